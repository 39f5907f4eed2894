"""What goes wrong while training leaves the model at rest, weights as they were, and the next step right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autosp.batch import call, equal
from autosp.devices import Region, VirtualDevice
from autosp.devices.virtual import VirtualCopy
from autosp.errors import HostMemoryError
from autosp.partition import bind
from autosp.partition.tensors import EXTENT_ALIGNMENT, align
from autosp.runtime.gradients import Gradients
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.training import lower_training
from autosp.tiers import Originals, host, open_store
from models import make, tokens, vectors
from trained import PLANS, SOME, Apply, assert_same_gradients, assert_same_weights, backward, loss_of, twins


class Fault(BaseException):
    """As Ctrl-C: nobody catches it on the way."""


def raising(error: BaseException) -> Callable[..., None]:
    """A hook."""

    def explode(*_: Any) -> None:
        raise error

    return explode


Place = Callable[[nn.Module, BaseException], Any]
PLACES: dict[str, Place] = {
    "a layer's forward": lambda model, error: model.blocks[2].up.register_forward_hook(raising(error)),
    "between layers": lambda model, error: model.blocks[4].register_forward_pre_hook(raising(error)),
    "a layer's backward": lambda model, error: model.blocks[2].up.register_full_backward_hook(raising(error)),
    "before a layer's backward": lambda model, error: model.blocks[1].register_full_backward_pre_hook(raising(error)),
    "a gradient": lambda model, error: model.blocks[3].down.weight.register_hook(raising(error)),
    "an accumulated gradient": lambda model, error: model.head.weight.register_post_accumulate_grad_hook(
        raising(error)
    ),
}
ERRORS = {"out of memory": torch.OutOfMemoryError("no room"), "interrupted": KeyboardInterrupt(), "any": Fault("any")}


def optimizers_of(*models: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(one.parameters(), lr=1e-2) for one in models]


def assert_the_next_steps_are_right(
    model: nn.Module, plain: nn.Module, batch: Any, optimizers: Sequence[torch.optim.Optimizer], steps: int = 2
) -> None:
    assert_same_weights(model, plain)
    for step in range(steps):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            backward(one, batch, step)
        assert_same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_weights(model, plain)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("plan", SOME)
def test_an_exception_anywhere(plan: str, place: str, error: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS[plan])
    optimizers = optimizers_of(model, plain)
    assert_the_next_steps_are_right(model, plain, batch, optimizers, 1)
    hook = PLACES[place](model, ERRORS[error])
    with pytest.raises(type(ERRORS[error])):
        backward(model, batch)
    hook.remove()
    arena = streamed._executor.loader.arena.untyped_storage().data_ptr()
    assert all(one.untyped_storage().data_ptr() != arena for one in model.parameters())
    assert_the_next_steps_are_right(model, plain, batch, optimizers)
    streamed.remove()
    assert_the_next_steps_are_right(model, plain, batch, optimizers)


class Fragile(nn.Module):
    """A layer that raises in its forward once it was called so often."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.calls_left = [-1]
        """A list, for attributes are as they were when a layer is computed again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls_left[0] -= 1
        if self.calls_left[0] == 0:
            raise Fault("in a forward")
        return torch.nn.functional.gelu(x @ self.weight)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("plan", ["recompute", "recompute some"])
def test_an_exception_while_activations_are_computed_again(plan: str, calls: int, apply: Apply) -> None:
    torch.manual_seed(0)
    model, plain = twins(nn.Sequential(*(Fragile() for _ in range(6))))
    batch = vectors()
    apply(model, batch, PLANS[plan])
    model[1].calls_left[0] = calls
    with pytest.raises(Fault, match="in a forward"):
        backward(model, batch)
    assert_the_next_steps_are_right(model, plain, batch, optimizers_of(model, plain))


@pytest.mark.parametrize("plan", SOME)
def test_an_exception_in_the_loss_or_in_clipping(plan: str, apply: Apply) -> None:
    """A forward without its backward, and a step without its update."""
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    optimizers = optimizers_of(model, plain)
    abandoned = loss_of(call(model, batch))
    assert_the_next_steps_are_right(model, plain, batch, optimizers)
    del abandoned
    for one in (model, plain):
        one.head.weight.grad.fill_(torch.inf)
        with pytest.raises(RuntimeError, match="non-finite"):
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0, error_if_nonfinite=True)
    assert_the_next_steps_are_right(model, plain, batch, optimizers)


class Interrupted(torch.optim.SGD):
    """Its update ends in the middle, once."""

    left = 5

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.left -= 1
            if self.left == 0:
                raise Fault("in the update")
            parameter.sub_(0.1 * parameter.grad)


@pytest.mark.parametrize("plan", SOME)
def test_an_exception_in_the_update(plan: str, apply: Apply) -> None:
    """What it had updated is updated, as in plain training; the next forward sees it."""
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    optimizers = [Interrupted(one.parameters(), lr=0.1) for one in (model, plain)]
    before = [one.clone() for one in model.parameters()]
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        backward(one, batch)
        with pytest.raises(Fault, match="in the update"):
            optimizer.step()
    changed = [not equal(*both) for both in zip(before, model.parameters(), strict=True)]
    assert sum(changed) == 4
    assert_the_next_steps_are_right(model, plain, batch, optimizers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", SOME)
def test_masters_in_the_user_s_loop(plan: str, dtype: torch.dtype, apply: Apply) -> None:
    """Weights of half precision, updated in full: a step that overflows is left out, one that fails can be repeated."""
    model, batch = make("stack")
    model, plain = twins(model.to(dtype))
    apply(model, batch, PLANS[plan])
    masters = [[one.detach().float() for one in each.parameters()] for each in (model, plain)]
    optimizers = [torch.optim.Adam(each, lr=1e-2) for each in masters]
    for step in range(5):
        before = [one.detach().clone() for one in model.parameters()]
        for one, mine, optimizer in zip((model, plain), masters, optimizers, strict=True):
            (loss_of(call(one, tokens(3, 7 + step))) * (torch.inf if step == 2 else 2.0**4)).backward()
            for master, parameter in zip(mine, one.parameters(), strict=True):
                master.grad = parameter.grad.float() / 2.0**4
            if all(bool(master.grad.isfinite().all()) for master in mine):
                optimizer.step()
            one.zero_grad()
            with torch.no_grad():
                for master, parameter in zip(mine, one.parameters(), strict=True):
                    parameter.copy_(master)
        assert_same_weights(model, plain)
        assert equal(before, [one.detach() for one in model.parameters()]) == (step == 2)


class Faulty(VirtualDevice):
    """Fails when a call of the kind in `fails` is the one of that number."""

    def __init__(self) -> None:
        super().__init__(bytes_per_s=1e6)
        self.fails: tuple[str, int] | None = None
        self.calls: Counter[str] = Counter()

    def copy(
        self,
        regions: Sequence[Region],
        target: torch.Tensor,
        after: float | None = None,
        written: VirtualCopy | None = None,
    ) -> VirtualCopy:
        self._count("copy")
        return super().copy(regions, target, after, written)

    def send(self, source: torch.Tensor, target: torch.Tensor, after: float | None = None) -> VirtualCopy:
        self._count("send")
        return super().send(source, target, after)

    def wait(self, copied: VirtualCopy | None) -> None:
        self._count("wait")
        super().wait(copied)

    def _count(self, kind: str) -> None:
        self.calls[kind] += 1
        if self.fails == (kind, self.calls[kind]):
            raise torch.OutOfMemoryError(f"no room for a {kind}")


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["copy", "wait", "send"])
@pytest.mark.parametrize("plan", SOME)
def test_a_transfer_that_fails(plan: str, kind: str, share: float, accumulated: bool, apply: Apply) -> None:
    """Of weights or of gradients, after that share of a step's: in the forward or in the backward pass."""
    model, batch = make("stack")
    model, plain = twins(model)
    device = Faulty()
    apply(model, batch, PLANS[plan], device=device)
    optimizers = optimizers_of(model, plain)
    assert_the_next_steps_are_right(model, plain, batch, optimizers)
    if not accumulated:
        optimizers[0].zero_grad()
    device.calls.clear()
    backward(model, batch)
    count = device.calls[kind]
    if not accumulated:
        optimizers[0].zero_grad()
    device.calls.clear()
    device.fails = kind, max(1, round(share * count))
    with pytest.raises(torch.OutOfMemoryError, match=f"no room for a {kind}"):
        backward(model, batch)
    assert_the_next_steps_are_right(model, plain, batch, optimizers)


