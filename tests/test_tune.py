"""The whole story, as a user tells it."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import CpuDevice
from autosp.devices.virtual import VirtualDevice
from autosp.errors import (
    AutospError,
    BudgetError,
    BudgetTooSmallError,
    EmptyModelError,
    MetaModelError,
    OutputMismatchError,
    PlanMismatchError,
    SettingError,
    StudyMismatchError,
    StudyNotFoundError,
)
from autosp.profiler import HEAP_SCATTER_OF_WORKSPACE
from autosp.runtime.streamed_model import StreamedModel
from autosp.search.space import all_resident, key_of, rank
from autosp.spec import Outcome, Tier
from autosp.store import Repository
from builders import study_key
from models import EarlyExit, make, tokens, vectors
from processes import start

WIDTH = 384
BUDGET_GB = 0.030
"""Below the model's 8 blocks of 4.7 MB, above a few of them and the heap's noise."""


def big() -> tuple[nn.Module, torch.Tensor]:
    """Large enough for its memory to stand out from the process's own."""
    torch.manual_seed(0)
    return EarlyExit(blocks=8, width=WIDTH).eval(), vectors(4, WIDTH)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: (id(tensor), tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}


def untouched(model: nn.Module, before: dict[str, Any]) -> bool:
    return all("forward" not in module.__dict__ for module in model.modules()) and all(
        (id(tensor), tensor.data_ptr()) == before[name][:2] and torch.equal(tensor, before[name][2])
        for name, tensor in model.named_parameters()
    )


