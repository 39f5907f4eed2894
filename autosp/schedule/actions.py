"""The action list: one pass of a plan as data. Printed, parsed, validated, simulated and executed.

Text form, one token per action: `<layers><kind><occurrence>[@<offset>][<waits>]`, for example

    4+5L0@8192[1E0]   load layers 4 and 5 in one transfer to arena offset 8192, once layer 1 was evicted
    4F0[4+5L0]        forward of layer 4, the first one in this pass
    3L0@0[-6E0]       a load of the next pass's beginning: `-` is an action of the pass before

Actions of one resource run in list order; a wait names an action of any resource.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does."""

    LOAD = "L"
    FORWARD = "F"
    EVICT = "E"


class Resource(StrEnum):
    """What an action occupies. EVICT takes no time on any: it says when memory becomes free."""

    COMPUTE = "compute"
    LINK = "link"


RESOURCE = {Kind.LOAD: Resource.LINK, Kind.FORWARD: Resource.COMPUTE, Kind.EVICT: Resource.COMPUTE}

_REF = re.compile(r"(?P<before>-?)(?P<layers>\d+(?:\+\d+)*)(?P<kind>[LFE])(?P<occurrence>\d+)")
_TOKEN = re.compile(rf"{_REF.pattern}(?:@(?P<offset>\d+))?(?:\[(?P<waits>[^\]]*)\])?")


@dataclass(frozen=True, slots=True)
class Ref:
    """Names an action: in this pass, or (`previous_pass`) in the one before."""

    kind: Kind
    layers: tuple[int, ...]
    occurrence: int
    previous_pass: bool = False

    def __str__(self) -> str:
        sign = "-" if self.previous_pass else ""
        return f"{sign}{'+'.join(map(str, self.layers))}{self.kind.value}{self.occurrence}"


@dataclass(frozen=True, slots=True)
class Action:
    """One step. `offset` is the arena address in bytes, for loads only."""

    kind: Kind
    layers: tuple[int, ...]
    occurrence: int
    waits: tuple[Ref, ...] = ()
    offset: int | None = None

    @property
    def ref(self) -> Ref:
        """This action's name."""
        return Ref(self.kind, self.layers, self.occurrence)

    def __str__(self) -> str:
        offset = "" if self.offset is None else f"@{self.offset}"
        waits = f"[{','.join(map(str, self.waits))}]" if self.waits else ""
        return f"{self.ref}{offset}{waits}"


@dataclass(frozen=True)
class Schedule:
    """One steady pass, and the `cold` loads: what it finds in the arena from the pass before.

    A layer in neither list's loads is resident, or never visited. `arena_bytes` holds every load's address range.
    """

    actions: tuple[Action, ...]
    cold: tuple[Action, ...]
    residents: tuple[int, ...]
    arena_bytes: int

    def __str__(self) -> str:
        head = f"arena={self.arena_bytes} residents={','.join(map(str, self.residents)) or '-'}"
        return "\n".join([head, " ".join(map(str, self.cold)), " ".join(map(str, self.actions))])

    @property
    def forwards(self) -> tuple[Action, ...]:
        """The compute actions, in order."""
        return tuple(action for action in self.actions if action.kind is Kind.FORWARD)

    @property
    def loads(self) -> tuple[Action, ...]:
        """The transfers of one steady pass, in order."""
        return tuple(action for action in self.actions if action.kind is Kind.LOAD)


def parse(text: str) -> Schedule:
    """The schedule whose `str()` is `text`.

    Raises: ValueError naming the first token that is not an action.
    """
    head, cold, body = (text.split("\n", 2) + ["", ""])[:3]
    match = re.fullmatch(r"arena=(\d+) residents=(-|\d+(?:,\d+)*)", head)
    if match is None:
        raise ValueError(f"not a schedule's first line: {head!r}")
    residents = () if match[2] == "-" else tuple(int(part) for part in match[2].split(","))
    return Schedule(_parse_actions(body), _parse_actions(cold), residents, int(match[1]))


