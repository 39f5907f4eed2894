"""The tuner's targets against what its studies measured: one table per kind of device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from kept_rows import having
from record import markdown
from tuner_accuracy import Errors, sizes, two, under_and_over
from tuner_budget import failed, infeasible_trials, over, over_in_run, over_in_tune
from tuner_regret import (
    RANKED_LAYERS,
    RANKING,
    WANTED_AGAIN_S,
    WANTED_EXTRA_S,
    WANTED_PASSES,
    WANTED_RANK_S,
    WANTED_REGRET,
    WANTED_TRIALS,
    regret_of,
    tuned_rows,
    wall_limit_s,
)
from tuner_results import TOO_SMALL, Row, verdict

from autosp.report.units import seconds

MEDIAN_ERROR, LARGE_ERROR = 0.03, 0.10
UNDER, OVER = 0.01, 0.03
DRAWS = 300

NOT_MEASURED = ("not measured", "")

Line = tuple[str, str, str, str]
"""What, its target, what was measured, the verdict."""


def targets(rows: Mapping[str, list[Row]]) -> str:
    """The table, from the rows of each study by its name; then the rows that have no figures for it."""
    parts = (_accuracy, _regret, _answers, _budget)
    text = markdown(["what", "target", "measured", ""], [list(line) for part in parts for line in part(rows)])
    broken = [
        f"{name} of {row.case} ({row.outcome})"
        for name, of_study in rows.items()
        for row in of_study
        if not row.ok and row.outcome != TOO_SMALL
    ]
    return f"{text}\n\nWithout figures: {'; '.join(broken)}." if broken else text


def _accuracy(rows: Mapping[str, list[Row]]) -> Iterator[Line]:
    errors = Errors.of([row for row in rows["accuracy"] if row.ok])
    latency = ("latency prediction", f"median ≤ {MEDIAN_ERROR:.0%}, 95th percentile ≤ {LARGE_ERROR:.0%}")
    memory = ("memory prediction", f"never under by more than {UNDER:.0%}, median over ≤ {OVER:.0%}")
    if not errors.latency:
        yield *latency, *NOT_MEASURED
        yield *memory, *NOT_MEASURED
        return
    seen = f" of {len(errors.latency)} candidates" + (f"; noise {two(sizes(errors.noise))}" if errors.noise else "")
    for when, found in (("profile alone", errors.latency), ("after a study", errors.latency_after)):
        middle, large = sizes(found)
        met = middle <= MEDIAN_ERROR and large <= LARGE_ERROR
        yield f"{latency[0]}, {when}", latency[1], two((middle, large)) + seen, verdict(met)
    for when, found in (("profile alone", errors.memory), ("after a study", errors.memory_after)):
        under, over_by = under_and_over(found)
        told = f"under by up to {under:.1%}, median over {over_by:.1%}"
        yield f"{memory[0]}, {when}", memory[1], told, verdict(under <= UNDER and over_by <= OVER)


def _regret(rows: Mapping[str, list[Row]]) -> Iterator[Line]:
    tuned = tuned_rows(rows["regret"])
    found = [regret_of(row) for row in tuned]
    known = [regret for regret in found if regret is not None]
    wanted = f"≤ {WANTED_REGRET} where noise allows"
    if not known:
        yield "regret", wanted, *NOT_MEASURED
    else:
        met = sum(regret.verdict == "met" for regret in known)
        within = sum(regret.verdict == "within noise" for regret in known)
        noises = [regret.noise for regret in known if regret.noise is not None]
        told = f"median {median(regret.of_best for regret in known):.3f}, largest {max(r.of_best for r in known):.3f}; "
        told += f"met in {met} of {len(found)}, within noise in {within}"
        told += f"; noise {median(noises):.1%}" if noises else ""
        told += f"; over the budget in {len(found) - len(known)}" if len(known) < len(found) else ""
        yield "regret", wanted, told, verdict(met + within == len(found))
    wanted = f"≤ {WANTED_TRIALS} at the median"
    if tuned:
        trials = [row.figures["trials"] for row in tuned]
        told = f"median {median(trials):g} ({min(trials)} – {max(trials)})"
        yield "trials on the device", wanted, told, verdict(median(trials) <= WANTED_TRIALS)
    else:
        yield "trials on the device", wanted, *NOT_MEASURED


def _answers(rows: Mapping[str, list[Row]]) -> Iterator[Line]:
    tuned = tuned_rows(rows["regret"])
    wall = ("wall time of tune", f"≤ {WANTED_PASSES} passes of its plan + {WANTED_EXTRA_S:g} s")
    again = ("same fingerprint again", f"< {WANTED_AGAIN_S:g} s")
    ranking = (f"ranking {RANKED_LAYERS} layers", f"< {WANTED_RANK_S:g} s on one core")
    if tuned:
        shares = [row.figures["wall_s"] / wall_limit_s(row) for row in tuned]
        told = f"within in {sum(share <= 1 for share in shares)} of {len(shares)}; {min(shares):.2f} – "
        told += f"{max(shares):.2f} times that, median {median(shares):.2f}"
        yield *wall, told, verdict(max(shares) <= 1)
        slowest = max(median(row.figures["again_s"]) for row in tuned)
        yield *again, f"{seconds(slowest)} at most", verdict(slowest < WANTED_AGAIN_S)
    else:
        yield *wall, *NOT_MEASURED
        yield *again, *NOT_MEASURED
    ranked = having(rows["regret"], model=RANKING)
    if ranked:
        rank_s = median(ranked[-1].figures["rank_s"])
        yield *ranking, seconds(rank_s), verdict(rank_s < WANTED_RANK_S)
    else:
        yield *ranking, *NOT_MEASURED


def _budget(rows: Mapping[str, list[Row]]) -> Iterator[Line]:
    drawn = rows["budget"]
    budget = ("budget", f"0 of {DRAWS} random draws end with a plan over it")
    trials = ("trials out of memory or over the budget", "recorded, never fatal")
    if not drawn:
        yield *budget, *NOT_MEASURED
        yield *trials, *NOT_MEASURED
        return
    bad = sum(map(over, drawn))
    plans = sum(row.ok for row in drawn)
    told = f"{bad} of {len(drawn)} ({sum(map(over_in_tune, drawn))} as `tune` measured, "
    told += f"{sum(map(over_in_run, drawn))} in a fresh process); {plans} had a plan"
    yield *budget, told, verdict(bad == 0 and len(drawn) >= DRAWS)
    broken = sum(map(failed, drawn))
    yield *trials, f"{sum(map(infeasible_trials, drawn))} recorded; {broken} draws failed", verdict(broken == 0)
