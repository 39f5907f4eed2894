"""Layers that rest on disk: where they are read to, when, and what `validate` refuses."""

from __future__ import annotations

import pytest
from hypothesis import given

from autosp.schedule.actions import Action, Kind, Ref, Schedule, parse
from autosp.schedule.streaming import build_ring, lower
from autosp.schedule.validate import validate
from autosp.spec import Candidate
from builders import Case, cases, evict, forward, load, read, thorough

# Checked by hand: the staging address of each read, and the loads that empty it.
BY_HAND = {
    "everything on disk, one at a time": (
        Case(Candidate(k=1, k_prime=1, on_disk=(0, 1, 2), read_ahead=1), (10, 10, 10), (0, 1, 2)),
        # One place in the arena, one in staging: 1 is read while 0 computes, 0 again while 2 does.
        """\
        arena=10 staging=10 on_disk=0,1,2 residents=-

        0R0@0[-2L0] 0L0@0[-2E0,0R0] 1R0@0[0L0] 0F0[0L0] 0E0[0F0] 1L0@0[0E0,1R0] 2R0@0[1L0] 1F0[1L0] 1E0[1F0]
        2L0@0[1E0,2R0] 2F0[2L0] 2E0[2F0]""",
    ),
    "every other layer on disk": (
        Case(Candidate(k=2, k_prime=1, on_disk=(1, 3), read_ahead=2), (10,) * 4, (0, 1, 2, 3)),
        # A place of staging for each of them: both are read again as soon as they were loaded from it.
        """\
        arena=20 staging=20 on_disk=1,3 residents=-

        1R0@0[-1L0] 3R0@10[-3L0] 0L0@0[-2E0] 1L0@10[-3E0,1R0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0]
        1F0[1L0] 1E0[1F0] 3L0@10[1E0,3R0] 2F0[2L0] 2E0[2F0] 3F0[3L0] 3E0[3F0]""",
    ),
    "what stays in the arena is read once": (
        Case(Candidate(k=3, k_prime=1, on_disk=(1, 2), read_ahead=1), (10,) * 4, (0, 1, 2, 3)),
        # 1 and 2 have places of their own on the device; both pass through the same place of staging.
        """\
        arena=30 staging=10 on_disk=1,2 residents=-
        1R0@0 1L0@20[1R0] 2R0@0[1L0] 2L0@10[2R0]
        0L0@0[-3E0] 0F0[0L0] 0E0[0F0] 3L0@0[0E0] 1F0 2F0 3F0[3L0] 3E0[3F0]""",
    ),
    "what stays gives its place of staging up": (
        Case(Candidate(k=3, k_prime=1, on_disk=(2, 3), read_ahead=1), (10,) * 4, (0, 1, 2, 3)),
        # In the first period 3 is read once 2, which stays, was loaded; later once it was loaded itself.
        """\
        arena=30 staging=10 on_disk=2,3 residents=-
        1L0@20 2R0@0 2L0@10[2R0]
        3R0@0[-3L0,-2L0] 0L0@0[-3E0] 0F0[0L0] 0E0[0F0] 3L0@0[0E0,3R0] 1F0 2F0 3F0[3L0] 3E0[3F0]""",
    ),
    "a layer that is read twice": (
        Case(Candidate(k=1, k_prime=1, on_disk=(0,), read_ahead=1), (10, 10, 10), (0, 1, 0, 2)),
        """\
        arena=10 staging=10 on_disk=0 residents=-

        0R0@0[-0L1] 0L0@0[-2E0,0R0] 0R1@0[0L0] 0F0[0L0] 0E0[0F0] 1L0@0[0E0] 1F0[1L0] 1E0[1F0] 0L1@0[1E0,0R1]
        0F1[0L1] 0E1[0F1] 2L0@0[0E1] 2F0[2L0] 2E0[2F0]""",
    ),
    "two layers per transfer": (
        Case(Candidate(k=2, k_prime=2, on_disk=(2, 3), read_ahead=1), (10, 20, 30, 5, 10), (0, 1, 2, 3, 4)),
        """\
        arena=35 staging=35 on_disk=2,3 residents=-

        2+3R0@0[-2+3L0] 0+1L0@0[-4E0] 0F0[0+1L0] 1F0[0+1L0] 0+1E0[1F0] 2+3L0@0[0+1E0,2+3R0]
        2F0[2+3L0] 3F0[2+3L0] 2+3E0[3F0] 4L0@0[2+3E0] 4F0[4L0] 4E0[4F0]""",
    ),
    "more is read than is loaded": (
        # 11 B and 13 B at once; on the device a place of 10 B.
        Case(
            Candidate(k=1, k_prime=1, on_disk=(0, 1, 2), read_ahead=2), (10, 10, 10), (0, 1, 2), read_bytes=(12, 11, 13)
        ),
        """\
        arena=10 staging=24 on_disk=0,1,2 residents=-

        0R0@0[-2L0] 1R0@13[-1L0] 0L0@0[-2E0,0R0] 2R0@0[0L0] 0F0[0L0] 0E0[0F0] 1L0@0[0E0,1R0] 1F0[1L0] 1E0[1F0]
        2L0@0[1E0,2R0] 2F0[2L0] 2E0[2F0]""",
    ),
    "a layer that is never visited": (
        Case(Candidate(k=2, k_prime=1, on_disk=(1,), read_ahead=1), (10, 45, 15), (0, 2)),
        # Should 1 be called after all, there is room for it in both rings.
        """\
        arena=45 staging=45 on_disk=1 residents=-
        0L0@0 2L0@10
        0F0 2F0""",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_lowered_as_by_hand(name: str) -> None:
    case, text = BY_HAND[name]
    head, cold, *body = (line.strip() for line in text.splitlines())
    lowered = lower(case.candidate, case.layer_bytes, case.visits, case.read_bytes)
    assert str(lowered) == "\n".join([head, cold, " ".join(body)])
    assert parse(str(lowered)) == lowered
    validate(lowered, case.layer_bytes, case.read_bytes)


@thorough
@given(cases(disk=True))
def test_lowered_is_valid_and_its_text_round_trips(case: Case) -> None:
    lowered = lower(case.candidate, case.layer_bytes, case.visits, case.read_bytes)
    validate(lowered, case.layer_bytes, case.read_bytes)
    assert parse(str(lowered)) == lowered


@thorough
@given(cases(disk=True))
def test_the_device_s_part_is_that_of_two_tiers(case: Case) -> None:
    """Where a layer rests changes what its load waits for, and nothing else."""
    two_tiers = case.candidate.model_copy(update={"on_disk": (), "read_ahead": 0})
    lowered, without = (
        lower(candidate, case.layer_bytes, case.visits, case.read_bytes) for candidate in (case.candidate, two_tiers)
    )

    def on_device(schedule: Schedule) -> list[str]:
        return [
            str(Action(one.kind, one.layers, one.occurrence, waits, one.offset))
            for one in (*schedule.cold, *schedule.actions)
            if one.kind is not Kind.READ
            for waits in [tuple(ref for ref in one.waits if ref.kind is not Kind.READ)]
        ]

    assert on_device(lowered) == on_device(without)
    assert lowered.arena_bytes == without.arena_bytes


@thorough
@given(cases(disk=True))
def test_every_load_from_disk_has_one_read_and_no_other_load_has_one(case: Case) -> None:
    lowered = lower(case.candidate, case.layer_bytes, case.visits, case.read_bytes)
    for actions in (lowered.cold, lowered.actions):
        loads = [one for one in actions if one.kind is Kind.LOAD and set(one.layers) <= set(lowered.on_disk)]
        reads = [one for one in actions if one.kind is Kind.READ]
        assert [(one.layers, one.occurrence) for one in reads] == [(one.layers, one.occurrence) for one in loads]


@thorough
@given(cases(disk=True))
def test_reads_that_follow_each_other_have_places_of_their_own(case: Case) -> None:
    """As many as are read ahead, within a period, of groups that are loaded once in it."""
    staging = build_ring(case.candidate, case.layer_bytes, case.visits, case.read_bytes).staging
    order = list(dict.fromkeys(one.group for one in staging.reads))
    for start, first in enumerate(order):
        for second in order[start + 1 : start + case.candidate.read_ahead]:
            low, high = sorted((first, second), key=lambda group: staging.offsets[group])
            assert staging.offsets[low] + staging.group_bytes[low] <= staging.offsets[high]


def test_a_group_lies_on_one_tier() -> None:
    candidate = Candidate(k=2, k_prime=2, on_disk=(1,), read_ahead=1)
    with pytest.raises(ValueError, match=r"layers \(0, 1\) travel together, and only some of them rest on disk"):
        lower(candidate, (10,) * 4, range(4))


READ_0 = read((0,), 0, Ref(Kind.LOAD, (1,), 0, previous_pass=True))
READ_1 = read((1,), 0, Ref(Kind.LOAD, (0,), 0))
LOAD_0 = load((0,), 0, Ref(Kind.EVICT, (1,), 0, previous_pass=True), READ_0.ref)
LOAD_1 = load((1,), 0, Ref(Kind.EVICT, (0,), 0), READ_1.ref)
FORWARD_0, FORWARD_1 = forward(0, LOAD_0.ref), forward(1, LOAD_1.ref)
EVICT_0, EVICT_1 = evict((0,), FORWARD_0.ref), evict((1,), FORWARD_1.ref)
ACTIONS = (READ_0, LOAD_0, READ_1, FORWARD_0, EVICT_0, LOAD_1, FORWARD_1, EVICT_1)


def of(*actions: Action, on_disk: tuple[int, ...] = (0, 1), staging_bytes: int = 10) -> Schedule:
    """Two layers of ten bytes, one at a time in each ring."""
    return Schedule(actions, (), (), 10, on_disk, staging_bytes)


def replaced(old: Action, *new: Action) -> tuple[Action, ...]:
    return tuple(one for action in ACTIONS for one in (new if action is old else (action,)))


def test_a_sound_schedule_is_valid() -> None:
    validate(of(*ACTIONS), (10, 10))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        pytest.param(
            of(*ACTIONS, staging_bytes=9), "0R0 ends at 10, beyond the staging ring's 9 bytes", id="too large"
        ),
        pytest.param(of(*replaced(READ_0, read((0,), None))), "0R0 has no address", id="no address"),
        pytest.param(
            of(*replaced(READ_1, read((1,), 0))),
            "1R0 does not wait for 0L0, which empties its place",
            id="a fast disk would overwrite what is loaded",
        ),
        pytest.param(
            of(*replaced(READ_0, read((0,), 0))),
            "0R0 does not wait for -1L0, which empties its place",
            id="a fast disk would overwrite what the pass before loads",
        ),
        pytest.param(of(READ_0, read((1,), 0), *ACTIONS[1:]), "1R0 is in the schedule twice", id="read twice"),
        pytest.param(
            of(READ_0, read((1,), 0), LOAD_0, *ACTIONS[3:]),
            "1R0 overwrites 0R0, which was not loaded yet",
            id="overwrites what was not loaded",
        ),
        pytest.param(of(*ACTIONS[1:]), "0L0 waits for 0R0, which comes later or never", id="read forgotten"),
        pytest.param(
            of(*replaced(LOAD_0, load((0,), 0, LOAD_0.waits[0]))),
            "0L0 does not wait for a read of its own pass that brings its weights",
            id="a slow disk would be overtaken",
        ),
        pytest.param(
            of(*replaced(READ_0)[:0], load((0,), 0, LOAD_0.waits[0]), *ACTIONS[2:]),
            "0L0 loads from disk what was not read",
            id="not read at all",
        ),
        pytest.param(of(*ACTIONS, on_disk=(1,)), "0R0 reads what does not rest on disk", id="not on disk"),
        pytest.param(
            of(read((0, 1), 0), on_disk=(1,), staging_bytes=20),
            "0\\+1R0 moves layers that rest on disk together with others",
            id="two tiers in one transfer",
        ),
    ],
)
def test_validate_names_what_is_broken(broken: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        validate(broken, (10, 10))


@pytest.mark.parametrize("head", ["arena=3 staging=1 residents=-", "arena=3 on_disk=1 residents=-"])
def test_parse_names_a_bad_first_line(head: str) -> None:
    with pytest.raises(ValueError, match="not a schedule's first line"):
        parse(head)
