"""Activations in host memory between forward and backward: every bit as in plain training, every byte counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autosp.batch import equal
from autosp.devices import CpuDevice, Device, VirtualDevice
from autosp.errors import ModelChangedError
from autosp.runtime.streamed_model import StreamedModel
from autosp.spec import Candidate, Tier
from models import Shared, Stack
from trained import (
    ALL,
    Apply,
    assert_same_gradients,
    assert_same_weights,
    backward,
    backward_both,
    loss_of,
    loss_step,
    twins,
)

ROWS = 128
"""Of a batch: 32 kB of activations for each 64 features."""


class Attention(nn.Module):
    """Heads that read one another's tokens, with dropout, and a residual MLP."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in self.qkv(self.norm(x)).chunk(3, -1))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.out(seen.transpose(1, 2).flatten(-2)))


def transformer() -> tuple[nn.Module, Any]:
    return nn.Sequential(*(Attention() for _ in range(5))), torch.randn(4, 32, 64)


def dropping() -> tuple[nn.Module, Any]:
    blocks = (nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 64)) for _ in range(4))
    return nn.Sequential(*blocks), torch.randn(ROWS, 64)


def convolutions() -> tuple[nn.Module, Any]:
    parts = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(5))
    return nn.Sequential(*parts), torch.randn(4, 8, 16, 16)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "transformer": transformer,
    "stack": lambda: (Stack(), torch.randint(500, (4, 32))),
    "shared": lambda: (Shared(), torch.randn(ROWS, 64)),
    "dropout": dropping,
    "convolutions": convolutions,
}

PLANS = {
    "k=1 k'=1": Candidate(k=1, k_prime=1, offload=ALL),
    "k=3 k'=1": Candidate(k=3, k_prime=1, offload=ALL[::2]),
    "k=4 k'=2": Candidate(k=4, k_prime=2, offload=ALL),
    "residents": Candidate(k=3, k_prime=1, residents=(1,), offload=(0, *ALL[2:])),
    "recompute first": Candidate(k=2, k_prime=1, recompute=ALL[:2], offload=ALL[2:]),
    "recompute last": Candidate(k=2, k_prime=1, recompute=ALL[4:], offload=ALL[:4]),
}

DEVICES: dict[str, Callable[[], Device]] = {
    "cpu": lambda: CpuDevice(slow_tier=Tier.HOST),
    "slow link": lambda: CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=2e8),
    "virtual": lambda: VirtualDevice(bytes_per_s=1e6),
}


def any_model(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return MODELS[name]()


CASES = [
    *((name, plan, "virtual") for name in MODELS for plan in PLANS),
    *((name, "k=4 k'=2", "cpu") for name in MODELS),
    *(("transformer", plan, "slow link") for plan in PLANS),
]


@pytest.mark.parametrize(("name", "plan", "device"), CASES)
def test_gradients_and_weights_of_many_steps(name: str, plan: str, device: str, apply: Apply) -> None:
    model, batch = any_model(name)
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS[plan], device=DEVICES[device]())
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (model, plain)]
    for step in range(20):
        backward_both(model, plain, batch, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)
    assert streamed.stats().offloaded_bytes > 0
    assert streamed.stats().restored_bytes > 0


def linears(count: int = 6) -> tuple[nn.Module, Any]:
    """Each but the first saves its input, which nobody else keeps."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(count))), torch.randn(ROWS, 64)


def offload_of(streamed: StreamedModel[nn.Module]) -> Any:
    return streamed._executor._offload  # type: ignore[attr-defined]


def test_activations_move_once_each_way_but_for_the_turn_and_no_memory_is_taken_twice(apply: Apply) -> None:
    model, batch = linears()
    device = VirtualDevice(bytes_per_s=1e9)
    streamed = apply(model.train(), batch, Candidate(k=2, k_prime=1, offload=ALL), device=device)
    kept = ROWS * 64 * 4
    assert streamed._bound.partition.activation_bytes == (0, *[kept] * 5)
    backward(model, batch)
    device.spend(1.0)
    before = streamed.stats()
    for step in range(3):
        model.zero_grad()
        loss = loss_step(model, batch)
        device.spend(1.0)
        loss.backward()
        assert streamed.stats().offloaded_bytes - before.offloaded_bytes == (step + 1) * 5 * kept
    after = streamed.stats()
    assert after.restored_bytes - before.restored_bytes == 3 * 4 * kept  # the last stays
    assert after.restore_misses == before.restore_misses == 0
    assert after.offload_buffers == before.offload_buffers == 5
    assert after.misses == 0
    assert after.link_bytes == {
        "host->device": after.moved_bytes + after.restored_bytes,
        "device->host": after.gradient_bytes + after.offloaded_bytes,
    }


def test_what_two_layers_save_comes_back_for_the_later_one(apply: Apply) -> None:
    """A tanh saves its output, and the next layer its input: one copy, and no miss."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64) / 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ self.weight)

    model, plain = twins(nn.Sequential(*(Block() for _ in range(6))))
    batch = torch.randn(ROWS, 64, requires_grad=True)
    device = VirtualDevice(bytes_per_s=1e9)
    streamed = apply(model, batch, Candidate(k=1, k_prime=1, offload=ALL), device=device)
    kept = ROWS * 64 * 4
    assert streamed._bound.partition.activation_bytes == (kept,) * 6
    for one in (model, plain):
        loss = loss_step(one, batch)
        device.spend(1.0)
        loss.backward()
    assert_same_gradients(model, plain)
    stats = streamed.stats()
    assert (stats.offloaded_bytes, stats.restore_misses) == (6 * kept, 0)


