"""Tuning of training: plans within their budget, gradients those of plain training, studies as for inference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.utils.checkpoint import checkpoint

import autosp
import trained
from autosp.batch import equal
from autosp.devices import CpuDevice, VirtualDevice
from autosp.errors import BudgetTooSmallError, HostMemoryError, SettingError, StudyMismatchError
from autosp.intercept import is_intercepted
from autosp.profiler.training import training_partition
from autosp.runtime.bench import Bench
from autosp.search.headroom import budget_for
from autosp.search.validate import Reference, validate
from autosp.spec import Candidate, Outcome, Plan, Tier
from autosp.store import Repository
from autosp.workload import Workload
from models import make, vectors
from trained import assert_same_gradients, assert_same_weights


def loss_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


class Wide(nn.Module):
    """A block whose activations are far larger than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 256) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([x @ self.weight] * 4, dim=-1)
        return x + torch.tanh(wide).unflatten(-1, (4, -1)).sum(-2)


def wide(blocks: int = 8, rows: int = 512) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Wide() for _ in range(blocks))).train(), vectors(rows, 256)


def heavy(layers: int = 12) -> tuple[nn.Module, torch.Tensor]:
    """2 MB of weights a layer, few activations."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(704, 704) for _ in range(layers))).train(), vectors(8, 704)


def tune(model: nn.Module, batch: Any, budget: str, **options: Any) -> Plan:
    options = {"mode": "training", "step": loss_step, "device": "cpu", "progress": False, "max_trials": 3} | options
    return autosp.tune(model, batch, budget, **options)


def plain_peak(model: nn.Module, batch: Any) -> int:
    """What training takes with everything resident and kept, as the device measures it."""
    count = len(autosp.plan(model, batch, k=1, k_prime=1, device="cpu").partition.visits)
    setting: dict[str, Any] = {"k": count, "k_prime": 1, "residents": count}
    plan = autosp.plan(model, batch, mode="training", step=loss_step, device="cpu", **setting)
    streamed = autosp.apply(model, plan)
    for _ in range(3):
        model.zero_grad()
        loss_step(model, batch).backward()
    peak_bytes = streamed.stats().peak_bytes
    streamed.remove()
    model.zero_grad()
    return peak_bytes


@pytest.mark.parametrize(("make_model", "share"), [(heavy, 0.8), (wide, 4)])
def test_a_plan_keeps_its_budget_and_trains_as_plain_torch_does(make_model: Any, share: float) -> None:
    model, batch = make_model()
    budget_bytes = int(share * plain_peak(model, batch))
    twin = copy.deepcopy(model)
    plan = tune(model, batch, f"{budget_bytes}B", max_trials=None)
    assert_same_weights(model, twin)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert plan.mode == "training"
    assert plan.measurement is not None and plan.measurement.outcome is Outcome.FITS
    assert plan.measurement.peak_bytes <= budget_bytes
    assert plan.measurement.misses == 0
    with autosp.apply(model, plan):
        for one in (model, twin):
            optimizer = torch.optim.Adam(one.parameters(), lr=1e-3)
            for _ in range(3):
                loss_step(one, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            loss_step(one, batch).backward()
        assert_same_gradients(model, twin)
    assert_same_weights(model, twin)


@pytest.fixture(scope="module")
def profiled() -> autosp.Profile:
    model, batch = wide()
    return autosp.profile(model, batch, mode="training", step=loss_step, device="cpu", progress=False)


def test_a_profile_knows_both_directions(profiled: autosp.Profile) -> None:
    assert [visit.layer for visit in profiled.backward] == list(profiled.partition.backward)
    assert profiled.return_link is not None and profiled.return_link.bytes_per_s > 0
    assert (profiled.return_link.source, profiled.return_link.target) == (Tier.DEVICE, Tier.HOST)
    assert all(visit.forward_s > 0 for visit in profiled.visits)
    assert all(visit.backward_s > 0 and visit.recompute_s > 0 for visit in profiled.backward)
    # Of inputs of 0.5 MB a tanh of four times as much is kept; what one block gives is the next one's input.
    row_bytes = 4 * 512 * 256
    assert all(4 * row_bytes <= visit.kept_bytes <= 6 * row_bytes for visit in profiled.visits)
    # The first has the batch's, the last has what the loss saves, too.
    assert [visit.input_bytes for visit in profiled.visits] == [0] + [row_bytes] * 6 + [2 * row_bytes]
    assert profiled.observed.prediction.candidate.recompute == tuple(range(1, 8))  # the first one's needs no weights


def test_less_memory_computes_more_again(profiled: autosp.Profile) -> None:
    """Were it not for the heap, whose noise is more than the activations of a small model."""
    bare = profiled.model_copy(update={"workspace_bytes": 0})
    ample = autosp.estimate(bare, "1GB")
    least = min(one.peak_bytes for one in ample)
    tight = autosp.estimate(bare, f"{budget_for(bare, int(1.24 * least))}B")
    assert len(ample[0].candidate.recompute) == 0
    assert min(len(one.candidate.recompute) for one in tight) > 0
    assert ample[0].latency_s < tight[0].latency_s


def test_a_second_call_answers_from_the_database() -> None:
    model, batch = heavy(4)
    first = tune(model, batch, "1GB", max_trials=1)
    assert tune(model, batch, "1GB", max_trials=1) == first
    with Repository(None) as repository:
        assert repository.plan(first.study_name or "") == first
    before = copy.deepcopy(model.state_dict())
    again = autosp.resume(first.study_name or "", model, batch, step=loss_step, device="cpu", progress=False)
    assert again == first
    more = autosp.resume(
        first.study_name or "", model, batch, step=loss_step, device="cpu", max_trials=2, progress=False
    )
    assert more.mode == "training"
    assert equal(dict(model.state_dict()), dict(before))


def test_a_front_and_a_batch_size() -> None:
    """What searches over budgets and batches, too, does so in training."""
    options: dict[str, Any] = {"mode": "training", "step": loss_step, "device": "cpu", "progress": False}
    model, batch = wide(blocks=4)
    front = autosp.pareto(model, batch, "1GB", points=2, max_trials=1, **options)
    assert {plan.mode for plan in front.plans} == {"training"}
    assert any(prediction.candidate.recompute for prediction in front.predicted)
    found = autosp.tune_batch(
        model, lambda count: vectors(count, 256), "1GB", batch_sizes=[2, 64], max_trials=1, **options
    )
    assert found.plan.mode == "training"
    assert found.best.batch_size == 64
    assert all(parameter.grad is None for parameter in model.parameters())


class GradOnly(nn.Module):
    """One of its layers takes part in passes with autograd only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
        self.extra = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return x + self.extra(x) if torch.is_grad_enabled() else x


