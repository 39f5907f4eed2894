"""torch.compile around, inside and on top of a plan: the compiled model's output, and no compilation after the first."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import autosp
from autosp.batch import equal
from models import Block, Stack, tokens, vectors

SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    gc.collect()  # or finalisers of what earlier tests left run in a compiled region, and are counted as frames
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Deep(nn.Module):
    """So many blocks that each is a layer, and is left whole."""

    def __init__(self, blocks: int = 34, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = vectors(7, 32)


def blocks_in_place(model: nn.Module, **options: Any) -> nn.Module:
    """`block.compile()`, as diffusers' compile_repeated_blocks does."""
    for block in model.blocks:
        block.compile(**options)
    return model


def blocks_replaced(model: nn.Module, **options: Any) -> nn.Module:
    """`model.blocks[i] = torch.compile(block)`."""
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **options)
    return model


def whole_in_place(model: nn.Module, **options: Any) -> nn.Module:
    """`model.compile()`."""
    model.compile(**options)
    return model


def whole_wrapped(model: nn.Module, **options: Any) -> nn.Module:
    """`torch.compile(model)`."""
    return torch.compile(model, **options)  # type: ignore[return-value]


WAYS = [blocks_in_place, blocks_replaced, whole_in_place, whole_wrapped]
Way = Callable[..., nn.Module]


def run(model: nn.Module, batch: torch.Tensor = X) -> torch.Tensor:
    """One call without autograd."""
    with torch.no_grad():
        output = model(batch)
    assert isinstance(output, torch.Tensor)
    return output