def test_a_budget_below_the_head(tmp_path: Path) -> None:
    """The largest weight need not fit: it streams run by run."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 50_000)).eval(), vectors(2)
    with torch.no_grad():
        expected = model(batch)
    weight: nn.Parameter = model[2].weight  # type: ignore[assignment]
    address = weight.data_ptr()
    plan = autosp.tune(model, batch, "80MB", device="cpu", progress=False, max_trials=3)
    assert weight.nbytes > 100e6
    assert plan.measurement
    assert plan.measurement.outcome is Outcome.FITS
    assert plan.measurement.peak_bytes <= 80e6
    assert weight.data_ptr() == address
    plan.save(tmp_path / "plan.json")
    with autosp.apply(model, autosp.Plan.load(tmp_path / "plan.json")) as streamed:
        assert equal(streamed(batch), expected)
    with torch.no_grad():
        assert equal(model(batch), expected)


def test_tune_apply_and_answer_from_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_within: list[int] = []
    monkeypatch.setattr(StreamedModel, "keep_within", lambda _, peak_bytes: kept_within.append(peak_bytes))
    model, batch = big()
    with torch.no_grad():
        expected = model(batch)
    before = snapshot(model)
    plan = autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False)
    assert untouched(model, before)
    assert set(kept_within) == {plan.budget_bytes}  # in trials
    kept_within.clear()
    assert plan.measurement is not None and plan.prediction is not None and plan.floor_s is not None
    assert plan.measurement.outcome is Outcome.FITS
    assert plan.measurement.peak_bytes <= plan.budget_bytes == 30_000_000
    assert plan.measurement.misses == 0
    assert plan.why
    with autosp.apply(model, plan) as streamed:
        assert streamed is model
        assert kept_within == [plan.usual_bytes] == [plan.measurement.peak_bytes + plan.partition.bookkeeping_bytes]
        for _ in range(3):
            assert equal(model(batch), expected)
    assert equal(model(batch).detach(), expected)

    assert autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False) == plan
    assert autosp.resume(plan.study_name or "", model, batch, device="cpu", progress=False) == plan
    assert autosp.load_plan(plan.study_name or "") == plan
    (summary,) = autosp.list_studies()
    assert (summary.name, summary.finished) == (plan.study_name, True)


class Repeated(nn.Module):
    """Its passes take as much memory as an attribute says."""

    def __init__(self, model: nn.Module, times: int) -> None:
        super().__init__()
        self.model = model
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(x.repeat(self.times, 1))
        return output[: len(x)]


def test_a_model_that_was_told_otherwise_is_another_question() -> None:
    """Its tensors are the same, but not what a pass takes."""
    model, batch = big()
    known = autosp.tune(Repeated(model, 1), batch, BUDGET_GB, device="cpu", progress=False)
    assert autosp.tune(Repeated(model, 1), batch, BUDGET_GB, device="cpu", progress=False) == known
    with pytest.raises(BudgetTooSmallError):
        autosp.tune(Repeated(model, 20000), batch, BUDGET_GB, device="cpu", progress=False)
    with pytest.raises(StudyMismatchError, match=r"behaviour: .* configs say, and eval\(\) or train\(\)"):
        autosp.resume(str(known.study_name), Repeated(model, 2), batch, device="cpu", progress=False)


def test_an_answer_from_the_database_needs_no_optuna_and_no_pass(tmp_path: Path) -> None:
    model, batch = big()
    autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False, max_trials=3)
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_tune, autosp
        model, batch = test_tune.big()
        model.register_forward_pre_hook(lambda *_: sys.exit("the model ran"))
        plan = autosp.tune(model, batch, test_tune.BUDGET_GB, device="cpu", progress=False)
        print(plan.study_name, "optuna" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["EarlyExit-inference", "False"]


def test_the_baselines_are_measured() -> None:
    from autosp.search.study import HOPELESS  # with optuna, which another test of this module must not have

    model, batch = big()
    plan = autosp.tune(model, batch, 0.12, device="cpu", progress=False)
    with Repository() as repository:
        trials = repository.trials(plan.study_name or "")
        profile = repository.profile(plan.study_name or "")
    assert profile is not None
    tried = [trial.prediction.candidate for trial in trials]
    assert key_of(all_resident(profile)) in {key_of(candidate) for candidate in tried}
    ranked = rank(profile, plan.budget_bytes)
    window_s = min(one.latency_s for one in ranked if not one.candidate.residents)
    hopeless = window_s > ranked[0].latency_s * (1 + HOPELESS)
    assert hopeless or any(not candidate.residents for candidate in tried)
    assert profile.overlapped is not None and not profile.overlapped.prediction.candidate.residents
    assert profile.overlapped.measurement.samples_s


def test_a_step_is_what_runs_and_what_is_compared() -> None:
    model, batch = big()

    def step(model: nn.Module, batch: Any) -> Any:
        return [model(batch, [0, 1, 2, 3, 4, 5, 6, 7]) for _ in range(3)]

    plan = autosp.tune(model, batch, BUDGET_GB, step=step, device="cpu", progress=False, max_trials=2)
    assert plan.partition.repeats == 3


def test_profile_estimate_and_floor_need_no_device_afterwards() -> None:
    model, batch = big()
    before = snapshot(model)
    profile = autosp.profile(model, batch, device="cpu", progress=False)
    assert untouched(model, before)
    ranked = autosp.estimate(profile, BUDGET_GB)
    assert all(prediction.peak_bytes <= 30_000_000 for prediction in ranked)
    assert all(a.latency_s <= b.latency_s + 1e-6 for a, b in zip(ranked, ranked[1:], strict=False))  # ties: less memory
    assert 0 < autosp.floor(profile, BUDGET_GB) <= autosp.floor(profile, 0.012)
    assert type(profile).model_validate_json(profile.model_dump_json()) == profile
    names = [layer.name for layer in profile.partition.layers]
    assert len(profile.visits) == len(names)
    assert all(visit.output_bytes > 0 for visit in profile.visits)


def test_a_prediction_has_room_for_the_scatter_of_a_c_heap() -> None:
    model, batch = big()
    profile = autosp.profile(model, batch, device="cpu", progress=False)
    assert profile.overlapped is not None
    warm = profile.overlapped
    bare_bytes = warm.prediction.peak_bytes - profile.planned_workspace_of(1)
    warm_bytes = warm.measurement.peak_bytes - bare_bytes
    wanted = max(profile.workspace_bytes, warm_bytes + int(HEAP_SCATTER_OF_WORKSPACE * warm_bytes))
    assert profile.planned_workspace_of(1) == wanted > 0
    first_bytes = profile.observed.prediction.peak_bytes - profile.planned_workspace_of(1) + profile.workspace_bytes
    assert first_bytes >= profile.observed.measurement.peak_bytes


def test_an_allocator_that_does_not_scatter_gets_no_room_for_it() -> None:
    model, batch = big()
    profile = autosp.profile(model, batch, device=VirtualDevice(bytes_per_s=1e9), progress=False)
    assert profile.heap_scatter_bytes == 0


def test_plan_with_the_user_s_own_k(device: Any) -> None:
    model, batch = make("stack")
    with torch.no_grad():
        expected = copy.deepcopy(model).to(device.torch_device)(batch.to(device.torch_device))
    plan = autosp.plan(model, batch, k=5, k_prime=2, residents=1, device=device)
    assert (plan.candidate.k, plan.candidate.k_prime, len(plan.candidate.residents)) == (5, 2, 1)
    assert plan.measurement is None
    with autosp.apply(model, plan):
        assert equal(model(batch.to(device.torch_device)), expected)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"k": 0, "k_prime": 1}, "k=0"),
        ({"k": 2, "k_prime": 3}, "too few to move k_prime=3"),
        ({"k": 2, "k_prime": 1, "residents": 2}, "raise k to at least 3"),
        ({"k": 99, "k_prime": 1}, "layers only"),
        ({"k": 2.5, "k_prime": 1}, "whole number"),
        ({"k": 2, "k_prime": 1, "residents": -1}, "residents=-1"),
        ({"k": 2, "k_prime": 1, "mode": "dreaming"}, "mode='dreaming'"),
    ],
)
def test_numbers_that_do_not_fit_together(numbers: dict[str, Any], message: str) -> None:
    model, batch = make("stack")
    with pytest.raises(SettingError, match=message):
        autosp.plan(model, batch, device="cpu", **numbers)


def test_budget_that_nothing_fits_names_the_least_and_the_layer() -> None:
    model, batch = big()
    before = snapshot(model)
    with pytest.raises(BudgetTooSmallError, match=r"least that works is .* GB.* set by layer") as caught:
        autosp.tune(model, batch, 0.001, device="cpu", progress=False)
    assert untouched(model, before)
    assert caught.value.budget_bytes == 1_000_000 < caught.value.least_bytes
    assert caught.value.layer.startswith("blocks.")
    assert autosp.list_studies() == []
    suggested = float(str(caught.value).rpartition("max_gpu_gb=")[2])
    assert autosp.tune(model, batch, suggested + 0.004, device="cpu", progress=False).measurement is not None


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "8 apples", True])
def test_budgets_that_are_none(budget: Any) -> None:
    model, batch = make("stack")
    with pytest.raises(BudgetError):
        autosp.tune(model, batch, budget, device="cpu")


def test_other_arguments_that_are_wrong() -> None:
    model, batch = make("stack")
    with pytest.raises(SettingError, match=r"not a torch\.nn\.Module"):
        autosp.tune(lambda x: x, batch, 1)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="sample_batch is a set"):
        autosp.tune(model, {1, 2}, 1, device="cpu", progress=False)
    with pytest.raises(SettingError, match="step"):
        autosp.tune(model, batch, 1, step=3)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="max_trials=0"):
        autosp.tune(model, batch, 1, device="cpu", max_trials=0)
    with pytest.raises(SettingError, match="timeout_s"):
        autosp.tune(model, batch, 1, device="cpu", timeout_s=-3)
    with pytest.raises(EmptyModelError):
        autosp.tune(nn.ReLU(), batch, 1, device="cpu", progress=False)
    with torch.device("meta"):
        meta = nn.Linear(3, 3)
    with pytest.raises(MetaModelError):
        autosp.tune(meta, batch, 1, device="cpu", progress=False)


def test_arguments_of_a_wrong_kind_are_named(tmp_path: Path) -> None:
    """Each public function says what it was given, and what to give."""
    model, batch = make("stack")
    quiet: dict[str, Any] = {"device": "cpu", "progress": False}
    mine: Any = autosp
    plan = autosp.plan(model, batch, k=1, k_prime=1, device="cpu")
    lazy = nn.Sequential(nn.LazyLinear(3))
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: mine.tune(model, batch, 1, device=1), "device is a int; pass a torch.device"),
        (lambda: mine.tune(model, batch, 1, storage=1, **quiet), "storage is a int; pass a path"),
        (lambda: mine.tune(model, batch, 1, storage=b"x.db", **quiet), "storage is a bytes; pass a path"),
        (lambda: mine.tune(model, batch, 1, study_name=1, **quiet), "study_name=1: pass a text"),
        (lambda: mine.tune(model, batch, 1, study_name=" ", **quiet), "study_name=' ': pass a text"),
        (lambda: mine.tune(lazy, batch, 1, **quiet), "0.weight has no shape yet: call the model once"),
        (lambda: mine.tune(model, {1: batch}, 1, **quiet), "sample_batch has the key 1, which names no argument"),
        (lambda: mine.apply(None, plan), r"model is a NoneType, not a torch\.nn\.Module"),
        (lambda: mine.estimate(plan, 8), r"profile is a Plan; pass what autosp\.profile gives"),
        (lambda: mine.floor(None, 8), "profile is a NoneType"),
        (lambda: mine.tune_batch(model, batch, 1, **quiet), "make_batch is a Tensor; pass a function"),
        (lambda: mine.tune_batch(model, len, 1, batch_sizes=3, **quiet), "batch_sizes=3: pass whole numbers"),
        (lambda: mine.tune_batch(model, len, 1, batch_sizes="12", **quiet), "batch_sizes='12': pass whole numbers"),
        (lambda: mine.resume(3, model, batch), "no study 3 among the 0 in"),
        (lambda: mine.load_plan(None), "no study None among the 0 in"),
        (lambda: mine.delete_study(None), "no study None among the 0 in"),
        (lambda: mine.load(3), "source is a int; pass a path, module:factory"),
        (lambda: mine.load(nn.Identity, weights=3), "weights is a int; pass the path"),
    ]
    for call, message in wrong:
        with pytest.raises(AutospError, match=message):
            call()
    assert autosp.list_studies() == []


def test_a_batch_that_the_model_rejects_raises_the_model_s_own_error() -> None:
    model, batch = big()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"normalized_shape|shape"):
        autosp.tune(model, torch.randn(3, 5), 1, device="cpu", progress=False)
    assert untouched(model, before)
    with pytest.raises(TypeError, match="unexpected keyword"):
        autosp.tune(model, {"nonsense": batch}, 1, device="cpu", progress=False)
    assert untouched(model, before)


def test_plans_and_studies_of_other_models_are_refused() -> None:
    model, batch = big()
    plan = autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False, study_name="mine")
    other = EarlyExit(blocks=7, width=WIDTH)
    with pytest.raises(PlanMismatchError, match=f"{plan.model_fingerprint}.*EarlyExit has"):
        autosp.apply(other, plan)
    with pytest.raises(StudyMismatchError, match="model_fingerprint"):
        autosp.resume("mine", other, batch, device="cpu", progress=False)
    with pytest.raises(StudyMismatchError, match=rf"device_fingerprint: {plan.device.fingerprint} there, .* here"):
        autosp.resume("mine", model, batch, device=CpuDevice(slow_tier=Tier.HOST), progress=False)
    with pytest.raises(StudyMismatchError, match="batch_signature"):
        autosp.resume("mine", model, vectors(5, WIDTH), device="cpu", progress=False)
    with pytest.raises(StudyMismatchError, match="budget_bytes"):
        autosp.tune(model, batch, 2 * BUDGET_GB, device="cpu", progress=False, study_name="mine")
    with pytest.raises(StudyNotFoundError, match="mine"):
        autosp.resume("mime", model, batch, device="cpu", progress=False)
    with pytest.raises(SettingError, match="plan is a dict"):
        autosp.apply(model, {})  # type: ignore[arg-type]


def test_a_model_under_a_plan_takes_no_second_one() -> None:
    model, batch = make("stack")
    plan = autosp.plan(model, batch, k=2, k_prime=1, device="cpu")
    with autosp.apply(model, plan):
        with pytest.raises(SettingError, match=r"remove\(\) it first"):
            autosp.apply(model, plan)
        with pytest.raises(SettingError, match=r"remove\(\) it first"):
            autosp.tune(model, batch, 1, device="cpu")
    with autosp.apply(model, plan):
        model(batch)


def test_resume_goes_on_where_a_limit_stopped_and_repeats_nothing() -> None:
    model, batch = big()
    first = autosp.tune(model, batch, BUDGET_GB, device="cpu", progress=False, max_trials=1)
    name = first.study_name or ""
    with Repository() as repository:
        before = repository.trials(name)
        profile = repository.profile(name)
    assert len(before) == 1
    autosp.resume(name, model, batch, device="cpu", progress=False, max_trials=3)
    with Repository() as repository:
        after = repository.trials(name)
        assert repository.profile(name) == profile
    assert after[0].prediction == before[0].prediction
    first_samples_s = before[0].measurement.samples_s
    if after[0].measurement.rounds == 1:
        assert after[0] == before[0]
    assert after[0].measurement.samples_s[: len(first_samples_s)] == first_samples_s, "finals add to them"
    assert 1 <= len(after) <= 3
    keys = [key_of(trial.prediction.candidate) for trial in after]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("slack", "taken"),
    [
        (None, ["EarlyExit-inference"]),
        (1.0, ["EarlyExit-inference-slack-1", "EarlyExit-inference-slack-1-0.03GB"]),
    ],
)
def test_a_name_that_is_taken_meanwhile_is_left_to_its_study(slack: float | None, taken: list[str]) -> None:
    """Of a study that the user gave no name: another process enters one of that name while this one profiles."""
    model, batch = big()
    entered: list[str] = []

    def step(model: nn.Module, batch: Any) -> Any:
        if not entered:
            entered.extend(taken)
            with Repository() as repository:
                for number, name in enumerate(taken, start=1):
                    repository.create_study(name, study_key(budget_bytes=number))
        return model(batch)

    plan = autosp.tune(model, batch, BUDGET_GB, slack=slack, step=step, device="cpu", progress=False, max_trials=1)
    assert entered == taken
    assert plan.study_name == f"{taken[0]}-2"
    known = {summary.name: summary.trials for summary in autosp.list_studies()}
    assert [known[name] for name in taken] == [0] * len(taken)
    assert {f"{name}-2" for name in taken} <= known.keys()


def test_ctrl_c_restores_the_model_and_resume_finishes(tmp_path: Path) -> None:
    model, batch = big()
    before = snapshot(model)
    calls_of_a_trial = [0]

    def step(model: nn.Module, batch: Any) -> Any:
        calls_of_a_trial[0] += bool(autosp.list_studies())
        if calls_of_a_trial[0] == 2:  # the study is entered, its first trial is running
            signal.raise_signal(signal.SIGINT)
        return model(batch)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            autosp.tune(model, batch, BUDGET_GB, step=step, device="cpu", progress=False, study_name="cut")
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert untouched(model, before)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]
    assert autosp.list_studies()[0].finished is False
    plan = autosp.resume("cut", model, batch, step=step, device="cpu", progress=False)
    assert plan.study_name == "cut"
    assert untouched(model, before)


def test_a_plan_whose_output_differs_is_never_returned() -> None:
    class Leaky(EarlyExit):
        """Its output depends on where its weights are."""

        def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
            streamed = "forward" in self.blocks[0].up.__dict__ or "forward" in self.blocks[0].__dict__
            deep = getattr(self.__dict__.get("forward"), "_around", None)
            return super().forward(x) + (1.0 if streamed and "pass" in getattr(deep, "__name__", "") else 0.0)

    torch.manual_seed(0)
    model = Leaky(blocks=8, width=WIDTH).eval()
    with pytest.raises(OutputMismatchError, match="another output than the plain model"):
        autosp.tune(model, vectors(4, WIDTH), BUDGET_GB, device="cpu", progress=False, max_trials=2)


def test_a_model_that_differs_from_itself_is_planned_with_a_warning() -> None:
    counter = [0]

    class Restless(EarlyExit):
        def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
            counter[0] += 1
            return super().forward(x) + counter[0]

    torch.manual_seed(0)
    model = Restless(blocks=8, width=WIDTH).eval()
    with pytest.warns(UserWarning, match="cannot be verified"):
        plan = autosp.tune(model, vectors(4, WIDTH), 0.05, device="cpu", progress=False, max_trials=3)
    assert plan.measurement is not None


def test_dropout_is_compared_from_one_seed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, 8 * WIDTH), nn.Dropout(), nn.Linear(8 * WIDTH, WIDTH)) for _ in range(4))
    )
    plan = autosp.tune(model.train(), vectors(4, WIDTH), 0.05, device="cpu", progress=False, max_trials=2, seed=3)
    assert plan.measurement is not None
    with autosp.apply(model, plan):
        torch.manual_seed(5)
        streamed = model(vectors(4, WIDTH))
    torch.manual_seed(5)
    assert equal(model(vectors(4, WIDTH)).detach(), streamed)


def test_token_models_too() -> None:
    model, batch = make("stack")
    plan = autosp.tune(model, batch, 0.5, device="cpu", progress=False, max_trials=2)
    assert plan.batch_signature == "int64[3,11]"
    assert tokens(3, 11).shape == batch.shape


FORGETS = """
import gc, sys, weakref
import torch
from torch import nn
import autosp

model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
autosp.tune(model, torch.ones(2, 256), "2MB", storage=sys.argv[1], progress=False)
known = weakref.ref(model)
del model
gc.collect()
assert known() is None
"""


def test_the_model_is_let_go_of(tmp_path: Path) -> None:
    # In a new process: what would keep it is what optuna remembers of being imported.
    run = subprocess.run([sys.executable, "-c", FORGETS, str(tmp_path / "db")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


WORKS = """
import test_tune, autosp
model, batch = test_tune.big()
plan = autosp.tune(model, batch, test_tune.BUDGET_GB, device="cpu", progress=False, study_name="shared")
print(plan.model_dump_json())
"""


def test_processes_on_one_study_share_its_trials_and_return_one_plan() -> None:
    answers = [worker.says() for worker in [start(WORKS), start(WORKS)]]
    plans = [autosp.Plan.model_validate_json(answer) for answer in answers]
    assert plans[0] == plans[1] == autosp.load_plan("shared")
    with Repository() as repository:
        trials = repository.trials("shared")
    tried = [key_of(trial.prediction.candidate) for trial in trials]
    assert len(tried) == len(set(tried))
    assert plans[0].measurement in [trial.measurement for trial in trials]
