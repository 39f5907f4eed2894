"""However a model calls its layers, reads its weights and is called itself: the streamed output is the plain one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.errors import ModelError
from models import Block, make, tokens, vectors

Stream = Callable[..., autosp.StreamedModel[nn.Module]]


def plain(model: nn.Module, batch: Any) -> Any:
    """The output without a plan."""
    with torch.no_grad():
        return call(model, batch)


# -- which layers are called ----------------------------------------------------------------------------------------


class LeavesEarly(nn.Module):
    """Stops at the block whose output is large enough, as a model with exits does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64) for _ in range(8))
        self.heads = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        depth = 0
        while True:
            x = self.blocks[depth](x) * 1.5
            if depth == 7 or x.abs().max() > 8:
                return self.heads[depth](x), depth
            depth += 1


def test_the_input_decides_where_it_ends(stream: Stream) -> None:
    torch.manual_seed(0)
    model = LeavesEarly()
    twin = copy.deepcopy(model)
    streamed = stream(model, vectors())
    depths = set()
    for scale in (1, 7, 0.1, 3, 1, 0.01, 7, 1):
        output = model(vectors() * scale)
        assert equal(output, plain(twin, vectors() * scale))
        depths.add(output[1])
    assert len(depths) > 2
    assert streamed.stats().misses > 0


class Experts(nn.Module):
    """Every row goes through the expert that it chooses; the experts that no row chose are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(64, 6) for _ in range(3))
        self.experts = nn.ModuleList(nn.ModuleList(Block(64) for _ in range(6)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for router, experts in zip(self.routers, self.experts, strict=True):
            choice = router(x).argmax(-1)
            mixed = torch.zeros_like(x)
            for index in choice.unique().tolist():
                mixed[choice == index] = experts[index](x[choice == index])
            x = mixed
        return x


def test_experts_that_the_profiled_batch_did_not_choose(stream: Stream) -> None:
    torch.manual_seed(0)
    model = Experts()
    twin = copy.deepcopy(model)
    stream(model, vectors(1))
    for seed in range(3):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
        assert equal(model(x), plain(twin, x))


class Nests(nn.Module):
    """A layer that calls itself, and a layer beside it that it does not own, until the depth is used up."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.outer = _Recursive()
        self.inner = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)
        self.outer.__dict__["other"] = self.inner  # a reference, not a child

    def forward(self, x: torch.Tensor, depth: int = 3) -> torch.Tensor:
        return self.last(self.outer(self.first(x), depth))


class _Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        x = torch.tanh(x @ self.weight)
        if depth:
            x = self.other(self(x, depth - 1))
        return x @ self.weight


def test_a_layer_inside_itself(stream: Stream) -> None:
    torch.manual_seed(0)
    model = Nests()
    expected = {depth: plain(model, (vectors(), depth)) for depth in range(5)}
    stream(model, vectors())
    for depth in (3, 0, 4, 1, 2, 3):
        assert equal(model(vectors(), depth), expected[depth])


def test_one_layer_object_in_two_places(stream: Stream) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    others = [nn.Linear(64, 64) for _ in range(4)]
    model = nn.Sequential(others[0], shared, others[1], nn.Sequential(others[2], shared), others[3], shared)
    expected = plain(model, vectors())
    streamed = stream(model, vectors())
    for _ in range(3):
        assert equal(model(vectors()), expected)
    streamed.remove()
    assert model[1] is model[3][1] is model[5] is shared


# -- how the model is called ----------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """Goes over the rows of its input by vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def row(x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

        mapped: torch.Tensor = torch.vmap(row)(x)
        return mapped


def test_layers_inside_vmap(stream: Stream) -> None:
    torch.manual_seed(0)
    model, batch = Mapped().eval(), vectors(3, 64)
    expected = plain(model, batch)
    streamed = stream(model, batch)
    assert equal(call(streamed, batch), expected)
    assert streamed.stats().misses == 0


