"""A model put on the slow tier once, on which any candidate can be tried."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from autosp.devices import Device
from autosp.intercept import call_all, to_its_end
from autosp.partition import bind
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.actions import Schedule
from autosp.schedule.lowering import lower_for
from autosp.spec import Candidate, Mode, Partition
from autosp.tiers import DiskStore, HostStore, Originals, Readers, Store, TieredStore, open_store


class Bench:
    """Holds all layers on the slow tier. After each trial the model is at rest again; at the end it is as it was.

    Where the host has a budget that they exceed, all layers are on disk instead, and each trial moves to the host what
    rests there under its candidate, for as long as it lasts.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        device: Device,
        cache_dir: Path,
        host_budget_bytes: int | None = None,
        mode: Mode = "inference",
    ) -> None:
        """`host_budget_bytes`: None where the slow tier has room for all.

        Raises: DiskFullError if the slow tier has no room; PlanMismatchError if the partition is another model's;
        ReadError if a file that weights are mapped from was truncated or replaced.
        """
        gc.collect()  # what earlier work left would be freed in the middle of a trial, and hide as much of its peak
        self.model = model
        self.device = device
        self.host_budget_bytes = host_budget_bytes
        self._mode = mode
        self._bound = bind(model, partition, device.info.slow_tier)
        self.partition = self._bound.partition
        self.readers = Readers()
        """Of what is on disk: one, until they are told otherwise."""
        self.store: Store
        if host_budget_bytes is None:
            self.store = open_store(device, self._bound.stored(), cache_dir, Originals.KEPT, readers=self.readers)
        else:
            self.store = DiskStore(self._bound.layers, cache_dir, Originals.KEPT, self.readers)

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        to_its_end(partial(call_all, [self.readers.close, self.store.close]))

    def arena_bytes(self, candidate: Candidate) -> int:
        """Device memory of the candidate's ring."""
        return self._lower(candidate).arena_bytes

    def apply(self, candidate: Candidate) -> StreamedModel[nn.Module]:
        """The model under `candidate`, until `remove()`."""
        schedule = self._lower(candidate)
        if self.host_budget_bytes is None:
            return StreamedModel(self._bound, schedule, self.device, self.store, Originals.KEPT, mode=self._mode)
        stored = self._bound.stored({*candidate.residents, *candidate.on_disk})
        host = HostStore(stored, self.device)
        store = TieredStore(host, self.store, candidate.on_disk)
        return StreamedModel(self._bound, schedule, self.device, store, Originals.KEPT, host.close)

    def state_bytes(self, candidate: Candidate) -> int:
        """What an optimizer will keep on the device under `candidate`, whose passes here run none."""
        return self.partition.state_bytes(candidate.residents, self.device.info.kind)

    def _lower(self, candidate: Candidate) -> Schedule:
        return lower_for(self._mode, candidate, self.partition)


def timed_pass(device: Device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and output of one pass. Loads for the next one go on, as in a loop."""
    start = device.stamp()
    output = run()
    end = device.stamp()
    return device.seconds(start, end), output
