"""The plans that the planned systems run: autosp's own answer, its plain sliding window, and the peers' policies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peer_models import PeerModel
from peer_systems import TUNED, WINDOW

import autosp
from autosp.cost_model.predict import predict
from autosp.devices import CpuDevice, Device, choose_device
from autosp.errors import BudgetTooSmallError
from autosp.search.headroom import usable_bytes
from autosp.spec import Candidate, Plan, Profile, Tier
from autosp.store import Repository


@dataclass(frozen=True)
class Figures:
    """What the budget's other rows are judged by, measured in the same run."""

    floor_s: float
    compute_s: float
    """A pass's compute alone: where the floor is above it, the link is what limits the pass."""
    link_bytes_per_s: float
    workspace_bytes: int
    tune_s: float
    least_bytes: int | None = None
    """The least budget that works, if this one is too small."""
    why: str = ""


def device_of(paced_bytes_per_s: float | None) -> Device:
    """The accelerator if there is one, else the CPU; or a CPU whose copies from RAM keep the pace of a link."""
    if paced_bytes_per_s is None:
        return choose_device(None)
    return CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=paced_bytes_per_s)


def make_plans(
    example: PeerModel,
    device: Device,
    budget_bytes: int,
    folder: Path,
    *,
    paced: bool,
    max_trials: int | None = None,
) -> Figures:
    """Tune at the budget and save `<system>.json` in `folder` for every planned system that has a plan.

    The sliding window is the one that the cost model finds fastest; with `paced` the peers' policies are there too.
    """
    budget = f"{budget_bytes}B"
    storage = folder / "study.db"
    begin = time.perf_counter()
    try:
        plan = autosp.tune(
            example.model,
            example.batch,
            budget,
            step=example.step,
            device=device,
            storage=storage,
            max_trials=max_trials,
            progress=False,
        )
    except BudgetTooSmallError as error:
        profile = autosp.profile(example.model, example.batch, step=example.step, device=device, progress=False)
        return _figures(profile, budget, time.perf_counter() - begin, least_bytes=error.least_bytes)
    tune_s = time.perf_counter() - begin
    with Repository(storage) as repository:
        measured = repository.profile(plan.study_name or "")
    assert measured is not None, "a finished study has its profile"
    plan.save(folder / f"{TUNED}.json")
    for name, candidate in _baselines(measured, budget_bytes, paced=paced):
        other = {"candidate": candidate, "prediction": None, "measurement": None, "why": name}
        plan.model_copy(update=other).save(folder / f"{name}.json")
    return _figures(measured, budget, tune_s, why=f"{plan.candidate.label()}: {plan.why}")


def load_plan(folder: Path, system: str) -> Plan:
    """The plan that `make_plans` saved."""
    return Plan.load(folder / f"{system}.json")


def _figures(profile: Profile, budget: str, tune_s: float, *, least_bytes: int | None = None, why: str = "") -> Figures:
    return Figures(
        floor_s=autosp.floor(profile, budget),
        compute_s=profile.least_compute_s,
        link_bytes_per_s=profile.link.bytes_per_s,
        workspace_bytes=profile.workspace_bytes,
        tune_s=tune_s,
        least_bytes=least_bytes,
        why=why,
    )


def _baselines(profile: Profile, budget_bytes: int, *, paced: bool) -> Iterator[tuple[str, Candidate]]:
    ranked = autosp.estimate(profile, f"{budget_bytes}B")
    window = next((prediction.candidate for prediction in ranked if not prediction.candidate.residents), None)
    if window is not None:
        yield WINDOW, window
    if paced:
        yield from policies(profile, usable_bytes(profile, budget_bytes))


def policies(profile: Profile, usable: int) -> Iterator[tuple[str, Candidate]]:
    """How the peers move layers, each as the setting that does the same, where one is predicted to fit.

    accelerate loads a layer when it is called and drops it after, resident ones being the first of the model; diffusers
    with a stream holds the group that computes and the next one, and keeps none.
    """
    visited = list(dict.fromkeys(profile.partition.visits))
    yield "policy-sequential", Candidate(k=1, k_prime=1)
    firsts = [tuple(sorted(visited[:count])) for count in range(len(visited))]
    filled = [Candidate(k=len(residents) + 1, k_prime=1, residents=residents) for residents in firsts]
    fitting = [prediction.candidate for prediction in predict(profile, filled) if prediction.peak_bytes <= usable]
    if fitting:
        yield "policy-first-fit", max(fitting, key=lambda candidate: candidate.k)
    rings = [Candidate(k=2 * group, k_prime=group) for group in (1, 2, 4) if 2 * group <= len(visited)]
    for prediction in predict(profile, rings):
        if prediction.peak_bytes <= usable:
            yield f"policy-stream-{prediction.candidate.k_prime}", prediction.candidate
