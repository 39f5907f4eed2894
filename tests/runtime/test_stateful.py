"""Layers that are called with what may change: no plan computes them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.errors import ModelChangedError
from autosp.spec import Candidate, Plan
from models import vectors
from trained import ALL, Apply, assert_same_gradients, assert_same_weights, backward, loss_step, twins


class Cached(nn.Module):
    """Remembers what it projected, in what it is given: a list, or an object that does not say what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor, cache: Any) -> torch.Tensor:
        known = getattr(cache, "known", [] if cache is None else cache)
        known.append(torch.tanh(x @ self.weight))
        return torch.sigmoid(torch.stack(known[-2:]).sum(0))


class Cache:
    """What transformers' caches are to autosp."""

    def __init__(self) -> None:
        self.known: list[torch.Tensor] = []


class Model(nn.Module):
    """Some layers with a cache, and some without."""

    def __init__(self, kind: Callable[[], Any]) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(64, 64)
        self.layers = nn.ModuleList([Cached(), Cached(), nn.Linear(64, 64), Cached()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = self.kind()
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = layer(x) if isinstance(layer, nn.Linear) else layer(x, cache)
        return x


@pytest.mark.parametrize("kind", [list, Cache])
def test_tuned_and_trained(kind: type) -> None:
    torch.manual_seed(0)
    model, plain = twins(Model(kind))
    plan = autosp.plan(model, vectors(), k=1, k_prime=1, mode="training", step=loss_step, device="cpu")
    names = {plan.partition.layers[index].name for index in plan.partition.stateful}
    assert names == {"layers.0", "layers.1", "layers.3"}
    tuned = autosp.tune(
        model, vectors(), "1GB", mode="training", step=loss_step, device="cpu", max_trials=2, progress=False
    )
    others = [layer for together in plan.partition.recomputable for layer in together]
    assert [plan.partition.layers[index].name for index in others] == ["layers.2"]
    again = Candidate(k=1, k_prime=1, recompute=tuple(sorted(others)))
    for one in (tuned, plan.model_copy(update={"candidate": again})):
        with autosp.apply(model, one):
            for step in range(2):
                backward(model, vectors(), step)
                backward(plain, vectors(), step)
                assert_same_gradients(model, plain)
                model.zero_grad()
                plain.zero_grad()


def test_a_plan_that_would_is_refused() -> None:
    model = Model(list).train()
    plan = autosp.plan(model, vectors(), k=1, k_prime=1, mode="training", step=loss_step, device="cpu")
    again = plan.model_dump() | {"candidate": Candidate(k=1, k_prime=1, recompute=plan.partition.stateful).model_dump()}
    with pytest.raises(ValueError, match="is called with what may change: it cannot be computed again"):
        Plan.model_validate(again)


def test_what_was_not_seen_when_the_plan_was_made(apply: Apply) -> None:
    """An object is not computed with again; a list that grew is refused in the backward pass."""
    model, plain = twins(Model(lambda: None))
    apply(model, vectors(), Candidate(k=1, k_prime=1, recompute=ALL))
    for one in (model, plain):
        one.kind = Cache
        backward(one, vectors())
    assert_same_gradients(model, plain)
    model.kind = list
    loss = loss_step(model, vectors())
    with pytest.raises(ModelChangedError, match=r"layers\.3 cannot be computed again .* recompute=0"):
        loss.backward()


class Replacing(nn.Linear):
    """Puts another tensor in its buffer's place at every call, as models that watch ranges do."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.register_buffer("least", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.least = 0.9 * self.least + 0.1 * x.detach().min()
        return torch.tanh(super().forward(x))


def test_a_buffer_that_is_replaced_is_replaced_once_a_step(apply: Apply) -> None:
    torch.manual_seed(0)
    model, plain = twins(nn.Sequential(*(Replacing() for _ in range(4))))
    apply(model, vectors(), Candidate(k=1, k_prime=1, recompute=ALL))
    for step in range(3):
        for one in (model, plain):
            backward(one, vectors(), step)
        assert_same_gradients(model, plain)
        assert_same_weights(model, plain)


class Remembers(nn.Linear):
    """Adds what it computed the last time, which it keeps in an attribute, as recurrent layers do."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x) if self.last is None else super().forward(x + self.last)
        self.last = y.detach()
        return torch.tanh(y)


def test_an_attribute_is_as_it_was_the_first_time(apply: Apply) -> None:
    torch.manual_seed(0)
    twice = Remembers()
    model, plain = twins(nn.Sequential(twice, Remembers(), twice, Remembers()))
    apply(model, vectors(), Candidate(k=1, k_prime=1, recompute=ALL))
    for step in range(3):
        for one in (model, plain):
            backward(one, vectors(), step)
        assert_same_gradients(model, plain)


class Codes(nn.Module):
    """Moves its codebook, which is large, where no version counter sees it; in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64)
        self.register_buffer("codes", torch.randn(512, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.project(x))
        if self.training:
            self.codes.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x + x @ self.codes.t() @ self.codes / 512


@pytest.mark.parametrize("k", [1, 3])
def test_buffers_that_only_training_writes_to_where_the_plan_was_made_in_eval_mode(k: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Codes() for _ in range(4)))
    model, plain = twins(model)
    model.eval()
    batch = vectors()
    plan = autosp.plan(model, batch, k=k, k_prime=1, mode="training", step=loss_step, device="cpu")
    model.train()
    with autosp.apply(model, plan):
        for step in range(3):
            for one in (model, plain):
                backward(one, batch, step)
            assert_same_gradients(model, plain)
    assert_same_weights(model, plain)


class Normalised(nn.Module):
    """Divides by what it has just written to its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.scale.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)
        return torch.tanh(x @ self.weight / self.scale.clone())


@pytest.mark.parametrize("blocks", [False, True])
def test_what_is_computed_again_finds_the_buffers_of_the_first_time(blocks: bool, apply: Apply) -> None:
    torch.manual_seed(0)
    inside = (nn.Sequential(Normalised(), nn.Linear(64, 64)) if blocks else Normalised() for _ in range(4))
    model, plain = twins(nn.Sequential(*inside))
    batch = vectors()
    apply(model, batch, Candidate(k=2, k_prime=1, recompute=ALL))
    for step in range(3):
        for one in (model, plain):
            backward(one, batch, step)
        assert_same_gradients(model, plain)
    assert_same_weights(model, plain)
