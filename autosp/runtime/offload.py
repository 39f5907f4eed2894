"""Activations of layers to offload: what their forwards save for the backward, on its way to host memory and back.

[Note: what is offloaded] Of each storage one copy, whole, sent by the first visit that saves it; what is saved of it,
and views of it, are views of what comes back. Left where they are: weights, buffers and the batch, which are there
anyway; what a layer that is not offloaded keeps; small tensors; and what is no run of the device's bytes.

[Note: whose memory an activation has] Its own on the device until its copy to the host is over, the host's until its
copy back is issued, then memory of its own again, which compute sees once that copy is over. Memory that a copy reads
or writes is held by the copy's `_Flight` until compute is ordered after it: only then can it be anybody else's. What
autograd lets go of is let go of here: nothing else holds an activation for long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from autosp.devices import Device
from autosp.runtime.loader import Counters
from autosp.runtime.recorder import Recorder
from autosp.schedule.actions import Kind
from autosp.tiers.host import HostRegion
from autosp.tiers.pinned import Lease, PinnedPool

LEAST_BYTES = 16 * 2**10
"""A copy of less takes as long as its latency."""


class Owner(Enum):
    """Who has an activation's bytes: see [Note: whose memory an activation has]."""

    DEVICE = auto()
    LEAVING = auto()
    """The device, until the copy to the host is over."""
    HOST = auto()
    COMING = auto()
    """The host; and the device, once the copy back is over."""


class Activation:
    """One storage that autograd saved."""

    __slots__ = ("__weakref__", "identity", "lease", "memory", "n_bytes", "owner", "version")

    def __init__(self, storage: torch.UntypedStorage, version: int, device: torch.device) -> None:
        self.identity = StorageWeakRef(storage)
        """No other storage has it while this is alive."""
        self.version = version
        self.n_bytes = storage.nbytes()
        self.owner = Owner.DEVICE
        with torch.no_grad():
            self.memory: torch.Tensor | None = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        """Its bytes on the device."""
        self.lease: Lease | None = None
        """Its bytes on the host."""


Saved = list[ref[Activation]]
"""What one visit backward needs."""


@dataclass(slots=True)
class Visit:
    """One visit forward of a layer to offload."""

    new: list[Activation] = field(default_factory=list)
    """What it is the first to save: to be sent when it is over."""
    saved: Saved = field(default_factory=list)
    """All that it saved: for its backward, to which what it shares with a later visit comes back before."""


@dataclass(eq=False, slots=True)
class _Flight:
    """Copies of one visit's activations under way, one way or the other."""

    activations: list[Activation] = field(default_factory=list)
    copies: list[Any] = field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.activations)

    def add(self, activation: Activation, copied: Any) -> None:
        """A copy was started."""
        self.activations.append(activation)
        self.copies.append(copied)


def can_be_offloaded(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor is a view of enough of the device's bytes."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device == device
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
        and tensor.untyped_storage().nbytes() >= LEAST_BYTES
    )


def storages_of(tensors: Iterable[torch.Tensor]) -> set[StorageWeakRef]:
    """The identities of what they are views of."""
    return {StorageWeakRef(one.untyped_storage()) for one in tensors if one.layout is torch.strided}


