"""Corrects a profile by what passes of measured plans spent time on: compute, links, what these cost each other.

Each figure is linear in what is sought, with u the share of compute beside which the link was busy, v the share of the
link's time beside which compute was, and s the share of visits that had to wait:

`compute = C (c + c a u + w s)`                      c scales every visit, a is the slowdown, w what waking up costs;
                                                     C is the plan's own: with what it computes again
`link = bytes / B (r + r b v) + transfers latency`    r scales the rate, b is the slowdown

Least squares of relative errors, held near what the profile says by how sure that is: the more plans were measured, the
less that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from autosp.cost_model.predict import beside_compute_s
from autosp.spec import BackwardProfile, Candidate, LinkProfile, Measurement, Profile, Trial, Usage

Array = npt.NDArray[np.float64]

MEASURED_ERROR = 0.03
"""Relative error of a measured figure: a machine has neighbours."""

SCALE_ERROR, SLOWDOWN_ERROR, WAKE_ERROR, LATENCY_ERROR = 0.3, 0.1, 0.2, 1.0
"""How far the profile may be off: relative for scales and latencies, absolute for slowdowns and shares."""

DISTURBED_ERROR = 0.25
DISTURBED_RATIO = 4
"""A residual above both of these, the second times the median residual, is a disturbed plan's: it teaches nothing."""

MOST_SLOWDOWN = 2.0
"""Of compute by a link: at worst the thread that copies shares a core with one that computes. What a pass shows beyond
that was somebody else's work."""

LEAST_SCALE = 0.1
"""Of compute, or of a transfer's time for its bytes: where transfers are tiny, all of it may look like latency."""

LEAST_LATENCY_SHARE = 0.02
"""Of a transfer's time: what a latency of nothing may turn out to be is measured against this."""


def observations(profile: Profile) -> list[Trial]:
    """The trials that a profile was made from."""
    return [profile.observed, *([profile.overlapped] if profile.overlapped else [])]


def calibrated(profile: Profile, trials: Sequence[Trial]) -> Profile:
    """The profile as these trials had it. Trials whose usage is not known count for nothing."""
    timed = [trial for trial in trials if trial.measurement.samples_s and trial.measurement.usage is not None]
    used = [(trial.measurement, trial.measurement.usage) for trial in timed if trial.measurement.usage is not None]
    if not used:
        return profile
    link = _link(profile.link, used, lambda m, u: (u.link_s, m.moved_bytes, u.loads))
    disk = profile.disk_link
    if disk is not None:
        disk = _link(disk, used, lambda m, u: (u.disk_s, u.read_bytes, u.reads))
    links = _links(profile, link, disk)
    candidates = [trial.prediction.candidate for trial in timed]
    return _compute(profile.model_copy(update={"links": links}), used, candidates)


def _links(profile: Profile, link: LinkProfile, disk: LinkProfile | None) -> tuple[LinkProfile, ...]:
    """A profile's links, with these in their places."""
    return (link, *(one for one in (disk, profile.return_link) if one is not None))


Used = Sequence[tuple[Measurement, Usage]]


def _compute(profile: Profile, used: Used, candidates: Sequence[Candidate]) -> Profile:
    """Scale every visit; learn what loads, reads and waking up cost compute. `candidates`: what each trial ran."""
    link, disk = profile.link, profile.disk_link
    visits = len(profile.visits) * profile.partition.repeats + len(profile.backward)
    rows, found = [], []
    for (measured, usage), candidate in zip(used, candidates, strict=True):
        alone_s = profile.compute_of(candidate)
        compute_s = measured.latency_s - usage.stall_s
        if compute_s <= 0 or alone_s <= 0:
            continue
        beside_link, beside_disk = (
            min(1.0, float(beside_compute_s(np.array(busy_s), np.array(usage.stall_s))) / compute_s)
            for busy_s in (usage.link_s, usage.disk_s)
        )
        rows.append([1.0, beside_link, beside_disk, usage.stalls / (visits * candidate.group)])
        found.append(compute_s / alone_s)
    if not rows:
        return profile
    if profile.plain_s is not None:  # nothing slows it: only it tells compute from what goes on beside it
        rows.append([1.0, 0.0, 0.0, 0.0])
        found.append(profile.plain_s / profile.compute_s)
    prior = [
        1.0,
        link.compute_slowdown - 1,
        disk.compute_slowdown - 1 if disk else 0.0,
        profile.wake_s * visits / profile.compute_s,
    ]
    errors = [SCALE_ERROR, SLOWDOWN_ERROR, SLOWDOWN_ERROR, WAKE_ERROR]
    factors = fit(np.array(rows), np.array(found), np.array(prior), np.array(errors))
    scale, by_link, by_disk, wake = factors.tolist()
    link = link.model_copy(update={"compute_slowdown": min(MOST_SLOWDOWN, 1 + by_link / scale)})
    if disk is not None:
        disk = disk.model_copy(update={"compute_slowdown": min(MOST_SLOWDOWN, 1 + by_disk / scale)})
    return profile.model_copy(
        update={
            "visits": tuple(
                visit.model_copy(update={"before_s": visit.before_s * scale, "forward_s": visit.forward_s * scale})
                for visit in profile.visits
            ),
            "backward": tuple(_scaled(visit, scale) for visit in profile.backward),
            "tail_s": profile.tail_s * scale,
            "wake_s": wake * profile.compute_s / visits,
            "links": _links(profile, link, disk),
        }
    )


