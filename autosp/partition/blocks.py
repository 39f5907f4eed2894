"""Blocks: repeated modules that a training pass may compute again as a whole, such as decoder layers.

A block is found by what it does, not by its name. It has a sibling of its own kind; one pass calls each of them once,
with inputs that stay as they are; and its layers are called nowhere else. A module made of such modules is none itself:
computing a part again takes less memory than the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from autosp.spec import Block

PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device, torch.layout)
"""What cannot be changed by whom it is given to."""


class Inputs:
    """What a module is called with, and whether it can be called with it again.

    A cache that the call writes to, or any other object, may be different then: such inputs are not `plain`.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = (args, kwargs)
        self._leaves = list(_leaves(self.given))
        self.plain = all(isinstance(leaf, (torch.Tensor, *PLAIN)) for leaf in self._leaves)
        self._versions = _versions(self._leaves)

    def untouched(self) -> bool:
        """Whether nothing was written to them since, and no list or mapping among them holds other things."""
        now = list(_leaves(self.given))
        same = len(now) == len(self._leaves) and all(map(_is_same, now, self._leaves))
        return same and _versions(now) == self._versions


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        parts: Collection[Any] = value
    elif isinstance(value, dict):
        parts = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        yield value
        return
    for part in parts:
        yield from _leaves(part)


def _is_same(left: Any, right: Any) -> bool:
    return left is right or (not isinstance(left, torch.Tensor) and type(left) is type(right) and left == right)


def _versions(leaves: Sequence[Any]) -> list[int]:
    """Of the tensors that count what is written to them."""
    return [leaf._version for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_inference()]


def find_blocks(
    model: nn.Module, calls: Sequence[tuple[int, ...]], repeatable: Collection[int], numbers: Mapping[int, int]
) -> tuple[Block, ...]:
    """The blocks of a model, in the order of the pass.

    Modules are named by their position in `model.modules()`. `calls`: of one pass, each with the stack of modules.
    `repeatable`: those that were called with plain inputs, which stayed untouched. `numbers`: layers, and their index.
    """
    visits = [stack for stack in calls if stack[-1] in numbers]
    called = Counter(stack[-1] for stack in calls)
    index_of = {module: index for index, module in enumerate(model.modules())}

    def layers_in(module: nn.Module) -> tuple[int, ...] | None:
        """If it can be computed again as a whole: the layers that it calls."""
        index = index_of[module]
        inside = [stack for stack in visits if index in stack]
        found = tuple(numbers[stack[-1]] for stack in inside)
        alone = all(called[stack[-1]] == 1 and not numbers.keys() & {*stack[:-1]} for stack in inside)
        once = called[index] == 1 and index in repeatable and index not in numbers
        return found if once and alone and found else None

    paths = {module: path for path, module in model.named_modules()}
    blocks = [Block(path=paths[module], layers=layers) for module, layers in _repeated(model, layers_in)]
    order = {numbers[stack[-1]]: position for position, stack in reversed(list(enumerate(visits)))}
    return tuple(sorted(blocks, key=lambda block: order[block.layers[0]]))


Found = list[tuple[nn.Module, tuple[int, ...]]]


def _repeated(module: nn.Module, layers_in: Callable[[nn.Module], tuple[int, ...] | None]) -> Found:
    """The blocks below a module. Of siblings of one kind all are blocks, or none."""
    found: Found = []
    kinds: dict[type[nn.Module], list[nn.Module]] = {}
    for child in module.children():
        kinds.setdefault(type(child), []).append(child)
    for children in kinds.values():
        whole = [(child, layers) for child in children if (layers := layers_in(child)) is not None]
        parts = {child: _repeated(child, layers_in) for child in children}
        made_of_parts = any(2 * sum(len(part) for _, part in parts[child]) >= len(layers) for child, layers in whole)
        if len(whole) > 1 and not made_of_parts:
            found += whole
        else:
            found += (part for child in children for part in parts[child])
    return found


def follows(block: Block, visits: Sequence[int], backward: Sequence[int]) -> bool:
    """Whether a training pass visits the block's layers as it has to: in a row, and backward in the reverse order."""
    return _only_run(block.layers, visits) and _only_run(block.layers[::-1], backward)


def _only_run(layers: Sequence[int], visits: Sequence[int]) -> bool:
    mine = [position for position, layer in enumerate(visits) if layer in layers]
    return len(mine) == len(layers) and tuple(visits[mine[0] : mine[0] + len(layers)]) == tuple(layers)
