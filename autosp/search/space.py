"""Which settings there are under a budget, and which layers each of them keeps resident."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple

from autosp.cost_model.floor import unknown_disk
from autosp.cost_model.placement import Placing, evenly_spread, exceeds, host_too_small, least_host_bytes
from autosp.cost_model.predict import Predictor, with_rings
from autosp.cost_model.training_memory import memory_of
from autosp.errors import BudgetTooSmallError
from autosp.schedule.streaming import Ring
from autosp.search import training_space
from autosp.search.headroom import budget_for, usable_bytes
from autosp.search.residents import Filling, Pass
from autosp.spec import Candidate, Prediction, Profile

DEPTHS = (1, 2, 3, 4)
"""Groups in the ring. Overlap needs two; more absorb layers of unlike compute. Beyond that, memory is better spent on
residents."""

READ_AHEAD = (1, 2, 4)
"""Groups in the host's staging ring. With two, one is read while another is loaded; more absorb unlike sizes."""

FRONT_STEPS = 16
"""Budgets for which residents are chosen, to find the front between the least memory and a budget."""

EVERY_K_PRIME = 12
"""Up to here each k' is tried; beyond, neighbouring ones differ too little in copy size to matter."""

Key = tuple[int, int, int, int, int, int, int]
"""See `key_of`."""


class Ranking(NamedTuple):
    """Candidates as `rank` has them, and what predicts them anew."""

    predictions: list[Prediction]
    predictor: Predictor


def rank(profile: Profile, budget_bytes: int, host_budget_bytes: int | None = None, group: int = 1) -> list[Prediction]:
    """Every candidate predicted to fit, the fastest first; of equally fast ones, the one with less memory.

    All of them are of passes of `group` microbatches.

    For each ring (k', number of groups) the budget is filled with residents. Besides these there are every k with its
    residents spread evenly, the plain sliding windows (no residents), and everything resident, k' on the `rungs`. Where
    the host has no room for what each of them streams, as little of it as fits rests on disk, for each of `READ_AHEAD`.
    Those of training are coarser, with every choice of what is computed again or offloaded: see `training_space`.

    Raises: BudgetTooSmallError if nothing is predicted to fit; SettingError if the profile does not know the disk.
    """
    return ranking(profile, budget_bytes, host_budget_bytes, group).predictions


def ranking(profile: Profile, budget_bytes: int, host_budget_bytes: int | None = None, group: int = 1) -> Ranking:
    """`rank`, for a study that will predict its candidates again. Raises: as `rank`."""
    usable = usable_bytes(profile, budget_bytes, group)
    predictor = _predictor(profile, _filled(profile, usable, group), usable, host_budget_bytes, group)
    best: dict[Key, Prediction] = {}
    for prediction in predictor.predict(profile):
        key = key_of(prediction.candidate)
        if key not in best or _order(prediction) < _order(best[key]):
            best[key] = prediction
    if not best:
        raise too_small(profile, budget_bytes, group)
    return Ranking(sorted(best.values(), key=_order), predictor)


