"""Kills training processes by SIGKILL at random moments; each goes on from its last checkpoint, to the same weights.

python studies/train_kills.py --kills 40

A process trains a small model under a plan and saves a checkpoint after every step. It is killed after a random time,
wherever it is then; the next one goes on. At the end the weights must have the bits of an undisturbed run of plain
torch: nothing that a checkpoint held was lost, and nothing was done twice.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from record import markdown, save
from torch import nn

import autosp
from autosp.batch import equal

STEPS = 10
LONGEST_S = 0.5
"""From the beginning of a process's training to its kill: some have ended by then."""

Event = Callable[[str, int], None]
"""Told where training is: a place, and the number of the step."""


@dataclass(frozen=True)
class KilledAt:
    """Ends its process as SIGKILL does, at one place of one step."""

    place: str
    step: int

    def __call__(self, place: str, step: int) -> None:
        """Now, or not yet."""
        if (place, step) == (self.place, self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def nothing(place: str, step: int) -> None:
    """Nobody is told."""


def build() -> nn.Sequential:
    """The model, the same in every process."""
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.2), nn.Linear(128, 128)) for _ in range(4))
    return nn.Sequential(*blocks).train()


def loss_step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """A loss."""
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def train(folder: Path, streamed: bool, overlap: bool = False, event: Event = nothing, begins: Any = None) -> None:
    """Train from the last checkpoint in `folder`, or from the beginning, to the end.

    `begins`: an event of multiprocessing, set where there is nothing left to do but to train.
    """
    torch.set_num_threads(1)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if not streamed:
        _loop(folder, model, optimizer, event)
        return
    plan = autosp.plan(
        model, torch.ones(2, 128), k=3, k_prime=1, recompute=3, mode="training", step=loss_step, device="cpu"
    )
    with autosp.apply(model, plan, optimizer=optimizer if overlap else None):
        if begins is not None:
            begins.set()
        _loop(folder, model, optimizer, event)


def _loop(folder: Path, model: nn.Sequential, optimizer: torch.optim.Optimizer, event: Event) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    path = folder / "checkpoint.pt"
    first = 0
    if path.exists():
        saved = torch.load(path)
        first = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    now = first
    model[2].register_forward_hook(lambda *_: event("forward", now))
    model[1].register_full_backward_hook(lambda *_: event("backward", now))
    for now in range(first, STEPS):
        torch.manual_seed(now)
        loss_step(model, torch.randn(8, 128)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        event("before the update", now)
        optimizer.step()
        event("after the update", now)
        scheduler.step()
        optimizer.zero_grad()
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"step": now + 1, **states}, folder / "unfinished.pt")
        event("while saving", now)
        (folder / "unfinished.pt").replace(path)
        event("between steps", now)


def context() -> BaseContext:
    """Processes that begin with all imports done."""
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["train_kills", "torch._dynamo"])  # whatever applies a plan imports the compiler
    return chosen


def run(folder: Path, streamed: bool, overlap: bool, event: Event = nothing, longest_s: float | None = None) -> bool:
    """One process's life. Whether it came to its end; else it was killed, by itself or after training for so long."""
    begins = context().Event()
    arguments = (folder, streamed, overlap, event, begins)
    process = context().Process(target=train, args=arguments)  # type: ignore[attr-defined]
    process.start()
    while longest_s is not None and process.exitcode is None and not begins.wait(0.1):
        pass
    process.join(longest_s)
    if process.exitcode is None:
        process.kill()
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a training process ended with {process.exitcode}")
    return bool(process.exitcode == 0)


def final(folder: Path) -> dict[str, object]:
    """The last checkpoint."""
    saved: dict[str, object] = torch.load(folder / "checkpoint.pt")
    return saved


@dataclass
class Figures:
    """What became of all runs."""

    runs: int = 0
    kills: int = 0
    kills_before_the_first_checkpoint: int = 0
    runs_with_the_weights_of_an_undisturbed_one: int = 0


def main() -> None:
    """Kill, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments, figures = random.Random(arguments.seed), Figures()
    with tempfile.TemporaryDirectory() as parent:
        plain = Path(parent) / "plain"
        plain.mkdir()
        run(plain, streamed=False, overlap=False)
        while figures.kills < arguments.kills:
            folder = Path(parent) / f"run-{figures.runs}"
            folder.mkdir()
            overlap = figures.runs % 2 == 1
            while figures.kills < arguments.kills:
                if run(folder, True, overlap, longest_s=moments.uniform(0.0, LONGEST_S)):
                    break
                figures.kills += 1
                figures.kills_before_the_first_checkpoint += not (folder / "checkpoint.pt").exists()
            else:
                run(folder, True, overlap)
            figures.runs += 1
            figures.runs_with_the_weights_of_an_undisturbed_one += equal(final(folder), final(plain))
    rows = [[label.replace("_", " "), str(value)] for label, value in asdict(figures).items()]
    save("train_kills_cpu", asdict(figures), markdown(["", ""], rows))
    if figures.runs_with_the_weights_of_an_undisturbed_one < figures.runs:
        raise SystemExit("a run ended with other weights")


if __name__ == "__main__":
    main()
