"""Plans for groups of microbatches: within their budget, with the bits of microbatches one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autosp
from autosp.batch import equal
from autosp.cost_model.floor import floor_s
from autosp.cost_model.predict import predict
from autosp.devices import VirtualDevice
from autosp.errors import BudgetTooSmallError, SettingError, StudyMismatchError
from autosp.runtime.bench import Bench
from autosp.search.headroom import acceptable_bytes
from autosp.search.space import least_bytes, rank
from autosp.spec import Outcome, Plan, Profile
from autosp.store import Repository
from autosp.workload import Workload
from builders import profile, profiles, quick
from models import vectors
from trained import assert_same_gradients, loss_step, twins

GROUP = 3


def stack(layers: int = 10) -> tuple[nn.Module, torch.Tensor]:
    """A megabyte a layer, and activations of a quarter of that."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(layers))
    return nn.Sequential(*blocks).eval(), vectors(128, 512)


def tune(model: nn.Module, batch: Any, budget: str, **options: Any) -> Plan:
    """Three trials are few for a budget that is nearly used up: passes of a process of many tests take more by turns."""
    options = {"device": "cpu", "progress": False, "max_trials": 3, "group": GROUP} | options
    return autosp.tune(model, batch, budget, **options)


def profiled(model: nn.Module, batch: Any, **options: Any) -> Profile:
    return autosp.profile(model, batch, **({"device": "cpu", "progress": False, "group": GROUP} | options))


def microbatches(batch: torch.Tensor, count: int = GROUP) -> list[torch.Tensor]:
    return [batch * (1 + number / 7) for number in range(count)]


def assert_within_budget(plan: Plan) -> None:
    assert plan.measurement is not None
    assert plan.measurement.outcome is Outcome.FITS
    assert plan.measurement.peak_bytes <= (plan.budget_bytes or 0)
    with Repository() as repository:
        found = repository.profile(plan.study_name or "")
    assert found is not None
    assert plan.measurement.peak_bytes <= acceptable_bytes(found, plan.budget_bytes or 0, GROUP)


def test_outputs_of_a_group_under_its_plan() -> None:
    model, batch = stack()
    budget_bytes = int(2 * least_bytes(profiled(model, batch), GROUP))
    plan = tune(model, batch, f"{budget_bytes}B", max_trials=None)
    assert_within_budget(plan)
    assert plan.candidate.group == GROUP
    with torch.no_grad():
        plain = [model(one) for one in microbatches(batch)]
    streamed = autosp.apply(model, plan)
    moved = []
    for count in (1, 1, GROUP):
        before = streamed.stats().moved_bytes
        with torch.no_grad():
            assert equal(streamed.run_group(microbatches(batch, count)), plain[:count])
        moved.append(streamed.stats().moved_bytes - before)
    assert equal(model(batch), plain[0])
    assert moved[1] == moved[2]
    assert plan.measurement is not None
    assert streamed.stats().peak_bytes <= budget_bytes
    streamed.remove()


def test_gradients_of_a_group_under_its_plan() -> None:
    model, batch = stack()
    training: dict[str, Any] = {"mode": "training", "step": loss_step}
    budget_bytes = int(2 * least_bytes(profiled(model.train(), batch, **training), GROUP))
    plan = tune(model, batch, f"{budget_bytes}B", max_trials=None, **training)
    assert_within_budget(plan)
    model, plain = twins(model)
    expected = []
    for one in microbatches(batch):
        expected.append(loss_step(plain, one))
        expected[-1].backward()
    streamed = autosp.apply(model, plan)
    for _ in range(2):
        with pytest.raises(
            SettingError, match=r"4 microbatches: .* computed for 3\. Make a plan with group=4, or run 2"
        ):
            streamed.backward_group(microbatches(batch, 4), loss_step)
        losses = streamed.backward_group(microbatches(batch), loss_step)
        assert equal(losses, [loss.detach() for loss in expected])
        assert_same_gradients(model, plain)
        model.zero_grad()
    assert streamed.stats().peak_bytes <= budget_bytes
    plain.zero_grad()
    loss_step(model, batch).backward()
    loss_step(plain, batch).backward()
    assert_same_gradients(model, plain)
    streamed.remove()


def test_another_group_is_another_study_of_the_same_profile() -> None:
    model, batch = stack()
    budget = "0.1GB"
    grouped = tune(model, batch, budget, max_trials=1)
    alone = tune(model, batch, budget, max_trials=1, group=1)
    assert grouped.study_name != alone.study_name
    assert tune(model, batch, budget, max_trials=1) == grouped
    with Repository() as repository:
        found, other = (repository.profile(plan.study_name or "") for plan in (grouped, alone))
        keys = [repository.study_key(plan.study_name or "") for plan in (grouped, alone)]
    assert found == other
    assert [key.group for key in keys] == [GROUP, 1]
    with pytest.raises(StudyMismatchError, match="group"):
        tune(model, batch, budget, study_name=grouped.study_name, group=2)
    with pytest.raises(StudyMismatchError, match="batch_signature"):
        autosp.resume(grouped.study_name or "", model, batch[:64], device="cpu", max_trials=2, progress=False)
    again = autosp.resume(grouped.study_name or "", model, batch, device="cpu", max_trials=2, progress=False)
    assert again.candidate.group == GROUP


