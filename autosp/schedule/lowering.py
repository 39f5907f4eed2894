"""Candidate -> action list, for either mode."""

from __future__ import annotations

from autosp.schedule.actions import Schedule
from autosp.schedule.streaming import lower
from autosp.schedule.training import lower_training
from autosp.spec import Candidate, Mode, Partition


def lower_for(mode: Mode, candidate: Candidate, partition: Partition) -> Schedule:
    """The action list of one pass under `candidate`.

    Raises: ValueError if only some layers of a group rest on disk, or any do in training.
    """
    if mode == "training":
        return lower_training(candidate, partition)
    layers = partition.layers
    read_bytes = [layer.read_bytes for layer in layers]
    return lower(candidate, [layer.n_bytes for layer in layers], partition.visits, read_bytes)
