"""Models whose passes end their process, in a process that is not the tests' own."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import EarlyExit, vectors

WIDTH = 384
BUDGET_GB = 0.030


class Fragile(EarlyExit):
    """Does a deed in some of its passes in processes of trials, counted over all of them in a file."""

    def __init__(self, deeds: dict[int, str], counter: Path) -> None:
        super().__init__(blocks=8, width=WIDTH)
        self.deeds = deeds
        self.counter = counter

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        if parent_process() is not None:
            with self.counter.open("a") as file:
                file.write(f"{os.getpid()}\n")
            deed = self.deeds.get(len(self.counter.read_text().split()))
            if deed is not None:
                DEEDS[deed]()
        return super().forward(x, order)


def _starve() -> None:
    raise MemoryError("host memory is exhausted")


def _hang() -> None:
    time.sleep(600)


def _fail() -> None:
    raise ArithmeticError("their own mistake")


DEEDS: dict[str, Any] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
    "hang": _hang,
    "out of memory": _starve,
    "raise": _fail,
}


def fragile(deeds: dict[int, str], counter: Path) -> tuple[nn.Module, torch.Tensor]:
    """The model, and its batch."""
    torch.manual_seed(0)
    return Fragile(deeds, counter).eval(), vectors(4, WIDTH)
