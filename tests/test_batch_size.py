"""The batch size with the most samples per second."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch_size import MOST_TUNED, _is_enough, _sizes, _tuned
from autosp.devices import CpuDevice
from autosp.errors import BudgetTooSmallError, SettingError
from autosp.spec import Candidate, Plan, Tier
from autosp.store import Repository
from builders import plan, prediction, profile, trial
from models import EarlyExit

WIDTH = 128


class Counted(EarlyExit):
    """Counts its passes."""

    passes = 0

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        Counted.passes += 1
        return super().forward(x, order)


def make_batch(size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, size * WIDTH).reshape(size, WIDTH)


def counted() -> nn.Module:
    torch.manual_seed(0)
    return Counted(blocks=4, width=WIDTH).eval()


def test_the_best_of_the_sizes_is_the_answer_and_stays_it() -> None:
    model = counted()
    options: dict[str, Any] = {"batch_sizes": [16, 1], "max_trials": 1, "device": "cpu", "progress": False}
    found = autosp.tune_batch(model, make_batch, 0.01, **options)
    assert [one.batch_size for one in found.sizes] == [1, 16]
    assert found.best.batch_size == 16  # sixteen times the samples for the same weights
    assert found.best in found.sizes
    assert found.plan.batch_signature == f"float32[16,{WIDTH}]"
    assert found.plan.measurement is not None
    assert found.best.samples_per_s == 16 / found.plan.measurement.latency_s
    with Repository() as repository:
        assert len(repository.summaries()) == 2  # a size that is not tuned keeps its profile
        assert all(repository.profile(summary.name) for summary in repository.summaries())
    Counted.passes = 0
    assert autosp.tune_batch(model, make_batch, 0.01, **options) == found
    assert Counted.passes == 0
    assert autosp.BatchSizes.model_validate_json(found.model_dump_json()) == found


def test_a_profile_without_the_disk_is_none_where_the_host_has_no_room() -> None:
    model, device = counted(), CpuDevice(slow_tier=Tier.HOST)
    options: dict[str, Any] = {"batch_sizes": [4], "max_trials": 1, "device": device, "progress": False}
    plain = autosp.tune_batch(model, make_batch, 0.01, **options)
    tight = autosp.tune_batch(model, make_batch, 0.01, max_cpu_gb="300KB", **options)
    assert (plain.plan.host_budget_bytes, tight.plan.host_budget_bytes) == (None, 300_000)
    with Repository() as repository:
        profiles = [repository.profile(found.plan.study_name or "") for found in (plain, tight)]
    assert [known is not None and known.disk_link is not None for known in profiles] == [False, True]
    Counted.passes = 0
    assert autosp.tune_batch(model, make_batch, 0.01, **options) == plain, "the newest knows the disk: it is another's"
    assert autosp.tune_batch(model, make_batch, 0.01, max_cpu_gb="300KB", **options) == tight
    assert Counted.passes == 0
    device.close()


def test_the_smallest_size_must_fit() -> None:
    with pytest.raises(BudgetTooSmallError):
        autosp.tune_batch(counted(), make_batch, 1e-4, device="cpu", progress=False)
    assert autosp.list_studies() == [] or not any(summary.finished for summary in autosp.list_studies())


def test_sizes_double_or_are_those_given() -> None:
    doubled = _sizes(None)
    assert [next(doubled) for _ in range(4)] == [1, 2, 4, 8]
    assert list(_sizes([8, 2, 8])) == [2, 8]


@pytest.mark.parametrize("sizes", [[], [0], [1.5], [True]])
def test_sizes_that_are_none(sizes: Any) -> None:
    with pytest.raises(SettingError, match="batch_sizes="):
        autosp.tune_batch(counted(), make_batch, 0.01, batch_sizes=sizes, device="cpu", progress=False)


def throughput(batch_size: int, per_s: float) -> autosp.Throughput:
    return autosp.Throughput(batch_size=batch_size, predicted_samples_per_s=per_s)


@pytest.mark.parametrize(
    ("per_s", "budget", "enough"),
    [((10.0, 19.0), 170, False), ((10.0, 19.0), 169, True), ((10.0, 10.4), 1000, True)],
    ids=["grows and fits", "will not fit", "no longer grows"],
)
def test_when_to_stop_doubling(per_s: tuple[float, float], budget: int, enough: bool) -> None:
    # The largest layer has 100 B; activations 10 B for 1 sample, 30 B for 2: of 4 samples they would have 70 B.
    known = [(1, profile((100, 100), workspace_bytes=10)), (2, profile((100, 100), workspace_bytes=30))]
    predicted = [(throughput(1, per_s[0]), None), (throughput(2, per_s[1]), None)]
    assert _is_enough(known, predicted, 4, budget) == enough
    assert not _is_enough(known[:1], predicted[:1], 2, 1)


def answering(latencies: dict[int, float], tuned: list[int]) -> Any:
    """Tunes a batch, here its size alone, to a plan of that latency; a size without one does not fit."""

    def tune_for(size: int) -> Plan:
        tuned.append(size)
        if size not in latencies:
            raise BudgetTooSmallError("no", budget_bytes=1, least_bytes=2, layer="blocks.0")
        took = trial(prediction(Candidate(k=1, k_prime=1)), latency_s=latencies[size])
        return plan(took, profile((100, 100)), budget_bytes=200)

    return tune_for


def test_sizes_that_cannot_win_are_not_tuned() -> None:
    predicted = [(throughput(size, per_s), size) for size, per_s in ((1, 50.0), (2, 95.0), (4, 100.0), (8, 60.0))]
    tuned: list[int] = []
    found = _tuned(predicted, answering({4: 0.04, 2: 0.019}, tuned))
    assert tuned == [4, 2]  # 95 may turn out as 104.5, which beats 100; 60 and 50 cannot
    assert [one.samples_per_s for one in found] == [None, pytest.approx(2 / 0.019), pytest.approx(100), None]


def test_a_size_that_needs_more_than_was_predicted_is_left_out() -> None:
    predicted = [(throughput(size, float(size)), size) for size in (1, 2, 4, 8, 16)]
    tuned: list[int] = []
    found = _tuned(predicted, answering({4: 1.0}, tuned))
    assert tuned == [16, 8, 4]
    assert len(tuned) == MOST_TUNED
    assert [one.plan is not None for one in found] == [False, False, True, False, False]
    with pytest.raises(BudgetTooSmallError):
        _tuned(predicted, answering({}, []))
