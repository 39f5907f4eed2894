"""Whether an action list computes with the right weights, whatever the speed of link and disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from autosp.schedule.actions import COMPUTES, Action, Kind, Ref, Schedule


def validate(schedule: Schedule, layer_bytes: tuple[int, ...], read_bytes: tuple[int, ...] | None = None) -> None:
    """Check a schedule. `read_bytes`: of layers on disk, default: `layer_bytes`.

    Guarantees, for the cold actions and two passes in list order: every FORWARD, RECOMPUTE and BACKWARD finds its
    layer on the device, and waits for the load that brought it in this pass; a BACKWARD waits for the RECOMPUTE before
    it, GRADIENTS for what computes them, a STEP for the last of these, and the next pass's first LOAD of a layer for
    its STEP; a SAVE waits for its FORWARD, a RESTORE for the SAVEs that it brings back, a BACKWARD for the RESTORE
    before it, and what was saved is restored once; a LOAD overwrites evicted layers only, and waits for their
    evictions; a LOAD from disk waits for a READ of just its layers in this pass; a READ overwrites only what was loaded
    from staging, and waits for those loads; waits name earlier actions; loads stay inside the arena, reads inside the
    staging ring.

    Raises: ValueError naming the action.
    """
    for actions in (schedule.cold, schedule.actions):
        counts = Counter(action.ref for action in actions)
        twice = next((ref for ref, count in counts.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is in the schedule twice")
    names = {action.ref for action in (*schedule.cold, *schedule.actions)}
    arena, staging = (
        _Arena(schedule, layer_bytes),
        _Staging(schedule, layer_bytes if read_bytes is None else read_bytes),
    )
    for number, actions in enumerate((schedule.cold, schedule.actions, schedule.actions)):
        done: set[Ref] = set()
        activations = _Activations()
        for action in actions:
            _check_waits(action, done, names)
            _check_backward(action, done)
            _check_update(action, done, schedule)
            activations.apply(action)
            staging.apply(action, number)
            arena.apply(action, number)
            done.add(action.ref)
        activations.end()


def _check_waits(action: Action, done: set[Ref], names: set[Ref]) -> None:
    for ref in action.waits:
        if ref.previous_pass:
            if Ref(ref.kind, ref.layers, ref.occurrence) not in names:
                raise ValueError(f"{action.ref} waits for {ref}, which is in no pass")
        elif ref not in done:
            raise ValueError(f"{action.ref} waits for {ref}, which comes later or never")


def _check_backward(action: Action, done: set[Ref]) -> None:
    """What the backward pass computes and sends follows what it is computed from."""
    again = Ref(Kind.RECOMPUTE, action.layers, action.occurrence)
    if action.kind is Kind.BACKWARD and again in done and again not in action.waits:
        raise ValueError(f"{action.ref} does not wait for {again}, which brings its activations")
    if action.kind is Kind.GRADIENTS and not any(ref.kind in COMPUTES for ref in action.waits):
        raise ValueError(f"{action.ref} waits for nothing that computes them")


def _check_update(action: Action, done: set[Ref], schedule: Schedule) -> None:
    """An update follows all gradients, which may be clipped together; weights are loaded once they are updated."""
    if action.kind is Kind.STEP:
        last = next((one.ref for one in reversed(schedule.actions) if one.kind is Kind.GRADIENTS), None)
        if last not in action.waits:
            raise ValueError(f"{action.ref} does not wait for {last}, the last gradients")
    if action.kind is Kind.LOAD:
        for layer in {*action.layers} & {*schedule.steps}:
            step = Ref(Kind.STEP, (layer,), 0, previous_pass=True)
            first = not any(ref.kind is Kind.LOAD and layer in ref.layers for ref in done)
            if first and step not in action.waits:
                raise ValueError(f"{action.ref} does not wait for {step}, which updates its weights")


class _Activations:
    """What is away, and what came back for a backward to come, in one pass."""

    def __init__(self) -> None:
        self._away: set[Ref] = set()
        self._back: set[Ref] = set()

    def apply(self, action: Action) -> None:
        """Take one action. A layer's backwards have its restores in their order."""
        if action.kind is Kind.SAVE:
            if Ref(Kind.FORWARD, action.layers, action.occurrence) not in action.waits:
                raise ValueError(f"{action.ref} does not wait for the forward that makes what it sends")
            self._away.add(action.ref)
        elif action.kind is Kind.RESTORE:
            saved = {ref for ref in action.waits if ref.kind is Kind.SAVE and ref.layers == action.layers}
            if not saved or not saved <= self._away:
                raise ValueError(f"{action.ref} waits for no save of its layer, or for one that came back before")
            self._away -= saved
            self._back.add(action.ref)
        elif action.kind is Kind.BACKWARD:
            restored = Ref(Kind.RESTORE, action.layers, action.occurrence)
            if restored in self._back and restored not in action.waits:
                raise ValueError(f"{action.ref} does not wait for {restored}, which brings its activations back")
            self._back.discard(restored)

    def end(self) -> None:
        """The pass is over."""
        if self._away:
            raise ValueError(f"{min(map(str, self._away))} is never restored")
        if self._back:
            raise ValueError(f"{min(map(str, self._back))} comes after its backward, or has none")


