"""What loops of users do around a streamed model: their checkpoints, their hooks, batches that they skip."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import autosp
from autosp.devices import VirtualDevice
from autosp.runtime.streamed_model import StreamedModel
from models import make, tokens, vectors
from trained import (
    PLANS,
    SOME,
    Apply,
    assert_same_gradients,
    assert_same_weights,
    backward,
    loss_step,
    twins,
)


class Branching(nn.Module):
    """A block with two outputs. One goes on to the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(64, 64, bias=False)
        self.branch = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.trunk(x), self.branch(x)


class Branches(nn.Module):
    """Blocks that the model itself checkpoints; what branches off may have a loss of its own, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Branching() for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, others = self.stem(x), []
        for block in self.blocks:
            x, other = checkpoint(block, x, use_reentrant=False)
            others.append(other)
        return x, torch.stack(others)


def first_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch)[0].square().mean()
    return loss


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("losses", ["the first", "the second", "one after the other", "both"])
def test_a_checkpoint_over_layers_that_a_loss_does_not_need(losses: str, plan: str, apply: Apply) -> None:
    """It computes them again nevertheless, in the middle of the backward of layers before them."""
    torch.manual_seed(0)
    model, plain = twins(Branches())
    batch = vectors()
    apply(model, batch, PLANS[plan], step=first_loss)
    for one in (model, plain):
        output, others = one(batch)
        first, second = output.square().mean(), others.square().mean()
        if losses == "the first":
            first.backward()
        elif losses == "the second":
            second.backward()
        elif losses == "both":
            (first + second).backward()
        else:
            first.backward(retain_graph=True)
            second.backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", ["recompute", "recompute some", "k=1 k'=1"])
def test_running_statistics_in_a_checkpoint_of_the_user(plan: str, reentrant: bool, apply: Apply) -> None:
    """They are updated twice, as in plain torch."""

    class Counting(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self:
                x = checkpoint(part, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(0)
    parts = (nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64)) for _ in range(4))
    model, plain = twins(Counting(*parts))
    batch = vectors().requires_grad_()
    apply(model, batch, PLANS[plan])
    for one in (model, plain):
        backward(one, batch)
    assert_same_gradients(model, plain)
    assert_same_weights(model, plain)


class InBackward:
    """Updates every parameter as soon as its gradient is complete, and drops the gradient: no optimizer is needed."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: dict[str, float] = {}
        self.handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, name))
            for name, parameter in model.named_parameters()
        ]

    def _update(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None and parameter.grad.device == parameter.device
        self.norms[name] = parameter.grad.norm().item()
        with torch.no_grad():
            parameter.sub_(parameter.grad, alpha=0.1)
        parameter.grad = None


@pytest.mark.parametrize("of_its_own", [False, True])
@pytest.mark.parametrize("when", ["before the first pass", "after the first pass"])
@pytest.mark.parametrize("plan", SOME)
def test_hooks_that_update_in_the_backward_pass(plan: str, when: str, of_its_own: bool, apply: Apply) -> None:
    """They find whole gradients, whatever is still on its way."""
    model, batch = make("stack")
    model, plain = twins(model)
    device = VirtualDevice(bytes_per_s=1e6) if of_its_own else None
    apply(model, batch, PLANS[plan], device=device)
    if when == "after the first pass":
        for one in (model, plain):
            backward(one, batch)
            one.zero_grad()
    hooks = [InBackward(one) for one in (model, plain)]
    for step in range(3):
        for one in (model, plain):
            backward(one, tokens(2, 5 + step))
        assert hooks[0].norms == hooks[1].norms
        assert_same_weights(model, plain)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_planning_tells_no_hook_of_gradients() -> None:
    model, batch = make("stack")
    before = copy.deepcopy(model)
    hooks = InBackward(model)
    autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=loss_step, device="cpu")
    assert_same_weights(model, before)
    assert not hooks.norms
    backward(model, batch)
    assert set(hooks.norms) == {name for name, _ in model.named_parameters()}


class SendsSeen(VirtualDevice):
    """Notes how far the backward pass had come at each send."""

    def __init__(self) -> None:
        super().__init__(bytes_per_s=1e6)
        self.streamed: StreamedModel[nn.Module] | None = None
        self.visits: list[int] = []

    def send(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        if self.streamed is not None:
            self.visits.append(len(self.streamed.backward_visits))
        return super().send(source, target, after)


@pytest.mark.parametrize("skipped", ["loss", "forward that raises"])
def test_gradients_leave_at_once_after_a_batch_that_was_skipped(skipped: str, apply: Apply) -> None:
    """A graph that is gone is no second call of its layers, whose gradients would have to be added on the device."""
    model, batch = make("stack")
    device = SendsSeen()
    device.streamed = apply(model, batch, PLANS["k=1 k'=1"], device=device)
    backward(model, batch)
    usual = [*device.visits]
    model.zero_grad()
    if skipped == "loss":
        loss_step(model, batch)
    else:
        hook = model.blocks[3].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss_step(model, batch)
        hook.remove()
    device.visits.clear()
    backward(model, batch)
    assert device.visits == usual
    assert usual[0] < usual[-1]


@pytest.mark.parametrize("zeroing", [None, False, True])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("of_its_own", [False, True])
def test_gradients_after_a_backward_that_raised(
    of_its_own: bool, accumulated: bool, zeroing: bool | None, apply: Apply
) -> None:
    """What autograd had added is there; what the user zeroed meanwhile, in place or not, stays so."""
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS["k=3 k'=1"], device=VirtualDevice(bytes_per_s=1e6) if of_its_own else None)
    for one in (model, plain):
        if accumulated:
            backward(one, batch)
        hook = one.blocks[1].up.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backward(one, tokens(2, 5))
        hook.remove()
        if zeroing is not None:
            one.zero_grad(set_to_none=zeroing)
        backward(one, tokens(2, 7))
    assert_same_gradients(model, plain)


def quantised(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Powers of two: what comes back is what there was, and nothing can be made of a tensor without elements."""
    largest = tensor.abs().max()
    return tensor / 4, largest


def test_hooks_of_the_user_that_take_no_empty_tensor(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS["k=1 k'=1"])
    for one in (model, plain):
        with saved_tensors_hooks(
            lambda tensor: quantised(tensor) if tensor.is_floating_point() else (tensor, None),
            lambda packed: packed[0] if packed[1] is None else packed[0] * 4,
        ):
            loss = loss_step(one, batch)
        loss.backward()
    assert_same_gradients(model, plain)
