"""The action list: one pass of a plan as data. Printed, parsed, validated, simulated and executed.

Text form, one token per action: `<layers><kind><occurrence>[@<offset>][<waits>]`, for example

    4+5L0@8192[1E0]   load layers 4 and 5 in one transfer to arena offset 8192, once layer 1 was evicted
    4F0[4+5L0]        forward of layer 4, the first one in this pass
    3L0@0[-6E0]       a load of the next pass's beginning: `-` is an action of the pass before
    7R0@4096[5L0]     read layer 7 from disk to offset 4096 of the host's staging ring, once layer 5 was loaded from it
    4B0[4+5L1,4C0]    backward of layer 4, whose activations were recomputed (4C0): alone, or with those of its block
    4G0[4B0]          gradients of layer 4 to the host
    4S0[3G0]          step of the optimizer over layer 4 on the host, once the last gradients (of layer 3) are there
    4O0[4F0]          what that forward of layer 4 saved for its backward, out to the host
    4I0[6B0,4O0]      and in again, once the backward of layer 6 is over

Actions of one resource run in list order; a wait names an action of any resource.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does."""

    READ = "R"
    LOAD = "L"
    FORWARD = "F"
    EVICT = "E"
    BACKWARD = "B"
    RECOMPUTE = "C"
    GRADIENTS = "G"
    STEP = "S"
    SAVE = "O"
    RESTORE = "I"


COMPUTES = (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD)
"""What needs the weights of its layer."""


class Resource(StrEnum):
    """What an action occupies. EVICT takes no time on any: it says when memory becomes free."""

    COMPUTE = "compute"
    LINK = "link"
    DISK = "disk"
    RETURN = "return link"
    HOST = "host"


RESOURCE = {
    Kind.READ: Resource.DISK,
    Kind.LOAD: Resource.LINK,
    Kind.FORWARD: Resource.COMPUTE,
    Kind.EVICT: Resource.COMPUTE,
    Kind.BACKWARD: Resource.COMPUTE,
    Kind.RECOMPUTE: Resource.COMPUTE,
    Kind.GRADIENTS: Resource.RETURN,
    Kind.STEP: Resource.HOST,
    Kind.SAVE: Resource.RETURN,
    Kind.RESTORE: Resource.LINK,
}

_LAYERS = r"\d+(?:,\d+)*"
_HEAD = re.compile(rf"arena=(\d+)(?: staging=(\d+) on_disk=({_LAYERS}))? residents=(-|{_LAYERS})")
_REF = re.compile(r"(?P<before>-?)(?P<layers>\d+(?:\+\d+)*)(?P<kind>[RLFEBCGSOI])(?P<occurrence>\d+)")
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
    """One step. `offset` is an address in bytes: of a LOAD in the arena, of a READ in the staging ring."""

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

    A layer in neither list's loads is resident, or never visited. `arena_bytes` holds every load's address range,
    `staging_bytes` every read's. A load of layers `on_disk` follows a read of them, a cold one a cold read.
    """

    actions: tuple[Action, ...]
    cold: tuple[Action, ...]
    residents: tuple[int, ...]
    arena_bytes: int
    on_disk: tuple[int, ...] = ()
    staging_bytes: int = 0

    def __str__(self) -> str:
        disk = f" staging={self.staging_bytes} on_disk={','.join(map(str, self.on_disk))}" if self.on_disk else ""
        head = f"arena={self.arena_bytes}{disk} residents={','.join(map(str, self.residents)) or '-'}"
        return "\n".join([head, " ".join(map(str, self.cold)), " ".join(map(str, self.actions))])

    @property
    def forwards(self) -> tuple[Action, ...]:
        """The forwards, in order."""
        return tuple(action for action in self.actions if action.kind is Kind.FORWARD)

    @property
    def computes(self) -> tuple[Action, ...]:
        """What needs weights, in order: the forwards, and in a training pass what the backward pass does."""
        return tuple(action for action in self.actions if action.kind in COMPUTES)

    @property
    def ends_at_rest(self) -> bool:
        """Whether each pass begins with an empty arena, and ends once its gradients have left: a training pass does."""
        return any(action.kind in (Kind.BACKWARD, Kind.GRADIENTS) for action in self.actions)

    @property
    def recomputed(self) -> frozenset[int]:
        """Layers whose activations are dropped after their forward, and computed again before their backward."""
        return frozenset(action.layers[0] for action in self.actions if action.kind is Kind.RECOMPUTE)

    @property
    def offloaded(self) -> frozenset[int]:
        """Layers whose activations are in host memory between their forward and their backward."""
        return frozenset(action.layers[0] for action in self.actions if action.kind is Kind.SAVE)

    @property
    def waits_for_gradients(self) -> bool:
        """Whether compute never goes on before all gradients that there are have left."""
        left: Ref | None = None
        for action in self.actions:
            if action.kind is Kind.GRADIENTS:
                left = action.ref
            elif action.kind in COMPUTES and left is not None:
                if left not in action.waits:
                    return False
                left = None
        return True

    @property
    def loads(self) -> tuple[Action, ...]:
        """The transfers of one steady pass, in order."""
        return tuple(action for action in self.actions if action.kind is Kind.LOAD)

    @property
    def steps(self) -> tuple[int, ...]:
        """Layers that the host updates beside the next pass, in order."""
        return tuple(action.layers[0] for action in self.actions if action.kind is Kind.STEP)

    @property
    def reads(self) -> tuple[Action, ...]:
        """The reads of one steady pass, in order."""
        return tuple(action for action in self.actions if action.kind is Kind.READ)


def parse(text: str) -> Schedule:
    """The schedule whose `str()` is `text`.

    Raises: ValueError naming the first token that is not an action.
    """
    head, cold, body = (text.split("\n", 2) + ["", ""])[:3]
    match = _HEAD.fullmatch(head)
    if match is None:
        raise ValueError(f"not a schedule's first line: {head!r}")
    residents = () if match[4] == "-" else tuple(int(part) for part in match[4].split(","))
    on_disk = tuple(int(part) for part in match[3].split(",")) if match[3] else ()
    staging_bytes = int(match[2] or 0)
    return Schedule(_parse_actions(body), _parse_actions(cold), residents, int(match[1]), on_disk, staging_bytes)


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
