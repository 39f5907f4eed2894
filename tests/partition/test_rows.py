"""An oversized linear leaf is cut into runs of rows, where its output is the same, bit by bit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autosp.errors import PlanMismatchError
from autosp.partition import at_rest, bind, partition
from autosp.partition.rows import ROWS, input_key, joined, runs_of, same_in_runs
from autosp.spec import Partition
from builders import thorough
from models import Headed, RunsDiffer, TiedHead, tokens

CPU = torch.device("cpu")
MIB = 2**20


def parts_of(model: nn.Module, *batch: Any) -> Partition:
    return partition(model.eval(), lambda: model(*batch), CPU)


def cut_rows(parts: Partition) -> tuple[tuple[int, int], ...]:
    return tuple(layer.rows for layer in parts.layers if layer.rows)


@thorough
@given(st.integers(1, 300_000), st.integers(1, 9000), st.integers(1, 64 * MIB))
def test_runs_are_neighbours_of_whole_blocks_and_about_equal(rows: int, row_bytes: int, limit: int) -> None:
    runs = runs_of(rows, rows * row_bytes, limit)
    assert [begin for begin, _ in runs] + [rows] == [0, *(end for _, end in runs)]
    assert all(begin < end for begin, end in runs)
    assert all(begin % ROWS == 0 and begin * row_bytes % 4096 == 0 for begin, _ in runs)
    block = next(rows for rows in range(ROWS, 4096 * ROWS + 1, ROWS) if rows * row_bytes % 4096 == 0)
    assert all((end - begin) * row_bytes <= limit + block * row_bytes for begin, end in runs)
    lengths = [end - begin for begin, end in runs]
    assert max(lengths) - min(lengths[:-1], default=max(lengths)) <= block


def test_a_head_becomes_a_layer_per_run_and_its_bias_stays() -> None:
    model = Headed()
    parts = parts_of(model, tokens(2, 5))
    runs = [layer for layer in parts.layers if layer.rows]
    assert cut_rows(parts) == Headed.RUNS
    assert [layer.name for layer in runs] == ["head[0:23296]", "head[23296:46592]", "head[46592:70000]"]
    assert {layer.path for layer in runs} == {"head"}
    assert {layer.tensors for layer in runs} == {("head.weight",)}
    assert sum(layer.weight_bytes or 0 for layer in runs) == 70000 * 256 * 4
    assert parts.visits == tuple(range(len(parts.layers)))
    assert [(leaf.path, leaf.inputs) for leaf in parts.leaves] == [("head", (input_key(torch.ones(2, 5, 256)),))]
    assert "head.bias" in parts.resident_tensors
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert weights <= parts.total_bytes <= weights + 4096 * (len(parts.layers) + 1)
    assert parts.whole([runs[1].index]) == {layer.index for layer in runs}
    assert parts.whole([0]) == {0}


def test_a_leaf_called_twice_is_visited_run_by_run_each_time() -> None:
    model = Headed(bias=False).eval()
    parts = partition(model, lambda: [model(tokens(1, 3)), model.head(torch.ones(4, 256))], CPU)
    head = [layer.index for layer in parts.layers if layer.rows]
    assert parts.visits[-6:] == (*head, *head)
    assert parts.leaves[0].inputs == (input_key(torch.ones(1, 3, 256)), input_key(torch.ones(4, 256)))


def test_a_model_that_is_one_linear_is_cut() -> None:
    parts = parts_of(nn.Linear(256, 70000), torch.ones(2, 256))
    assert [layer.path for layer in parts.layers] == ["", "", ""]
    assert [layer.layer.rows for layer in bind(nn.Linear(256, 70000), parts).layers] == list(Headed.RUNS)


class Doubled(nn.Linear):
    """A linear module with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def compile_in_place(model: Headed) -> None:
    model.head.compile()


def wrap(model: Headed) -> None:
    model.head.forward = model.head.forward  # type: ignore[method-assign]


def transpose(model: Headed) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().t().contiguous().t())


def subclass(model: Headed) -> None:
    model.head = Doubled(256, 70000)


@pytest.mark.parametrize("change", [compile_in_place, wrap, transpose, subclass])
def test_what_is_not_a_plain_product_with_its_own_matrix_stays_whole(change: Callable[[Headed], None]) -> None:
    model = Headed()
    change(model)
    assert cut_rows(parts_of(model, tokens(2, 5))) == ()


def test_a_weight_that_is_used_elsewhere_stays_whole_and_resident() -> None:
    model = Headed().eval()
    parts = partition(model, lambda: F.linear(model(tokens(1, 2))[..., :256], model.head.weight), CPU)
    assert cut_rows(parts) == ()
    assert "head.weight" in parts.resident_tensors


def tied_parts(model: nn.Module, batch: torch.Tensor, *, lookups: bool = True) -> Partition:
    return partition(model.eval(), lambda: model(batch), CPU, lookups=lookups)


def test_a_tied_head_streams_and_its_table_is_read_at_rest() -> None:
    parts = tied_parts(TiedHead(), tokens(2, 5))
    assert cut_rows(parts) == Headed.RUNS
    assert [(leaf.path, len(leaf.inputs)) for leaf in parts.leaves] == [("head", 1)]
    assert {layer.tensors for layer in parts.layers if layer.rows} == {("embed.weight",)}
    assert "embed" not in [layer.name for layer in parts.layers]
    assert parts.resident_tensors == ("head.bias",)
    assert parts.lookups is None
    assert parts.visits == tuple(range(len(parts.layers)))


