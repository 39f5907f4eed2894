"""A linear module whose weight's rows are layers of their own: some stream, some stay, the output is the module's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from autosp.batch import equal
from autosp.devices.memory import expect_ordinary_reads, expect_scattered_reads
from autosp.partition import BoundLayer, BoundLeaf
from autosp.partition.placed import views_on
from autosp.partition.rows import input_key, joined, the_input
from autosp.runtime.executor import Executor
from autosp.runtime.residents import Residents, fill
from autosp.runtime.streamed_layer import StreamedLayer, sample


class StreamedRun(StreamedLayer):
    """A run of rows that moves. The parameter is the whole weight at rest all the time."""

    def bind_device(self) -> None:
        """Nothing is bound. Raises: as `check`."""
        self.check()

    def bind_rest(self) -> None:
        """Nothing was bound."""

    def columns(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The columns of the output that its rows make."""
        return F.linear(x, self._on_device[0][1], bias)


class ResidentRun:
    """A run of rows that stays on the device: a copy of the weight at rest."""

    def __init__(self, bound: BoundLayer, residents: Residents) -> None:
        """`residents` has its memory."""
        (self._rest,) = bound.placed
        place = residents.place_of(self._rest.extent)
        self._memory = residents.memory[place.offset : place.offset + place.extent.n_bytes]
        (self._weight,) = views_on([place], residents.memory)
        self._copied = self._state()

    def renew(self) -> None:
        """Copy it again if the weight at rest was written to. Raises: ReadError."""
        state = self._state()
        if state != self._copied:
            fill(self._memory, self._rest)
            self._copied = state

    def columns(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The columns of the output that its rows make."""
        return F.linear(x, self._weight, bias)

    def _state(self) -> tuple[int, int]:
        """Changes when its rows at rest are written to, whether or not a version counter sees it."""
        return self._rest.extent.tensors[0].tensor._version, sample(self._rest)


class CutLeaf:
    """Computes a linear module run by run, for every input of which the output is known to be the same then.

    Any other (see `input_key`) is computed both ways once, with the whole weight as it rests (on an accelerator: with a
    copy of it, in memory taken for the occasion); where the two differ, always with the whole. So the output is the
    module's own in any case, and the plan's memory is enough for the inputs that the plan was made for.
    """

    def __init__(
        self,
        leaf: BoundLeaf,
        layers: Sequence[BoundLayer],
        runs: Sequence[StreamedRun | ResidentRun],
        executor: Executor,
    ) -> None:
        """`runs` of all the leaf's layers, in their order."""
        self._module = leaf.module
        self._weight = leaf.weight.tensors[0].tensor
        self._rows = [bound.layer.rows or (0, 0) for bound in layers]
        self._runs = runs
        self._executor = executor
        self._same = dict.fromkeys(leaf.inputs, True)
        data = self._weight.data
        self._rest = data.data_ptr(), data.nbytes
        self._is_table = len(leaf.weight.tensors[0].names) > 1 and data.is_cpu
        if self._is_table:  # as in `Lookups`
            expect_scattered_reads(*self._rest)

    def forget(self) -> None:
        """While the weight still rests where it did."""
        if self._is_table:
            expect_ordinary_reads(*self._rest)

    def renew(self) -> None:
        """Before a pass. Raises: ReadError."""
        for run in self._runs:
            if isinstance(run, ResidentRun):
                run.renew()

    def forward(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward, within a pass."""
        if self._module.weight is not self._weight:  # somebody gave the module another parameter
            return forward(*args, **kwargs)
        x = the_input(args, kwargs)
        key = input_key(x)
        same = self._same.get(key)
        if same:
            return self._run_by_run(x)
        whole = self._by_the_whole(x)
        if same is None:
            self._same[key] = equal(self._run_by_run(x), whole)
        return whole

    def _by_the_whole(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_table:
            expect_ordinary_reads(*self._rest)
        output = F.linear(x, self._weight.to(x.device), self._module.bias)
        if self._is_table:
            expect_scattered_reads(*self._rest)
        return output

    def _run_by_run(self, x: torch.Tensor) -> torch.Tensor:
        bias = self._module.bias

        def columns(number: int) -> torch.Tensor:
            run, (begin, end) = self._runs[number], self._rows[number]
            part = None if bias is None else bias[begin:end]
            if isinstance(run, ResidentRun):
                return run.columns(x, part)
            columns: torch.Tensor = self._executor.run_layer(run, run.columns, (x, part), {})
            return columns

        return joined(self._rows, columns)