class Offload:
    """The activations of one model's layers to offload."""

    def __init__(
        self,
        layers: frozenset[int],
        device: Device,
        counters: Counters,
        recorder: Recorder,
        model: nn.Module,
    ) -> None:
        """The model's parameters and buffers are there, whatever is offloaded."""
        self.layers = layers
        self._device = device
        self._counters = counters
        self._recorder = recorder
        self._model = model
        self._pool = PinnedPool(device)
        self._there: set[StorageWeakRef] = set()
        self._known: WeakValueDictionary[int, Activation] = WeakValueDictionary()
        self._saved: dict[int, dict[int | None, list[Saved]]] = {}
        """By layer and microbatch: of visits forward whose activations were not asked for again, the last one last."""
        self._leaving: deque[_Flight] = deque()
        self._most_leaving = 0
        self._coming: dict[int, list[_Flight]] = {}
        """By layer."""
        self._microbatch: int | None = None

    def begin_pass(self) -> None:
        """Forget what nobody can ask for any more. What is under way may be of a graph that was dropped."""
        if not self.layers:
            return
        self.settle()
        self._pool.begin_pass()
        self._there = storages_of([*self._model.parameters(), *self._model.buffers()])
        for stacks in self._saved.values():
            for stack in stacks.values():
                stack[:] = [saved for saved in stack if any(one() is not None for one in saved)]

    def begin_turn(self, microbatch: int | None) -> None:
        """Whose forward or backward comes next."""
        self._microbatch = microbatch

    def stays(self, tensors: Iterable[torch.Tensor]) -> None:
        """Somebody keeps these until the backward: a batch its user, inputs a layer that is computed again."""
        if self.layers:
            self._there.update(one for one in storages_of(tensors) if one.cdata not in self._known)

    # -- forward --------------------------------------------------------------------------------------------------

    def hold(self, tensor: torch.Tensor, visit: Visit) -> Activation | None:
        """The activation that a tensor shows, which joins the `visit` if it is new. None: it stays where it is."""
        if not can_be_offloaded(tensor, self._device.torch_device):
            return None
        storage = tensor.untyped_storage()
        identity = StorageWeakRef(storage)
        known = self._known.get(identity.cdata)
        if known is not None and known.version == tensor._version:
            visit.saved.append(ref(known))
            return known
        if identity in self._there:
            return None
        made = Activation(storage, tensor._version, self._device.torch_device)
        self._known[identity.cdata] = made
        visit.new.append(made)
        visit.saved.append(ref(made))
        return made

    def send(self, layer: int, visit: Visit) -> None:
        """The layer's forward is over: what it saved leaves, once there is room for it under way."""
        self._poll()
        self._saved.setdefault(layer, {}).setdefault(self._microbatch, []).append(visit.saved)
        flight = _Flight()
        self._leaving.append(flight)
        after = self._device.record()
        for one in visit.new:
            assert one.memory is not None
            one.lease = self._pool.take(one.n_bytes)
            flight.add(one, self._device.send(one.memory, one.lease.data, after))
            one.owner = Owner.LEAVING
        self._counters.offloaded_bytes += flight.n_bytes
        self._counters.offload_buffers = self._pool.runs_taken
        self._recorder.moved(Kind.SAVE, layer, flight.copies)
        self._most_leaving = max(self._most_leaving, flight.n_bytes)
        while sum(one.n_bytes for one in self._leaving) > self._most_leaving:
            self._arrived(self._leaving.popleft())

    # -- backward -------------------------------------------------------------------------------------------------

    def restore(self, layer: int, visits: int) -> None:
        """Bring back what the layer's last so many visits forward sent, of each microbatch; what is needed first first.

        What has not left yet stays.
        """
        self._poll()
        wanted: list[Activation] = []
        for stack in self._saved.get(layer, {}).values():
            for saved in reversed(stack[-visits:]):
                wanted += (one for known in reversed(saved) if (one := known()) is not None)
            del stack[-visits:]
        self._bring(layer, wanted)

    def wait_for(self, layer: int) -> None:
        """The layer's backward begins: order compute after what was brought back for it."""
        for flight in self._coming.pop(layer, ()):
            self._arrived(flight)

    def memory_of(self, activation: Activation, layer: int) -> torch.Tensor:
        """Its bytes on the device (uint8), for compute. If nobody asked for them, they are brought now: a miss."""
        if activation.owner is Owner.HOST:
            self._counters.restore_misses += 1
            self._bring(layer, [activation])
        if activation.owner is Owner.LEAVING:
            activation.owner = Owner.DEVICE
        if activation.owner is Owner.COMING:
            for others, flights in list(self._coming.items()):
                if any(activation in flight.activations for flight in flights):
                    self.wait_for(others)
        assert activation.memory is not None
        return activation.memory

    # -- the end --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The pass is over, or raised: wait for what is under way, so that its memory is free if nobody holds it."""
        while self._leaving:
            self._arrived(self._leaving.popleft())
        for layer in list(self._coming):
            self.wait_for(layer)

    def close(self) -> None:
        """Nothing is sent from now on. What is away stays readable."""
        self.settle()
        self._saved.clear()
        self._pool.close()

    def _bring(self, layer: int, activations: Iterable[Activation]) -> None:
        flight = _Flight()
        self._coming.setdefault(layer, []).append(flight)
        for one in activations:
            if one.owner is Owner.LEAVING:
                one.owner = Owner.DEVICE
            if one.owner is not Owner.HOST:
                continue
            assert one.lease is not None
            region = HostRegion(one.lease.data, one.n_bytes)
            memory = torch.empty(one.n_bytes, dtype=torch.uint8, device=self._device.torch_device)
            flight.add(one, self._device.copy([region], memory, self._device.record()))
            one.memory, one.owner = memory, Owner.COMING
        self._counters.restored_bytes += flight.n_bytes
        self._recorder.moved(Kind.RESTORE, layer, flight.copies)

    def _poll(self) -> None:
        """What has left, has left."""
        while self._leaving and all(map(self._device.finished, self._leaving[0].copies)):
            self._arrived(self._leaving.popleft())

    def _arrived(self, flight: _Flight) -> None:
        """Order compute after the copies. Where one failed, its activation is where it was, and this raises that."""
        for one, copied in zip(flight.activations, flight.copies, strict=True):
            try:
                self._device.wait(copied)
            except BaseException:
                self._fall_back(flight)
                raise
            if one.owner is Owner.LEAVING:
                one.memory, one.owner = None, Owner.HOST
            elif one.owner is Owner.COMING:
                one.owner = Owner.DEVICE

    def _fall_back(self, flight: _Flight) -> None:
        self._device.synchronize()  # its other copies still read and write
        for one in flight.activations:
            if one.owner is Owner.LEAVING:
                one.owner = Owner.DEVICE
            elif one.owner is Owner.COMING:
                one.memory, one.owner = None, Owner.HOST
