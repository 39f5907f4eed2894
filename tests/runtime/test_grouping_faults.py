"""What goes wrong in one microbatch ends the others: the model is at rest, gradients are what they were."""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.errors import SettingError
from autosp.runtime import relay as relay_module
from autosp.runtime.relay import THREAD_NAME, Relay, StoppedError
from models import make
from trained import (
    PLANS,
    SOME,
    Apply,
    assert_same_gradients,
    assert_same_weights,
    backward_step,
    loss_of,
    loss_step,
    twins,
)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Nor for long one that was about to begin when Ctrl-C came: see [Note: unwinding]."""
    yield
    deadline = time.monotonic() + 10
    while left := [one.name for one in threading.enumerate() if one.name.startswith(THREAD_NAME)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def raising(error: BaseException) -> Callable[..., None]:
    """A hook that raises in the third microbatch."""

    def explode(*_: Any) -> None:
        if threading.current_thread().name == f"{THREAD_NAME}-2":
            raise error

    return explode


PLACES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "its first layer": lambda model, hook: model.embed.register_forward_hook(hook),
    "a layer's forward": lambda model, hook: model.blocks[2].up.register_forward_hook(hook),
    "between layers": lambda model, hook: model.blocks[4].register_forward_pre_hook(hook),
    "a layer's backward": lambda model, hook: model.blocks[2].up.register_full_backward_hook(hook),
    "a gradient": lambda model, hook: model.blocks[3].down.weight.register_hook(hook),
    "the last gradient": lambda model, hook: model.embed.weight.register_post_accumulate_grad_hook(hook),
}
ERRORS = {
    "out of memory": torch.OutOfMemoryError("no room"),
    "interrupted": KeyboardInterrupt(),
    "any": KeyError("any"),
}


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_in_the_third_microbatch(place: str, error: str, accumulated: bool, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    plan = SOME[len(place) % len(SOME)]
    streamed = apply(model, batch, PLANS[plan])
    batches = [(batch + number) % 500 for number in range(4)]
    if accumulated:
        loss_step(model, batch).backward()
        loss_step(plain, batch).backward()
    before = [one.grad for one in model.parameters()]
    hook = PLACES[place](model, raising(ERRORS[error]))
    with pytest.raises(type(ERRORS[error])):
        streamed.backward_group(batches, loss_step)
    hook.remove()
    arena = streamed._executor.loader.arena.untyped_storage().data_ptr()
    assert all(one.untyped_storage().data_ptr() != arena for one in model.parameters())
    assert all(one.grad is grad for one, grad in zip(model.parameters(), before, strict=True))
    assert_same_gradients(model, plain)
    assert_same_weights(model, plain)
    for _ in range(2):
        streamed.backward_group(batches, loss_step)
        for one in batches:
            loss_step(plain, one).backward()
    assert_same_gradients(model, plain)
    loss_step(model, batch).backward()
    loss_step(plain, batch).backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("backward", [False, True])
def test_ctrl_c_comes_to_the_thread_that_waits(backward: bool, apply: Apply, can_be_interrupted: None) -> None:
    """As the kernel delivers it: to the main thread, while a microbatch computes."""
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])

    def interrupt(*_: Any) -> None:
        if threading.current_thread().name == f"{THREAD_NAME}-1":
            _thread.interrupt_main()

    block = model.blocks[2].up
    hook = block.register_full_backward_hook(interrupt) if backward else block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        streamed.backward_group([batch] * 3, loss_step)
    hook.remove()
    assert_same_gradients(model, plain)
    streamed.backward_group([batch] * 2, loss_step)
    for _ in range(2):
        loss_step(plain, batch).backward()
    assert_same_gradients(model, plain)


def test_an_exception_in_inference() -> None:
    model, batch = make("stack")
    with torch.no_grad():
        expected = model(batch)
    streamed = autosp.apply(model, autosp.plan(model, batch, k=3, k_prime=1, device="cpu"))

    def fail(model: nn.Module, batch: Any) -> Any:
        output = model(batch)
        if threading.current_thread().name == f"{THREAD_NAME}-1":
            raise KeyError("afterwards")
        return output

    with pytest.raises(KeyError, match="afterwards"):
        streamed.run_group([batch] * 4, fail)
    assert equal(streamed.run_group([batch] * 2), [expected] * 2)
    assert equal(model(batch), expected)
    streamed.remove()


def test_mistakes_are_named(apply: Apply) -> None:
    model, batch = make("stack")
    streamed = apply(model.train(), batch, PLANS["k=3 k'=1"])

    def nested(model: nn.Module, batch: Any) -> torch.Tensor:
        streamed.run_group([batch])
        return loss_step(model, batch)

    with pytest.raises(SettingError, match="begins inside a pass"):
        streamed.backward_group([batch] * 2, nested)
    with pytest.raises(SettingError, match="returns the loss"):
        streamed.backward_group([batch], lambda model, batch: model(batch))
    with pytest.raises(SettingError, match=r"calls backward\(\) itself"):
        streamed.backward_group([batch], backward_step)
    model.zero_grad()
    assert all(one.grad is None for one in model.parameters())
    streamed.remove()
    with pytest.raises(SettingError, match="removed"):
        streamed.run_group([batch])


def test_a_plan_for_inference_does_not_train() -> None:
    model, batch = make("stack")
    streamed = autosp.apply(model, autosp.plan(model, batch, k=2, k_prime=1, device="cpu"))
    with pytest.raises(SettingError, match="mode='training'"):
        streamed.backward_group([batch], loss_step)
    streamed.remove()


def test_other_threads_wait_for_the_end_of_a_group(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    outputs: list[torch.Tensor] = []

    def ask() -> None:
        with torch.no_grad():
            outputs.append(model(batch))

    other = threading.Thread(target=ask)

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        output = model(batch)
        if other.ident is None:
            other.start()
        return loss_of(output)

    streamed.backward_group([batch] * 3, step)
    other.join(30)
    for _ in range(3):
        loss_step(plain, batch).backward()
    assert_same_gradients(model, plain)
    with torch.no_grad():
        assert equal(outputs, [plain(batch)])


def test_those_that_began_are_unwound_and_others_do_not_begin() -> None:
    ended: list[str] = []

    def first() -> None:
        try:
            relay.hand_over(1)
        except StoppedError:
            ended.append("first")
            with pytest.raises(StoppedError):
                relay.check()
            raise

    def second() -> None:
        raise KeyError("second")

    relay = Relay([first, second, lambda: ended.append("third")], lambda: relay.left[0])
    with pytest.raises(KeyError, match="second"):
        relay.run()
    assert ended == ["first"]


def test_what_cannot_begin_leaves_no_thread() -> None:
    def nobody() -> int:
        raise KeyError("nobody is next")

    with pytest.raises(KeyError, match="nobody is next"):
        Relay([lambda: None] * 3, nobody).run()


LOOKS = {"_start", "_give_on", "_give", "_ending_all", "release", "notify", "_is_owned", "is_set"}
"""Functions of the relay, and of what its threads wait with: at the beginning of each Python looks for signals."""


def interrupted(relay: Relay, moment: int) -> bool:
    """Run it, with Ctrl-C at one of those moments. Whether the run came to it."""
    looks = 0

    def look(frame: FrameType, *_: Any) -> None:
        nonlocal looks
        if frame.f_code.co_name in LOOKS and frame.f_code.co_filename in (relay_module.__file__, threading.__file__):
            looks += 1
            if looks == moment:
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(look)
    try:
        relay.run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_ctrl_c_at_any_moment_ends_all() -> None:
    def made() -> Relay:
        relay = Relay([lambda: relay.hand_over(1), lambda: None], lambda: relay.left[0])
        return relay

    moment, relay = 1, made()
    while interrupted(relay, moment):
        for thread in relay._threads:
            if thread.is_alive():
                thread.join(10)
            assert not thread.is_alive()
        moment, relay = moment + 1, made()
    assert moment > 5
