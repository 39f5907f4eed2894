"""Microbatches that share a pass: the bits of a loop over them, and the weight traffic of one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autosp
from autosp.batch import Step, call, equal, map_tensors
from autosp.devices import CpuDevice, VirtualDevice
from autosp.runtime.bench import Bench
from autosp.runtime.relay import THREAD_NAME
from autosp.runtime.streamed_model import StreamedModel
from autosp.spec import Candidate, Tier
from autosp.workload import Workload
from models import EarlyExit, make, mixtral, vectors
from trained import (
    PLANS,
    SOME,
    Apply,
    assert_same_gradients,
    assert_same_weights,
    laid_otherwise,
    loss_of,
    loss_step,
    twins,
)


def microbatches(batch: Any, count: int) -> list[Any]:
    """Batches of one kind, each with values of its own."""

    def varied(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def vary(tensor: torch.Tensor) -> torch.Tensor:
            return tensor * (1 + number / 7) if tensor.is_floating_point() else (tensor + 31 * number) % 500

        return vary

    return [map_tensors(varied(number), batch) for number in range(count)]


def accumulate(model: nn.Module, batches: list[Any], step: Step = loss_step) -> list[torch.Tensor]:
    """The loop that `backward_group` stands for."""
    losses = []
    for batch in batches:
        losses.append(step(model, batch))
        losses[-1].backward()
    return [loss.detach() for loss in losses]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [one.name for one in threading.enumerate() if one.name.startswith(THREAD_NAME)]


def transformer() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True) for _ in range(4)]
    return nn.Sequential(*layers, nn.LayerNorm(64), nn.Linear(64, 10)), torch.linspace(-1, 1, 2 * 9 * 64).view(2, 9, 64)


def frozen() -> tuple[nn.Module, Any]:
    """Of six layers the first and the fourth are not trained."""
    model, batch = make("early_exit")
    model.blocks[0].requires_grad_(False)
    model.blocks[3].up.requires_grad_(False)
    return model, batch


MORE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "transformer": transformer,
    "frozen": frozen,
    "laid otherwise": laid_otherwise,
}


def any_model(name: str) -> tuple[nn.Module, Any]:
    return MORE[name]() if name in MORE else make(name)


def train_beside(
    streamed: StreamedModel[nn.Module], plain: nn.Module, batch: Any, groups: tuple[tuple[int, ...], ...]
) -> None:
    """One step for each of `groups`, sizes of groups that follow one another before the update."""
    model = streamed.model
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9) for one in (model, plain)]
    for step, counts in enumerate(groups):
        for count in counts:
            batches = microbatches(batch, count)
            assert equal(streamed.backward_group(batches, loss_step), accumulate(plain, batches))
        assert_same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 4 != 0)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("name", ["stack", "transformer", "convolutions"])
def test_gradients_and_weights_of_many_steps(name: str, plan: str, apply: Apply) -> None:
    """Running statistics, too, are those of the loop."""
    model, batch = any_model(name)
    model, plain = twins(model)
    train_beside(apply(model, batch, PLANS[plan]), plain, batch, ((3,), (1, 4), (2,), (3,)) * 5)


@pytest.mark.parametrize("plan", [name for name in PLANS if name not in SOME])
def test_plans_of_all_kinds(plan: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    train_beside(apply(model, batch, PLANS[plan]), plain, batch, ((4,), (2, 1)))


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("name", ["tied", "shared", "borrowed", "two_towers", "fused_views", "frozen"])
def test_models_of_all_kinds(name: str, plan: str, apply: Apply) -> None:
    model, batch = any_model(name)
    model, plain = twins(model)
    train_beside(apply(model, batch, PLANS[plan]), plain, batch, ((4,), (2, 1)))


@pytest.mark.parametrize("plan", SOME)
@pytest.mark.parametrize("name", ["stack", "shared", "frozen", "laid otherwise"])
def test_gradients_of_a_device_with_memory_of_its_own(name: str, plan: str, apply: Apply) -> None:
    model, batch = any_model(name)
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS[plan], device=VirtualDevice(bytes_per_s=1e6))
    train_beside(streamed, plain, batch, ((4,), (2, 1), (3,)))


def cost_of_a_step(streamed: StreamedModel[nn.Module], batches: list[Any]) -> dict[str, int]:
    """What the counters of the second of two steps say; the first finds an empty arena."""
    for _ in range(2):
        before = streamed.stats()
        streamed.backward_group(batches, loss_step)
        streamed.model.zero_grad()
    after = streamed.stats()
    names = ("passes", "moved_bytes", "loads", "gradient_bytes", "misses", "temporary_loads")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


@pytest.mark.parametrize("plan", ["k=1 k'=1", "k=3 k'=1", "k=4 k'=2", "residents", "recompute some"])
def test_no_byte_more_moves_for_many_microbatches_than_for_one(plan: str, apply: Apply) -> None:
    """Neither of weights nor of gradients: the bound is 1.05 times as many."""
    model, batch = make("stack")
    streamed = apply(model.train(), batch, PLANS[plan])
    streamed.model(batch)
    alone = streamed.stats()
    loss_step(model, batch).backward()
    model.zero_grad()
    plain_bytes = streamed.stats().moved_bytes - alone.moved_bytes
    one = cost_of_a_step(streamed, [batch])
    assert one["moved_bytes"] == plain_bytes > 0
    assert one["misses"] == 0
    for count in (2, 4, 8, 16):
        assert cost_of_a_step(streamed, microbatches(batch, count)) == one


class Counting(VirtualDevice):
    """Counts what blocks the host."""

    blocked = 0

    def settle(self, copied: Any) -> None:
        self.blocked += 1
        super().settle(copied)

    def synchronize(self) -> None:
        self.blocked += 1
        super().synchronize()

    def finish_compute(self) -> None:
        self.blocked += 1
        super().finish_compute()


def test_the_host_is_not_blocked_more_often(apply: Apply) -> None:
    model, batch = make("stack")
    device = Counting(bytes_per_s=1e9)
    streamed = apply(model.train(), batch, PLANS["k=3 k'=1"], device=device)
    blocked = []
    for count in (1, 1, 4, 16):
        device.blocked = 0
        streamed.backward_group(microbatches(batch, count), loss_step)
        model.zero_grad()
        blocked.append(device.blocked)
    assert blocked[2:] == [blocked[1]] * 2


@pytest.mark.parametrize("setting", [{"k": 1, "k_prime": 1}, {"k": 4, "k_prime": 2}, {"k": 4, "residents": 2}])
@pytest.mark.parametrize("name", ["stack", "transformer", "two_towers"])
def test_inference_over_many_batches(name: str, setting: dict[str, int]) -> None:
    """From disk: the outputs of a loop, and each weight once for all of them."""
    model, batch = any_model(name)
    model.eval()
    batches = microbatches(batch, 5)
    with torch.no_grad():
        plain = [call(model, one) for one in batches]
    plan = autosp.plan(model, batch, device="cpu", **{"k_prime": 1, **setting})
    streamed = autosp.apply(model, plan)
    moved = []
    for count in (1, 1, 5):
        before = streamed.stats().moved_bytes
        assert equal(streamed.run_group(batches[:count]), plain[:count])
        moved.append(streamed.stats().moved_bytes - before)
    assert streamed.stats().misses == 0
    assert moved[1] == moved[2]
    assert equal(call(model, batches[3]), plain[3])
    assert streamed.run_group([]) == []
    streamed.remove()


def test_a_step_may_call_the_model_several_times(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    batches = microbatches(batch, 3)

    def two_losses(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            scale = model(batch).abs().mean()
        return loss_step(model, batch) * scale + loss_of(model(batch[:1]))

    assert equal(streamed.backward_group(batches, two_losses), accumulate(plain, batches, two_losses))
    assert_same_gradients(model, plain)


def test_losses_of_a_group_may_go_backward_together(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    batches = microbatches(batch, 2)
    torch.stack(streamed.run_group(batches, loss_step)).sum().backward()
    accumulate(plain, batches)
    assert_same_gradients(model, plain)


class Dropping(nn.Module):
    """Blocks that drop out activations, some of them computed again by the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.GELU()) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if number % 2 else block(x)
        return x


