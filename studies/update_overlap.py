"""What updating beside the next forward gains on a CPU, whose cores do both, over links of several paces.

python studies/update_overlap.py [--rounds 6]

Steps of Adam with clipping, on a stack of linear layers; with and without `optimizer=`, by turns, in one process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from record import markdown, save
from torch import nn

from autosp.devices import CpuDevice
from autosp.partition import bind
from autosp.profiler.training import training_partition
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.training import lower_training
from autosp.schedule.updates import with_updates
from autosp.spec import Candidate, Partition, Tier
from autosp.tiers import Originals, open_store
from autosp.workload import Workload

WIDTH = 1536
LAYERS = 12
ROWS = (8, 256)
"""Of a batch: with few, the link is what a step waits for; with many, compute."""
PACES = (1e9, 4e9, None)
"""Bytes per second of the link; None: a copy in memory."""
CANDIDATE = Candidate(k=3, k_prime=1)


def loss_step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """A loss."""
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def steps_s(rows: int, pace: float | None, overlap: bool, parts: Partition, rounds: int) -> list[float]:
    """Seconds of each step, the first two left out."""
    torch.manual_seed(0)
    model = stack()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)
    device = CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=pace)
    bound = bind(model, parts)
    schedule = lower_training(CANDIDATE, bound.partition)
    schedule = with_updates(schedule) if overlap else schedule
    batch = torch.randn(rows, WIDTH)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(device, bound.layers, Path(folder), Originals.FREED)
        with StreamedModel(
            bound,
            schedule,
            device,
            store,
            Originals.FREED,
            store.close,
            mode="training",
            optimizer=optimizer if overlap else None,
        ):
            for _ in range(rounds + 2):
                begin = time.perf_counter()
                loss_step(model, batch).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seconds.append(time.perf_counter() - begin)
    device.close()
    return seconds[2:]


def stack() -> nn.Module:
    """The model."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).train()


def main() -> None:
    """Measure, by turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    figures = {}
    table = []
    device = CpuDevice(slow_tier=Tier.HOST)
    for rows in ROWS:
        workload = Workload.of(stack(), torch.randn(rows, WIDTH), loss_step, "training", device)
        with tempfile.TemporaryDirectory() as folder:
            parts = training_partition(workload, device, Path(folder))
        for pace in PACES:
            samples: dict[bool, list[float]] = {False: [], True: []}
            for overlap in (False, True, False, True):
                samples[overlap] += steps_s(rows, pace, overlap, parts, rounds)
            name = f"{rows} rows, " + ("memory" if pace is None else f"{pace / 1e9:g} GB/s")
            figures[name] = {"at once": samples[False], "beside": samples[True]}
            at_once_s, beside_s = median(samples[False]), median(samples[True])
            table.append([name, f"{at_once_s:.3f}", f"{beside_s:.3f}", f"{at_once_s / beside_s:.2f}"])
    device.close()
    save("update_overlap_cpu", figures, markdown(["", "at once, s a step", "beside, s a step", "gain"], table))


if __name__ == "__main__":
    main()