def test_a_layer_that_only_passes_with_autograd_visit() -> None:
    torch.manual_seed(0)
    model, batch = GradOnly().train(), vectors(8, 256)
    twin = copy.deepcopy(model)
    plan = tune(model, batch, "1GB", max_trials=2)
    assert plan.partition.visits == (0, 1, 2, 3)
    assert plan.measurement is not None and plan.measurement.misses == 0
    with autosp.apply(model, plan):
        for one in (model, twin):
            loss_step(one, batch).backward()
        assert_same_gradients(model, twin)


class Nested(nn.Module):
    """A checkpoint inside a checkpoint: the inner one runs forward, without autograd, in the outer one's backward."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x * torch.ones((), requires_grad=True), use_reentrant=True)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, self.outer(x), use_reentrant=True)


def test_a_forward_in_the_backward_is_no_visit() -> None:
    model = Nested().train()
    plan = autosp.plan(model, vectors(), k=1, k_prime=1, mode="training", step=loss_step, device="cpu")
    assert plan.partition.visits == (0, 1)


def test_what_is_frozen_later_is_another_question() -> None:
    """A plan without the gradients of some layers says nothing of the memory that these take."""
    model, batch = heavy(4)
    model[1].requires_grad_(False)
    frozen = tune(model, batch, "1GB", max_trials=1)
    model[1].requires_grad_(True)
    all_of_it = tune(model, batch, "1GB", max_trials=1)
    assert all_of_it.study_name != frozen.study_name
    gradients = [[layer.gradient_bytes for layer in plan.partition.layers] for plan in (frozen, all_of_it)]
    assert gradients[0][1] == 0 < gradients[1][1]
    with pytest.raises(StudyMismatchError, match="trained: 6 parameters.* there, 8 parameters.* here"):
        autosp.resume(frozen.study_name or "", model, batch, step=loss_step, device="cpu", progress=False)


def test_what_was_there_is_there_again() -> None:
    model, batch = make("convolutions")
    model.train()
    loss_step(model, batch).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    tune(model, batch, "1GB", max_trials=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(one.grad is before for one, before in zip(model.parameters(), gradients, strict=True))
    assert all(equal(one, value) for one, value in zip(gradients, values, strict=True))
    assert equal(dict(model.named_buffers()), buffers)


def test_a_budget_that_nothing_fits() -> None:
    model, batch = heavy(4)
    with pytest.raises(BudgetTooSmallError, match="the least that works is") as raised:
        tune(model, batch, "1MB")
    assert raised.value.least_bytes is not None
    tune(model, batch, f"{int(1.5 * raised.value.least_bytes)}B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": None}, "needs step"),
        ({"step": lambda model, batch: model(batch)}, "a tensor of shape"),
        ({"step": trained.backward_step}, "calls backward\\(\\) itself"),
        ({"max_cpu_gb": 1}, "give it to autosp.apply"),
        ({"device": CpuDevice()}, "rest on disk, and training updates them"),
    ],
)
def test_what_cannot_be_tuned(changes: dict[str, Any], message: str) -> None:
    model, batch = make("stack")
    with pytest.raises(SettingError, match=message):
        tune(model, batch, "1GB", **changes)


def test_isolated_trials() -> None:
    model, batch = heavy(3)
    plan = tune(model, batch, "1GB", max_trials=1, isolate=True, step=trained.loss_step)
    assert plan.measurement is not None and plan.measurement.outcome is Outcome.FITS


def test_a_pass_that_raises_while_its_activations_are_counted_leaves_no_hooks() -> None:
    """Each pass of the profile raises in its turn, inside a layer; among them the one that autograd is watched in."""

    class Raises(nn.Linear):
        calls = 0
        left = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Raises.calls += 1
            if Raises.calls == Raises.left:
                raise ValueError("out of luck")
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(Raises(16, 16), nn.Tanh()), nn.Linear(16, 16)).train()
    batch = vectors(4, 16)
    for Raises.left in range(1, 7):
        Raises.calls = 0
        with pytest.raises(ValueError, match="out of luck"):
            autosp.profile(model, batch, mode="training", step=loss_step, device="cpu", progress=False)
        assert _top_saved_tensors_default_hooks(True) is None
    loss_step(model, batch).backward()


def test_other_gradients_are_found(tmp_path: Any) -> None:
    """A trial is compared in its loss and in every gradient."""
    model, batch = heavy(3)
    device = CpuDevice(slow_tier=Tier.HOST)
    workload = Workload.of(model, batch, loss_step, "training", device)
    parts = training_partition(workload, device, tmp_path)
    with Bench(model, parts, device, tmp_path, mode="training") as bench:
        reference = Reference.of_training(bench, workload)
        candidate = Candidate(k=2, k_prime=1)
        assert validate(bench, workload, reference, 10**9, candidate).outcome is Outcome.FITS
        model[1].weight.register_hook(lambda gradient: gradient * 1.001 if is_intercepted(model) else gradient)
        assert validate(bench, workload, reference, 10**9, candidate).outcome is Outcome.OUTPUT_DIFFERS
    device.close()


class Apart(VirtualDevice):
    """Its memory is not the host's."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        return False


