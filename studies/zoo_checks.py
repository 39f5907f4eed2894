"""What must hold of every model under autosp: the same bits under every plan, and the model as it was afterwards."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import autosp
from autosp.batch import equal, map_tensors, tensors_in
from autosp.intercept import is_intercepted
from autosp.partition.tensors import EXTENT_ALIGNMENT, LAYER_ALIGNMENT, collect
from autosp.spec import Partition
from zoo_inputs import Batch
from zoo_models import NotBuiltError, Specimen

CPU = torch.device("cpu")
SEED = 0
PASSES = 2


@dataclass(frozen=True)
class Setting:
    """The numbers of one plan."""

    name: str
    k: int
    k_prime: int
    residents: int


@dataclass(frozen=True)
class Outcome:
    """Some passes under one plan."""

    setting: Setting
    equal: bool
    misses: int
    loads: int
    visits: int


@dataclass(frozen=True)
class Finding:
    """One model type. `problems` are failures of autosp; `remarks` are the model's own ways."""

    model_type: str
    class_name: str
    inputs: tuple[str, ...]
    weight_bytes: int
    layers: int
    visited_layers: int
    outcomes: tuple[Outcome, ...]
    other_batch: str
    """Under the first plan, a batch of another size: equal, differs, or why there is none."""
    other_misses: int
    """In the pass over it, whose layers may run in another order than the profiled one's."""
    restored: bool
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether autosp did all it promises."""
        return not self.problems

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def settings_for(layers: int) -> list[Setting]:
    """The plans to try on a model of which a pass visits `layers` layers."""
    chosen = [Setting("window of one", 1, 1, 0)]
    if layers >= 3:
        residents = 1 if layers < 6 else 2
        chosen.append(Setting("residents", residents + 2 if layers > residents + 2 else residents + 1, 1, residents))
    elif layers == 2:
        chosen.append(Setting("residents", 2, 1, 1))
    if layers >= 5:
        chosen.append(Setting("two at a time", 4, 2, 0))
    chosen.append(Setting("all resident", layers, 1, layers))
    return chosen


def examine(specimen: Specimen, device: str = "cpu") -> Finding:
    """Try every setting on one model. What autosp raises is a problem, not an exception.

    Raises: NotBuiltError if the plain model does not run on the device.
    """
    examination = _Examination(specimen, torch.device(device))
    examination.run()
    return examination.finding()


class _Examination:
    """One model, its reference output, and what was found so far."""

    def __init__(self, specimen: Specimen, device: torch.device) -> None:
        self._specimen = specimen
        self._device = device
        before = _Snapshot(specimen.model)
        try:
            self._reference = run_plainly(specimen.model, specimen.batch, device)
        except Exception as error:
            raise NotBuiltError(f"plain pass on {device}: {' '.join(str(error).split())[:160]}") from error
        self._deterministic = equal(run_plainly(specimen.model, specimen.batch, device), self._reference)
        if device.type != "cpu":
            run(specimen.model, specimen.batch)
        self._changes_itself = bool(before.differences(specimen.model))
        self._remarks = remarks_on(self._reference)
        if not self._deterministic:
            self._remarks.append("not deterministic by itself")
        if self._changes_itself:
            self._remarks.append("changes its own tensors in a pass")
        self._before = _Snapshot(specimen.model)
        self._problems: list[str] = []
        self._outcomes: list[Outcome] = []
        self._partition: Partition | None = None
        self._other_batch = "one size only"
        self._other_misses = 0

    def run(self) -> None:
        """Every setting, and the plain model again."""
        self._attempt("plan", self._learn)
        if self._partition is None:
            return
        self._problems += partition_problems(self._specimen.model, self._partition)
        for setting in settings_for(len(set(self._partition.visits))):
            self._attempt(setting.name, partial(self._try, setting))
            left = [] if self._changes_itself else self._before.differences(self._specimen.model)
            self._problems += [f"{setting.name}: after remove(), {difference}" for difference in left]
        self._attempt("after the last remove()", self._run_plainly)

    def finding(self) -> Finding:
        """What was found."""
        parts = self._partition
        first = self._outcomes[0] if self._outcomes else None
        if first and first.misses:
            self._remarks.append(f"{first.misses} misses in {first.visits} visits under a {first.setting.name}")
        return Finding(
            model_type=self._specimen.model_type,
            class_name=type(self._specimen.model).__name__,
            inputs=tuple(self._specimen.batch),
            weight_bytes=collect(self._specimen.model).total_bytes,
            layers=len(parts.layers) if parts else 0,
            visited_layers=len(set(parts.visits)) if parts else 0,
            outcomes=tuple(self._outcomes),
            other_batch=self._other_batch,
            other_misses=self._other_misses,
            restored=not self._before.differences(self._specimen.model),
            problems=tuple(self._problems),
            remarks=tuple(self._remarks),
        )

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a failure of one model is a row of the table
            self._problems.append(f"{what}: {where(error)}")

    def _learn(self) -> None:
        plan = autosp.plan(self._specimen.model, self._specimen.batch, k=1, k_prime=1, device=self._device)
        self._partition = plan.partition

    def _try(self, setting: Setting) -> None:
        with_other = not self._outcomes and self._specimen.other is not None
        outcome, other = try_plan(self._specimen, setting, self._reference, self._device, with_other=with_other)
        self._outcomes.append(outcome)
        if self._deterministic and not outcome.equal:
            self._problems.append(f"{setting.name}: output differs")
        if other is not None:
            self._other_batch = "equal" if other.equal else "differs"
            self._other_misses = other.misses
            if self._deterministic and not other.equal:
                self._problems.append(f"{setting.name}: output differs on a batch of another size")

    def _run_plainly(self) -> None:
        output = run_plainly(self._specimen.model, self._specimen.batch, self._device)
        if not equal(output, self._reference) and self._deterministic:
            self._problems.append("after the last remove(): output differs")


def run(model: nn.Module, batch: Batch) -> Any:
    """One seeded pass."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        return model(**batch)