def test_training_inside_vmap_is_refused_by_layer() -> None:
    model, batch = Mapped(), vectors(3, 64)
    with pytest.raises(ModelError, match=r"layer 0 is called with autograd inside a transform of torch\.func"):
        autosp.plan(
            model, batch, k=2, k_prime=1, mode="training", step=lambda model, batch: model(batch).sum(), device="cpu"
        )


def test_eight_threads(stream: Stream) -> None:
    model, _ = make("stack")
    batches = [tokens(1 + index, 3 + index) for index in range(8)]
    expected = [plain(model, batch) for batch in batches]
    streamed = stream(model, batches[0])
    wrong: list[Any] = []

    def work(index: int) -> None:
        try:
            wrong.extend(index for _ in range(20) if not equal(model(batches[index]), expected[index]))
        except BaseException as error:  # noqa: BLE001 - a thread's exception would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (streamed.stats().passes, streamed.stats().misses) == (160, 0)


@pytest.mark.parametrize("where", ["plan", "apply", "call", "remove", "all"])
def test_inference_mode(where: str, stream: Stream) -> None:
    model, batch = make("stack")
    expected = plain(model, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def mode(*places: str) -> Any:
        return torch.inference_mode(where in (*places, "all"))

    with mode("plan", "apply"):
        streamed = stream(model, batch)
    for _ in range(3):
        with mode("call"):
            assert equal(model(batch), expected)
    with torch.no_grad():
        model.head.weight.mul_(1.0)  # an ordinary write, which an inference tensor would refuse
    with mode("remove"):
        streamed.remove()
    assert equal(dict(model.state_dict()), before)
    model(batch).sum().backward()  # and ordinary parameters
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_buffer_made_under_inference_mode(stream: Stream) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)) for _ in range(5))).eval()
    with torch.inference_mode():
        for _, norm in model:
            norm.running_mean = norm.running_mean + 1  # as a pass that replaces its buffers leaves them
    expected = plain(model, vectors())
    streamed = stream(model, vectors())
    for _ in range(2):
        assert equal(model(vectors()), expected)
    streamed.remove()
    assert equal(plain(model, vectors()), expected)


@pytest.mark.parametrize("profiled", [True, False])
def test_autocast(profiled: bool, stream: Stream) -> None:
    model, batch = make("stack")
    autocast = torch.autocast("cpu", torch.bfloat16)
    with autocast:
        expected = plain(model, batch)
    assert expected.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=profiled):
        stream(model, batch)
    for _ in range(2):
        with autocast:
            assert equal(model(batch), expected)
            assert equal(model(batch), expected)


def test_autocast_keeps_no_copies_of_the_weights(stream: Stream) -> None:
    model, batch = make("stack")
    cached: list[bool] = []
    stream(model, batch)
    model.head.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
        assert torch.is_autocast_cache_enabled()
    assert cached == [False]  # or the copies of all weights would stay until the context ends, whatever the budget


class Gated(nn.Module):
    """Raises after a layer when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
        self.stop_after: int | None = None
        self.error: type[BaseException] = RuntimeError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == self.stop_after:
                raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_raising_between_layers(error: type[BaseException], stream: Stream) -> None:
    torch.manual_seed(0)
    model = Gated()
    expected = plain(model, vectors())
    stream(model, vectors())
    model.error = error
    for position in (0, 3, 7, 3):
        model.stop_after = position
        with pytest.raises(error):
            model(vectors())
        model.stop_after = None
        assert equal(model(vectors()), expected)


def test_a_part_of_the_model_called_by_itself(stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    stream(model, batch)
    for _ in range(2):
        x = plain(twin.embed, batch)
        assert equal(model.embed(batch), x)
        assert equal(model.blocks[2](x), plain(twin.blocks[2], x))
        assert equal(
            model.blocks[2].down(model.blocks[2].up(x)), plain(nn.Sequential(twin.blocks[2].up, twin.blocks[2].down), x)
        )
        assert equal(model(batch), plain(twin, batch))