def front(
    profile: Profile, budget_bytes: int, host_budget_bytes: int | None = None, group: int = 1
) -> list[Prediction]:
    """The candidates that none beats in both memory and latency, by rising memory: over all budgets up to this one.

    Raises: as `rank`.
    """
    usable = usable_bytes(profile, budget_bytes, group)
    least = _least_plan(profile, group)[0]
    budgets = {least + (usable - least) * step // FRONT_STEPS for step in range(1, FRONT_STEPS + 1)}
    filled = (candidate for budget in sorted(budgets) for candidate in _filled(profile, budget, group))
    best: list[Prediction] = []
    predictor = _predictor(profile, filled, usable, host_budget_bytes, group)
    for prediction in sorted(predictor.predict(profile), key=_by_memory):
        if not best or prediction.latency_s < best[-1].latency_s:
            best.append(prediction)
    if not best:
        raise too_small(profile, budget_bytes, group)
    return best


def _predictor(
    profile: Profile, filled: Iterable[Candidate], usable: int, host_budget_bytes: int | None, group: int
) -> Predictor:
    """Of `filled`, and of the candidates that are the same under any budget, those that fit."""
    memory = memory_of(profile)
    others = [*sliding_windows(profile), all_resident(profile)]
    if profile.mode == "training":
        others = list(training_space.with_activations(profile, others, usable, group))
    else:
        others = [*grid(profile, usable), *others]
    fitting = (candidate for candidate in _serving(others, group) if memory.may_fit(candidate, usable))
    candidates = dict.fromkeys([*_serving(filled, group), *fitting])
    if host_budget_bytes is not None and exceeds(profile.partition, host_budget_bytes):
        return _within(profile, candidates, usable, host_budget_bytes)
    return _within_device(profile, candidates, usable)


def _serving(candidates: Iterable[Candidate], group: int) -> Iterator[Candidate]:
    """The candidates, of passes of so many microbatches."""
    if group == 1:
        yield from candidates
        return
    for candidate in candidates:
        yield candidate.model_copy(update={"group": group})


def key_of(candidate: Candidate) -> Key:
    """What names a candidate within a study.

    k, k', the numbers of residents and of layers on disk, the read-ahead, the numbers of layers computed again and
    offloaded.
    """
    residents, on_disk, recompute = map(len, (candidate.residents, candidate.on_disk, candidate.recompute))
    return candidate.k, candidate.k_prime, residents, on_disk, candidate.read_ahead, recompute, len(candidate.offload)


def rungs(most: int) -> list[int]:
    """The values of k' that are tried: all up to `EVERY_K_PRIME`, then each a quarter more than the one before."""
    values = list(range(1, min(most, EVERY_K_PRIME) + 1))
    while values and values[-1] * 5 // 4 <= most and values[-1] >= EVERY_K_PRIME:
        values.append(values[-1] * 5 // 4)
    return values


def grid(profile: Profile, most_bytes: float = math.inf) -> list[Candidate]:
    """Every k and k' with its best residents: a ring of two groups if k allows it, else of one, the rest resident.

    Where the residents alone take more than `most_bytes` it is left out.
    """
    layers = profile.partition.layers
    visited = list(dict.fromkeys(profile.partition.visits))
    spread = [evenly_spread(visited, count) for count in range(len(visited) + 1)]
    fits = [sum(layers[index].n_bytes for index in residents) <= most_bytes for residents in spread]
    candidates = []
    for k in range(1, len(visited) + 1):
        for k_prime in rungs(k):
            ring = 2 * k_prime if k >= 2 * k_prime else k_prime
            if fits[k - ring]:
                candidates.append(Candidate(k=k, k_prime=k_prime, residents=spread[k - ring]))
    return candidates


def sliding_windows(profile: Profile) -> list[Candidate]:
    """The Superpipeline paper's own plans: no residents, k a multiple of k'."""
    count = len(set(profile.partition.visits))
    return [
        Candidate(k=groups * k_prime, k_prime=k_prime) for k_prime in rungs(count) for groups in rungs(count // k_prime)
    ]


def all_resident(profile: Profile) -> Candidate:
    """No streaming of anything the pass visits."""
    visited = tuple(sorted(set(profile.partition.visits)))
    return Candidate(k=len(visited), k_prime=1, residents=visited)


def least_bytes(profile: Profile, group: int = 1) -> int:
    """The least budget in which what is predicted of the least-memory plan is usable."""
    return budget_for(profile, _least_plan(profile, group)[0], group)


def _least_plan(profile: Profile, group: int) -> tuple[int, Candidate, int]:
    """The bytes that the plan of least memory is predicted to take, the plan, and the bytes of its arena.

    It is the one that was observed; or for a group one that brings more at once, where less waits meanwhile.
    """
    plans = [profile.observed.prediction.candidate]
    if group > 1 and profile.mode == "training":
        plans += training_space.least_of_group(profile, [*sliding_windows(profile), all_resident(profile)], group)
    memory = memory_of(profile)
    pairs = with_rings(profile, _serving(plans, group))
    found = [(memory.peak_bytes(plan, ring.arena_bytes), plan, ring.arena_bytes) for plan, ring in pairs]
    return min(found, key=itemgetter(0))


def too_small(profile: Profile, budget_bytes: int, group: int = 1) -> BudgetTooSmallError:
    """The error for a budget below the least that works, with the layer that sets it."""
    partition = profile.partition
    layer = max(partition.layers, key=lambda layer: layer.n_bytes)
    needed, plan, arena = _least_plan(profile, group)
    least = budget_for(profile, needed, group)
    resident = partition.resident_bytes + sum(partition.layers[index].n_bytes for index in plan.residents)
    beside = needed - arena - resident
    what = f"layer {layer.index} ({layer.name}), {layer.n_bytes / 1e9:.4g}"
    if plan.k_prime > 1:
        what = f"{plan.k_prime} layers that travel together, {arena / 1e9:.4g}"
    return BudgetTooSmallError(
        f"no setting fits {budget_bytes / 1e9:.4g} GB: the least that works is {least / 1e9:.4g} GB. It is set by "
        f"{what} GB at once, beside {resident / 1e9:.4g} GB that must be resident and "
        f"{beside / 1e9:.4g} GB of activations and workspace{_of_group(group)}; "
        f"try max_gpu_gb={suggested_gb(least)}",
        budget_bytes=budget_bytes,
        least_bytes=least,
        layer=layer.name,
    )


def _of_group(group: int) -> str:
    return f" of {group} microbatches, which a smaller group has fewer of" if group > 1 else ""


def suggested_gb(least_bytes: int) -> str:
    """A budget a little above the least, in GB with four digits."""
    return f"{least_bytes * 1.05 / 1e9:.4g}"


def _order(prediction: Prediction) -> tuple[float, int, int]:
    return round(prediction.latency_s, 6), prediction.peak_bytes, prediction.host_bytes


def _by_memory(prediction: Prediction) -> tuple[int, float, int]:
    return prediction.peak_bytes, prediction.latency_s, prediction.host_bytes


def _within_device(profile: Profile, candidates: Iterable[Candidate], usable: int) -> Predictor:
    """The candidates that fit the device, all else being on the host."""
    memory = memory_of(profile)
    pairs = with_rings(profile, candidates)
    return Predictor(profile, (pair for pair in pairs if memory.peak_bytes(pair[0], pair[1].arena_bytes) <= usable))


def _within(profile: Profile, candidates: Iterable[Candidate], usable: int, host_budget_bytes: int) -> Predictor:
    """The candidates that fit the device, with layers on disk, as far as they fit the host then."""
    partition = profile.partition
    if profile.disk_link is None:
        raise unknown_disk()
    if host_budget_bytes < least_host_bytes(partition):
        raise host_too_small(partition, host_budget_bytes)
    memory = memory_of(profile)
    found: dict[Candidate, Ring] = {}
    for candidate in candidates:
        placing = Placing(candidate, partition, host_budget_bytes)
        if memory.peak_bytes(candidate, placing.ring.arena_bytes) <= usable:
            found.update(filter(None, map(placing.with_read_ahead, READ_AHEAD)))
    return Predictor(profile, found.items())


def _filled(profile: Profile, budget_bytes: int, group: int) -> Iterator[Candidate]:
    """For each ring, resident sets that use up the budget beside the activations of a group."""
    if profile.mode == "training":
        yield from training_space.filled(profile, budget_bytes, group)
        return
    free = budget_bytes - profile.partition.resident_bytes - profile.planned_workspace_of(group)
    of = Pass.of(profile)
    count = len(of.layers)
    for k_prime in rungs(count):
        for depth in DEPTHS:
            if depth * k_prime > count:
                break
            for residents in Filling(of, k_prime, depth, free).resident_sets():
                if count - len(residents) >= depth * k_prime:
                    yield Candidate(k=len(residents) + depth * k_prime, k_prime=k_prime, residents=residents)
