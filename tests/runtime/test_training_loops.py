"""What loops of users do around a streamed model: their checkpoints, their hooks, batches that they skip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import vectors
from trained import PLANS, Apply, assert_same_gradients, twins


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
