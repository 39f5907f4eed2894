"""Ctrl-C at every place: the thread's modes are as before, the next pass is right, and a plan can be removed."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import CpuDevice
from autosp.intercept import is_intercepted
from autosp.settings import settings
from autosp.spec import Tier
from trained import PLANS, Apply, assert_same_gradients, backward, twins

BEFORE_REMOVAL = 3
"""Places where nothing was begun yet, and the plan is applied as ever."""

PACKAGE = str(Path(autosp.__file__).parent)


@contextmanager
def interrupted_at(number: int) -> Iterator[list[int]]:
    """KeyboardInterrupt on entry of that call of a function of autosp, counted from 0; the list says how many came."""
    calls = [0]

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            calls[0] += 1
            if calls[0] == number + 1:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield calls
    finally:
        sys.settrace(before)


def at_every_place(run: Callable[[], object], check: Callable[[int], object]) -> int:
    """Run until it is interrupted nowhere; `check` after each time. How many places there were."""
    number = 0
    while True:
        with interrupted_at(number) as calls, suppress(KeyboardInterrupt):
            run()
        if calls[0] <= number:
            return number
        check(number)
        number += 1


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Of generators that were interrupted while they were collected."""


def small() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(2, 8)


@pytest.mark.parametrize("slow_tier", [Tier.HOST, Tier.DISK])
def test_a_pass(slow_tier: Tier) -> None:
    model, batch = small()
    expected = model(batch)
    device = CpuDevice(slow_tier=slow_tier)
    plan = autosp.plan(model, batch, k=2, k_prime=1, residents=1, device=device)
    streamed = autosp.apply(model, plan, device=device)

    def check(place: int) -> None:
        assert torch.is_grad_enabled(), place
        assert equal(model(batch), expected.detach()), place

    places = at_every_place(lambda: model(batch), check)
    assert places > 50
    streamed.remove()
    device.close()
    assert equal(model(batch), expected)


def test_a_training_pass(apply: Apply) -> None:
    model, batch = small()
    model, plain = twins(model)
    apply(model, batch, PLANS["k=3 k'=1"])
    backward(plain, batch)

    def check(place: int) -> None:
        assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled(), place
        model.zero_grad()
        backward(model, batch)
        assert_same_gradients(model, plain)

    places = at_every_place(lambda: backward(model, batch), check)
    assert places > 50


def packed_files() -> list[str]:
    """Of this test: those that are open, and those that are mapped."""
    names = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    names += Path("/proc/self/maps").read_text().splitlines()
    return [name for name in names if f"{settings().cache_dir}/packed-" in name]


@pytest.mark.parametrize(
    ("mode", "slow_tier"), [("inference", Tier.HOST), ("inference", Tier.DISK), ("training", Tier.HOST)]
)
def test_removal(mode: str, slow_tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a `with` has no handle to try again with: the model is an ordinary one whatever came."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's own keeps the frames
    model, batch = small()
    expected, weights = model(batch).detach(), [one.clone() for one in model.parameters()]
    device = CpuDevice(slow_tier=slow_tier)
    step = None if mode == "inference" else lambda m, b: m(b).sum()
    plan = autosp.plan(model, batch, k=2, k_prime=1, residents=1, device=device, mode=mode, step=step)
    ready: list[autosp.StreamedModel[nn.Module]] = [autosp.apply(model, plan, device=device)]

    def check(place: int) -> None:
        if place < BEFORE_REMOVAL:
            assert equal(model(batch).detach(), expected), place
            ready[-1].remove()
        assert not is_intercepted(model), place
        if packed_files():
            gc.collect()  # frames of the error
        assert packed_files() == [], place
        assert equal(list(model.parameters()), weights), place
        assert equal(model(batch).detach(), expected), place
        ready.append(autosp.apply(model, plan, device=device))

    gc.freeze()  # else each collection takes long
    places = at_every_place(lambda: ready[-1].remove(), check)
    gc.unfreeze()
    assert places > 20
    device.close()


def test_removal_waits_for_a_pass_of_another_thread() -> None:
    model, batch = small()
    expected = model(batch).detach()
    plan = autosp.plan(model, batch, k=2, k_prime=1, device="cpu")
    streamed = autosp.apply(model, plan)
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        go_on.wait(60)

    hook = model[1].register_forward_pre_hook(pause)
    outputs: list[torch.Tensor] = []
    passing = threading.Thread(target=lambda: outputs.append(model(batch)))
    passing.start()
    assert inside.wait(60)
    removing = threading.Thread(target=streamed.remove)
    removing.start()
    removing.join(0.5)
    assert removing.is_alive()
    go_on.set()
    passing.join()
    removing.join()
    hook.remove()
    assert equal(outputs, [expected])
    assert not is_intercepted(model)
