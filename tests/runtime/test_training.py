"""Training under a plan: every gradient and every updated weight has the bits of plain training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autosp.batch import call, equal
from autosp.devices import CpuDevice, VirtualDevice
from autosp.errors import ModelChangedError
from autosp.profiler.training import training_partition
from autosp.spec import Candidate, Tier
from autosp.workload import Workload
from models import Block, Stack, make, tokens, vectors
from trained import (
    PLANS,
    SOME,
    Apply,
    assert_same_gradients,
    assert_same_weights,
    backward,
    backward_both,
    laid_otherwise,
    loss_of,
    loss_step,
    twins,
)


class Lora(nn.Module):
    """A frozen linear layer, and what is trained beside it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, 4, bias=False)
        self.up = nn.Linear(4, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.base(x) + self.up(self.down(x)))


def dropping() -> nn.Module:
    """Blocks that drop out activations."""
    blocks = (nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.3), nn.Linear(64, 64)) for _ in range(4))
    return nn.Sequential(*blocks)


OTHERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "lora": lambda: (nn.Sequential(*(Lora() for _ in range(5))), vectors()),
    "dropout": lambda: (dropping(), vectors()),
    "laid otherwise": laid_otherwise,
}
MODELS = ["stack", "tied", "shared", "borrowed", "two_towers", "fused_views", "fast_path", "convolutions", "early_exit"]


def any_model(name: str) -> tuple[nn.Module, Any]:
    if name in OTHERS:
        torch.manual_seed(0)
        return OTHERS[name]()
    return make(name)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-3),
    "adam that loops": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [*MODELS, "lora", "dropout"])
def test_gradients_and_weights_of_many_steps(name: str, plan: str, apply: Apply) -> None:
    """Plain steps, steps of two batches, clipping, a schedule, and passes without autograd between them."""
    model, batch = any_model(name)
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    optimizers = [OPTIMIZERS["adam" if plan in SOME else "sgd"](one) for one in (model, plain)]
    schedulers = [torch.optim.lr_scheduler.StepLR(one, 5, 0.5) for one in optimizers]
    for step in range(20):
        backward_both(model, plain, batch, step)
        if step % 4 == 2:
            with torch.no_grad():
                assert equal(call(model.eval(), batch), call(plain.eval(), batch))
            model.train(), plain.train()
        for one, optimizer, scheduler in zip((model, plain), optimizers, schedulers, strict=True):
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_sees_ordinary_parameters(optimizer: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    identities = [id(parameter) for parameter in model.parameters()]
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    for one, steps in ((model, OPTIMIZERS[optimizer](model)), (plain, OPTIMIZERS[optimizer](plain))):
        for step in range(5):
            backward(one, batch, step)
            steps.step()
            steps.zero_grad()
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert equal(dict(model.state_dict()), dict(plain.state_dict()))
    streamed.remove()
    assert_same_weights(model, plain)
    backward(model, batch)
    backward(plain, batch)
    assert_same_gradients(model, plain)


def test_weights_move_twice_but_for_the_turn_and_gradients_once(apply: Apply) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).train()
    batch = vectors().requires_grad_()
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    backward(model, batch)
    before = streamed.stats()
    for step in range(3):
        model.zero_grad()
        backward(model, batch, step)
    after = streamed.stats()
    layer_bytes = max(one.n_bytes for one in streamed._bound.partition.layers)
    assert after.moved_bytes - before.moved_bytes == 3 * (2 * 6 - 2) * layer_bytes
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert after.gradient_bytes - before.gradient_bytes == 3 * weights
    assert after.link_bytes == {"host->device": after.moved_bytes, "device->host": after.gradient_bytes}
    assert after.misses == 0
    assert after.passes - before.passes == 3
    assert streamed.backward_visits == (5, 4, 3, 2, 1, 0)


def test_what_backward_does_not_need_is_not_loaded_for_it(apply: Apply) -> None:
    model, batch = make("stack")
    streamed = apply(model.train(), batch, Candidate(k=1, k_prime=1))
    backward(model, batch)
    embedding = next(one for one in streamed._bound.partition.layers if one.name == "embed")
    assert embedding.gradient_bytes > 0
    assert embedding.index not in streamed.backward_visits
    assert streamed.stats().misses == 0


def test_frozen_layers_send_nothing(apply: Apply) -> None:
    model, batch = any_model("lora")
    streamed = apply(model.train(), batch, Candidate(k=2, k_prime=1))
    backward(model, batch)
    trained = sum(one.numel() * 4 for one in model.parameters() if one.requires_grad)
    assert streamed.stats().gradient_bytes == trained


