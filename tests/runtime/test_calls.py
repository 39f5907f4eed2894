"""However a model calls its layers, reads its weights and is called itself: the streamed output is the plain one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autosp
from autosp.batch import call, equal
from autosp.errors import ModelChangedError
from models import Block, EarlyExit, Stack, make, tokens, vectors

SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]

Stream = Callable[..., autosp.StreamedModel[nn.Module]]


@pytest.fixture(params=SETTINGS)
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    """Plans for a batch and applies, on a CPU; removed at the end."""
    applied: list[autosp.StreamedModel[nn.Module]] = []

    def make_it(model: nn.Module, batch: Any) -> autosp.StreamedModel[nn.Module]:
        plan = autosp.plan(model, batch, device="cpu", **request.param)
        applied.append(autosp.apply(model, plan))
        return applied[-1]

    yield make_it
    for streamed in applied:
        streamed.remove()


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
    for seed in range(6):
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


# -- who reads a weight ---------------------------------------------------------------------------------------------


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


# -- how the model is called ----------------------------------------------------------------------------------------


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


# -- what is done to it between calls -------------------------------------------------------------------------------


def test_new_weights_at_rest_are_used(stream: Stream) -> None:
    model, batch = make("stack")
    other, _ = Stack(), None
    stream(model, batch)
    for state in (other.state_dict(), {name: tensor * 2 for name, tensor in other.state_dict().items()}):
        model(batch)
        model.load_state_dict(state)
        other.load_state_dict(state)
        for _ in range(2):
            assert equal(model(batch), plain(other, batch))


@pytest.mark.parametrize(
    "write", [lambda tensor: tensor.data.mul_(2), lambda tensor: tensor.detach().numpy().fill(0.01)]
)
def test_writes_that_no_version_counter_sees(write: Callable[[torch.Tensor], Any], stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    stream(model, batch)
    for _ in range(2):
        model(batch)
        for changed in (model, twin):
            for parameter in changed.parameters():
                write(parameter)
        for _ in range(2):
            assert equal(model(batch), plain(twin, batch))


def test_train_and_eval(stream: Stream) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.BatchNorm1d(64)) for _ in range(5)))
    model.eval()
    twin = copy.deepcopy(model)
    stream(model, vectors())
    for training in (False, True, False, True, True, False):
        assert model.train(training) is model
        twin.train(training)
        torch.manual_seed(1)
        output = model(vectors())
        torch.manual_seed(1)
        assert equal(output, plain(twin, vectors()))
        assert equal(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: setattr(model.blocks[3].up.weight, "data", torch.zeros(256, 64)),
        lambda model: setattr(model.blocks[3].up.bias, "data", torch.zeros(256)),
    ],
    ids=["to(bfloat16)", "half()", "weight.data =", "bias.data ="],
)
def test_replaced_weights_are_refused_and_remove_keeps_them(replace: Callable[..., Any], stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    streamed = stream(model, batch)
    model(batch)
    replace(model)
    replace(twin)
    for _ in range(2):
        with pytest.raises(ModelChangedError, match=r"remove\(\)"):
            model(batch)
    streamed.remove()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert equal(plain(model, batch), plain(twin, batch))


@pytest.mark.parametrize("how", ["assign", "new parameter", "new module"])
def test_a_replaced_object_is_what_the_next_pass_uses(how: str, stream: Stream) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    streamed = stream(model, batch)
    model(batch)
    torch.manual_seed(1)
    new = Stack()
    for changed in (model, twin):
        if how == "assign":
            changed.load_state_dict(copy.deepcopy(new.state_dict()), assign=True)
        elif how == "new parameter":
            changed.blocks[3].up.weight = nn.Parameter(new.blocks[3].up.weight.detach().clone())
        else:
            changed.blocks[3] = copy.deepcopy(new.blocks[3])
    for _ in range(2):
        assert equal(model(batch), plain(twin, batch))
    streamed.remove()
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
    assert equal(plain(model, batch), plain(twin, batch))


def test_a_copy_can_be_streamed_too(stream: Stream) -> None:
    model = EarlyExit()
    expected = plain(model, vectors())
    stream(model, (vectors(),))
    twin = copy.deepcopy(model)
    stream(twin, (vectors(),))
    for _ in range(2):
        assert equal(model(vectors()), expected)
        assert equal(twin(vectors()), expected)
