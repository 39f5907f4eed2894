"""Device memory of a training pass: weights, activations kept for the backward, gradients.

`peak = fixed + arena + residents + state + max over visits of (activations + gradients)`, where

- fixed is what is resident for every plan, and the workspace: what the least-memory plan was observed to take beyond
  this formula, so that kernels' own memory, and gradients of activations, are in it;
- state is what an optimizer keeps beside residents once it has made a step: `Partition.state_bytes`. Where the device
  is the host, all of its state is in host memory in any case, and none is counted;
- activations at a visit are what the forward has kept so far, or the backward has not used up: of a layer that is
  computed again its inputs, and during its own backward all; of a block likewise; of one that offloads them, none while
  they are away. Of a group one microbatch visits, and each of the others holds what it has where its round begins, or
  ends: see `rounds`. Where some offload, each is taken to hold what the visiting one does;
- gradients are those that resident layers have by then, that which the visit makes, and those of streamed layers before
  it that may still be under way: of these, no more than the largest layer's ([Note: gradients under way]). Of a group
  those of a round stay until its end, and one that is made is added to one that is there.

[Note: gradients under way] One that leaves is in device memory until the next one is there and wants to leave, however
fast the link is. So of equal layers two gradients are there at once: one leaves while the other is made. Not so with
k = 1: while the next layer's weights are on their way, the gradients of the one before leave.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from autosp.cost_model.memory import DeviceMemory
from autosp.cost_model.offload_memory import bytes_away
from autosp.cost_model.rounds import Bytes, Rounds, held_by_one
from autosp.schedule.visits import used_up_after
from autosp.spec import Candidate, Profile

CURVES = 512
"""How many are remembered: neighbouring candidates share them."""


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
        self._there_again = self._first_backward_visits()
        self._in_block = np.isin(self._layers, list(profile.partition.in_blocks))
        self._gradients = np.array([layer.gradient_bytes for layer in profile.partition.layers], np.int64)
        self._gradient_visits = self._last_backward_visits()
        self._curve = lru_cache(maxsize=CURVES)(self._activations)
        self._held = lru_cache(maxsize=CURVES)(self._held_by_one)
        self._gradient_curve = lru_cache(maxsize=CURVES)(self._gradients_of)
        self._away = lru_cache(maxsize=CURVES)(partial(bytes_away, profile))

    def peak_bytes(self, candidate: Candidate, arena_bytes: int) -> int:
        """See the formula at this module's top."""
        beside = self.state_bytes(candidate.residents) + self.moving_bytes(candidate)
        return self._weights.peak_bytes(candidate, arena_bytes) + beside

    def state_bytes(self, residents: tuple[int, ...]) -> int:
        """Of an optimizer, on the device."""
        return self._partition.state_bytes(residents, self._profile.device.kind)

    def may_fit(self, candidate: Candidate, usable_bytes: int) -> bool:
        """Whether the candidate fits in the smallest arena that could hold its groups; found without placing them."""
        if self.peak_bytes(candidate, 0) > usable_bytes:
            return False
        return self.peak_bytes(candidate, self._weights.least_arena_bytes(candidate)) <= usable_bytes

    def moving_bytes(self, candidate: Candidate) -> int:
        """Activations and gradients at the peak of both together."""
        there, gradients = self.curves(candidate)
        return int((there + gradients).max(initial=0))

    def curves(self, candidate: Candidate) -> tuple[Bytes, Bytes]:
        """Activations, and gradients, during each visit of a pass, forward and backward, and at its end. [F + B + 1]"""
        rounds = Rounds.of(candidate, self._partition) if candidate.group > 1 and len(self._layers) else None
        if candidate.offload:
            there = self._curve(candidate.recompute, candidate.group) - self._away(_moving_alike(candidate))
        elif rounds is None:
            there = self._curve(candidate.recompute)
        else:
            there = self._of_group(candidate, rounds)
        if rounds is None:
            return there, self._gradient_curve(candidate.residents, candidate.k > 1)
        return there, self._gradients_of_group(candidate, rounds)

    def activation_bytes(self, recompute: tuple[int, ...], group: int = 1) -> int:
        """Activations at their peak, nothing offloaded. Of a group that waits between any two visits."""
        return int(self._curve(recompute, group).max(initial=0))

    def _activations(self, recompute: tuple[int, ...], group: int = 1) -> Bytes:
        """Bytes during each visit, forward and backward, and at the end of the pass. [F + B + 1]

        Of a group, as if all of it were at the same visit.
        """
        backward = self._partition.backward
        again = np.isin(self._layers, recompute)
        held = group * np.where(again, self._inputs, self._kept)
        curve = np.cumsum(held)
        left = np.zeros(len(backward) + 1, np.int64)
        np.add.at(left, self._used_up, held)
        during = held.sum() - np.concatenate([[0], np.cumsum(left)])[:-1]
        anew = np.zeros(len(backward) + 2, np.int64)
        again &= self._used_up < len(backward)  # what no backward visit uses up is not computed again
        beyond = np.where(again, np.maximum(0, self._kept - self._inputs), 0) * np.where(self._in_block, group, 1)
        np.add.at(anew, self._there_again, beyond)
        np.add.at(anew, self._used_up + 1, -beyond)
        return np.concatenate([curve, during + np.cumsum(anew)[:-1]])

    def _of_group(self, candidate: Candidate, rounds: Rounds) -> Bytes:
        """Activations of a group, nothing offloaded. [F + B + 1]"""
        during, before = self._held(candidate.recompute)
        there = during + (candidate.group - 1) * rounds.most_held(before)
        return np.append(rounds.as_curve(there), candidate.group * before[-1])

    def _held_by_one(self, recompute: tuple[int, ...]) -> tuple[Bytes, Bytes]:
        return held_by_one(recompute, self._partition, self._inputs, self._kept)

    def _first_backward_visits(self) -> npt.NDArray[np.intp]:
        """Forward visit -> the backward visit from which its activations are there again: of a block, its first one."""
        begins = self._used_up.copy()
        for block in self._partition.blocks:
            mine = np.isin(self._layers, block.layers)
            begins[mine] = begins[mine].min()
        return begins

    def _gradients_of(self, residents: tuple[int, ...], several: bool) -> Bytes:
        """Bytes at the end of each visit, before what it made leaves; and at the end of the pass. [F + B + 1]

        `several`: whether some of it may still be under way when the next visit begins.
        """
        staying, leaving, under_way = self._made(residents, several)
        curve: Bytes = np.cumsum(staying) + under_way + leaving
        return curve

    def _gradients_of_group(self, candidate: Candidate, rounds: Rounds) -> Bytes:
        """The same where those of a round stay until its last microbatch has added its own. [F + B + 1]"""
        staying, leaving, under_way = self._made(candidate.residents, candidate.k > 1)
        made, stays = (rounds.of_entries(one[:-1]) for one in (staying + leaving, staying))
        earlier = (np.cumsum(stays) - stays)[rounds.first] + under_way[rounds.entry[rounds.first]]
        curve = rounds.as_curve(earlier[rounds.number] + rounds.total(made) + made)
        return np.append(curve, np.cumsum(staying)[-1] + under_way[-1] + leaving[-1])

    def _made(self, residents: tuple[int, ...], several: bool) -> tuple[Bytes, Bytes, Bytes]:
        """What each visit makes that stays, and that leaves; what is under way when it begins. [F + B + 1]"""
        end = len(self._partition.visits) + len(self._partition.backward)
        staying, leaving = np.zeros((2, end + 1), np.int64)
        stays = np.zeros(len(self._gradients), bool)
        stays[list(residents)] = True
        np.add.at(staying, self._gradient_visits[stays], self._gradients[stays])
        np.add.at(leaving, self._gradient_visits[~stays], self._gradients[~stays])
        most = self._gradients[~stays].max(initial=0)
        made = np.concatenate([[0], np.cumsum(leaving)])
        oldest = np.searchsorted(made, made[:-1] - most)
        under_way = made[:-1] - made[oldest]
        last = self._gradients[~stays & (self._gradient_visits == end)].max(initial=0)  # one after another
        under_way[end] = min(most, under_way[end] + leaving[end] - last)
        under_way[:end] *= several
        leaving[end] = last
        return staying, leaving, under_way

    def _last_backward_visits(self) -> npt.NDArray[np.intp]:
        """Layer -> the visit that makes its gradient whole: its last backward, or the end of the pass."""
        forward, backward = self._partition.visits, self._partition.backward
        last = {layer: visit for visit, layer in enumerate(backward, len(forward))}
        end = len(forward) + len(backward)
        return np.array([last.get(layer.index, end) for layer in self._partition.layers], np.intp)


def _moving_alike(candidate: Candidate) -> Candidate:
    """One whose offloaded activations move as this one's do."""
    return candidate.model_copy(update={"k": candidate.ring, "k_prime": 1, "residents": ()})


Together = tuple[int, ...]
"""Layers that are computed again together: see `Partition.recomputable`."""


def freed_bytes(profile: Profile) -> dict[Together, int]:
    """What the activations take beyond the inputs: what computing them again frees."""
    beyond: dict[int, int] = {}
    for visit in profile.visits:
        beyond[visit.layer] = beyond.get(visit.layer, 0) + visit.kept_bytes - visit.input_bytes
    return {layers: sum(beyond[layer] for layer in layers) for layers in profile.partition.recomputable}


def seconds_per_freed_byte(profile: Profile) -> dict[Together, float]:
    """What each byte costs that is freed by computing activations again; only where that frees some."""
    taken: dict[int, float] = {}
    for again in profile.backward:
        taken[again.layer] = taken.get(again.layer, 0.0) + again.recompute_s
    freed = freed_bytes(profile).items()
    return {layers: sum(taken[layer] for layer in layers) / n_bytes for layers, n_bytes in freed if n_bytes > 0}
