"""The action list as text, and what `validate` refuses."""

from __future__ import annotations

import pytest
from hypothesis import given

from autosp.schedule.actions import Action, Kind, Ref, Schedule, parse
from autosp.schedule.streaming import lower
from autosp.schedule.validate import validate
from builders import Case, cases, evict, forward, load, schedule, thorough

BYTES = (10, 20, 10)

LOAD_0 = load((0,), 0, Ref(Kind.EVICT, (2,), 0, previous_pass=True))
LOAD_1 = load((1,), 10)
LOAD_2 = load((2,), 0, Ref(Kind.EVICT, (0,), 0))
FORWARD_0 = forward(0, LOAD_0.ref)
FORWARD_1 = forward(1)
FORWARD_2 = forward(2, LOAD_2.ref)
EVICT_0 = evict((0,), FORWARD_0.ref)
EVICT_2 = evict((2,), FORWARD_2.ref)
ACTIONS = (LOAD_0, FORWARD_0, EVICT_0, LOAD_2, FORWARD_1, FORWARD_2, EVICT_2)
TEXT = """\
arena=30 residents=-
1L0@10
0L0@0[-2E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0 2F0[2L0] 2E0[2F0]"""


def sound(*actions: Action, arena_bytes: int = 30, residents: tuple[int, ...] = ()) -> Schedule:
    """Layer 1 stays at its place; layers 0 and 2 share the other one."""
    return schedule(*(actions or ACTIONS), cold=(LOAD_1,), arena_bytes=arena_bytes, residents=residents)


def test_text() -> None:
    assert str(sound()) == TEXT
    assert parse(TEXT) == sound()


def test_text_of_a_transfer_of_several_layers() -> None:
    waits = (Ref(Kind.EVICT, (0, 1), 2), Ref(Kind.FORWARD, (11,), 0, previous_pass=True))
    action = Action(Kind.LOAD, (4, 5), 1, waits, 8192)
    assert str(action) == "4+5L1@8192[0+1E2,-11F0]"
    assert parse(f"arena=9000 residents=3,12\n\n{action}") == schedule(action, arena_bytes=9000, residents=(3, 12))


def test_text_of_nothing() -> None:
    empty = schedule(arena_bytes=0)
    assert str(empty) == "arena=0 residents=-\n\n"
    assert parse(str(empty)) == empty
    assert parse("arena=0 residents=-") == empty


@thorough
@given(cases())
def test_text_round_trip(case: Case) -> None:
    lowered = lower(case.candidate, case.layer_bytes, case.visits)
    assert parse(str(lowered)) == lowered


def test_forwards_and_loads_keep_their_order() -> None:
    assert sound().forwards == (FORWARD_0, FORWARD_1, FORWARD_2)
    assert sound().loads == (LOAD_0, LOAD_2)


@pytest.mark.parametrize(
    "head", ["", "arena=30", "arena=30 residents=", "arena=x residents=-", "arena=30 residents=1,", "0F0"]
)
def test_parse_names_a_bad_first_line(head: str) -> None:
    with pytest.raises(ValueError, match="not a schedule's first line") as error:
        parse(f"{head}\n\n0F0")
    assert repr(head) in str(error.value)


@pytest.mark.parametrize("token", ["F0", "0F", "0X0", "-0F0", "0+F0", "0L0@", "0L0@x", "0F0[", "0F0]", "0f0", "0F0,"])
@pytest.mark.parametrize("place", ["cold", "steady"])
def test_parse_names_a_bad_action(token: str, place: str) -> None:
    cold, steady = (token, "0F0") if place == "cold" else ("0L0@0", f"0F0 {token} 1F0")
    with pytest.raises(ValueError, match="not an action") as error:
        parse(f"arena=30 residents=-\n{cold}\n{steady}")
    assert repr(token) in str(error.value)


@pytest.mark.parametrize("wait", ["0", "0L", "--0L0", "0L0@5", "0L0,", ",0L0"])
def test_parse_names_a_bad_wait(wait: str) -> None:
    with pytest.raises(ValueError, match="not a reference to an action"):
        parse(f"arena=30 residents=-\n\n0F0[{wait}]")