def compiled_frames() -> tuple[int, int, int]:
    """Graphs, compiled frames and graph breaks so far."""
    return counters["stats"]["unique_graphs"], counters["frames"]["total"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("when", ["before the plan", "before the plan, and called", "after apply"])
@pytest.mark.parametrize("way", WAYS)
def test_same_output_and_no_more_compilation(way: Way, when: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = Deep()
    expected = run(model)
    called = compiled = way(model, backend="eager") if when != "after apply" else model
    if when.endswith("called"):
        assert equal(run(compiled), expected)
    plan = autosp.plan(model, X, k=4, k_prime=1, residents=2, device="cpu")
    counters.clear()
    with autosp.apply(model, plan) as streamed:
        if when == "after apply":
            called = way(streamed, backend="eager")
        assert equal(called(X), expected)
        first = compiled_frames()
        assert first[0] == (0 if when.endswith("called") and way in (blocks_in_place, blocks_replaced) else 1)
        for _ in range(3):
            assert equal(called(X), expected)
        assert compiled_frames() == first
    assert equal(run(called), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("way", [blocks_in_place, blocks_replaced])
def test_a_block_in_one_graph(way: Way, setting: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = Deep()
    expected = run(way(copy.deepcopy(model), backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    way(model, backend="aot_eager", fullgraph=True)
    plan = autosp.plan(model, X, device="cpu", **setting)
    counters.clear()
    with autosp.apply(model, plan):
        for _ in range(3):
            assert equal(model(X), expected)
    assert compiled_frames()[0] == 1
    assert not counters["graph_break"]


def test_the_whole_model_in_one_graph_is_refused_and_says_why() -> None:
    model = Deep()
    plan = autosp.plan(model, X, k=4, k_prime=1, device="cpu")
    expected = run(model)
    with autosp.apply(model, plan) as streamed:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="no graph can reach across"):
            torch.compile(streamed, fullgraph=True, backend="eager")(X)
        assert equal(model(X), expected)


def test_planning_leaves_compiled_blocks_compilable() -> None:
    model = blocks_in_place(Deep(), backend="eager")
    plan = autosp.plan(model, X, k=4, k_prime=1, device="cpu")
    assert compiled_frames()[0] == 0  # the observed pass is not compiled
    assert plan.partition.layers[0].name == "blocks.0"
    run(model)
    assert compiled_frames()[0] == 1


def test_layers_smaller_than_the_compiled_blocks() -> None:
    torch.manual_seed(0)
    model = Stack(width=128).eval()
    expected = run(blocks_in_place(copy.deepcopy(model), backend="aot_eager"), tokens(3, 11))
    torch._dynamo.reset()
    blocks_in_place(model, backend="aot_eager")
    plan = autosp.plan(model, tokens(3, 11), k=4, k_prime=1, device="cpu")
    assert "blocks.2.up" in {layer.name for layer in plan.partition.layers}
    with autosp.apply(model, plan):
        assert equal(model(tokens(3, 11)), expected)
        first = compiled_frames()
        for _ in range(3):
            assert equal(model(tokens(3, 11)), expected)
        assert compiled_frames() == first


def test_one_compiled_graph_for_weights_at_any_address() -> None:
    """Compiled machine code, where a ring puts the weights of other layers, and then another plan's, elsewhere."""
    torch.manual_seed(0)
    model = Deep()
    reference = blocks_in_place(copy.deepcopy(model))
    expected, doubled = run(reference), run(reference, X * 2)
    blocks_in_place(model)
    run(model)
    counters.clear()
    addresses = {block.up.weight.data_ptr() for block in model.blocks}
    before = len(addresses)
    for setting in ({"k": 3, "k_prime": 1}, {"k": 8, "k_prime": 2}, {"k": 6, "k_prime": 1, "residents": 3}):
        handle = autosp.apply(model, autosp.plan(model, X, device="cpu", **setting))
        for _ in range(3):
            assert equal(model(X), expected)
            assert equal(model(X * 2), doubled)
        groups = handle._executor.loader.group_of.values()
        addresses |= {group.target.data_ptr() for group in groups}
        handle.remove()
    assert len(addresses) > before + 5
    assert compiled_frames()[:2] == (0, 0)


def test_new_weights_reach_compiled_blocks() -> None:
    torch.manual_seed(0)
    model, other = blocks_in_place(Deep(), backend="aot_eager"), blocks_in_place(Deep(), backend="aot_eager")
    plan = autosp.plan(model, X, k=4, k_prime=1, residents=2, device="cpu")
    with autosp.apply(model, plan):
        model(X)
        model.load_state_dict(other.state_dict())
        assert equal(model(X), run(other))


@pytest.mark.parametrize("way", WAYS)
def test_training_compiles_nothing_of_the_runtime(way: Way) -> None:
    """Compiled code calls the hooks of what it saves. Gradients are those of the compiled model."""
    compiled_code: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        compiled_code.extend(node.meta.get("stack_trace") or "" for node in graph.graph.nodes)
        return graph

    def gradients(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        model(X).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    torch.manual_seed(0)
    model = Deep(blocks=6)
    expected = gradients(model)
    model = way(model, backend=backend)
    plan = autosp.plan(
        model, X, k=2, k_prime=1, mode="training", step=lambda model, batch: model(batch).sum(), device="cpu"
    )
    with autosp.apply(model, plan):
        assert equal(gradients(model), expected)
    assert any("models.py" in place for place in compiled_code)
    assert not [place for place in compiled_code if str(Path(autosp.__file__).parent) in place]


def test_tune() -> None:
    torch.manual_seed(0)
    model = blocks_in_place(Deep(), backend="aot_eager")
    expected = run(model)
    plan = autosp.tune(model, X, "1GB", device="cpu", max_trials=2, progress=False)
    with autosp.apply(model, plan):
        assert equal(model(X), expected)


def test_a_model_that_is_not_compiled_takes_no_compiler() -> None:
    """The compiler is imported (it is what lets it be told to look away), but nothing is compiled."""
    model = Deep()
    with autosp.apply(model, autosp.plan(model, X, k=4, k_prime=1, device="cpu")):
        model(X)
    assert compiled_frames() == (0, 0, 0)


def test_compiling_later_in_a_process_that_began_without_the_compiler() -> None:
    script = (
        "import torch, autosp; from models import EarlyExit, vectors; model = EarlyExit(); x = vectors()\n"
        "expected = model(x).detach()\n"
        "handle = autosp.apply(model, autosp.plan(model, x, k=2, k_prime=1, device='cpu'))\n"
        "compiled = torch.compile(model, backend='eager')\n"
        "assert all(torch.equal(compiled(x), expected) for _ in range(3))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)