def test_a_profile_of_one_microbatch_is_not_enough_for_a_group() -> None:
    model, batch = stack(4)
    alone = tune(model, batch, "1GB", group=1, max_trials=1)
    grouped = tune(model, batch, "1GB", max_trials=1, isolate=True)
    with Repository() as repository:
        before, found = (repository.profile(plan.study_name or "") for plan in (alone, grouped))
    assert before is not None and before.waiting_bytes is None
    assert found is not None and found.waiting_bytes is not None
    with pytest.raises(SettingError, match="make it with group=2"):
        autosp.estimate(before, 1, group=2)
    assert autosp.floor(found, 1, group=4) >= 4 * autosp.floor(found, 1)


def test_more_microbatches_than_were_counted_are_refused() -> None:
    model, batch = stack(4)
    plan = tune(model, batch, "1GB", group=1, max_trials=1)
    with torch.no_grad():
        plain = [model(one) for one in microbatches(batch)]
    streamed = autosp.apply(model, plan)
    with pytest.raises(SettingError, match="group of 3 microbatches: the plan's memory was computed for 1"):
        streamed.run_group(microbatches(batch))
    assert equal(streamed.run_group(microbatches(batch, 1)), plain[:1])
    streamed.remove()
    by_hand = autosp.plan(model, batch, k=2, k_prime=1, device="cpu", group=2)
    streamed = autosp.apply(model, by_hand)
    assert equal(streamed.run_group(microbatches(batch, 2)), plain[:2])
    with pytest.raises(SettingError, match="computed for 2"):
        streamed.run_group(microbatches(batch))
    streamed.remove()


@pytest.mark.parametrize("group", [0, -1, 1.5, True])
def test_groups_that_are_none(group: Any) -> None:
    model, batch = stack(2)
    with pytest.raises(SettingError, match="how many microbatches share a pass"):
        tune(model, batch, "1GB", group=group)


def test_a_budget_too_small_for_the_group_says_so() -> None:
    model, batch = stack(4)
    measured = profiled(model, batch)
    assert measured.waiting_bytes is not None
    known = measured.model_copy(update={"waiting_bytes": measured.waiting_bytes + 10**6})
    for group in (2, 16):
        least = least_bytes(known, group)
        assert rank(known, least + 10**5, group=group)
        with pytest.raises(BudgetTooSmallError, match=f"of {group} microbatches") as caught:
            rank(known, least_bytes(known, group - 1), group=group)
        assert caught.value.least_bytes == least


def test_bytes_of_a_group_are_those_of_one_microbatch() -> None:
    measured = profile((100,) * 4, forward_s=0.1, bytes_per_s=10.0).model_copy(update={"waiting_bytes": 5})
    found = {group: rank(measured, 300 + 5 * (group - 1), group=group)[0] for group in (1, 2, 16)}
    assert {one.moved_bytes for one in found.values()} == {found[1].moved_bytes}
    assert all(one.candidate.group == group for group, one in found.items())
    assert found[16].latency_s < 16 * found[1].latency_s / 5, "transfers bound the pass"


@quick
@given(measured=profiles(contention=True), group=st.integers(2, 16))
def test_no_group_beats_its_floor_and_none_moves_more(measured: Profile, group: int) -> None:
    measured = measured.model_copy(update={"waiting_bytes": 3})
    budget = measured.partition.total_bytes + measured.workspace_of(group)
    for grouped in rank(measured, budget, group=group):
        (alone,) = predict(measured, [grouped.candidate.model_copy(update={"group": 1})])
        assert grouped.moved_bytes == alone.moved_bytes
        assert grouped.peak_bytes == alone.peak_bytes + 3 * (group - 1)
        assert alone.latency_s <= grouped.latency_s * (1 + 1e-9)
        assert grouped.latency_s <= group * alone.latency_s * (1 + 1e-9)
        assert floor_s(measured, budget, group=group) <= grouped.latency_s * (1 + 1e-9)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_passes_of_a_group_stand_for_its_microbatches_one_after_another(mode: str, tmp_path: Path) -> None:
    """Random numbers too: what a study compares a plan's group with."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)) for _ in range(4))).train()
    batch, device = vectors(), VirtualDevice(bytes_per_s=1e6)
    step = loss_step if mode == "training" else None
    workload = Workload.of(model, batch, step, mode, device, group=GROUP)
    plain = workload.run_seeded()
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode=mode, step=step, device=device, group=GROUP)
    with Bench(model, plan.partition, device, tmp_path, mode=plan.mode) as bench:
        streamed = bench.apply(plan.candidate)
        assert equal(workload.run_seeded(streamed), plain)
        streamed.remove()
    outputs = plain[0] if mode == "training" else plain
    assert len({float(one.sum()) for one in outputs}) == GROUP