def test_weights_rest_on_the_host_whenever_the_user_looks(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    arena = streamed._executor.loader.arena.untyped_storage().data_ptr()
    seen: list[str] = []

    def look(*_: Any) -> None:
        seen.extend(name for name, one in model.named_parameters() if one.untyped_storage().data_ptr() == arena)

    output = model(batch)
    look()
    output.register_hook(look)
    assert_same_weights(model, plain)
    loss_of(output).backward()
    look()
    assert seen == []


@pytest.mark.parametrize("plan", SOME)
def test_an_exception_leaves_the_next_step_right(plan: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS[plan])
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, plain)]

    def explode(*_: Any) -> None:
        raise KeyError("in the middle")

    for place in ("forward", "backward", "forward again", "gradient"):
        if place == "backward":
            hook = model.blocks[2].up.register_full_backward_hook(explode)
        elif place == "gradient":
            hook = model.blocks[3].up.weight.register_hook(explode)
        else:
            hook = model.blocks[2].register_forward_hook(explode)
        with pytest.raises(KeyError, match="in the middle"):
            backward(model, batch)
        hook.remove()
        assert_same_weights(model, plain)
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            backward(one, batch)
        assert_same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
    streamed.remove()
    assert_same_weights(model, plain)


@pytest.mark.parametrize("name", ["stack", "tied", "shared", "lora", "fused_views", "laid otherwise"])
def test_gradients_of_a_device_with_memory_of_its_own(name: str, apply: Apply) -> None:
    """What the user had is put aside, and added to on the host: whether or not a layer ran more than once."""
    model, batch = any_model(name)
    model, plain = twins(model)
    device = VirtualDevice(bytes_per_s=1e6)
    streamed = apply(model, batch, PLANS["k=3 k'=1"], device=device)
    device.sends.clear()
    for step in range(4):
        for one in (model, plain):
            backward(one, batch, step)
            loss_step(one, batch).backward()
            (loss_step(one, batch) + loss_step(one, batch)).backward()
            trained = [x for x in one.parameters() if x.requires_grad]
            assert any(x is not None for x in torch.autograd.grad(loss_step(one, batch), trained, allow_unused=True))
            if step == 3:
                loss_step(one, batch).backward(create_graph=True)
        assert_same_gradients(model, plain)
        for one in (model, plain):
            one.zero_grad(set_to_none=step % 2 == 0)
    assert sum(n_bytes for *_, n_bytes in device.sends) == streamed.stats().gradient_bytes > 0
    assert device.now_s >= max(end for _, end, _ in device.sends)