def _range(action: Action, layer_bytes: tuple[int, ...], limit: int, place: str) -> tuple[int, int]:
    """The bytes that a LOAD or READ writes to."""
    if action.offset is None:
        raise ValueError(f"{action.ref} has no address")
    end = action.offset + sum(layer_bytes[layer] for layer in action.layers)
    if end > limit:
        raise ValueError(f"{action.ref} ends at {end}, beyond the {place}'s {limit} bytes")
    return action.offset, end


def _as_seen(ref: Ref, when: int, number: int) -> Ref:
    """How an action of pass `number` names one of pass `when`."""
    return Ref(ref.kind, ref.layers, ref.occurrence, previous_pass=when < number)


class _Arena:
    """Which layers are in the arena, which left it, and by which actions of which pass."""

    def __init__(self, schedule: Schedule, layer_bytes: tuple[int, ...]) -> None:
        self._schedule = schedule
        self._layer_bytes = layer_bytes
        self._present: dict[int, tuple[int, int, Ref, int]] = {}  # layer -> begin, end, its load, the load's pass
        self._left: dict[int, tuple[int, int, Ref, int]] = {}  # layer -> begin, end, its eviction, that one's pass

    def apply(self, action: Action, number: int) -> None:
        """Take one action of pass `number`."""
        if action.kind is Kind.LOAD:
            self._load(action, number)
        elif action.kind is Kind.EVICT:
            for layer in action.layers:
                if layer in self._present:
                    begin, end, _, _ = self._present.pop(layer)
                    self._left[layer] = begin, end, action.ref, number
        elif action.kind in COMPUTES and action.layers[0] not in self._schedule.residents:
            if action.layers[0] not in self._present:
                raise ValueError(f"{action.ref} runs without its weights")
            _, _, load, when = self._present[action.layers[0]]
            if when == number and load not in action.waits:
                raise ValueError(f"{action.ref} does not wait for {load}, which brings its weights")

    def _load(self, action: Action, number: int) -> None:
        """Bring layers to the action's offset."""
        begin, end = _range(action, self._layer_bytes, self._schedule.arena_bytes, "arena")
        for layer, (low, high, _, _) in self._present.items():
            if low < end and begin < high:
                raise ValueError(f"{action.ref} overwrites layer {layer}, which was not evicted")
        for layer, (low, high, eviction, when) in list(self._left.items()):
            expected = _as_seen(eviction, when, number)
            if expected in action.waits:
                del self._left[layer]  # over for all later loads too: the link is a queue
            elif low < end and begin < high:
                raise ValueError(f"{action.ref} does not wait for {expected}, which frees its place")
        for layer in action.layers:
            self._present[layer] = (begin, begin + self._layer_bytes[layer], action.ref, number)
            begin += self._layer_bytes[layer]


@dataclass
class _Occupant:
    """Bytes of the staging ring that were read, and the load that took them, if it came."""

    begin: int
    end: int
    read: Ref
    when: int
    load: Ref | None = None
    loaded_when: int = 0


class _Staging:
    """What the staging ring holds, and whether it was loaded from it yet."""

    def __init__(self, schedule: Schedule, read_bytes: tuple[int, ...]) -> None:
        self._schedule = schedule
        self._read_bytes = read_bytes
        self._occupants: list[_Occupant] = []

    def apply(self, action: Action, number: int) -> None:
        """Take one action of pass `number`."""
        if action.kind not in (Kind.READ, Kind.LOAD):
            return
        resting = {layer in self._schedule.on_disk for layer in action.layers}
        if len(resting) > 1:
            raise ValueError(f"{action.ref} moves layers that rest on disk together with others")
        if action.kind is Kind.READ:
            if resting == {False}:
                raise ValueError(f"{action.ref} reads what does not rest on disk")
            self._read(action, number)
        elif resting == {True}:
            self._load(action, number)

    def _read(self, action: Action, number: int) -> None:
        begin, end = _range(action, self._read_bytes, self._schedule.staging_bytes, "staging ring")
        for one in [one for one in self._occupants if one.begin < end and begin < one.end]:
            if one.load is None:
                raise ValueError(f"{action.ref} overwrites {one.read}, which was not loaded yet")
            expected = _as_seen(one.load, one.loaded_when, number)
            if expected not in action.waits:
                raise ValueError(f"{action.ref} does not wait for {expected}, which empties its place")
            self._occupants.remove(one)  # empty for all later reads too: the disk is a queue
        self._occupants.append(_Occupant(begin, end, action.ref, number))

    def _load(self, action: Action, number: int) -> None:
        waiting = (one for one in self._occupants if one.load is None and one.read.layers == action.layers)
        one = next(waiting, None)
        if one is None:
            raise ValueError(f"{action.ref} loads from disk what was not read")
        if one.when != number or one.read not in action.waits:
            raise ValueError(f"{action.ref} does not wait for a read of its own pass that brings its weights")
        one.load, one.loaded_when = action.ref, number
