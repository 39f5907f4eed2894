"""Training a model beside a twin that is trained as plain torch does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autosp.batch import Step, call, equal, tensors_in
from autosp.runtime.streamed_model import StreamedModel
from autosp.spec import Candidate

ALL = tuple(range(50))

PLANS = {
    "k=1 k'=1": Candidate(k=1, k_prime=1),
    "k=3 k'=1": Candidate(k=3, k_prime=1),
    "k=4 k'=2": Candidate(k=4, k_prime=2),
    "residents": Candidate(k=3, k_prime=1, residents=(1, 2)),
    "recompute": Candidate(k=2, k_prime=1, recompute=ALL),
    "recompute some": Candidate(k=3, k_prime=1, residents=(2,), recompute=(1, 2, 3)),
    "all resident": Candidate(k=50, k_prime=1, residents=ALL),
}
SOME = ["k=1 k'=1", "k=4 k'=2", "recompute some"]

Apply = Callable[..., StreamedModel[nn.Module]]


def loss_of(output: Any) -> torch.Tensor:
    """A loss of any output."""
    return torch.stack([one.float().square().mean() for one in tensors_in(output) if one.is_floating_point()]).sum()


def loss_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return loss_of(call(model, batch))


def backward_step(model: nn.Module, batch: Any) -> torch.Tensor:
    """As nobody may write it: autosp goes backward."""
    loss = loss_step(model, batch)
    loss.backward()
    return loss


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model in training mode, and one like it."""
    return model.train(), copy.deepcopy(model).train()


def assert_same_gradients(model: nn.Module, plain: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or equal(mine.grad, theirs.grad), name
        assert mine.grad is None or mine.grad.stride() == theirs.grad.stride(), name


def assert_same_weights(model: nn.Module, plain: nn.Module) -> None:
    assert all(equal(mine, theirs) for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(equal(mine, theirs) for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True))


def backward(model: nn.Module, batch: Any, seed: int = 0, step: Step = loss_step) -> None:
    torch.manual_seed(seed)
    step(model, batch).backward()


def backward_both(model: nn.Module, plain: nn.Module, batch: Any, step: int) -> None:
    """A step's gradients, every third time accumulated of two passes: the same bits in both."""
    for one in (model, plain):
        backward(one, batch, step)
        if step % 3 == 1:
            backward(one, batch, 100 + step)
    assert_same_gradients(model, plain)


class LaidOtherwise(nn.Module):
    """Autograd gives each of its parameters a gradient with other strides, or one that others have, too."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(4, 4, 3, padding=1)
        self.product = nn.Parameter(torch.randn(4, 16, 4))
        self.position = nn.Parameter(torch.randn(1, 4, 4, 4))
        self.scale = nn.Parameter(torch.randn(4, 4))
        self.offset = nn.Parameter(torch.randn(8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x.reshape(-1, 4, 4, 4).contiguous(memory_format=torch.channels_last)
        images = self.kernel(images) + self.position + self.position
        rows = images.flatten(2).transpose(1, 2)
        rows = torch.einsum("btc,ctd->btd", rows, self.product).reshape(-1, 4) @ self.scale.t()
        return rows.reshape(x.shape) + x + self.offset


def laid_otherwise() -> tuple[nn.Module, torch.Tensor]:
    """A model of such layers, and its batch."""
    torch.manual_seed(0)
    return nn.Sequential(*(LaidOtherwise() for _ in range(5))), torch.randn(8, 64)
