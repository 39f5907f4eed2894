"""Blocks computed again as a whole: the bits of plain training, and no more loads than the schedule says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autosp.devices import VirtualDevice
from autosp.errors import ModelChangedError
from autosp.schedule.actions import Kind
from autosp.spec import Candidate
from models import vectors
from trained import (
    ALL,
    Apply,
    assert_same_gradients,
    assert_same_weights,
    backward,
    loss_of,
    loss_step,
    twins,
)

PLANS = {
    "one layer at a time": Candidate(k=1, k_prime=1, recompute=ALL),
    "two at a time": Candidate(k=4, k_prime=2, recompute=ALL),
    "a ring that holds blocks": Candidate(k=9, k_prime=1, recompute=ALL),
    "residents": Candidate(k=3, k_prime=1, residents=(1, 3), recompute=ALL),
    "some": Candidate(k=2, k_prime=1, recompute=(4,)),
    "all resident": Candidate(k=50, k_prime=1, residents=ALL, recompute=ALL),
}


@dataclass
class Given:
    """What a block answers."""

    hidden: torch.Tensor
    scores: tuple[torch.Tensor, ...]


class Attention(nn.Module):
    """A block with dropout and statistics of its own; its layers are called inside it, and so is a checkpoint."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *, scale: tuple[torch.Tensor, float], extra: dict[str, Any] | None) -> Given:
        hidden = self.norm(x)
        scores = torch.softmax(self.query(hidden) @ self.key(hidden).T * scale[0] * scale[1], dim=-1)
        mixed = checkpoint(torch.tanh, F.dropout(scores, 0.2, self.training) @ x, use_reentrant=False)
        hidden = x + self.out(mixed)
        if extra is not None:
            extra["seen"] = extra.get("seen", 0) + 1
        return Given(hidden, (scores,))