def alive(n_bytes: int) -> int:
    """Storages of that size which a tensor shows."""
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    return len({one.untyped_storage()._cdata for one in tensors if one.untyped_storage().nbytes() == n_bytes})


def test_what_left_is_not_on_the_device_until_it_is_back(apply: Apply) -> None:
    """Under way are at most two visits' activations, forward and backward."""
    model, batch = linears(8)
    device = VirtualDevice(bytes_per_s=1e9)
    apply(model.train(), batch, Candidate(k=1, k_prime=1, offload=ALL), device=device)
    backward(model, batch)
    gc.collect()
    seen: list[int] = []
    at_rest = alive(ROWS * 64 * 4)
    for layer in model:
        layer.register_forward_hook(lambda *_: seen.append(alive(ROWS * 64 * 4) - at_rest))
        layer.register_full_backward_hook(lambda *_: seen.append(alive(ROWS * 64 * 4) - at_rest))
    backward(model, batch)
    assert len(seen) == 16
    assert max(seen) <= 5, seen  # input, output or gradients; one that leaves; two that are back


def test_a_graph_that_is_dropped_leaves_nothing_behind(apply: Apply) -> None:
    model, batch = linears()
    streamed = apply(model.train(), batch, Candidate(k=2, k_prime=1, offload=ALL))
    backward(model, batch)
    taken = streamed.stats().offload_buffers
    for _ in range(3):
        loss = loss_step(model, batch)
        del loss
    backward(model, batch)
    assert streamed.stats().offload_buffers == taken
    assert not offload_of(streamed)._known


@pytest.mark.parametrize("device", DEVICES)
def test_an_exception_leaves_the_next_step_right_and_nothing_behind(device: str, apply: Apply) -> None:
    model, batch = linears()
    model, plain = twins(model)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1, offload=ALL), device=DEVICES[device]())

    def explode(*_: Any) -> None:
        raise KeyError("in the middle")

    for place in ("forward", "backward", "forward again"):
        register = model[2].register_full_backward_hook if place == "backward" else model[3].register_forward_hook
        hook = register(explode)
        with pytest.raises(KeyError, match="in the middle"):
            backward(model, batch)
        hook.remove()
        for one in (model, plain):
            one.zero_grad()
            backward(one, batch)
        assert_same_gradients(model, plain)
        gc.collect()
        offload = offload_of(streamed)
        assert not offload._known and not offload._leaving and not any(offload._coming.values())


def test_several_losses_several_backwards_and_gradients_of_gradients(apply: Apply) -> None:
    model, batch = linears()
    model, plain = twins(model)
    other = torch.randn(ROWS, 64)
    apply(model, batch, Candidate(k=2, k_prime=1, offload=ALL))
    for one in (model, plain):
        first, second = loss_step(one, batch), loss_step(one, other)
        (first + 2 * second).backward()
        output = one(batch)
        output.mean().backward(retain_graph=True)
        output.square().mean().backward()
        x = other.clone().requires_grad_()
        (slope,) = torch.autograd.grad(one(x).tanh().sum(), x, create_graph=True)
        (slope.square().mean() + loss_step(one, x)).backward()
    assert_same_gradients(model, plain)


def test_a_write_to_what_was_saved_is_refused_as_torch_does(apply: Apply) -> None:
    """Also where only a view of it is written to, and what was saved has left."""
    for streamed in (False, True):
        model, batch = linears()
        if streamed:
            device = VirtualDevice(bytes_per_s=1e9)
            apply(model.train(), batch, Candidate(k=2, k_prime=1, offload=ALL), device=device)
        views: list[torch.Tensor] = []
        model[2].register_forward_hook(lambda module, args, output: views.append(output.view(-1)))
        loss = loss_of(model(batch))
        with torch.no_grad():
            views[0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_is_written_to_and_saved_again_is_another_activation(apply: Apply) -> None:
    class Rewritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused, self.used = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            with torch.no_grad():
                before = hidden.detach()
            self.unused(hidden)
            before.add_(1)
            return self.used(hidden)

    model, plain = twins(Rewritten())
    batch = torch.randn(ROWS, 64)
    apply(model, batch, Candidate(k=1, k_prime=1, offload=ALL))
    for one in (model, plain):
        backward(one, batch)
    assert_same_gradients(model, plain)


def test_removal_between_forward_and_backward_is_refused(apply: Apply) -> None:
    model, batch = linears()
    streamed = apply(model.train(), batch, Candidate(k=2, k_prime=1, offload=ALL))
    loss = loss_step(model, batch)
    streamed.remove()
    with pytest.raises(ModelChangedError, match="removed between a forward pass and its backward"):
        loss.backward()


def test_passes_without_autograd_send_nothing(apply: Apply) -> None:
    model, batch = linears()
    model, plain = twins(model)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1, offload=ALL))
    with torch.no_grad():
        assert equal(model(batch), plain(batch))
    assert streamed.stats().offloaded_bytes == 0


@pytest.mark.parametrize("plan", PLANS)
def test_microbatches_of_a_group(plan: str, apply: Apply) -> None:
    model, batch = any_model("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS[plan])
    batches = [torch.randint(500, (4, 32)) for _ in range(3)]
    for _ in range(2):
        streamed.backward_group(batches, loss_step)
        for one in batches:
            loss_step(plain, one).backward()
    assert_same_gradients(model, plain)
    assert streamed.stats().offloaded_bytes > 0
