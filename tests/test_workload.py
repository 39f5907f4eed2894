"""Budgets in every spelling, and what a plan is for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.devices import VirtualDevice
from autosp.errors import BudgetError, ModelError, SettingError
from autosp.intercept import Intercepted
from autosp.workload import Workload, parse_budget

DEVICE = VirtualDevice(bytes_per_s=1.0)


@pytest.mark.parametrize(
    ("budget", "n_bytes"),
    [
        (8, 8_000_000_000),
        (8.0, 8_000_000_000),
        (0.5, 500_000_000),
        (1e-9, 1),
        (10**6, 10**15),
        ("8GB", 8_000_000_000),
        ("8 GB", 8_000_000_000),
        ("  7.5 gb ", 7_500_000_000),
        ("8GiB", 2**33),
        ("8 gib", 2**33),
        ("0.5GiB", 2**29),
        ("900MB", 900_000_000),
        ("900 MiB", 900 * 2**20),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("512B", 512),
        (".5GB", 500_000_000),
    ],
)
def test_budget(budget: float | str, n_bytes: int) -> None:
    parsed = parse_budget(budget)
    assert parsed == n_bytes
    assert type(parsed) is int


@pytest.mark.parametrize(
    "budget",
    [
        pytest.param(budget, id=repr(budget))
        for budget in [
            *(0, 0.0, -1, -0.5, 1e-10, math.nan, math.inf, -math.inf, True, False),
            *(None, [8], (8,), {"gb": 8}, b"8GB", Decimal(8), 8j),
            *(
                "",
                " ",
                "8",
                "8.5",
                "GB",
                "8 G",
                "8gigs",
                "8 GB please",
                "8,5GB",
                "1e3GB",
                "0GB",
                "0.0 GiB",
                "-8GB",
                "+8GB",
            ),
            *("nan", "nanGB", "inf GB", "infinity", "1.2.3GB", ".GB", "8 G B", "8GBGB", "0x8GB", "8PB", "8Gb/s", "½GB"),
        ]
    ],
)
def test_no_budget(budget: Any) -> None:
    with pytest.raises(BudgetError, match="max_gpu_gb"):
        parse_budget(budget)


@pytest.mark.parametrize("budget", [-8, "8 GBs", math.nan])
def test_error_says_what_was_given_and_what_to_give(budget: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        parse_budget(budget)
    assert repr(budget) in str(caught.value)
    assert "'8GiB'" in str(caught.value)


def test_more_digits_than_a_float_has() -> None:
    with pytest.raises(BudgetError):
        parse_budget("9" * 400 + "GB")


@pytest.mark.parametrize(
    "budget", [pytest.param("8iB", id="unit KeyError"), pytest.param(10**400, id="int OverflowError")]
)
def test_odd_budgets(budget: Any) -> None:
    with pytest.raises(BudgetError):
        parse_budget(budget)


def test_spellings_of_one_budget_agree() -> None:
    assert parse_budget(2.01) == parse_budget("2.01GB") == parse_budget("2010MB")


def test_batch_without_data() -> None:
    with pytest.raises(SettingError, match="sample_batch has tensors on the meta device"):
        Workload.of(Noisy(), {"x": [torch.zeros(3, device="meta")]}, None, "inference", DEVICE)


class Noisy(nn.Module):
    """Its output depends on the random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + torch.rand(3)


class Generates(nn.Sequential):
    """Its layers run when somebody asks for its outputs, if anybody does."""

    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:  # type: ignore[override]
        for layer in self:
            x = layer(x)
            yield x


def workload(step: Any = None, seed: int = 0) -> Workload:
    """Of a model whose output depends on the random generator."""
    return Workload.of(Noisy(), torch.zeros(3), step, "inference", DEVICE, seed)


@pytest.mark.parametrize(
    ("model", "step", "mode", "message"),
    [
        ("a model", None, "inference", "model is a str, not a torch.nn.Module"),
        (Noisy, None, "inference", "model is a type, not a torch.nn.Module"),
        (Noisy(), "generate", "inference", "step is a str; pass a function"),
        (Noisy(), None, "tuning", "mode='tuning': pass one of 'inference', 'training'"),
        (Noisy(), None, "training", "mode='training' needs step"),
        (Noisy(), None, "Inference", "mode='Inference'"),
    ],
)
def test_arguments_of_the_wrong_kind(model: Any, step: Any, mode: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Workload.of(model, torch.zeros(3), step, mode, DEVICE)


@pytest.mark.parametrize("seed", ["x", 1.5, None, -1, True, 2**70])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(SettingError, match=r"seed=.*: pass a whole number from 0"):
        Workload.of(Noisy(), torch.zeros(3), None, "inference", DEVICE, seed)


def test_training_under_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(SettingError, match=r"torch\.inference_mode\(\), where nothing gets"):
        Workload.of(Noisy(), torch.zeros(3), lambda model, batch: model(batch).sum(), "training", DEVICE)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(2, 3))])