def two_heads(model: TiedHead) -> None:
    model.second = nn.Linear(256, 70000, bias=False)
    model.second.weight = model.embed.weight
    model.head.register_forward_hook(lambda module, args, output: output + model.second(*args))


def use_the_table(model: TiedHead) -> None:
    model.embed.register_forward_hook(lambda module, args, output: output + module.weight.mean())


def renormalise(model: TiedHead) -> None:
    model.embed.max_norm = 0.1


@pytest.mark.parametrize("change", [two_heads, use_the_table, renormalise])
def test_a_table_with_which_more_is_done_stays_resident(change: Callable[[TiedHead], None]) -> None:
    model = TiedHead()
    change(model)
    parts = tied_parts(model, tokens(2, 5))
    assert cut_rows(parts) == ()
    assert "embed.weight" in parts.resident_tensors


def test_a_tied_head_stays_resident_where_the_device_cannot_read_it_at_rest() -> None:
    parts = tied_parts(TiedHead(), tokens(2, 5), lookups=False)
    assert cut_rows(parts) == ()
    assert "embed.weight" in parts.resident_tensors


def test_a_table_of_which_most_is_looked_up_stays_resident() -> None:
    model = TiedHead()
    model.head.register_forward_pre_hook(lambda module, args: args[0][:, :2])
    parts = tied_parts(model, torch.arange(9000).reshape(1, -1))
    assert cut_rows(parts) == ()
    assert "embed.weight" in parts.resident_tensors


def test_a_leaf_whose_output_differs_stays_whole() -> None:
    model = Headed().eval()

    def run() -> None:
        with RunsDiffer():
            model(tokens(2, 5))

    parts = partition(model, run, CPU)
    assert cut_rows(parts) == parts.leaves == ()
    assert "head" in [layer.name for layer in parts.layers]


def test_every_bit_is_compared() -> None:
    linear = nn.Linear(8, 12)
    runs = ((0, 5), (5, 12))
    with torch.no_grad():
        x = torch.ones(2, 3, 8)
        output = torch.cat([F.linear(x, linear.weight[a:b], linear.bias[a:b]) for a, b in runs], dim=-1)
        assert same_in_runs(linear, runs, x, output)
        output[1, 2, 11] = torch.nextafter(output[1, 2, 11], torch.tensor(1e9))
        assert not same_in_runs(linear, runs, x, output)


def test_joined_holds_one_run_beside_the_output() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def columns(number: int) -> torch.Tensor:
        assert all(part() is None for part in alive)
        part = torch.full((2, 3), float(number))
        alive.append(weakref.ref(part))
        return part

    assert joined(((0, 3), (3, 6), (6, 9)), columns).tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2


def test_what_tells_inputs_apart() -> None:
    x = torch.ones(2, 3)
    keys = [input_key(x), input_key(x.t()), input_key(torch.ones(3, 2)), input_key(x.double())]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(input_key(x))
    assert keys[0] == f"float32[2,3] by {torch.get_num_threads()} threads"
    assert len(set(keys)) == len(keys)


def test_runs_rest_as_one_weight() -> None:
    model = Headed()
    parts = parts_of(model, tokens(2, 5))
    bound = bind(model, parts)
    *others, head = at_rest(bound.layers)
    assert all(resting.leaf is None and len(resting.layers) == 1 for resting in others)
    assert head.indices == [layer.index for layer in parts.layers if layer.rows]
    (whole,) = head.placed
    assert whole.extent.weight_bytes == model.head.weight.nbytes
    assert torch.equal(torch.cat([run.placed[0].current_bytes() for run in head.layers]), whole.current_bytes())
    kept = bound.stored([*range(head.indices[1])])
    assert [stored.layer.index for stored in kept] == head.indices
    assert bound.stored(range(len(parts.layers))) == []


def with_runs(parts: Partition, runs: Sequence[tuple[int, int]]) -> Partition:
    """The plan as if its last layers had been these runs."""
    layers = list(parts.layers[: -len(Headed.RUNS)])
    for (begin, end), layer in zip(runs, parts.layers[-len(Headed.RUNS) :], strict=False):
        changes = {"rows": (begin, end), "name": f"head[{begin}:{end}]", "weight_bytes": (end - begin) * 1024}
        layers.append(layer.model_copy(update=changes))
    return parts.model_copy(update={"layers": tuple(layers)})


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(Headed.RUNS[:2], id="not the last"),
        pytest.param(((0, 23296), (23296, 46336), (46592, 70000)), id="a gap"),
        pytest.param(((0, 23296), (46592, 70000), (23296, 46592)), id="another order"),
        pytest.param(((0, 1), (1, 46592), (46592, 70000)), id="no whole blocks"),
    ],
)
def test_a_plan_whose_runs_are_not_the_weight_is_refused(runs: Sequence[tuple[int, int]]) -> None:
    model = Headed()
    parts = parts_of(model, tokens(2, 5))
    assert bind(model, with_runs(parts, Headed.RUNS))
    with pytest.raises(PlanMismatchError, match="runs of rows of head are not one after another all that it has"):
        bind(model, with_runs(parts, runs))


def test_a_module_that_got_another_forward_is_refused() -> None:
    model = Headed()
    parts = parts_of(model, tokens(2, 5))
    wrap(model)
    with pytest.raises(PlanMismatchError, match="cuts the weight of head into rows"):
        bind(model, parts)
