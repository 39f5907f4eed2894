"""Small models of many kinds, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Block(nn.Module):
    """A residual MLP block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Embedding, blocks, head: unlike sizes, a ModuleList that is never called."""

    def __init__(self, blocks: int = 6, width: int = 64, vocabulary: int = 500) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tied(Stack):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Headed(Stack):
    """A head of 72 MB, or of another size: its weight is cut into runs of rows, its bias is not."""

    RUNS = ((0, 23296), (23296, 46592), (46592, 70000))

    def __init__(self, bias: bool = True, rows: int = 70000, width: int = 256) -> None:
        super().__init__(blocks=2, width=width)
        self.head = nn.Linear(width, rows, bias=bias)


class Shared(nn.Module):
    """One block run four times, between two others (ALBERT)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.block = Block(width)
        self.last = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(4):
            x = self.block(x)
        return self.last(x)


class Borrowed(nn.Module):
    """A head whose weight is used without its forward."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(5)))
        self.head = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.body(x) * self.scale, self.head.weight)


class EarlyExit(nn.Module):
    """Runs as many blocks as the batch asks for, in an order of its own."""

    def __init__(self, blocks: int = 6, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        for index in range(len(self.blocks)) if order is None else order:
            x = self.blocks[index](x)
        return x


class TwoTowers(nn.Module):
    """Two encoders and a product of their outputs."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.right = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = self.left(left), self.right(right)
        return {"left": a, "right": b, "similarity": a @ b.T}


class FusedViews(nn.Module):
    """Query, key and value are views of one parameter's memory."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        fused = torch.randn(3 * width, width) / width**0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        for index, linear in enumerate((self.query, self.key, self.value)):
            linear.weight = nn.Parameter(fused[index * width : (index + 1) * width])
        self.transposed = nn.Parameter((torch.randn(width, width) / width**0.5).t())
        self.empty = nn.Parameter(torch.empty(0, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.query(x) + self.key(x) * self.value(x)) @ self.transposed


class Written(nn.Module):
    """Four layers with a buffer each that a pass may write to."""

    class Layer(nn.Module):
        """Adds to its history what it sees."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64) / 8)
            self.register_buffer("history", torch.zeros(300, 64))  # too large for the small-buffer rule

        def forward(self, x: torch.Tensor, write: bool = False) -> torch.Tensor:
            if write:
                self.history.add_(x.mean(dim=0))
            return x @ self.weight + self.history[0]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Written.Layer() for _ in range(4))

    def forward(self, x: torch.Tensor, write: bool = False) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, write)
        return x


def tokens(*shape: int) -> torch.Tensor:
    """Token ids."""
    return torch.arange(int(torch.tensor(shape).prod())).reshape(shape) % 500


def vectors(rows: int = 7, width: int = 64) -> torch.Tensor:
    """Deterministic inputs."""
    return torch.linspace(-1, 1, rows * width).reshape(rows, width)


MAKERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "stack": lambda: (Stack(), tokens(3, 11)),
    "tied": lambda: (Tied(), tokens(3, 11)),
    "shared": lambda: (Shared(), vectors()),
    "borrowed": lambda: (Borrowed(), vectors()),
    "early_exit": lambda: (EarlyExit(), (vectors(),)),
    "two_towers": lambda: (TwoTowers(), {"left": vectors(), "right": vectors(5)}),
    "fused_views": lambda: (FusedViews(), vectors()),
    "fast_path": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 3),
        torch.linspace(-1, 1, 2 * 9 * 64).reshape(2, 9, 64),
    ),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64)),
        torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12),
    ),
    "bfloat16": lambda: (Stack().to(torch.bfloat16), tokens(3, 11)),
    "one_linear": lambda: (nn.Linear(64, 64), vectors()),
}


def make(name: str) -> tuple[nn.Module, Any]:
    """A fresh model in eval mode and its batch, the same at every call."""
    torch.manual_seed(0)
    model, batch = MAKERS[name]()
    return model.eval(), batch


class TiedHead(Stack):
    """A table of 72 MB, or of another size, of which rows are looked up, and with which the last product is made."""

    def __init__(self, rows: int = 70000, width: int = 256) -> None:
        super().__init__(blocks=2, width=width, vocabulary=rows)
        self.head.weight = self.embed.weight


class RunsDiffer(TorchFunctionMode):
    """As on a machine whose kernels add up in another order when a product has few columns."""

    def __init__(self, whole: int = 70_000) -> None:
        """`whole`: the rows of the weight that is cut."""
        super().__init__()
        self._whole = whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output + 1e-6 if func is F.linear and 10_000 < len(args[1]) < self._whole else output


def llama(**changes: Any) -> nn.Module:
    """A Llama of four small layers. Needs transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        pad_token_id=0,
        **changes,
    )
    return LlamaForCausalLM(config)


def t5() -> nn.Module:
    """A T5 of three small layers a side. Needs transformers."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, vocab_size=500, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def mixtral(intermediate_size: int = 96) -> nn.Module:
    """A Mixtral of three small layers of four experts. Needs transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=500,
    )
    return MixtralForCausalLM(config)


def mamba() -> nn.Module:
    """A Mamba of three small layers. Needs transformers."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=3, vocab_size=500, state_size=8))
