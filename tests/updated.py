"""Optimizers, an ordinary loop of their steps, and a device whose updates wait for the test."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autosp.batch import call
from autosp.devices import CpuDevice
from autosp.spec import Tier
from models import tokens
from trained import backward, loss_of

Make = Callable[[nn.Module], torch.optim.Optimizer]


def start_anew(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


RESETS: dict[str, Callable[[torch.optim.Optimizer], None]] = {
    "cleared": lambda optimizer: optimizer.state.clear(),
    "another": start_anew,
}
"""Ways to forget an optimizer's state that touch no parameter."""


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Weights that decay and biases that do not, in one layer."""
    decayed = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=torch.tensor(0.01), foreach=False)


class Custom(torch.optim.Optimizer):
    """Asks whether a parameter has an entry, not whether that is empty."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self.state:
                    self.state[parameter]["mean"] = torch.zeros_like(parameter)
                mean = self.state[parameter]["mean"].mul_(0.9).add_(parameter.grad)
                parameter.sub_(mean, alpha=group["lr"])


OPTIMIZERS: dict[str, Make] = {
    "custom": lambda model: Custom(model.parameters()),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "sgd with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "sgd over lists": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    "adam over lists": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, foreach=True),
    "adam fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "two groups": two_groups,
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05),
    "adagrad fused": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.05, fused=True),
    "adadelta": lambda model: torch.optim.Adadelta(model.parameters()),
    "adamax": lambda model: torch.optim.Adamax(model.parameters(), lr=0.01),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
    "radam": lambda model: torch.optim.RAdam(model.parameters(), lr=0.01),
    "asgd": lambda model: torch.optim.ASGD(model.parameters(), lr=0.05),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.01),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
    "muon": lambda model: torch.optim.Muon([one for one in model.parameters() if one.ndim == 2], lr=0.01),
}


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int = 5) -> None:
    """Clipping, a schedule, accumulation, both ways to let gradients go, and passes without autograd."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for step in range(steps):
        backward(model, batch, step)
        if step % 2:
            backward(model, batch, 100 + step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        (model if step % 3 else optimizer).zero_grad(set_to_none=step != 1)
        if step == 2:
            with torch.no_grad():
                call(model, batch)


def scaled_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Five steps of a scaler, of which one overflows. Its scale afterwards."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    for step in range(5):
        loss = loss_of(model(tokens(3, 7 + step)))
        scaler.scale(loss * torch.inf if step == 2 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return scaler.get_scale()


class Held(CpuDevice):
    """Its jobs begin when a test wants."""

    def __init__(self) -> None:
        super().__init__(slow_tier=Tier.HOST)
        self._free = threading.Event()

    def hold(self) -> None:
        """What is asked for from now on waits."""
        self._free.clear()
        self.work(self._free.wait)

    def release_soon(self) -> None:
        """From another thread, for this one may be waiting."""
        threading.Timer(0.02, self._free.set).start()

    def close(self) -> None:
        self._free.set()
        super().close()