def run_plainly(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """One seeded pass without a plan: on an accelerator, of a copy that is there with all its weights."""
    if device.type == "cpu":
        return run(model, batch)
    return run(copy.deepcopy(model).to(device), map_tensors(lambda tensor: tensor.to(device), batch))


def try_plan(
    specimen: Specimen, setting: Setting, reference: Any, device: torch.device = CPU, *, with_other: bool = False
) -> tuple[Outcome, Outcome | None]:
    """`PASSES` passes under a plan; if asked, then one over the batch of another size."""
    model = specimen.model
    k, k_prime, residents = setting.k, setting.k_prime, setting.residents
    plan = autosp.plan(model, specimen.batch, k=k, k_prime=k_prime, residents=residents, device=device)
    other_reference = None
    if with_other and specimen.other is not None:
        other_reference = run_plainly(model, specimen.other, device)
    other = None
    streamed = autosp.apply(model, plan)
    try:
        same = outputs_equal(model, specimen.batch, reference)
        stats = streamed.stats()
        outcome = Outcome(setting, same, stats.misses, stats.loads, stats.visits)
        if with_other and specimen.other is not None:
            same = equal(run(model, specimen.other), other_reference)
            after = streamed.stats()
            counts = (after.misses - stats.misses, after.loads - stats.loads, after.visits - stats.visits)
            other = Outcome(setting, same, *counts)
    finally:
        streamed.remove()
    return outcome, other


def outputs_equal(model: nn.Module, batch: Batch, reference: Any) -> bool:
    """Whether each of `PASSES` passes gives the reference; all of them run."""
    outputs = [run(model, batch) for _ in range(PASSES)]
    return all(equal(output, reference) for output in outputs)


def partition_problems(model: nn.Module, parts: Partition) -> list[str]:
    """Every tensor in one place, every byte counted once."""
    problems = []
    extents = collect(model).extents
    lookups = parts.lookups
    layers = [*parts.layers, lookups] if lookups else list(parts.layers)
    names = [name for layer in layers if not layer.rows or layer.rows[0] == 0 for name in layer.tensors]
    names += parts.resident_tensors
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        problems.append(f"partition: {twice} is in two places")
    missing = {item.name for extent in extents for item in extent.tensors} - set(names)
    if missing:
        problems.append(f"partition: {sorted(missing)[0]} is nowhere")
    exact = sum(extent.n_bytes for extent in extents)
    slack = len(extents) * EXTENT_ALIGNMENT + (len(layers) + 1) * LAYER_ALIGNMENT
    if not exact <= parts.total_bytes <= exact + slack:
        problems.append(f"partition: {parts.total_bytes} bytes, the model has {exact}")
    return problems


class _Snapshot:
    """The bytes and identities of a model's tensors at one time."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in _named(model)}

    def differences(self, model: nn.Module) -> list[str]:
        """What is no longer as it was: at most one line."""
        if is_intercepted(model):
            return ["a forward is still wrapped"]
        now = dict(_named(model))
        if now.keys() != self._tensors.keys():
            return ["other tensors than before"]
        for name, (tensor, value) in self._tensors.items():
            if isinstance(tensor, nn.Parameter) and now[name] is not tensor:
                return [f"{name} is another Parameter"]
            if not equal(now[name].detach(), value):
                return [f"{name} has other bytes"]
        return []


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def remarks_on(reference: Any) -> list[str]:
    """Whether an output can tell right from wrong."""
    floats = [tensor for tensor in tensors_in(reference) if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return ["output has no floating-point tensor"]
    finite = all(bool(torch.isfinite(tensor).any()) for tensor in floats)
    return [] if finite else ["an output has no finite value"]


def where(error: Exception) -> str:
    """What was raised, and the line of autosp that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if "autosp" in frame.filename), frames[-1])
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({place.filename.rpartition('autosp/')[2]}:{place.lineno} {place.name})"
