"""Candidates lowered to action lists: small ones checked by hand, random ones by what must hold for all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.schedule.actions import Action, Kind, parse
from autosp.schedule.arena import arena_bytes, place, place_spread
from autosp.schedule.streaming import Group, Ring, Transfer, build_ring, lower
from autosp.schedule.validate import validate
from autosp.spec import Candidate
from builders import Case, cases, sizes, thorough


def lowered(case: Case) -> str:
    """The text of a case's schedule."""
    return str(lower(case.candidate, case.layer_bytes, case.visits))


def ring_of(case: Case) -> Ring:
    """The ring of a case."""
    return build_ring(case.candidate, case.layer_bytes, case.visits)


def window_of(candidate: Candidate) -> int:
    """Neighbouring groups that the arena is made for."""
    return max(1, candidate.ring // candidate.k_prime)


# Checked by hand: the place of each layer, who is evicted for whom, and from which pass.
BY_HAND = {
    "one layer at a time": (
        Case(Candidate(k=1, k_prime=1), (10, 10, 10), (0, 1, 2)),
        # All at address 0: each load waits for the layer before it, the first one for the last of the pass before.
        """\
        arena=10 residents=-

        0L0@0[-2E0] 0F0[0L0] 0E0[0F0] 1L0@0[0E0] 1F0[1L0] 1E0[1F0] 2L0@0[1E0] 2F0[2L0] 2E0[2F0]""",
    ),
    "sliding window": (
        Case(Candidate(k=2, k_prime=1), (10, 10, 10, 10), (0, 1, 2, 3)),
        # 0 and 2 share address 0, 1 and 3 address 10.
        """\
        arena=20 residents=-

        0L0@0[-2E0] 1L0@10[-3E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0[1L0] 1E0[1F0] 3L0@10[1E0]
        2F0[2L0] 2E0[2F0] 3F0[3L0] 3E0[3F0]""",
    ),
    "a window of all but one": (
        Case(Candidate(k=3, k_prime=1), (10, 10, 10, 10), (0, 1, 2, 3)),
        # Only 0 and 3 share an address: 1 (at the top) and 2 (between) are loaded once and stay.
        """\
        arena=30 residents=-
        1L0@20 2L0@10
        0L0@0[-3E0] 0F0[0L0] 0E0[0F0] 3L0@0[0E0] 1F0 2F0 3F0[3L0] 3E0[3F0]""",
    ),
    "a window of all": (
        Case(Candidate(k=3, k_prime=1), (10, 20, 5), (2, 0, 1)),
        # In the order of the visits: 2 at the bottom, 0 at the top, 1 between.
        """\
        arena=35 residents=-
        2L0@0 0L0@25 1L0@5
        2F0 0F0 1F0""",
    ),
    "a resident": (
        Case(Candidate(k=3, k_prime=1, residents=(1,)), (10, 10, 10, 10), (0, 1, 2, 3)),
        # A ring of two for 0, 2 and 3: 0 and 3 share address 0. 3 is loaded while 1 and 2 compute.
        """\
        arena=20 residents=1
        2L0@10
        0L0@0[-3E0] 0F0[0L0] 0E0[0F0] 3L0@0[0E0] 1F0 2F0 3F0[3L0] 3E0[3F0]""",
    ),
    "everything resident": (
        Case(Candidate(k=2, k_prime=1, residents=(0, 1)), (10, 10), (1, 0)),
        """\
        arena=0 residents=0,1

        1F0 0F0""",
    ),
    "a layer that is visited twice": (
        Case(Candidate(k=2, k_prime=1), (10, 10, 10), (0, 1, 0, 2)),
        # 0 and 2 share address 0: 2 waits for the second visit of 0.
        """\
        arena=20 residents=-
        1L0@10
        0L0@0[-2E0] 0F0[0L0] 1F0 0F1[0L0] 0E0[0F1] 2L0@0[0E0] 2F0[2L0] 2E0[2F0]""",
    ),
    "a layer that is loaded twice": (
        Case(Candidate(k=1, k_prime=1), (10, 10, 10), (0, 1, 0, 2)),
        # Nothing fits beside it: it comes and goes for each of its visits.
        """\
        arena=10 residents=-

        0L0@0[-2E0] 0F0[0L0] 0E0[0F0] 1L0@0[0E0] 1F0[1L0] 1E0[1F0] 0L1@0[1E0] 0F1[0L1] 0E1[0F1]
        2L0@0[0E1] 2F0[2L0] 2E0[2F0]""",
    ),
    "the last layer is the next pass's first": (
        Case(Candidate(k=1, k_prime=1), (10, 10), (0, 1, 0)),
        # 0 is there from the pass before, which loaded it for its own last visit.
        """\
        arena=10 residents=-
        0L0@0
        0F0 0E0[0F0] 1L0@0[0E0] 1F0[1L0] 1E0[1F0] 0L0@0[1E0] 0F1[0L0]""",
    ),
    "unlike sizes": (
        Case(Candidate(k=2, k_prime=1), (5, 10, 5, 10), (0, 1, 2, 3)),
        # Two neighbours take 15 bytes, not two slots of the largest.
        """\
        arena=15 residents=-

        0L0@0[-2E0] 1L0@5[-3E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0[1L0] 1E0[1F0] 3L0@5[1E0]
        2F0[2L0] 2E0[2F0] 3F0[3L0] 3E0[3F0]""",
    ),
    "a large layer overwrites two small ones": (
        Case(Candidate(k=2, k_prime=1), (4, 4, 9), (0, 1, 2)),
        # 1 lies at the top of the 13 bytes that 1 and 2 need together, so 2 overwrites 0 only.
        """\
        arena=13 residents=-
        1L0@9
        0L0@0[-2E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0 2F0[2L0] 2E0[2F0]""",
    ),
    "a large layer waits for the later one of two": (
        Case(Candidate(k=2, k_prime=1), (2, 1, 1), (1, 2, 1, 0)),
        # 1 lies at the bottom and 2 at the top; 0 overwrites 1, after its second use.
        """\
        arena=3 residents=-
        2L0@2
        1L0@0[-0E0] 1F0[1L0] 2F0 1F1[1L0] 1E0[1F1] 0L0@0[1E0] 0F0[0L0] 0E0[0F0]""",
    ),
    "two layers per transfer": (
        Case(Candidate(k=2, k_prime=2), (10, 20, 30, 5, 10), (0, 1, 2, 3, 4)),
        # Three groups of 30, 35 and 10 bytes at address 0; the last one is a single layer.
        """\
        arena=35 residents=-

        0+1L0@0[-4E0] 0F0[0+1L0] 1F0[0+1L0] 0+1E0[1F0] 2+3L0@0[0+1E0] 2F0[2+3L0] 3F0[2+3L0] 2+3E0[3F0]
        4L0@0[2+3E0] 4F0[4L0] 4E0[4F0]""",
    ),
    "two layers per transfer, two transfers in the ring": (
        Case(Candidate(k=4, k_prime=2), (10,) * 8, tuple(range(8))),
        """\
        arena=40 residents=-

        0+1L0@0[-4+5E0] 2+3L0@20[-6+7E0] 0F0[0+1L0] 1F0[0+1L0] 0+1E0[1F0] 4+5L0@0[0+1E0]
        2F0[2+3L0] 3F0[2+3L0] 2+3E0[3F0] 6+7L0@20[2+3E0]
        4F0[4+5L0] 5F0[4+5L0] 4+5E0[5F0] 6F0[6+7L0] 7F0[6+7L0] 6+7E0[7F0]""",
    ),
    "groups skip residents": (
        Case(Candidate(k=3, k_prime=2, residents=(1,)), (10,) * 5, tuple(range(5))),
        """\
        arena=20 residents=1

        0+2L0@0[-3+4E0] 0F0[0+2L0] 1F0 2F0[0+2L0] 0+2E0[2F0] 3+4L0@0[0+2E0] 3F0[3+4L0] 4F0[3+4L0] 3+4E0[4F0]""",
    ),
    "a layer that is never visited": (
        Case(Candidate(k=2, k_prime=1), (10, 45, 15, 20), (0, 2, 3)),
        # Should 1 be called after all, there is room for it; 0, 2 and 3 move as if there were not.
        """\
        arena=45 residents=-
        2L0@20
        0L0@0[-3E0] 0F0[0L0] 0E0[0F0] 3L0@0[0E0] 2F0 3F0[3L0] 3E0[3F0]""",
    ),
    "one layer at a time, and one that is never visited": (
        Case(Candidate(k=1, k_prime=1), (10, 25, 15), (0, 2)),
        # There would be room for both, but this plan is to have one of them at a time.
        """\
        arena=25 residents=-

        0L0@0[-2E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 2F0[2L0] 2E0[2F0]""",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_lowered_as_by_hand(name: str) -> None:
    case, text = BY_HAND[name]
    head, cold, *body = (line.strip() for line in text.splitlines())
    assert lowered(case) == "\n".join([head, cold, " ".join(body)])


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand_is_valid(name: str) -> None:
    case, _ = BY_HAND[name]
    validate(parse(lowered(case)), case.layer_bytes)


def test_ring_of_a_sliding_window() -> None:
    ring = build_ring(Candidate(k=2, k_prime=1), (10, 10, 10, 10), (0, 1, 2, 3))
    assert ring.groups == (Group((0,), 0, 10), Group((1,), 10, 10), Group((2,), 0, 10), Group((3,), 10, 10))
    assert ring.arena_bytes == 20
    # Visits 0 and 1 need layers that overwrite those of visits 2 and 3 of the period before, -2 and -1.
    assert ring.transfers == (
        Transfer(group=0, after=-2, before=0, evicts=((2, -2),)),
        Transfer(group=1, after=-1, before=1, evicts=((3, -1),)),
        Transfer(group=2, after=0, before=2, evicts=((0, 0),)),
        Transfer(group=3, after=1, before=3, evicts=((1, 1),)),
    )


@given(cases())
def test_a_load_is_not_issued_before_the_one_ahead_of_it(case: Case) -> None:
    issued = [transfer.after for transfer in ring_of(case).transfers]
    assert issued == sorted(issued)
    assert all(transfer.after < transfer.before for transfer in ring_of(case).transfers)


@pytest.mark.parametrize(
    ("window", "expected"), [(1, 9), (2, 13), (3, 15), (4, 16), (7, 16)], ids=lambda value: str(value)
)
def test_arena_holds_any_neighbours(window: int, expected: int) -> None:
    assert arena_bytes([1, 2, 4, 9], window) == expected


def test_arena_of_nothing() -> None:
    assert arena_bytes([], 2) == 0


@thorough
@given(st.lists(sizes, max_size=8), st.integers(1, 9))
def test_arena_bytes_by_brute_force(group_bytes: list[int], window: int) -> None:
    sums = [sum(group_bytes[start : start + window]) for start in range(len(group_bytes))]
    assert arena_bytes(group_bytes, window) == max(sums, default=0)


@thorough
@given(cases())
def test_every_schedule_is_valid(case: Case) -> None:
    validate(lower(case.candidate, case.layer_bytes, case.visits), case.layer_bytes)


@thorough
@given(cases())
def test_forwards_are_the_visits(case: Case) -> None:
    forwards = lower(case.candidate, case.layer_bytes, case.visits).forwards
    assert tuple(action.layers[0] for action in forwards) == case.visits
    for layer in set(case.visits):
        occurrences = [action.occurrence for action in forwards if action.layers == (layer,)]
        assert occurrences == list(range(case.visits.count(layer)))


@thorough
@given(cases())
def test_groups_hold_every_streamed_layer_once(case: Case) -> None:
    groups = ring_of(case).groups
    assert tuple(layer for group in groups for layer in group.layers) == case.streamed
    assert all(len(group.layers) == case.candidate.k_prime for group in groups[:-1])
    assert all(group.n_bytes == sum(case.layer_bytes[layer] for layer in group.layers) for group in groups)


@thorough
@given(cases())
def test_arena_is_no_larger_than_the_window_needs(case: Case) -> None:
    ring = ring_of(case)
    groups = [group.n_bytes for group in ring.groups]
    never = set(range(len(case.layer_bytes))) - set(case.visits)
    window = window_of(case.candidate)
    needed = [sum(groups[start : start + window]) for start in range(len(groups))]
    assert ring.arena_bytes == max([*needed, *(case.layer_bytes[layer] for layer in never)], default=0)


@thorough
@given(cases())
def test_live_ranges_never_overlap(case: Case) -> None:
    """Walks two passes with its own books, and none of `validate`'s."""
    schedule = lower(case.candidate, case.layer_bytes, case.visits)
    owner: list[int | None] = [None] * schedule.arena_bytes  # of each byte

    def take(action: Action) -> None:
        assert action.offset is not None
        begin = action.offset
        for layer in action.layers:
            for byte in range(begin, begin + case.layer_bytes[layer]):
                assert owner[byte] is None
                owner[byte] = layer
            begin += case.layer_bytes[layer]

    for action in schedule.cold:
        take(action)
    for action in schedule.actions * 2:
        if action.kind is Kind.LOAD:
            take(action)
        elif action.kind is Kind.EVICT:
            owner = [None if layer in action.layers else layer for layer in owner]
        elif action.layers[0] not in case.candidate.residents:
            assert owner.count(action.layers[0]) == case.layer_bytes[action.layers[0]]


@thorough
@given(st.data(), st.integers(1, 8), sizes)
def test_window_of_like_layers_is_on_the_device_together(data: st.DataObject, count: int, n_bytes: int) -> None:
    k = data.draw(st.integers(1, count))
    candidate = Candidate(k=k, k_prime=data.draw(st.integers(1, k)))
    groups = build_ring(candidate, (n_bytes,) * count, range(count)).groups
    assert_neighbours_apart(groups, window_of(candidate))


@pytest.mark.parametrize("layer_bytes", [(1, 1, 2), (5, 20, 7, 9), (10, 20, 10, 20, 10, 20)])
def test_window_of_unlike_layers_is_on_the_device_together(layer_bytes: tuple[int, ...]) -> None:
    candidate = Candidate(k=3 if len(layer_bytes) == 6 else 2, k_prime=1)
    groups = build_ring(candidate, layer_bytes, range(len(layer_bytes))).groups
    assert_neighbours_apart(groups, window_of(candidate))


def test_a_large_group_leaves_room_for_small_ones_beside_it() -> None:
    # Packed in their order, the groups before the large one leave it no gap, and the arena is 61 B.
    group_bytes = (7, 7, 7, 1, 2, 7, 26)
    ends = [offset + size for offset, size in zip(place(group_bytes, 3), group_bytes, strict=True)]
    assert max(ends) == arena_bytes(group_bytes, 3) == 35


@thorough
@given(st.lists(sizes, max_size=12), st.integers(1, 5))
def test_places_of_any_neighbours_are_apart(group_bytes: list[int], window: int) -> None:
    ends = []
    for placing in (place, place_spread):
        groups = [Group((), *of) for of in zip(placing(group_bytes, window), group_bytes, strict=True)]
        assert all(group.offset >= 0 for group in groups)
        assert_neighbours_apart(groups, window)
        ends.append(max((group.offset + group.n_bytes for group in groups), default=0))
    assert ends[1] <= ends[0]


def test_small_groups_are_spread_over_what_large_neighbours_need() -> None:
    # The arena is made for the last two: of the others it holds four in a row.
    group_bytes = (6, 6, 6, 6, 6, 6, 5, 30)
    assert place(group_bytes, 2) == [0, 29, 0, 29, 0, 29, 0, 5]
    assert list(place_spread(group_bytes, 2)) == [0, 6, 12, 18, 0, 24, 0, 5]
    assert list(place_spread(group_bytes, 1)) == [0] * 8


def assert_neighbours_apart(groups: Sequence[Group], window: int) -> None:
    """Any `window` groups in a row have memory of their own."""
    for start, first in enumerate(groups):
        for second in groups[start + 1 : start + window]:
            assert not first.overlaps(second)


@thorough
@given(cases())
def test_every_load_serves_a_visit_of_its_own(case: Case) -> None:
    schedule = lower(case.candidate, case.layer_bytes, case.visits)
    needed = {ref for action in schedule.forwards for ref in action.waits}
    assert needed == {action.ref for action in schedule.loads}
    for action in schedule.forwards:
        assert len(action.waits) <= 1
        assert all(action.layers[0] in ref.layers for ref in action.waits)


@thorough
@given(cases())
def test_loads_are_no_more_than_visits(case: Case) -> None:
    schedule = lower(case.candidate, case.layer_bytes, case.visits)
    for group in ring_of(case).groups:
        visits = sum(layer in group.layers for layer in case.visits)
        assert sum(action.layers == group.layers for action in schedule.loads) <= visits
    loaded = {layer for action in (*schedule.loads, *schedule.cold) for layer in action.layers}
    assert loaded == set(case.streamed)


@thorough
@given(cases())
def test_each_eviction_follows_the_last_use(case: Case) -> None:
    schedule = lower(case.candidate, case.layer_bytes, case.visits)
    evictions = 0
    for position, action in enumerate(schedule.actions):
        if action.kind is Kind.EVICT:
            evictions += 1
            (last_use,) = action.waits
            assert last_use.layers[0] in action.layers
            before = [other for other in schedule.actions[:position] if other.kind is Kind.FORWARD]
            assert before[-1].ref == last_use
    assert evictions == len(schedule.loads)  # what comes in a period leaves in a period


@thorough
@given(cases(once=True))
def test_a_pass_moves_what_shares_its_place(case: Case) -> None:
    """Of layers visited once, those with a place of their own stay, and every other one comes once a pass."""
    ring = ring_of(case)
    sharing = [group for group in ring.groups if sum(group.overlaps(other) for other in ring.groups) > 1]
    loads = lower(case.candidate, case.layer_bytes, case.visits).loads
    assert sorted(action.layers for action in loads) == sorted(group.layers for group in sharing)


@thorough
@given(st.data(), st.integers(1, 12), sizes)
def test_a_pass_moves_everything_if_the_ring_is_at_most_half(data: st.DataObject, count: int, n_bytes: int) -> None:
    k_prime = data.draw(st.integers(1, count))
    groups = count // k_prime
    depth = data.draw(st.integers(1, max(1, groups // 2)))
    if groups < 2 * depth:
        depth, k_prime = 1, 1
    candidate = Candidate(k=depth * k_prime, k_prime=k_prime)
    schedule = lower(candidate, (n_bytes,) * count, range(count))
    moved = sum(n_bytes * len(action.layers) for action in schedule.loads)
    assert moved == (n_bytes * count if count > 1 else 0)
