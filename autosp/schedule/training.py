"""Lowers a candidate to the action list of a training pass: forward, then backward over the same ring.

The update between two passes changes the weights at rest, so every pass begins with an empty arena. Forward leaves the
last layers there: at the turn they are not loaded again. So weights W of which a ring holds R are loaded as 2 W - R
bytes a pass; layers whose backward needs no weights (an embedding) only once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from autosp.schedule.actions import Action, Kind, Ref, Schedule
from autosp.schedule.arena import place_spread
from autosp.schedule.offload import Restore, held_up, link_queue, restores, saves, saves_held_up
from autosp.schedule.streaming import Ring, place_groups, time_transfers
from autosp.schedule.visits import Visit, visits_of
from autosp.spec import Candidate, Partition


def lower_training(candidate: Candidate, partition: Partition) -> Schedule:
    """The action list of one training pass.

    Raises: ValueError if layers rest on disk, or one is recomputed or offloaded that the backward pass does not visit,
    or one is recomputed without the rest of its block.
    """
    if candidate.on_disk:
        raise ValueError(f"layers {candidate.on_disk} rest on disk: in training, weights rest in host memory")
    if not {*candidate.recompute} <= {*partition.backward}:
        raise ValueError("a layer is recomputed whose backward needs no weights")
    if not {*candidate.offload} <= {*partition.backward}:
        raise ValueError("activations are offloaded of a layer whose backward needs no weights")
    parted = partition.parted_blocks(candidate.recompute)
    if parted:
        raise ValueError(f"some layers of block {parted[0].path} are recomputed, and others are not")
    ring = training_ring(candidate, partition)
    actions = _Lowering(ring, candidate, partition).actions
    return Schedule(tuple(actions), (), candidate.residents, ring.arena_bytes)


def least_training(partition: Partition) -> Candidate:
    """The training plan of least memory: one layer at a time, and of each only its inputs kept, where that will do."""
    again = {layer for together in partition.recomputable for layer in together}
    return Candidate(k=1, k_prime=1, recompute=tuple(sorted(again)))


def training_ring(candidate: Candidate, partition: Partition) -> Ring:
    """Where streamed layers live, and when they move in a pass: see `visits_of`.

    No pass finds anything in the arena, so a place that few layers share saves no load: they are spread over all of it.
    """
    sizes = [layer.n_bytes for layer in partition.layers]
    groups, arena_bytes = place_groups(candidate, sizes, partition.visits, place_spread)
    visits = [visit.layer for visit in visits_of(candidate, partition)]
    return Ring(groups, arena_bytes, time_transfers(groups, visits, walks=0))


class _Lowering:
    """The actions of one pass, in their order."""

    def __init__(self, ring: Ring, candidate: Candidate, partition: Partition) -> None:
        self.actions: list[Action] = []
        self._ring = ring
        self._group_of = {layer: index for index, group in enumerate(ring.groups) for layer in group.layers}
        self._numbers: Counter[tuple[Kind, tuple[int, ...]]] = Counter()
        self._brought: dict[int, Ref] = {}
        """Groups in the arena, and the loads that brought them."""
        self._held_up: tuple[Ref, ...] = ()
        """Gradients, or activations, that must have left before compute goes on."""
        self._saved: dict[int, Ref] = {}
        """Visits forward whose activations leave."""
        self._restored: dict[int, Ref] = {}
        """Visits backward whose activations come back."""
        self._last_use: dict[int, Ref] = {}
        self._again: dict[int, Ref] = {}
        """Layers whose activations are there again, and what computed them."""
        visits = visits_of(candidate, partition)
        leaving = leaving_after(candidate, partition, visits)
        held = held_up_by(leaving, partition, candidate)
        sends, saves_held = saves(candidate, partition), saves_held_up(candidate, partition)
        left_after: dict[int, Ref] = {}
        queue = list(link_queue(ring.transfers, restores(candidate, partition, ring.transfers)))
        for visit in range(-1, len(visits)):
            if visit >= 0:
                done = self._compute(visits[visit], self._restored.get(visit))
                if visit in sends:
                    self._saved[visit] = self._act(Kind.SAVE, (visits[visit].layer,), (done,))
                for layer in leaving.get(visit, ()):
                    left_after[visit] = self._act(Kind.GRADIENTS, (layer,), (done,))
                if visit in held:
                    self._held_up = (left_after[held[visit]],)
                if visit in saves_held:
                    self._held_up = (*self._held_up, self._saved[saves_held[visit]])
            while queue and queue[0].after <= visit:
                first = queue.pop(0)
                if isinstance(first, Restore):
                    self._restore(first, visits[first.before].layer, done)
                else:
                    self._load(first.group)
        left = {group: self._evict(group) for group in sorted(self._brought)}
        self._wait_for_the_pass_before(left)

    def _act(self, kind: Kind, layers: tuple[int, ...], waits: Sequence[Ref], offset: int | None = None) -> Ref:
        number = self._numbers[kind, layers]
        self._numbers[kind, layers] += 1
        self.actions.append(Action(kind, layers, number, tuple(waits), offset))
        return self.actions[-1].ref

    def _compute(self, visit: Visit, restored: Ref | None) -> Ref:
        """`restored`: what brings its activations back, if they were away."""
        kind, layer, again = visit
        group = self._group_of.get(layer)
        waits = [*([self._brought[group]] if group is not None else []), *self._held_up]
        self._held_up = ()
        if restored is not None:
            waits.append(restored)
        if again:
            self._again[layer] = self._act(Kind.RECOMPUTE, (layer,), waits)
        if kind is Kind.BACKWARD and layer in self._again:
            waits.append(self._again.pop(layer))
        done = self._act(kind, (layer,), waits)
        if kind is Kind.RECOMPUTE:
            self._again[layer] = done
        if group is not None:
            self._last_use[group] = done
        return done

    def _load(self, index: int) -> None:
        group = self._ring.groups[index]
        rivals = [other for other in self._brought if group.overlaps(self._ring.groups[other])]
        waits = [self._evict(rival) for rival in rivals]
        self._brought[index] = self._act(Kind.LOAD, group.layers, waits, group.offset)

    def _restore(self, restore: Restore, layer: int, room: Ref) -> None:
        """`room`: the compute after which there is room for it."""
        saved = [self._saved[visit] for visit in restore.saved]
        self._restored[restore.before] = self._act(Kind.RESTORE, (layer,), [room, *saved])

    def _evict(self, group: int) -> Ref:
        del self._brought[group]
        return self._act(Kind.EVICT, self._ring.groups[group].layers, (self._last_use[group],))

    def _wait_for_the_pass_before(self, left: dict[int, Ref]) -> None:
        """The first load into a place waits for those who had it at the end of the pass before."""
        by_layers = {group.layers: group for group in self._ring.groups}
        for position, action in enumerate(self.actions):
            if action.kind is not Kind.LOAD:
                continue
            rivals = [other for other in left if by_layers[action.layers].overlaps(self._ring.groups[other])]
            waits = tuple(replace(left.pop(rival), previous_pass=True) for rival in rivals)
            self.actions[position] = replace(action, waits=action.waits + waits)


def leaving_after(candidate: Candidate, partition: Partition, visits: Sequence[Visit]) -> dict[int, list[int]]:
    """Visit -> the streamed layers whose gradients leave after it: their last one backward, or the last of all."""
    last = {visit.layer: position for position, visit in enumerate(visits) if visit.kind is Kind.BACKWARD}
    leaving: dict[int, list[int]] = {}
    for layer in partition.layers:
        if layer.gradient_bytes and layer.index not in candidate.residents:
            leaving.setdefault(last.get(layer.index, len(visits) - 1), []).append(layer.index)
    return leaving


def held_up_by(leaving: Mapping[int, Sequence[int]], partition: Partition, candidate: Candidate) -> dict[int, int]:
    """Visit -> the one up to it whose gradients must have left before compute goes on.

    No more gradients are under way than the layer has that has most, unless one visit sends more. With one layer on the
    device at once compute has to wait for the next one's weights anyway: then none are.
    """
    if candidate.k <= 1:
        return {visit: visit for visit in leaving}
    sizes = {visit: sum(partition.layers[layer].gradient_bytes for layer in mine) for visit, mine in leaving.items()}
    most = max((partition.layers[layer].gradient_bytes for mine in leaving.values() for layer in mine), default=0)
    return held_up(sizes, most)
