"""What must hold of every model that is trained under autosp: plain training's gradients and weights, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import autosp
from autosp.batch import equal, map_tensors, tensors_in
from autosp.cost_model.placement import evenly_spread
from autosp.spec import Candidate, Plan
from zoo_checks import where
from zoo_inputs import Batch
from zoo_models import NotBuiltError, Specimen

STEPS = 3


@dataclass(frozen=True)
class Setting:
    """A plan, and whether updates run beside the next forward."""

    name: str
    candidate: Candidate
    overlap: bool = False


@dataclass(frozen=True)
class Outcome:
    """`STEPS` steps under one plan."""

    setting: str
    gradients_equal: bool
    weights_equal: bool
    misses: int
    loads: int


@dataclass(frozen=True)
class Finding:
    """One model type. `problems` are failures of autosp; `remarks` are the model's own ways."""

    model_type: str
    class_name: str
    optimizer: str
    weight_bytes: int
    layers: int
    backward_layers: int
    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """Some steps: what every parameter's gradient was in each, and what became of the model."""

    gradients: list[dict[str, torch.Tensor | None]]
    weights: Mapping[str, torch.Tensor]


def settings_for(plan: Plan) -> list[Setting]:
    """The plans to try on a model, from the one of a window of one layer."""
    visited = list(dict.fromkeys(plan.partition.visits))
    again = tuple(sorted(layer for together in plan.partition.recomputable for layer in together))
    count = len(visited)
    window = Candidate(k=1, k_prime=1)
    half = Candidate(k=max(2, count // 2), k_prime=max(1, count // 4)) if count > 1 else window
    kept = min(count, max(1, count // 3))
    residents = tuple(sorted(evenly_spread(visited, kept)))
    return [
        Setting("window of one", window),
        Setting("half, a quarter at a time", half),
        Setting("residents", Candidate(k=min(count, kept + 1), k_prime=1, residents=residents)),
        Setting("all recomputed", Candidate(k=min(2, count), k_prime=1, recompute=again)),
        Setting("updates beside", Candidate(k=min(2, count), k_prime=1), overlap=True),
    ]


def examine(specimen: Specimen, device: str = "cpu") -> Finding:
    """Train under every setting. What autosp raises is a problem, not an exception.

    Raises: NotBuiltError if there is nothing to train.
    """
    model = specimen.model.train()
    batch = map_tensors(lambda tensor: tensor.to(device), specimen.batch)
    optimizer = "Adam" if sum(map(ord, specimen.model_type)) % 2 else "SGD"  # as many of either
    expected, remarks = _expected(model, batch, optimizer, torch.device(device))
    problems: list[str] = []
    outcomes: list[Outcome] = []
    plan: Plan | None = None
    try:
        seed(0)
        plan = autosp.plan(model, batch, k=1, k_prime=1, mode="training", step=loss_step, device=device)
    except Exception as error:  # noqa: BLE001 - a failure of one model is a row of the table
        problems.append(f"plan: {where(error)}")
    for setting in settings_for(plan) if plan else ():
        assert plan is not None, "there are settings"
        try:
            outcome = try_plan(model, batch, plan, setting, optimizer, expected)
        except Exception as error:  # noqa: BLE001 - as above
            problems.append(f"{setting.name}: {where(error)}")
            continue
        outcomes.append(outcome)
        if not remarks:
            problems += [] if outcome.gradients_equal else [f"{setting.name}: gradients differ"]
            problems += [] if outcome.weights_equal else [f"{setting.name}: weights differ"]
    return Finding(
        model_type=specimen.model_type,
        class_name=type(model).__name__,
        optimizer=optimizer,
        weight_bytes=sum(one.numel() * one.element_size() for one in model.parameters()),
        layers=len(plan.partition.layers) if plan else 0,
        backward_layers=len(set(plan.partition.backward)) if plan else 0,
        outcomes=tuple(outcomes),
        problems=tuple(problems),
        remarks=tuple(remarks),
    )


def _expected(model: nn.Module, batch: Batch, optimizer: str, device: torch.device) -> tuple[Training, list[str]]:
    """Plain training on the device, and why its bits do not bind: it does not repeat itself."""
    try:
        expected, again = (trained(copy.deepcopy(model).to(device), batch, optimizer) for _ in range(2))
    except Exception as error:
        raise NotBuiltError(f"plain training: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    finite = (torch.isfinite(one).all() for step in expected.gradients for one in step.values() if one is not None)
    if not all(map(bool, finite)):
        raise NotBuiltError("plain training: a gradient is not finite")
    same = equal(expected.gradients, again.gradients) and equal(expected.weights, again.weights)
    return expected, [] if same else ["plain training does not repeat itself"]


def try_plan(
    model: nn.Module, batch: Batch, plan: Plan, setting: Setting, optimizer: str, expected: Training
) -> Outcome:
    """Train a copy under one plan."""
    copied = copy.deepcopy(model)
    steps = optimizer_of(copied, optimizer)
    chosen = plan.model_copy(update={"candidate": setting.candidate})
    streamed = autosp.apply(copied, chosen, optimizer=steps if setting.overlap else None)
    try:
        seen = trained(copied, batch, optimizer, steps)
        stats = streamed.stats()
    finally:
        streamed.remove()
    return Outcome(
        setting.name,
        equal(seen.gradients, expected.gradients),
        equal(seen.weights, expected.weights) and equal(dict(copied.state_dict()), expected.weights),
        stats.misses,
        stats.loads,
    )


def trained(model: nn.Module, batch: Batch, optimizer: str, steps: torch.optim.Optimizer | None = None) -> Training:
    """Train for `STEPS` steps, each seeded.

    Raises: NotBuiltError if the output gives no loss.
    """
    steps = steps or optimizer_of(model, optimizer)
    gradients = []
    for step in range(STEPS):
        seed(step)
        loss_step(model, batch).backward()
        gradients.append(
            {name: None if one.grad is None else one.grad.clone() for name, one in model.named_parameters()}
        )
        steps.step()
        steps.zero_grad()
    return Training(gradients, {name: value.clone() for name, value in model.state_dict().items()})


def loss_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """The mean square of every output."""
    outputs = [one for one in tensors_in(model(**batch)) if one.is_floating_point() and one.numel()]
    if not outputs or (torch.is_grad_enabled() and not any(one.requires_grad for one in outputs)):
        raise NotBuiltError("no output depends on a parameter")
    return torch.stack([one.float().square().mean() for one in outputs]).sum()


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """By its name."""
    return getattr(torch.optim, name)(model.parameters(), lr=1e-3)


def seed(step: int) -> None:
    """Of every generator that a model may use."""
    torch.manual_seed(step)
    np.random.seed(step)  # transformers draws masks from it
    random.seed(step)