@pytest.mark.parametrize("plan", SOME)
def test_random_numbers_are_drawn_per_microbatch(plan: str, apply: Apply) -> None:
    """As after `torch.manual_seed` with numbers that are drawn first; nothing else changes the caller's generator."""
    torch.manual_seed(0)
    model, plain = twins(Dropping())
    batch = vectors()
    streamed = apply(model, batch, PLANS[plan])
    batches = microbatches(batch, 4)
    for step in range(3):
        torch.manual_seed(step)
        losses = streamed.backward_group(batches, loss_step)
        after = torch.get_rng_state()
        torch.manual_seed(step)
        seeds = torch.randint(2**63 - 1, (4,)).tolist()
        assert torch.equal(after, torch.get_rng_state())
        expected = []
        for seed, one in zip(seeds, batches, strict=True):
            torch.manual_seed(seed)
            expected += accumulate(plain, [one])
        assert equal(losses, expected)
        assert len({loss.item() for loss in losses}) == 4
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("plan", ["k=1 k'=1", "k=3 k'=1", "k=4 k'=2", "recompute some"])
def test_microbatches_that_go_ways_of_their_own(plan: str, apply: Apply) -> None:
    """Those that leave layers out do not change the order of sums here; those that turn back are right, too."""
    torch.manual_seed(0)
    model, plain = twins(EarlyExit())
    streamed = apply(model, (vectors(),), PLANS[plan])
    ways = [None, [0, 1], [0, 2, 4], None, [3]]
    batches = [(vectors() * (1 + number), way) for number, way in enumerate(ways)]

    assert equal(streamed.backward_group(batches, loss_step), accumulate(plain, batches))
    assert_same_gradients(model, plain)
    turned = [(vectors(), [5, 4, 3, 2, 1, 0]), (vectors(), None), (vectors(), [2, 2, 5, 0])]
    assert equal(streamed.run_group(turned, loss_step), [loss_step(plain, one) for one in turned])


