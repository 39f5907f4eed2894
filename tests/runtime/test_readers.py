"""Weights that others than their layer read, or are handed: parents, hooks, callers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autosp
from autosp.batch import call, equal
from models import make, vectors

Stream = Callable[..., autosp.StreamedModel[nn.Module]]


def plain(model: nn.Module, batch: Any) -> Any:
    """The output without a plan."""
    with torch.no_grad():
        return call(model, batch)


class Peeks(nn.Module):
    """Reads the weights of its layers itself: before their call, after it, or without calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))

    def forward(self, x: torch.Tensor, before: int = -1, after: int = -1, instead: int = -1) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if index == before:
                x = x + layer.weight.sum(0)
            x = F.linear(x, layer.weight) if index == instead else layer(x)
            if index == after:
                x = x * layer.weight.mean() + layer.bias
        return x


@pytest.mark.parametrize("profiled", [{}, {"before": 2, "after": 3, "instead": 4}], ids=["not profiled", "profiled"])
def test_a_parent_reads_weights_at_any_time(profiled: dict[str, int], stream: Stream) -> None:
    torch.manual_seed(0)
    model = Peeks()
    twin = copy.deepcopy(model)
    stream(model, {"x": vectors(), **profiled})
    for how in ({"before": 2}, {"after": 2}, {"instead": 2}, {"before": 5, "after": 5}, {"instead": 0, "after": 0}, {}):
        for _ in range(2):
            assert equal(model(vectors(), **how), plain(twin, {"x": vectors(), **how}))


class Hands(nn.Module):
    """Layers that hand out their weights, or views of them, as outputs: a table of positions, a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.table = _Table()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.table(len(x))
        for block in self.blocks:
            x = block(x)
        return {"sum": x + rows, "rows": rows}


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, rows: int) -> torch.Tensor:
        return self.weight[:rows]


@pytest.mark.parametrize("used_again", [True, False])
def test_an_output_that_is_a_weight_outlives_the_pass(used_again: bool, stream: Stream) -> None:
    torch.manual_seed(0)
    model: nn.Module = Hands()
    if not used_again:
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), _Indexed())
    expected = copy.deepcopy(plain(model, vectors()))
    stream(model, vectors())
    outputs = [model(vectors()) for _ in range(3)]
    assert all(equal(output, expected) for output in outputs)


class _Indexed(_Table):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return x @ self.weight, super().forward(len(x))


class Sometimes(nn.Module):
    """Its layers hand out their weights only when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Asked() for _ in range(6))

    def forward(self, x: torch.Tensor, ask: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
        handed = []
        for layer in self.layers:
            x, weight = layer(x, ask)
            handed.append(weight)
        return x, handed


class _Asked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor, ask: bool) -> tuple[torch.Tensor, Any]:
        return x @ self.weight, self.weight[3:5] if ask else None


def test_a_weight_handed_out_in_a_pass_unlike_the_profiled_one(stream: Stream) -> None:
    torch.manual_seed(0)
    model = Sometimes()
    expected = copy.deepcopy(plain(model, (vectors(), True)))
    stream(model, vectors())
    outputs = [model(vectors(), True) for _ in range(3)]
    assert all(equal(output, expected) for output in outputs)


def test_hooks_read_weights(stream: Stream) -> None:
    model, batch = make("stack")
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.up.register_forward_pre_hook(lambda module, args: seen.append(module.weight.sum().detach()))
        block.up.register_forward_hook(lambda module, args, output: output * module.weight.mean().detach())
    expected, count = plain(model, batch), len(seen)
    stream(model, batch)
    seen_plain = seen[:count]
    seen.clear()
    for _ in range(2):
        assert equal(model(batch), expected)
    assert equal(seen, seen_plain * 2)