@pytest.mark.parametrize("plan", SOME)
def test_several_losses_and_several_backwards(plan: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    for one in (model, plain):
        first, second = loss_step(one, batch), loss_step(one, tokens(2, 5))
        (first + 2 * second).backward()
        output = one(batch)
        output.mean().backward(retain_graph=True)
        output.square().mean().backward()
        loss_of(one(batch)).backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("plan", SOME)
def test_gradients_that_are_asked_for(plan: str, apply: Apply) -> None:
    """`autograd.grad` gives them, and leaves what was accumulated where it is."""
    model, batch = make("shared")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    given = []
    for one in (model, plain):
        backward(one, batch)
        given.append(torch.autograd.grad(loss_step(one, batch), list(one.parameters())))
    assert equal(*given)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("plan", ["k=1 k'=1", "k=4 k'=2"])
def test_gradients_of_gradients(plan: str, apply: Apply) -> None:
    model, batch = make("shared")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    for one in (model, plain):
        x = vectors().requires_grad_()
        (slope,) = torch.autograd.grad(one(x).sum(), x, create_graph=True)
        (slope.square().mean() + loss_step(one, x)).backward()
    assert_same_gradients(model, plain)


def test_old_gradients_stay_what_they_are(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS["k=3 k'=1"])
    kept = []
    for one in (model, plain):
        held = []
        for _ in range(3):
            backward(one, batch)
            held.append([parameter.grad[:1] for parameter in one.parameters()])
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.sub_(0.01 * parameter.grad)
            one.zero_grad()
        kept.append(held)
    assert equal(*kept)
    assert len({one[0].data_ptr() for one in kept[0]}) == 3


def test_host_memory_for_gradients_is_taken_once(apply: Apply) -> None:
    model, batch = make("stack")
    apply(model.train(), batch, PLANS["k=3 k'=1"])
    addresses = []
    for step in range(3):
        model.zero_grad()
        backward(model, batch, step)
        addresses.append([block.up.weight.grad.data_ptr() for block in model.blocks])
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(set(addresses[0])) == len(addresses[0])


@pytest.mark.parametrize("plan", ["k=1 k'=1", "recompute some"])
def test_compiled_models(plan: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    for one in (model, plain):
        compiled = torch.compile(one, backend="aot_eager")
        for step in range(2):
            backward(compiled, batch, step)
    assert_same_gradients(model, plain)


def test_writes_that_torch_does_not_count_are_seen_by_the_next_step(apply: Apply) -> None:
    """An optimizer that writes to `.data`, and only where no sample is taken."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    model, plain = twins(model)
    batch = vectors()
    apply(model, batch, Candidate(k=3, k_prime=1))
    for step in range(3):
        for one in (model, plain):
            backward(one, batch, step)
            for parameter in one.parameters():
                parameter.data[20, 3] += 1.0
        assert_same_gradients(model, plain)


def test_a_write_between_forward_and_backward_is_refused_as_torch_does(apply: Apply) -> None:
    for streamed in (False, True):
        model, batch = make("stack")
        if streamed:
            apply(model.train(), batch, PLANS["k=3 k'=1"])
        loss = loss_step(model, batch)
        with torch.no_grad():
            model.blocks[3].up.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_removal_between_forward_and_backward_is_refused(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    loss = loss_step(model, batch)
    streamed.remove()
    with pytest.raises(ModelChangedError, match="removed between a forward pass and its backward"):
        loss.backward()
    assert_same_weights(model, plain)


class Unusual(nn.Module):
    """Layers that answer with dicts and views, whose outputs are written to, and a parameter that is handed out."""

    class Part(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            hidden = self.linear(x)
            return {"hidden": hidden.view(-1, 8).view_as(hidden), "bias": self.linear.bias, "name": "part"}

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Unusual.Part(width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            output = part(x)
            hidden = output["hidden"]
            hidden.relu_()
            x = hidden + x.sum() * 0.1 + output["bias"].square()
        return x


class Checkpointed(nn.Module):
    """Blocks that the model itself checkpoints."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Block(64), nn.Dropout(0.2)) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.ones((), requires_grad=True)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class CheckpointsInside(nn.Module):
    """A layer, small enough to stay whole, that computes a part of itself again, and notes where its weights are."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2)))
        self.reentrant = reentrant
        self.seen: list[int] = []
        self.mlp[1].register_forward_pre_hook(lambda *_: self.seen.append(self.mlp[0].weight.data_ptr()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=self.reentrant)


class Sparse(Stack):
    """Its embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.embed = nn.Embedding(500, 64, sparse=True)


UNUSUAL: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "outputs of all kinds": lambda: (Unusual(), vectors()),
    "checkpoints": lambda: (Checkpointed(reentrant=False), vectors()),
    "reentrant checkpoints": lambda: (Checkpointed(reentrant=True), vectors()),
    "checkpoints inside": lambda: (nn.Sequential(*(CheckpointsInside(False) for _ in range(40))), vectors()),
    "reentrant checkpoints inside": lambda: (nn.Sequential(*(CheckpointsInside(True) for _ in range(40))), vectors()),
    "sparse gradients": lambda: (Sparse(), tokens(3, 11)),
    "bfloat16": lambda: make("bfloat16"),
    "doubles": lambda: (dropping().double(), vectors().double()),
    "complex": lambda: (nn.Sequential(*(nn.Linear(64, 64, dtype=torch.cfloat) for _ in range(4))), vectors().cfloat()),
}


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models(name: str, plan: str, apply: Apply) -> None:
    torch.manual_seed(0)
    model, batch = UNUSUAL[name]()
    model, plain = twins(model)

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return call(model, batch).abs().float().square().mean()

    apply(model, batch, PLANS[plan], step)
    for one in (model, plain):
        for seed in range(3):
            backward(one, batch, seed, step)
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_of_a_layer_computes_again_with_the_layer_s_weights(reentrant: bool, apply: Apply) -> None:
    model = nn.Sequential(*(CheckpointsInside(reentrant) for _ in range(40)))
    at_rest = {block.mlp[0].weight.data_ptr() for block in model}
    apply(model, vectors(), PLANS["k=3 k'=1"], device=VirtualDevice(bytes_per_s=1e6))
    for block in model:
        block.seen.clear()
    backward(model, vectors())
    at_rest |= {block.mlp[0].weight.data_ptr() for block in model}
    for block in model[1:]:  # the first gets no input with a gradient, so a reentrant checkpoint computes it once
        first, again = block.seen
        assert first not in at_rest and again not in at_rest


@pytest.mark.parametrize("plan", SOME)
def test_autocast(plan: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS[plan])
    for one in (model, plain):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_step(one, batch)
            loss.backward()
    assert_same_gradients(model, plain)


def test_parameters_may_be_frozen_and_thawed_meanwhile(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    apply(model, batch, PLANS["k=3 k'=1"])
    for trained in (True, False, True):
        for one in (model, plain):
            one.blocks[1].requires_grad_(trained)
            one.zero_grad()
            backward(one, batch)
        assert_same_gradients(model, plain)


def test_observation_leaves_no_trace(tmp_path: Path) -> None:
    model, batch = make("convolutions")
    model, plain = twins(model)
    backward(model, batch)
    backward(plain, batch)
    gradients = [parameter.grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    device = CpuDevice(slow_tier=Tier.HOST)
    training_partition(Workload.of(model, batch, loss_step, "training", device), device, tmp_path)
    device.close()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(mine.grad is before for mine, before in zip(model.parameters(), gradients, strict=True))
    assert_same_gradients(model, plain)
    assert_same_weights(model, plain)
    assert not any(parameter._backward_hooks for parameter in model.parameters())
