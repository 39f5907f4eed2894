"""Tensors of every kind, read and written by layers that move: right while they move, unchanged when they are back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from models import vectors

Stream = Callable[..., autosp.StreamedModel[nn.Module]]


def plain(model: nn.Module, *batch: Any) -> Any:
    """The output without a plan."""
    with torch.no_grad():
        return call(model, batch)


def held_names(streamed: autosp.StreamedModel[nn.Module]) -> set[str]:
    """Names of the tensors in layers, which move."""
    return {name for layer in streamed._bound.layers for name in layer.layer.tensors}


# -- tensors that are read ------------------------------------------------------------------------------------------

WIDE = (
    130  # 4 x 130 x 130 bytes and more: too large for the rule that keeps small buffers resident, where it is a buffer
)


def _dense(dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(4 * WIDE, WIDE) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(4 * WIDE, WIDE, dtype=torch.cfloat if dtype.is_complex else torch.float32).to(dtype)
    return torch.randint(0, 100, (4 * WIDE, WIDE)).to(dtype)


def _sum(held: torch.Tensor) -> torch.Tensor:
    if held.is_complex():
        return torch.view_as_real(held.resolve_conj()).sum()
    return (held.to_dense() if held.layout is not torch.strided else held).to(torch.float64).sum().float()


DENSE = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
    torch.complex128, torch.bool, torch.int8, torch.uint8, torch.int16, torch.int64, torch.uint16,
]  # fmt: skip

MOVING: dict[str, Callable[[], torch.Tensor]] = {
    **{str(dtype).removeprefix("torch."): (lambda dtype=dtype: _dense(dtype)) for dtype in DENSE},
    "transposed": lambda: torch.randn(WIDE, 4 * WIDE).t(),
    "every second row": lambda: torch.randn(8 * WIDE, WIDE)[::2],
    "channels last": lambda: torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last),
    "at an odd offset": lambda: torch.randn(4 * WIDE * WIDE + 3)[3:].view(4 * WIDE, WIDE),
    "expanded rows": lambda: torch.randn(1, 200 * WIDE).expand(5, -1),
    "fp16 at an odd offset": lambda: torch.randn(8 * WIDE * WIDE + 3).half()[3:].view(8 * WIDE, WIDE),
}

OTHERS: dict[str, Callable[[], torch.Tensor]] = {
    "0-dim": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0, 64),
    "expanded from one number": lambda: torch.tensor(0.5).expand(64, 64),
    "lazily conjugated": lambda: torch.randn(64, 64, dtype=torch.cfloat).conj(),
    "sparse": lambda: torch.eye(256).to_sparse(),
    "sparse rows": lambda: torch.eye(256).to_sparse_csr(),
    "quantised by torch": lambda: torch.quantize_per_tensor(torch.randn(256, 256), 0.1, 0, torch.qint8),
}


class Holds(nn.Module):
    """A linear layer that also uses one tensor of some kind."""

    def __init__(self, held: torch.Tensor, as_parameter: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        if as_parameter:
            self.held = nn.Parameter(held, requires_grad=False)
        else:
            self.register_buffer("held", held)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = self.held.dequantize() if self.held.is_quantized else self.held
        return self.linear(x) * torch.sigmoid(_sum(held))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:torch.quantize")
@pytest.mark.parametrize("as_parameter", [True, False], ids=["parameters", "buffers"])
def test_every_kind_of_tensor(as_parameter: bool, stream: Stream) -> None:
    torch.manual_seed(0)
    makers = {**MOVING, **OTHERS}
    model = nn.Sequential(*(Holds(make(), as_parameter) for make in makers.values()))
    expected, whole = [plain(layer, vectors()) for layer in model], plain(model, vectors())
    before = [_as_it_is(layer.held) for layer in model]
    streamed = stream(model, vectors())
    moving = {kind for index, kind in enumerate(makers) if f"{index}.held" in held_names(streamed)}
    assert moving >= MOVING.keys()
    for _ in range(2):
        assert equal(model(vectors()), whole)
        assert _differing([layer(vectors()) for layer in model], expected) == []
        assert _differing([_as_it_is(layer.held) for layer in model], before) == []
    streamed.remove()
    assert _differing([_as_it_is(layer.held) for layer in model], before) == []
    assert _differing([plain(layer, vectors()) for layer in model], expected) == []


def _differing(found: list[Any], expected: list[Any]) -> list[str]:
    pairs = zip([*MOVING, *OTHERS], found, expected, strict=True)
    return [kind for kind, mine, theirs in pairs if not equal(mine, theirs)]


def _as_it_is(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What of a tensor must not change, and a checksum of its values."""
    strides = tensor.stride() if tensor.layout is torch.strided else None
    values = tensor.dequantize() if tensor.is_quantized else tensor
    kind = (type(tensor), tensor.dtype, tensor.layout, tensor.requires_grad)
    return str(kind), tuple(tensor.shape), strides, _sum(values.detach()).item()