def test_a_mixture_of_experts() -> None:
    """Tokens choose which experts run: outputs are those of the loop."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = mixtral().eval()
    batches = [{"input_ids": torch.randint(0, 500, (1, 3)), "use_cache": False} for _ in range(4)]

    def logits(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch).logits

    with torch.no_grad():
        plain = [logits(model, one) for one in batches]
    plan = autosp.plan(model, batches[0], k=3, k_prime=1, device="cpu")
    streamed = autosp.apply(model, plan)
    assert equal(streamed.run_group(batches, logits), plain)
    streamed.remove()


def test_modes_of_the_caller_reach_every_microbatch(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, PLANS["k=3 k'=1"])
    batches = microbatches(batch, 3)
    with torch.autocast("cpu", torch.bfloat16):
        losses, expected = streamed.backward_group(batches, loss_step), []
        for one in batches:
            expected.append(loss_step(plain, one))
    for loss in expected:
        loss.backward()
    assert equal(losses, [loss.detach() for loss in expected])
    assert_same_gradients(model, plain)
    seen: list[tuple[Any, ...]] = []

    def look(model: nn.Module, batch: Any) -> None:
        seen.append(
            (
                torch.is_inference_mode_enabled(),
                torch.is_grad_enabled(),
                torch.empty(1).device.type,
                torch.get_num_threads(),
            )
        )

    threads = torch.get_num_threads()
    with torch.inference_mode(), torch.device("meta"):
        streamed.run_group(batches, look)
    with torch.no_grad():
        streamed.run_group(batches[:1], look)
    streamed.run_group(batches[:1], look)
    assert seen == [(True, False, "meta", threads)] * 3 + [
        (False, False, "cpu", threads),
        (False, True, "cpu", threads),
    ]


def test_hooks_on_what_is_saved_reach_every_microbatch(apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    streamed = apply(model, batch, Candidate(k=3, k_prime=1))
    packed: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(threading.get_ident())
        return tensor.clone()

    batches = microbatches(batch, 3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        streamed.backward_group(batches, loss_step)
    accumulate(plain, batches)
    assert_same_gradients(model, plain)
    assert len(set(packed)) == 3


def test_who_waits_keeps_no_kernel_buffers(tmp_path: Path) -> None:
    """MKL keeps some for each thread that computed: eight microbatches took 19 to 30 MB with theirs, and 8 to 9 MB."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))), vectors(128, 512)
    device = CpuDevice(slow_tier=Tier.HOST)
    workload = Workload.of(model, batch, None, "inference", device, group=8)
    with Bench(model, workload.layers(device), device, tmp_path) as bench:
        streamed = bench.apply(Candidate(k=1, k_prime=1, group=8))
        for _ in range(3):
            workload.run_under(streamed)
        peak_bytes = streamed.stats().peak_bytes
        streamed.remove()
    assert peak_bytes < 14e6
