"""Candidate -> action list, for either mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from autosp.schedule.actions import Schedule
from autosp.schedule.streaming import Ring, build_ring, lower
from autosp.schedule.training import lower_training, training_ring
from autosp.spec import Candidate, Mode, Partition


def lower_for(mode: Mode, candidate: Candidate, partition: Partition) -> Schedule:
    """The action list of one pass under `candidate`.

    Raises: ValueError if only some layers of a group rest on disk, or any do in training.
    """
    if mode == "training":
        return lower_training(candidate, partition)
    return lower(candidate, *_sizes(partition))


def ring_for(mode: Mode, candidate: Candidate, partition: Partition) -> Ring:
    """The ring that the action list of `lower_for` loads into.

    Raises: ValueError if only some layers of a group rest on disk.
    """
    return rings_of(mode, partition)(candidate)


def rings_of(mode: Mode, partition: Partition) -> Callable[[Candidate], Ring]:
    """`ring_for`, for many candidates."""
    if mode == "training":
        return partial(training_ring, partition=partition)
    layer_bytes, visits, read_bytes = _sizes(partition)
    return partial(build_ring, layer_bytes=layer_bytes, visits=visits, read_bytes=read_bytes)


def _sizes(partition: Partition) -> tuple[list[int], tuple[int, ...], list[int]]:
    """Bytes of each layer's load, the visits, and bytes of each layer's read."""
    layers = partition.layers
    return [layer.n_bytes for layer in layers], partition.visits, [layer.read_bytes for layer in layers]