def _parse_actions(text: str) -> tuple[Action, ...]:
    return tuple(_parse_action(token) for token in text.split())


def _parse_action(token: str) -> Action:
    match = _TOKEN.fullmatch(token)
    if match is None or match["before"]:
        raise ValueError(f"not an action: {token!r}")
    waits = tuple(_parse_ref(part) for part in match["waits"].split(",")) if match["waits"] else ()
    offset = None if match["offset"] is None else int(match["offset"])
    ref = _ref(match)
    return Action(ref.kind, ref.layers, ref.occurrence, waits, offset)


def _parse_ref(text: str) -> Ref:
    match = _REF.fullmatch(text)
    if match is None:
        raise ValueError(f"not a reference to an action: {text!r}")
    return _ref(match)


def _ref(match: re.Match[str]) -> Ref:
    layers = tuple(int(part) for part in match["layers"].split("+"))
    return Ref(Kind(match["kind"]), layers, int(match["occurrence"]), match["before"] == "-")


def validate(schedule: Schedule, layer_bytes: tuple[int, ...]) -> None:
    """Check that a schedule computes with the right weights, whatever the speed of the link.

    Guarantees, for the cold loads and two passes in list order: every FORWARD finds its layer on the device, and waits
    for the load that brought it in this pass; a LOAD overwrites evicted layers only, and waits for their evictions;
    waits name earlier actions; loads stay inside the arena.

    Raises: ValueError naming the action.
    """
    names = Counter(action.ref for action in schedule.actions)
    twice = next((ref for ref, count in names.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is in the schedule twice")
    arena = _Arena(schedule, layer_bytes)
    for load in schedule.cold:
        arena.load(load, 0)
    for number in (1, 2):
        done: set[Ref] = set()
        for action in schedule.actions:
            _check_waits(action, done, names)
            arena.apply(action, number)
            done.add(action.ref)


def _check_waits(action: Action, done: set[Ref], names: Counter[Ref]) -> None:
    for ref in action.waits:
        if ref.previous_pass:
            if Ref(ref.kind, ref.layers, ref.occurrence) not in names:
                raise ValueError(f"{action.ref} waits for {ref}, which is in no pass")
        elif ref not in done:
            raise ValueError(f"{action.ref} waits for {ref}, which comes later or never")


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
            self.load(action, number)
        elif action.kind is Kind.EVICT:
            for layer in action.layers:
                if layer in self._present:
                    begin, end, _, _ = self._present.pop(layer)
                    self._left[layer] = begin, end, action.ref, number
        elif action.layers[0] not in self._schedule.residents:
            if action.layers[0] not in self._present:
                raise ValueError(f"{action.ref} runs without its weights")
            _, _, load, when = self._present[action.layers[0]]
            if when == number and load not in action.waits:
                raise ValueError(f"{action.ref} does not wait for {load}, which brings its weights")

    def load(self, action: Action, number: int) -> None:
        """Bring layers to the action's offset."""
        if action.offset is None:
            raise ValueError(f"{action.ref} has no address")
        begin = action.offset
        end = begin + sum(self._layer_bytes[layer] for layer in action.layers)
        if end > self._schedule.arena_bytes:
            raise ValueError(f"{action.ref} ends at {end}, beyond the arena's {self._schedule.arena_bytes} bytes")
        for layer, (low, high, _, _) in self._present.items():
            if low < end and begin < high:
                raise ValueError(f"{action.ref} overwrites layer {layer}, which was not evicted")
        for layer, (low, high, eviction, when) in list(self._left.items()):
            expected = Ref(eviction.kind, eviction.layers, eviction.occurrence, previous_pass=when < number)
            if expected in action.waits:
                del self._left[layer]  # over for all later loads too: the link is a queue
            elif low < end and begin < high:
                raise ValueError(f"{action.ref} does not wait for {expected}, which frees its place")
        for layer in action.layers:
            self._present[layer] = (begin, begin + self._layer_bytes[layer], action.ref, number)
            begin += self._layer_bytes[layer]