@pytest.mark.parametrize("plan", SOME)
def test_a_step_that_the_scaler_skips(plan: str, apply: Apply) -> None:
    """Gradients that overflow: no weight changes, the scale is halved, and the steps after it are plain training's."""
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    optimizers = optimizers_of(model, plain)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2) for _ in (model, plain)]
    scales = []
    for step in range(6):
        before = [one.clone() for one in model.parameters()]
        for one, optimizer, scaler in zip((model, plain), optimizers, scalers, strict=True):
            torch.manual_seed(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(call(one, tokens(3, 11 + step)))
            if step == 2:
                loss = loss * torch.inf
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert_same_weights(model, plain)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
        assert equal(before, list(model.parameters())) == (step == 2)
    assert scales == [256, 512, 256, 256, 512, 512]


def test_gradients_that_ram_has_no_room_for(apply: Apply, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before any memory is taken: when the plan is applied, or when more parameters are trained."""
    model, batch = make("stack")
    model, plain = twins(model)
    weight = model.head.weight
    for one in (model, plain):
        for parameter in one.parameters():
            parameter.requires_grad_(parameter is one.blocks[0].down.weight)
    streamed = apply(model, batch, PLANS["k=1 k'=1"], device=VirtualDevice(bytes_per_s=1e9))
    n_bytes = align(weight.numel() * weight.element_size(), EXTENT_ALIGNMENT)
    staged = 2 * n_bytes if weight.numel() > model.blocks[0].down.weight.numel() else 0
    monkeypatch.setattr(host, "available_bytes", lambda: n_bytes + staged - 1)
    weight.requires_grad_()
    with pytest.raises(
        HostMemoryError, match=r"room for the gradients of 1 streamed parameters takes 0\.00 GB of host"
    ):
        backward(model, batch)
    monkeypatch.setattr(host, "available_bytes", lambda: n_bytes + staged)
    plain.head.weight.requires_grad_()
    for one in (model, plain):
        backward(one, batch)
    assert_same_gradients(model, plain)
    streamed.remove()
    monkeypatch.setattr(host, "available_bytes", lambda: 10)
    with pytest.raises(HostMemoryError, match="close other programs, train fewer parameters"):
        Gradients(bind(model, streamed._bound.partition).layers, VirtualDevice(bytes_per_s=1e9))


class Crowded(VirtualDevice):
    """Host memory may run out."""

    full = False

    def pin(self, memory: torch.Tensor) -> None:
        if self.full:
            raise MemoryError("no room for gradients")


def test_no_room_for_gradients_leaves_the_model_as_it_was(apply: Apply, tmp_path: Path) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    device = Crowded(bytes_per_s=1e9)
    candidate = PLANS["k=3 k'=1"]
    applied = apply(model, batch, candidate, device=device)
    bound = bind(model, applied._bound.partition)
    applied.remove()
    own_bytes = [one.untyped_storage().nbytes() for one in model.parameters()]
    store = open_store(device, bound.layers, tmp_path, Originals.FREED)
    device.full = True
    with pytest.raises(MemoryError):
        schedule = lower_training(candidate, bound.partition)
        StreamedModel(bound, schedule, device, store, Originals.FREED, store.close, mode="training")
    assert [one.untyped_storage().nbytes() for one in model.parameters()] == own_bytes
    assert_same_weights(model, plain)
