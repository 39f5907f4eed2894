"""Figures that must be small: predicting and ranking the settings of a deep model, and a second `tune`.

python studies/quick_answers.py
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import markdown, save
from torch import nn

import autosp
from autosp.cost_model.predict import predict
from autosp.search.space import grid, rank
from autosp.spec import Profile

DEPTHS = (80, 200)
REPEATS = 5


def stretched(profile: Profile, count: int) -> Profile:
    """The profile of a model of `count` layers, each like the profiled ones in turn, with unlike sizes and times."""
    partition = profile.partition
    layers = tuple(
        partition.layers[index % len(partition.layers)].model_copy(
            update={"index": index, "name": f"layers.{index}", "n_bytes": 4096 * (1000 + 37 * (index % 7))}
        )
        for index in range(count)
    )
    visits = tuple(
        profile.visits[index % len(profile.visits)].model_copy(
            update={"layer": index, "forward_s": 0.001 * (1 + index % 3)}
        )
        for index in range(count)
    )
    parts = partition.model_copy(update={"layers": layers, "visits": tuple(range(count))})
    return profile.model_copy(update={"partition": parts, "visits": visits})


@dataclass(frozen=True)
class Ranking:
    """How long it took to predict the grid, and to rank all settings under half of the weights."""

    settings: int
    fitting: int
    predict_s: list[float]
    rank_s: list[float]


def small() -> tuple[nn.Module, torch.Tensor]:
    """A model of eight layers, with a batch."""
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))), torch.randn(4, 512)


def small_profile() -> Profile:
    """Its profile on this machine, to be stretched."""
    return autosp.profile(*small(), progress=False)


def timed_ranking(profile: Profile, layers: int) -> Ranking:
    """Of the profile stretched to so many layers, several times."""
    wide = stretched(profile, layers)
    candidates = grid(wide)
    budget = wide.partition.total_bytes // 2 + wide.workspace_bytes
    predicted, ranked = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        predict(wide, candidates)
        predicted.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = rank(wide, budget)
        ranked.append(time.perf_counter() - start)
    return Ranking(len(candidates), len(found), predicted, ranked)


def main() -> None:
    """Measure them on one core."""
    torch.set_num_threads(1)
    model, batch = small()
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder) / "study.db"
        first = time.perf_counter()
        plan = autosp.tune(model, batch, 0.05, storage=storage, progress=False)
        first = time.perf_counter() - first
        again = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            assert autosp.tune(model, batch, 0.05, storage=storage, progress=False) == plan
            again.append(time.perf_counter() - start)
        second = time.perf_counter()
        autosp.tune(model, batch, 0.04, storage=storage, progress=False)
        second = time.perf_counter() - second
    profile = small_profile()
    rows = []
    figures: dict[str, Any] = {"tune_first_s": first, "tune_second_budget_s": second, "tune_again_s": again}
    for layers in DEPTHS:
        found = timed_ranking(profile, layers)
        grid_row = f"{layers} layers: every k, k' on the rungs, with residents: {found.settings} predictions"
        rows.append([grid_row, f"{median(found.predict_s):.3f}", ""])
        rank_row = f"{layers} layers: rank() under half the weights: {found.fitting} fit"
        rows.append([rank_row, f"{median(found.rank_s):.3f}", "1"])
        figures[f"predict_{layers}_s"] = found.predict_s
        figures[f"rank_{layers}_s"] = found.rank_s
    rows.append(["tune, first call", f"{first:.3f}", ""])
    rows.append(["tune, another budget", f"{second:.3f}", ""])
    rows.append(["tune, same fingerprint again", f"{median(again):.4f}", "0.1"])
    save("quick_answers", figures, markdown(["on one core", "seconds", "target"], rows))


if __name__ == "__main__":
    main()