class Attention(nn.Module):
    """Query, key and value are views of one matrix, the whole of which is registered too."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(3 * 64, 64) / 8)
        self.query, self.key, self.value = (nn.Linear(64, 64, bias=False) for _ in range(3))
        for linear, rows in zip((self.query, self.key, self.value), self.fused.detach().chunk(3), strict=True):
            linear.weight = nn.Parameter(rows)

    def forward(self, x: torch.Tensor, fused: bool = False) -> torch.Tensor:
        if fused:
            query, key, value = (x @ self.fused.t()).chunk(3, dim=-1)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        return torch.softmax(query @ key.t(), -1) @ value


def test_views_of_a_fused_weight_move_and_stay_together(stream: Stream) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention() for _ in range(40)))
    expected = plain(model, vectors())
    streamed = stream(model, vectors())
    assert {"3.fused", "3.query.weight", "3.value.weight"} <= held_names(streamed)
    for _ in range(2):
        assert equal(model(vectors()), expected)
    assert equal(model[3](vectors(), True), plain(model[3], vectors(), True))
    streamed.remove()
    for layer in model:
        with torch.no_grad():
            layer.fused.zero_()
        assert not layer.key.weight.any()


def test_one_parameter_in_two_modules_of_a_layer(stream: Stream) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(64, 64), nn.Linear(64, 64)
            self.up.weight = self.down.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.up(torch.tanh(self.down(x)))

    torch.manual_seed(0)
    model = nn.Sequential(*(Pair() for _ in range(40)))
    expected = plain(model, vectors())
    streamed = stream(model, vectors())
    assert "7.down.weight" in held_names(streamed)
    for _ in range(2):
        assert equal(model(vectors()), expected)
    streamed.remove()
    assert all(pair.up.weight is pair.down.weight for pair in model)


# -- tensors that a pass writes -------------------------------------------------------------------------------------


class Writes(nn.Module):
    """Base of layers that keep something from pass to pass, in a buffer large enough to move."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("kept", torch.zeros(300, 64))
        self.register_buffer("forgotten", torch.zeros(300, 64), persistent=False)
        self.calls = 0

    def forward(self, x: torch.Tensor, write: bool = True) -> torch.Tensor:
        if write:
            self.write(x)
        return self.linear(x) + self.kept[0] + self.forgotten[0] + self.calls

    def write(self, x: torch.Tensor) -> None:
        """What a subclass does in a pass that writes."""


class InPlace(Writes):
    """A counter, a running statistic."""

    def write(self, x: torch.Tensor) -> None:
        self.kept += x.mean()
        self.forgotten[0].add_(1)


class Cache(Writes):
    """A static cache: row after row."""

    def write(self, x: torch.Tensor) -> None:
        self.kept[self.calls % 300] = x[0]
        self.forgotten.index_copy_(0, torch.tensor([0]), x[:1])
        self.calls += 1


class Replaces(Writes):
    """A counter written as `self.count = self.count + 1`."""

    def write(self, x: torch.Tensor) -> None:
        self.kept = self.kept + x.mean()
        self.forgotten = self.forgotten + 1


class ThroughData(Writes):
    """Writes that no version counter sees."""

    def write(self, x: torch.Tensor) -> None:
        self.kept.data.add_(x.mean())
        self.forgotten.detach()[0] = 1


class FirstTime(Writes):
    """Initialises itself from the first batch."""

    def write(self, x: torch.Tensor) -> None:
        if not self.calls:
            self.kept.copy_(x.std())
            self.register_buffer("late", x.mean(0))
        self.calls += 1
        self.forgotten = self.late.expand(300, 64)


class OwnWeight(Writes):
    """A parameter that a pass updates, as a codebook is."""

    def write(self, x: torch.Tensor) -> None:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)


class Writers(nn.Module):
    """Several of one kind."""

    def __init__(self, kind: type[Writes]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(6))

    def forward(self, x: torch.Tensor, write: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, write)
        return x


def state(model: nn.Module) -> dict[str, Any]:
    """Every tensor, non-persistent buffers included, and every plain attribute."""
    tensors = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    calls = {name: module.calls for name, module in model.named_modules() if isinstance(module, Writes)}
    return {**tensors, **calls}


WRITERS = [
    *((kind, profiled) for kind in (InPlace, Cache, Replaces, FirstTime, OwnWeight) for profiled in (True, False)),
    (ThroughData, True),  # in a pass unlike the profiled one nothing says that a layer's bytes changed
]


@pytest.mark.parametrize(("kind", "profiled"), WRITERS)
def test_what_a_pass_writes(kind: type[Writes], profiled: bool, stream: Stream) -> None:
    torch.manual_seed(0)
    model = Writers(kind)
    twin = copy.deepcopy(model)
    streamed = stream(model, (vectors(), profiled))
    assert equal(state(model), state(twin))  # planning left nothing behind
    for turn in range(4):
        x = vectors() * (turn + 1)
        assert equal(model(x), plain(twin, x))
        assert equal(state(model), state(twin))
    assert model.state_dict().keys() == twin.state_dict().keys()
    streamed.remove()
    assert equal(state(model), state(twin))
    assert equal(plain(model, vectors()), plain(twin, vectors()))


def test_batch_norm_in_train_mode(stream: Stream) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d
    model = nn.Sequential(
        *(nn.Sequential(convolution(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(6))
    ).train()
    twin = copy.deepcopy(model)
    images = torch.linspace(-1, 1, 2 * 8 * 12 * 12).reshape(2, 8, 12, 12)
    streamed = stream(model, images)
    for turn in range(3):
        assert equal(model(images * turn), plain(twin, images * turn))
        assert equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert model[0][1].num_batches_tracked == 3
    streamed.remove()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