class Attentions(nn.Module):
    """Blocks called by keyword, with tuples and numbers, which answer with records."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.last = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(()))
        self.extra = extra

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x, scores = self.first(x), torch.zeros(())
        for block in self.blocks:
            given = block(x, scale=(self.scale, 0.5), extra={} if self.extra else None)
            x, scores = given.hidden, scores + given.scores[0].square().sum()
        return {"hidden": self.last(x), "scores": scores}


class WeightsFirst(nn.Module):
    """Its product asks for the weight before it asks for its activation."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False)
        self.down = WeightsFirst.Down(width)

    class Down(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, width) / 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight @ x.T).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Overwriting(nn.Module):
    """A block that adds to its input in place; where it does not, somebody else may do so."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.first, self.second, self.inside = nn.Linear(64, 64), nn.Linear(64, 64), inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(x + 1)))
        return x.add_(hidden) if self.inside else x + hidden


class Overwritten(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Overwriting(inside) for _ in range(3))
        self.afterwards = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for block in self.blocks:
            given = x
            x = block(x)
            if self.afterwards:
                given.add_(1)
        return x


def paths(streamed: Any) -> list[str]:
    return [block.path for block in streamed._bound.partition.blocks]


@pytest.mark.parametrize("plan", PLANS)
def test_training_for_many_steps(plan: str, apply: Apply) -> None:
    """Dropout, statistics, records, several losses, accumulated gradients, and a pass without autograd."""
    torch.manual_seed(0)
    model, plain = twins(Attentions())
    batch = vectors()
    streamed = apply(model, batch, PLANS[plan])
    assert paths(streamed) == ["blocks.0", "blocks.1", "blocks.2"]
    optimizers = [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (model, plain)]
    for step in range(20):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            backward(one, batch, step)
            if step % 4 == 1:
                backward(one, batch, 100 + step)
            if step % 4 == 2:
                (loss_step(one, batch) + loss_step(one, batch * 2)).backward()
            if step % 4 == 3:
                output = one(batch)
                output["scores"].backward(retain_graph=True)
                output["hidden"].square().mean().backward()
        assert_same_gradients(model, plain)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_weights(model, plain)


@pytest.mark.parametrize(
    ("k", "loads"),
    [
        # 14 forward. Backward the first block is loaded but for what is there at the turn, each for being computed
        # again; all of a block but its last layer again for its backward; and the model's first layer.
        pytest.param(1, 14 + 3 * (4 + 3) + 1, id="a ring of one"),
        pytest.param(14, 14, id="a ring that holds all"),
    ],
)
def test_loads_are_those_of_the_schedule(k: int, loads: int, apply: Apply) -> None:
    torch.manual_seed(0)
    model = Attentions().train()
    streamed = apply(model, vectors().requires_grad_(), Candidate(k=k, k_prime=1, recompute=ALL))
    for step in range(3):
        before = streamed.stats()
        backward(model, vectors().requires_grad_(), step)
        after = streamed.stats()
    assert after.misses == 0
    assert after.loads - before.loads == loads
    assert after.visits - before.visits == 14 + 14 + 9
    visits = streamed.visit_times(1)[0][0]
    assert [visit.layer for visit in visits if visit.kind is Kind.RECOMPUTE] == [9, 10, 11, 5, 6, 7, 1, 2, 3]
    assert streamed.backward_visits == tuple(reversed(range(14)))


def test_a_weight_that_is_asked_for_first(apply: Apply) -> None:
    torch.manual_seed(0)
    model, plain = twins(nn.Sequential(*(WeightsFirst() for _ in range(4))))
    streamed = apply(model, vectors().requires_grad_(), Candidate(k=1, k_prime=1, recompute=ALL))
    assert len(paths(streamed)) == 4
    for step in range(3):
        for one in (model, plain):
            backward(one, vectors(), step)
        assert_same_gradients(model, plain)
    assert streamed.stats().misses == 0
    assert streamed.stats().temporary_loads == 0


@pytest.mark.parametrize("inside", [True, False])
def test_a_block_whose_input_is_written_to_is_kept(inside: bool, apply: Apply) -> None:
    """By itself, or by its caller afterwards."""
    model, plain = twins(Overwritten(inside))
    model.afterwards = plain.afterwards = not inside
    streamed = apply(model, vectors().requires_grad_(), Candidate(k=1, k_prime=1, recompute=ALL))
    assert paths(streamed) == []
    for one in (model, plain):
        backward(one, vectors())
    assert_same_gradients(model, plain)


def test_an_input_that_is_written_to_afterwards_is_refused(apply: Apply) -> None:
    """Where nobody did when the plan was made."""
    model, plain = twins(Overwritten(inside=False))
    streamed = apply(model, vectors().requires_grad_(), Candidate(k=1, k_prime=1, recompute=ALL))
    assert len(paths(streamed)) == 3
    model.afterwards = True
    loss = loss_step(model, vectors())
    with pytest.raises(ModelChangedError, match=r"blocks\.2 cannot be computed again .* recompute=0"):
        loss.backward()
    model.afterwards = False
    model.zero_grad()
    for one in (model, plain):
        backward(one, vectors())
    assert_same_gradients(model, plain)


def test_inputs_that_may_change(apply: Apply) -> None:
    """A mapping that is written to: seen when the plan was made, or only later."""
    torch.manual_seed(0)
    for planned in (True, False):
        model, plain = twins(Attentions(extra=planned))
        streamed = apply(model, vectors(), Candidate(k=2, k_prime=1, recompute=ALL))
        assert len(paths(streamed)) == (0 if planned else 3)
        for one in (model, plain):
            one.extra = planned
            backward(one, vectors())
        assert_same_gradients(model, plain)


def test_autocast_is_as_it_was(apply: Apply) -> None:
    torch.manual_seed(0)
    model, plain = twins(Attentions())
    apply(model, vectors(), PLANS["one layer at a time"])
    for one in (model, plain):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(one(vectors()))
        loss.backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("plan", ["one layer at a time", "two at a time"])
def test_exceptions_leave_the_next_step_right(plan: str, apply: Apply) -> None:
    torch.manual_seed(0)
    model, plain = twins(Attentions())
    apply(model, vectors(), PLANS[plan])

    def explode(*_: Any) -> None:
        if where == "forward" or torch._C._current_graph_task_id() != -1:
            raise KeyError("in the middle")

    for where in ("forward", "computed again"):  # noqa: B007 - `explode` reads it
        hook = model.blocks[1].key.register_forward_hook(explode)
        with pytest.raises(KeyError, match="in the middle"):
            backward(model, vectors())
        hook.remove()
        assert_same_parameters(model, plain)
        plain.load_state_dict(model.state_dict())  # running means of what was run
        for one in (model, plain):
            one.zero_grad()
            backward(one, vectors())
        assert_same_gradients(model, plain)


def assert_same_parameters(model: nn.Module, plain: nn.Module) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True))


def test_microbatches_that_share_a_pass(apply: Apply) -> None:
    model, plain = twins(nn.Sequential(*(WeightsFirst() for _ in range(4))))
    streamed = apply(model, vectors().requires_grad_(), Candidate(k=1, k_prime=1, recompute=ALL))
    batches = [vectors() * scale for scale in (1, 2, 3)]
    backward(model, batches[0])
    model.zero_grad()
    before = streamed.stats()
    streamed.backward_group(batches, loss_step)
    after = streamed.stats()
    for batch in batches:
        loss_step(plain, batch).backward()
    assert_same_gradients(model, plain)
    assert after.moved_bytes - before.moved_bytes == before.moved_bytes
    assert after.misses == 0


def test_a_device_with_memory_of_its_own(apply: Apply) -> None:
    torch.manual_seed(0)
    model, plain = twins(Attentions())
    apply(model, vectors(), PLANS["two at a time"], device=VirtualDevice(bytes_per_s=1e6))
    for step in range(3):
        for one in (model, plain):
            backward(one, vectors(), step)
        assert_same_gradients(model, plain)
