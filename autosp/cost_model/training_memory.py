"""Device memory of a training pass: weights, activations kept for the backward, gradients.

`peak = fixed + arena + residents + max over visits of (activations + gradients)`, where

- fixed is what is resident for every plan, and the workspace: what the least-memory plan was observed to take beyond
  this formula, so that what is kept outside of any layer, and kernels' own memory, are in it;
- activations at a visit are what the forward has kept so far, or the backward has not used up: of a layer that is
  computed again its inputs, and during its own backward all; of one that offloads them, none while they are away;
- gradients are those that resident layers have by then, and, once the first one leaves, as much as the largest streamed
  layer's on their way: more is not let under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from autosp.cost_model.memory import DeviceMemory
from autosp.cost_model.offload_memory import bytes_away
from autosp.schedule.arena import arena_bytes
from autosp.schedule.offload import used_up_after
from autosp.spec import Candidate, Profile


def memory_of(profile: Profile) -> DeviceMemory | TrainingMemory:
    """The memory of a profile's candidates."""
    return TrainingMemory(profile) if profile.mode == "training" else DeviceMemory(profile)


class TrainingMemory:
    """`peak_bytes` of many candidates of one profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile, self._partition = profile, profile.partition
        self._weights = DeviceMemory(profile)
        self._layers = np.array([visit.layer for visit in profile.visits], np.intp)
        self._kept = np.array([visit.kept_bytes for visit in profile.visits], np.int64)
        self._inputs = np.array([visit.input_bytes for visit in profile.visits], np.int64)
        self._used_up = np.array(used_up_after(profile.partition.visits, profile.partition.backward), np.intp)
        self._gradients = np.array([layer.gradient_bytes for layer in profile.partition.layers], np.int64)
        self._gradient_visits = self._last_backward_visits()
        self._curve = lru_cache(maxsize=None)(self._activations)

    def peak_bytes(self, candidate: Candidate, arena_bytes: int) -> int:
        """See the formula at this module's top."""
        moving = self._curve(candidate.recompute) + self._gradient_curve(candidate.residents)
        if candidate.offload:
            moving = moving - bytes_away(self._profile, candidate)
        return self._weights.peak_bytes(candidate, arena_bytes) + int(moving.max(initial=0))

    def may_fit(self, candidate: Candidate, usable_bytes: int) -> bool:
        """Whether the candidate fits in the smallest arena that could hold its groups; found without placing them."""
        layers = self._partition.layers
        sizes = [sum(layers[one].n_bytes for one in group) for group in candidate.groups(self._partition.visits)]
        return self.peak_bytes(candidate, arena_bytes(sizes, candidate.depth)) <= usable_bytes

    def activation_bytes(self, recompute: tuple[int, ...], offload: tuple[int, ...] = ()) -> int:
        """Activations at their peak, in a ring of one layer."""
        curve = self._curve(recompute)
        if offload:
            curve = curve - bytes_away(self._profile, Candidate(k=1, k_prime=1, recompute=recompute, offload=offload))
        return int(curve.max(initial=0))

    def gradient_bytes(self, residents: Sequence[int] = ()) -> int:
        """Gradients at their peak: those of residents, and those under way."""
        return int(self._gradient_curve(residents).max(initial=0))

    def _activations(self, recompute: tuple[int, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Bytes during each visit, forward and backward. [F + B]"""
        backward = self._partition.backward
        again = np.isin(self._layers, recompute)
        held = np.where(again, self._inputs, self._kept)
        curve = np.cumsum(held)
        left = np.zeros(len(backward) + 1, np.int64)
        np.add.at(left, self._used_up, held)
        during = held.sum() - np.concatenate([[0], np.cumsum(left)])[: len(backward)]
        anew = np.zeros(len(backward) + 1, np.int64)
        np.add.at(anew, self._used_up, np.where(again, np.maximum(0, self._kept - self._inputs), 0))
        return np.concatenate([curve, during + anew[: len(backward)]])

    def _gradient_curve(self, residents: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Bytes at the end of each visit. [F + B]"""
        forward, backward = len(self._partition.visits), len(self._partition.backward)
        curve = np.zeros(forward + backward, np.int64)
        if not len(curve):
            return curve
        stays = np.zeros(len(self._gradients), bool)
        stays[list(residents)] = True
        np.add.at(curve, self._gradient_visits[stays], self._gradients[stays])
        curve = np.cumsum(curve)
        curve[min(forward, len(curve) - 1) :] += self._gradients[~stays].max(initial=0)
        return curve

    def _last_backward_visits(self) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        """Layer -> the visit after which its gradient is whole: its last backward, or the last of all."""
        forward, backward = self._partition.visits, self._partition.backward
        last = {layer: visit for visit, layer in enumerate(backward, len(forward))}
        end = max(0, len(forward) + len(backward) - 1)
        return np.array([last.get(layer.index, end) for layer in self._partition.layers], np.intp)


def freed_bytes(profile: Profile) -> Counter[int]:
    """Layer -> what its activations take beyond its inputs: what computing them again frees."""
    freed: Counter[int] = Counter()
    for visit in profile.visits:
        freed[visit.layer] += visit.kept_bytes - visit.input_bytes
    return freed


def seconds_per_freed_byte(profile: Profile) -> dict[int, float]:
    """Layer -> what each byte costs that is freed by computing its activations again; only layers that free some."""
    freed = freed_bytes(profile)
    taken: dict[int, float] = {}
    for again in profile.backward:
        taken[again.layer] = taken.get(again.layer, 0.0) + again.recompute_s
    return {layer: seconds / freed[layer] for layer, seconds in taken.items() if freed[layer] > 0}