def test_torch_jit_s_modules_are_refused_by_name(make: Any) -> None:
    """A part of a model or all of it: what runs inside is no Python, so that nothing can be loaded before it."""
    whole = make(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    for model, name in ((whole, "the model"), (nn.Sequential(nn.ReLU(), whole), "its module 1")):
        for mode, step in (("inference", None), ("training", lambda model, batch: model(batch).sum())):
            with pytest.raises(ModelError, match=f"{name} is a .* of torch.jit.* pass the module"):
                autosp.plan(model, torch.zeros(2, 3), k=1, k_prime=1, mode=mode, step=step, device="cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(3, affine=False)), "Sequential has no layer to stream: all of its 3 tensors"),
        (
            Generates(nn.Linear(3, 3), nn.Linear(3, 3)),
            "the pass called none of the 2 layers of Generates, 0 first: check that sample_batch and step",
        ),
    ],
)
def test_a_pass_without_layers_says_why(model: nn.Module, message: str) -> None:
    """Whatever is asked for."""
    batch = torch.zeros(2, 3)
    model = model.eval()
    for ask in (partial(autosp.tune, max_gpu_gb=1, progress=False), partial(autosp.plan, k=1, k_prime=1)):
        with pytest.raises((SettingError, ModelError), match=message):
            ask(model, batch, device="cpu")


def test_model_that_a_plan_is_applied_to() -> None:
    model = nn.Sequential(Noisy())
    applied = Intercepted(model[0], lambda forward, args, kwargs: forward(*args, **kwargs))
    with pytest.raises(SettingError, match="a plan is applied to this Sequential already: remove"):
        Workload.of(model, torch.zeros(3), None, "inference", DEVICE)
    applied.remove()
    assert Workload.of(model, torch.zeros(3), None, "inference", DEVICE).run().shape == (3,)


def test_run_calls_the_model_without_autograd() -> None:
    output = workload().run()
    assert output.shape == (3,)
    assert not output.requires_grad


def test_run_calls_the_step() -> None:
    seen: list[Any] = []
    made = workload(step=lambda model, batch: seen.append((model, batch, torch.is_grad_enabled())) or "done")
    assert made.run() == "done"
    assert seen[0][0] is made.model
    assert seen[0][1] is made.batch
    assert seen[0][2] is False


def test_what_the_step_raises_passes_through() -> None:
    def step(model: nn.Module, batch: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        workload(step).run()
    assert torch.is_grad_enabled()


def test_seeded_runs_are_alike_and_leave_the_generator_alone() -> None:
    made = workload()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = made.run_seeded()
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(made.run_seeded(), first)
    assert not torch.equal(workload(seed=1).run_seeded(), first)


def test_batch_moves_to_the_device() -> None:
    class Elsewhere:
        torch_device = torch.device("meta")

    batch = {"x": torch.zeros(3), "name": "kept"}
    moved = Workload.of(Noisy(), batch, None, "inference", Elsewhere()).batch  # type: ignore[arg-type]
    assert moved["x"].device.type == "meta"
    assert moved["name"] == "kept"
    assert batch["x"].device.type == "cpu"


def test_key() -> None:
    key = workload().key(DEVICE, 10**9)
    assert (key.model_name, key.batch_signature, key.step, key.mode) == ("Noisy", "float32[3]", "call", "inference")
    assert (key.device_fingerprint, key.budget_bytes) == (DEVICE.info.fingerprint, 10**9)
    assert key == workload(seed=7).key(DEVICE, 10**9)  # of equal models and batches, whatever the seed
    assert key != workload(step=lambda model, batch: model(batch)).key(DEVICE, 10**9)


@pytest.mark.parametrize("changed", ["model", "batch", "device", "budget"])
def test_key_changes_with_what_it_is_for(changed: str) -> None:
    model = nn.Linear(3, 2) if changed == "model" else nn.Linear(3, 3)
    batch = torch.zeros(2 if changed == "batch" else 1, 3)
    device = VirtualDevice(bytes_per_s=2.0) if changed == "device" else DEVICE
    other = Workload.of(model, batch, None, "inference", device).key(device, 2 if changed == "budget" else 1)
    base = Workload.of(nn.Linear(3, 3), torch.zeros(1, 3), None, "inference", DEVICE).key(DEVICE, 1)
    assert other.fingerprint != base.fingerprint