def test_a_trial_leaves_room_for_the_optimizers_state_of_residents(tmp_path: Any) -> None:
    """On a device of its own; on a CPU all state is in host memory, whatever is resident."""
    model, batch = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 64), nn.Linear(64, 64)), vectors(4, 256)
    model[1].requires_grad_(False)
    weights = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    everything = Candidate(k=3, k_prime=1, residents=(0, 1, 2))
    for device in (Apart(bytes_per_s=1e9), CpuDevice(slow_tier=Tier.HOST)):
        workload = Workload.of(model, batch, loss_step, "training", device)
        parts = training_partition(workload, device, tmp_path)
        with Bench(model, parts, device, tmp_path, mode="training") as bench:
            assert bench.state_bytes(everything) == (0 if device.is_host else 2 * weights)
            assert bench.state_bytes(Candidate(k=1, k_prime=1)) == 0
            reference = Reference.of_training(bench, workload)
            found = validate(bench, workload, reference, 2 * weights - 1, everything)
        if not device.is_host:
            assert (found.outcome, found.peak_bytes >= 2 * weights) == (Outcome.OVER_BUDGET, True)
        device.close()


def test_what_offloads_is_validated_and_a_full_host_is_an_outcome(tmp_path: Any) -> None:
    model, batch = wide(4, 64)
    device = Apart(bytes_per_s=1e9)
    workload = Workload.of(model, batch, loss_step, "training", device)
    parts = training_partition(workload, device, tmp_path)
    assert min(parts.activation_bytes) > 0

    def full(*_: Any) -> None:
        if is_intercepted(model):
            raise HostMemoryError("no room")

    with Bench(model, parts, device, tmp_path, mode="training") as bench:
        reference = Reference.of_training(bench, workload)
        candidate = Candidate(k=2, k_prime=1, offload=tuple(sorted(parts.backward)))
        assert validate(bench, workload, reference, 10**9, candidate).outcome is Outcome.FITS
        model[1].register_forward_hook(full)
        assert validate(bench, workload, reference, 10**9, candidate).outcome is Outcome.HOST_OUT_OF_MEMORY
