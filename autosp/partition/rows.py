"""Cuts an oversized linear leaf, such as a language model's head, so that its weight's rows travel apart.

[Note: runs of rows] A row of a linear module's weight makes one column of its output and nothing else, so a run of rows
is a layer like any other. Kernels need not agree: for another number of columns a library may add up in another order.
MKL was seen to with runs of 8 and of 777 rows, and of 512 rows of float64; with runs of 7168 and 8448 rows every input
of 1 to 300 rows that was tried gave the same bits. So whether the columns come out as from the whole weight is tried,
bit by bit, for every shape of input, and where they do not, the whole weight is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autosp.batch import equal, signature
from autosp.partition.tensors import LAYER_ALIGNMENT, Extent, ModelTensors

CUT_ABOVE_SHARE = 1 / 128
CUT_ABOVE_BYTES = 32 * 2**20
"""A leaf with more than this share of the model's bytes, and more than these, is cut into runs of about that size: the
ring need hold no more of it, and still a run's transfer outweighs its fixed cost."""

ROWS = 256
"""A run begins at a multiple, where the tiles of kernels do."""

Runs = tuple[tuple[int, int], ...]
"""Neighbouring runs of rows, each from and to, of all rows."""


def find_runs(model: nn.Module, tensors: ModelTensors) -> dict[nn.Module, Runs]:
    """The runs to cut each oversized leaf into, if it turns out that its output is the same."""
    limit = max(CUT_ABOVE_BYTES, tensors.total_bytes * CUT_ABOVE_SHARE)
    own = {id(extent.tensors[0].tensor): extent for extent in tensors.extents if len(extent.tensors) == 1}
    found = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        extent = own.get(id(weight))
        if extent is None or extent.weight_bytes <= limit:
            continue
        if is_linear(module) and module._compiled_call_impl is None:
            found[module] = runs_of(len(extent.tensors[0].tensor), extent.weight_bytes, limit)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether its forward is torch's own product with a weight that is an ordinary matrix of its own."""
    weight = module._parameters.get("weight")
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and type(weight) is nn.Parameter
        and weight.ndim == 2
        and weight.is_contiguous()
    )


def runs_of(rows: int, n_bytes: int, limit: float) -> Runs:
    """As many runs as it takes for each to be of about `limit` bytes at most.

    All but the last are of whole blocks of LAYER_ALIGNMENT bytes: together they rest as one tensor.
    """
    row_bytes = n_bytes // rows
    step = math.lcm(ROWS * row_bytes, LAYER_ALIGNMENT) // row_bytes
    steps = -(-rows // step)
    count = min(steps, math.ceil(n_bytes / limit))
    begins = [step * (steps * number // count) for number in range(count)]
    return tuple(zip(begins, [*begins[1:], rows], strict=True))


def is_cut(runs: Sequence[tuple[int, int]], weight: Extent) -> bool:
    """Whether these are all rows of a weight, in order, so that they can rest as one tensor."""
    rows = len(weight.tensors[0].tensor)
    row_bytes = weight.n_bytes // rows
    begins, ends = [begin for begin, _ in runs], [end for _, end in runs]
    return [*begins, rows] == [0, *ends] and all(begin * row_bytes % LAYER_ALIGNMENT == 0 for begin in begins)


def input_key(x: torch.Tensor) -> str:
    """What decides which kernel multiplies: the input's shape, strides and dtype, autocast, the threads of a CPU."""
    kind = x.device.type
    strides = "" if x.is_contiguous() else f" of strides {x.stride()}"
    autocast = f" under {torch.get_autocast_dtype(kind)}" if torch.is_autocast_enabled(kind) else ""
    threads = f" by {torch.get_num_threads()} threads" if kind == "cpu" else ""
    return signature(x) + strides + autocast + threads


def the_input(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Of a linear module's forward."""
    return args[0] if args else kwargs["input"]


def joined(runs: Sequence[tuple[int, int]], columns: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The output whose columns `columns` gives, run by run. Beside it there is never more than one run's."""
    output: torch.Tensor | None = None
    for number, (begin, end) in enumerate(runs):
        part = columns(number)
        if output is None:
            output = part.new_empty((*part.shape[:-1], runs[-1][1]))
        output[..., begin:end] = part
        del part
    assert output is not None, "there is at least one run"
    return output


def same_in_runs(module: nn.Linear, runs: Runs, x: torch.Tensor, output: Any) -> bool:
    """Whether the columns of `output` are what each run of rows gives, bit by bit."""
    weight, bias = module.weight, module.bias
    return isinstance(output, torch.Tensor) and all(
        equal(F.linear(x, weight[begin:end], None if bias is None else bias[begin:end]), output[..., begin:end])
        for begin, end in runs
    )