def _scaled(visit: BackwardProfile, scale: float) -> BackwardProfile:
    times = ("before_s", "recompute_s", "backward_s")
    return visit.model_copy(update={name: getattr(visit, name) * scale for name in times})


def _link(
    link: LinkProfile, used: Used, traffic: Callable[[Measurement, Usage], tuple[float, float, float]]
) -> LinkProfile:
    """Scale the rate and the latency; learn what compute costs the link. `traffic`: busy seconds, bytes, transfers."""
    rows, found = [], []
    for measured, usage in used:
        busy_s, n_bytes, transfers = traffic(measured, usage)
        if busy_s <= 0 or n_bytes <= 0:
            continue
        alone_s = n_bytes / link.bytes_per_s
        beside = float(beside_compute_s(np.array(busy_s), np.array(usage.stall_s))) / busy_s
        rows.append([1.0, transfers / alone_s, beside])
        found.append(busy_s / alone_s)
    if not rows:
        return link
    table = np.array(rows)
    unit_s = LEAST_LATENCY_SHARE / float(np.median(table[:, 1]))
    unit_s = max(unit_s, link.latency_s)
    table[:, 1] *= unit_s
    prior = np.array([1.0, link.latency_s / unit_s, link.link_slowdown - 1])
    errors = np.array([SCALE_ERROR, LATENCY_ERROR, SLOWDOWN_ERROR])
    scale, latency, by_compute = fit(table, np.array(found), prior, errors).tolist()
    return link.model_copy(
        update={
            "bytes_per_s": link.bytes_per_s / scale,
            "latency_s": latency * unit_s,
            "link_slowdown": 1 + by_compute / scale,
        }
    )


def fit(table: Array, found: Array, prior: Array, errors: Array) -> Array:
    """The factors of `table @ factors = found`: relative errors, held at `prior` by its `errors`.

    The first one, the scale, is no less than `LEAST_SCALE`, and none of the others is negative. Rows that are far off
    all others are left out of a second fit. Shapes: [N, F], [N], [F], [F] -> [F].
    """
    factors = _solve(table, found, prior, errors)
    residuals = np.abs(table @ factors / found - 1)
    usual = undisturbed(residuals)
    return factors if usual.all() else _solve(table[usual], found[usual], prior, errors)


def undisturbed(residuals: Array) -> npt.NDArray[np.bool_]:
    """Which relative residuals are not far off all others. [N]"""
    return residuals <= max(DISTURBED_ERROR, DISTURBED_RATIO * float(np.median(residuals)))


def _solve(table: Array, found: Array, prior: Array, errors: Array) -> Array:
    rows = np.concatenate([table / found[:, None] / MEASURED_ERROR, np.diag(1 / errors)])
    target = np.concatenate([np.ones(len(found)) / MEASURED_ERROR, prior / errors])
    least = np.zeros(len(prior))
    least[0] = LEAST_SCALE
    free = np.ones(len(prior), bool)
    factors = least.copy()
    while free.any():
        rest = target - rows[:, ~free] @ least[~free]
        factors[free] = np.linalg.lstsq(rows[:, free], rest, rcond=None)[0]
        if (factors >= least).all():
            break
        free &= factors > least
        factors[~free] = least[~free]
    return factors