def test_a_sound_schedule_is_valid() -> None:
    validate(sound(), BYTES)


def test_a_resident_needs_no_load() -> None:
    validate(schedule(forward(1), arena_bytes=0, residents=(1,)), BYTES)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        pytest.param(sound(*ACTIONS, EVICT_2), "2E0 is in the schedule twice", id="name given twice"),
        pytest.param(
            schedule(forward(1), arena_bytes=30), "1F0 runs without its weights", id="no load of a streamed layer"
        ),
        pytest.param(schedule(*ACTIONS, arena_bytes=30), "1F0 runs without its weights", id="cold load forgotten"),
        pytest.param(
            sound(load((0,), 0), FORWARD_0, EVICT_0, forward(0, occurrence=1)),
            "0F1 runs without its weights",
            id="used after eviction",
        ),
        pytest.param(
            sound(forward(1), evict((1,), FORWARD_1.ref)),
            "1F0 runs without its weights",
            id="gone in the second pass",
        ),
        pytest.param(
            sound(load((0,), 0), FORWARD_0, load((2,), 0), FORWARD_2),
            "2L0 overwrites layer 0, which was not evicted",
            id="overwrites what is in use",
        ),
        pytest.param(
            sound(load((0,), 0), FORWARD_0, EVICT_0, load((2,), 9), forward(2), evict((2,))),
            "2L0 overwrites layer 1, which was not evicted",
            id="overlaps by one byte",
        ),
        pytest.param(
            sound(load((0,), 0), FORWARD_0),
            "0L0 overwrites layer 0, which was not evicted",
            id="not evicted for the next pass",
        ),
        pytest.param(
            sound(load((0, 2), 0), FORWARD_0, forward(2), evict((0, 2))),
            "0\\+2L0 overwrites layer 1, which was not evicted",
            id="the second of two layers overwrites",
        ),
        pytest.param(
            schedule(load((0, 2), 0), load((1,), 15), forward(1), arena_bytes=40),
            "1L0 overwrites layer 2, which was not evicted",
            id="overwrites the second of two layers",
        ),
        pytest.param(
            sound(forward(1, LOAD_2.ref), LOAD_2, FORWARD_2, EVICT_2),
            "1F0 waits for 2L0, which comes later or never",
            id="waits for what comes later",
        ),
        pytest.param(
            sound(forward(1, Ref(Kind.LOAD, (1,), 7))),
            "1F0 waits for 1L7, which comes later or never",
            id="waits for what never comes",
        ),
        pytest.param(
            sound(forward(1, Ref(Kind.EVICT, (2,), 0, previous_pass=True))),
            "1F0 waits for -2E0, which is in no pass",
            id="waits for what was in no pass",
        ),
        pytest.param(sound(arena_bytes=29), "1L0 ends at 30, beyond the arena's 29 bytes", id="beyond the arena"),
        pytest.param(
            sound(load((0,), 0), FORWARD_0, EVICT_0, load((2,), 25), forward(2), evict((2,))),
            "2L0 ends at 35, beyond the arena's 30 bytes",
            id="steady load beyond the arena",
        ),
        pytest.param(sound(load((0,), None), FORWARD_0, EVICT_0), "0L0 has no address", id="no address"),
    ],
)
def test_validate_names_what_is_broken(broken: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        validate(broken, BYTES)


def test_validate_refuses_a_forward_that_a_slow_link_would_overtake() -> None:
    racing = sound(LOAD_0, forward(0), EVICT_0, LOAD_2, FORWARD_1, FORWARD_2, EVICT_2)
    with pytest.raises(ValueError, match="0F0"):
        validate(racing, BYTES)


def test_validate_refuses_a_load_that_a_fast_link_would_start_early() -> None:
    racing = sound(LOAD_0, FORWARD_0, EVICT_0, load((2,), 0), FORWARD_1, FORWARD_2, EVICT_2)
    with pytest.raises(ValueError, match="2L0"):
        validate(racing, BYTES)
