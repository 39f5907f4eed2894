"""A model as ordered layers."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import Field, model_validator

from autosp.spec.record import Record

BOOKKEEPING_BYTES, BOOKKEEPING_BYTES_PER_LAYER = 250_000, 20_000
"""On a CPU: what the objects that run a plan take. A study does not see them, in a process that has freed as many: of
26 to 75 layers in a new process they were 0.6 to 0.9 MB, with a scatter of a part of Python's own arena, 1 MiB."""

STATE_PER_WEIGHT = 2
"""Bytes that an optimizer keeps for each byte of a trained weight: Adam's, which has more than most."""


class Layer(Record):
    """The unit that moves: the tensors of one module, or a run of rows of its weight, in one piece of memory."""

    index: int
    name: str = Field(description="dotted path of the module, and its run of rows, such as `lm_head[0:8192]`")
    tensors: tuple[str, ...] = Field(description="canonical names of the parameters and buffers that travel")
    n_bytes: int = Field(description="bytes of one transfer, alignment included, where the plan was made")
    disk_bytes: int | None = Field(
        default=None, description="bytes of one read from disk, alignment included; None before schema 6"
    )
    weight_bytes: int | None = Field(default=None, description="bytes of the tensors alone; None before schema 3")
    rows: tuple[int, int] | None = Field(default=None, description="from and to, if it is a run of a weight's rows")
    gradient_bytes: int = Field(default=0, description="bytes of the gradients that a training pass gives")

    @model_validator(mode="after")
    def _name_says_rows(self) -> Layer:
        if self.rows is not None and not self.name.endswith(f"[{self.rows[0]}:{self.rows[1]}]"):
            raise ValueError(f"layer {self.index} ({self.name}) has rows {self.rows}, which its name does not end in")
        return self

    @property
    def read_bytes(self) -> int:
        """Bytes of one read from disk."""
        return self.n_bytes if self.disk_bytes is None else self.disk_bytes

    @property
    def path(self) -> str:
        """Dotted path of the module."""
        return self.name if self.rows is None else self.name[: self.name.rindex("[")]


class Leaf(Record):
    """A linear module cut into runs of its weight's rows: neighbouring layers, visited one after another."""

    path: str
    inputs: tuple[str, ...] = Field(description="of which the output was seen to be the same, bit by bit, run by run")


class Block(Record):
    """A repeated module, such as a decoder layer: in training it is computed again as a whole, or not at all.

    A pass calls it once. Its layers are visited one after another, and backward in the reverse order.
    """

    path: str
    layers: tuple[int, ...] = Field(description="in the order of their visits")


class Partition(Record):
    """A model as ordered layers. Every byte is in one layer, or a lookup table, or among the resident tensors."""

    layers: tuple[Layer, ...]
    resident_tensors: tuple[str, ...] = Field(description="tied, mutated or parent-owned tensors: never streamed")
    resident_bytes: int
    resident_gradient_bytes: int = Field(
        default=0, description="bytes of the resident tensors' gradients that a training pass gives"
    )
    visits: tuple[int, ...] = Field(description="layer index per call, in the order of one period of execution")
    repeats: int = Field(description="periods per pass; more than one where the step calls the model again and again")
    backward: tuple[int, ...] = Field(
        default=(), description="layers whose weights a training pass's backward needs, in the order of need"
    )
    activation_bytes: tuple[int, ...] = Field(
        default=(),
        description="per entry of `visits`: what autograd saves of it that can be offloaded; none before schema 7",
    )
    lookups: Layer | None = Field(
        default=None, description="tables of which a pass reads a few rows: they stay on the slow tier"
    )
    leaves: tuple[Leaf, ...] = Field(default=(), description="modules that are several layers")
    blocks: tuple[Block, ...] = Field(default=(), description="of which a training pass may keep the inputs only")
    stateful: tuple[int, ...] = Field(
        default=(), description="layers that are called with what may change, such as a cache: not computed again"
    )
    called_again: tuple[str, ...] = Field(
        default=(), description="modules inside layers that a checkpoint of the model's own calls in the backward"
    )

    @model_validator(mode="after")
    def _indices_are_places(self) -> Partition:
        """Lookup tables come after all layers."""
        for place, layer in enumerate([*self.layers, *filter(None, [self.lookups])]):
            if layer.index != place:
                raise ValueError(f"layer {layer.index} ({layer.name}) is in place {place}: layers are in their order")
        return self

    def whole(self, layers: Collection[int]) -> frozenset[int]:
        """These layers, and all other runs of the leaves that they are runs of: together those rest as one tensor."""
        cut = {self.layers[index].path for index in layers if self.layers[index].rows} if self.leaves else set()
        return frozenset(layers).union(layer.index for layer in self.layers if cut and layer.rows and layer.path in cut)

    @property
    def recomputable(self) -> tuple[tuple[int, ...], ...]:
        """The layers that are computed again together: a block's, or one in no block. In the order of the forward."""
        block_of = {layer: block.layers for block in self.blocks for layer in block.layers}
        able = frozenset(self.backward) - (frozenset(self.stateful) - self.in_blocks)
        return tuple(dict.fromkeys(block_of.get(one, (one,)) for one in self.visits if one in able))

    @property
    def in_blocks(self) -> frozenset[int]:
        """The layers of all blocks."""
        return frozenset(layer for block in self.blocks for layer in block.layers)

    def recomputed_blocks(self, recompute: Collection[int]) -> tuple[Block, ...]:
        """Those of which all layers are computed again."""
        again = frozenset(recompute)
        return tuple(block for block in self.blocks if again.issuperset(block.layers))

    def parted_blocks(self, recompute: Collection[int]) -> tuple[Block, ...]:
        """Those of which some layers would be computed again without the rest."""
        whole = {layer for block in self.recomputed_blocks(recompute) for layer in block.layers}
        others = {*recompute} - whole
        return tuple(block for block in self.blocks if not others.isdisjoint(block.layers))

    def state_bytes(self, residents: Collection[int], kind: str) -> int:
        """What an optimizer comes to keep on a device of that kind, where weights are that never leave it.

        These are the resident tensors and these layers. None on a CPU: there all state is in host memory in any case.
        """
        if kind == "cpu":
            return 0
        trained = self.resident_gradient_bytes + sum(self.layers[index].gradient_bytes for index in residents)
        return STATE_PER_WEIGHT * trained

    @property
    def bookkeeping_bytes(self) -> int:
        """What the objects that run a plan may take of a process, on a CPU."""
        return BOOKKEEPING_BYTES + BOOKKEEPING_BYTES_PER_LAYER * len(self.layers)

    @property
    def streamable_bytes(self) -> int:
        """Bytes of all layers together."""
        return sum(layer.n_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights: layers, resident tensors, lookup tables."""
        return self.streamable_bytes + self.resident_bytes + (self.lookups.n_bytes if self.lookups else 0)
