"""Timelines computed by hand, to the last digit, and what holds for all of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.simulate import Costs, costs_of, simulate
from autosp.schedule.actions import Kind, parse
from autosp.schedule.streaming import lower
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Candidate, Tier
from builders import Case, cases, link, profile, thorough


def costs(
    layer_bytes: tuple[int, ...],
    forward_s: list[float],
    *,
    bytes_per_s: float,
    before_s: list[float] | None = None,
    tail_s: float = 0.0,
    latency_s: float = 0.0,
) -> Costs:
    """Costs of a period, with nothing before, after or between the forwards unless said."""
    return Costs(
        before_s=[0.0] * len(forward_s) if before_s is None else before_s,
        forward_s=forward_s,
        tail_s=tail_s,
        layer_bytes=layer_bytes,
        link_latency_s=latency_s,
        link_bytes_per_s=bytes_per_s,
    )


def timeline(candidate: Candidate, visits: tuple[int, ...], costs: Costs, periods: int = 4) -> Timeline:
    """The candidate, lowered and simulated."""
    return simulate(lower(candidate, costs.layer_bytes, visits), costs, periods)


def spans(timeline: Timeline, period: int, *kinds: Kind) -> dict[str, tuple[float, float]]:
    """Action -> (start, end) in a period."""
    return {
        str(span.action.ref): (span.start_s, span.end_s)
        for span in timeline.spans
        if span.period == period and span.action.kind in kinds
    }


def stalls(timeline: Timeline, period: int) -> list[float]:
    """The stall of each visit of a period."""
    return [span.stall_s for span in timeline.spans if span.period == period and span.action.kind is Kind.FORWARD]


def test_no_overlap() -> None:
    # k=1: each load (10 B at 10 B/s: 1 s) waits for the forward (2 s) before it. A pass is 3 * (1 + 2) = 9 s.
    result = timeline(Candidate(k=1, k_prime=1), (0, 1, 2), costs((10, 10, 10), [2.0] * 3, bytes_per_s=10.0))
    assert spans(result, 0, *Kind) == {
        "0L0": (0, 1),
        "0F0": (1, 3),
        "0E0": (3, 3),
        "1L0": (3, 4),
        "1F0": (4, 6),
        "1E0": (6, 6),
        "2L0": (6, 7),
        "2F0": (7, 9),
        "2E0": (9, 9),
    }
    assert spans(result, 1, Kind.LOAD) == {"0L0": (9, 10), "1L0": (12, 13), "2L0": (15, 16)}
    assert stalls(result, 0) == stalls(result, 3) == [1, 1, 1]
    assert result.period_ends_s == (9, 18, 27, 36)
    assert (result.cold_s, result.steady_s) == (9, 9)
    assert result.stalls_s() == {0: 1, 1: 1, 2: 1}


def test_double_buffer_bound_by_compute() -> None:
    # k=2: a load takes 1 s, a forward 2 s. 0 and 2 share a place, 1 and 3 the other.
    result = timeline(Candidate(k=2, k_prime=1), (0, 1, 2, 3), costs((10,) * 4, [2.0] * 4, bytes_per_s=10.0))
    assert spans(result, 0, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (0, 1),
        "1L0": (1, 2),
        "0F0": (1, 3),  # stalls 1 s: nothing was there
        "2L0": (3, 4),  # after 0 was evicted at 3
        "1F0": (3, 5),
        "3L0": (5, 6),  # after 1 was evicted at 5
        "2F0": (5, 7),
        "3F0": (7, 9),
    }
    assert spans(result, 1, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (7, 8),  # after 2 was evicted at 7, while 3 still computed in the first pass
        "1L0": (9, 10),  # after 3 was evicted at 9
        "0F0": (9, 11),
        "2L0": (11, 12),
        "1F0": (11, 13),
        "3L0": (13, 14),
        "2F0": (13, 15),
        "3F0": (15, 17),
    }
    assert stalls(result, 0) == [1, 0, 0, 0]
    assert stalls(result, 1) == [0, 0, 0, 0]
    assert result.period_ends_s == (9, 17, 25, 33)
    assert (result.cold_s, result.steady_s) == (9, 8)  # 4 * 2: all compute
    assert result.stalls_s() == {0: 0, 1: 0, 2: 0, 3: 0}


def test_double_buffer_bound_by_the_link() -> None:
    # k=2: a load takes 30 B / 10 B/s = 3 s, a forward 1 s. The link never rests: a steady pass is 4 * 3 = 12 s.
    result = timeline(Candidate(k=2, k_prime=1), (0, 1, 2, 3), costs((30,) * 4, [1.0] * 4, bytes_per_s=10.0))
    assert spans(result, 0, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (0, 3),
        "1L0": (3, 6),
        "0F0": (3, 4),
        "2L0": (6, 9),
        "1F0": (6, 7),
        "3L0": (9, 12),
        "2F0": (9, 10),
        "3F0": (12, 13),
    }
    assert spans(result, 1, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (12, 15),
        "1L0": (15, 18),
        "0F0": (15, 16),
        "2L0": (18, 21),
        "1F0": (18, 19),
        "3L0": (21, 24),
        "2F0": (21, 22),
        "3F0": (24, 25),
    }
    assert stalls(result, 0) == [3, 2, 2, 2]
    assert stalls(result, 1) == [2, 2, 2, 2]
    assert result.period_ends_s == (13, 25, 37, 49)
    assert (result.cold_s, result.steady_s) == (13, 12)
    assert result.stalls_s() == {0: 2, 1: 2, 2: 2, 3: 2}


def test_two_layers_per_transfer() -> None:
    # k=4, k'=2: a transfer takes 1 s latency + 20 B / 10 B/s = 3 s, a forward 1 s.
    result = timeline(
        Candidate(k=4, k_prime=2), tuple(range(8)), costs((10,) * 8, [1.0] * 8, bytes_per_s=10.0, latency_s=1.0)
    )
    assert spans(result, 0, Kind.LOAD, Kind.FORWARD) == {
        "0+1L0": (0, 3),
        "2+3L0": (3, 6),
        "0F0": (3, 4),
        "1F0": (4, 5),
        "4+5L0": (6, 9),  # 0 and 1 were evicted at 5, but the link is busy until 6
        "2F0": (6, 7),
        "3F0": (7, 8),
        "6+7L0": (9, 12),
        "4F0": (9, 10),
        "5F0": (10, 11),
        "6F0": (12, 13),
        "7F0": (13, 14),
    }
    assert spans(result, 1, Kind.LOAD) == {"0+1L0": (12, 15), "2+3L0": (15, 18), "4+5L0": (18, 21), "6+7L0": (21, 24)}
    assert stalls(result, 0) == [3, 0, 1, 0, 1, 0, 1, 0]
    assert stalls(result, 1) == [1, 0, 1, 0, 1, 0, 1, 0]
    assert result.period_ends_s == (14, 26, 38, 50)
    assert (result.cold_s, result.steady_s) == (14, 12)  # 4 transfers of 3 s


def test_resident_between_streamed_layers() -> None:
    # Layer 1 stays; 0, 2 and 3 share one place. A load takes 2 s, a forward 3 s.
    result = timeline(
        Candidate(k=2, k_prime=1, residents=(1,)), (0, 1, 2, 3), costs((20,) * 4, [3.0] * 4, bytes_per_s=10.0)
    )
    assert spans(result, 0, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (0, 2),
        "0F0": (2, 5),
        "2L0": (5, 7),  # hidden behind layer 1
        "1F0": (5, 8),
        "2F0": (8, 11),
        "3L0": (11, 13),  # nothing to hide behind
        "3F0": (13, 16),
    }
    assert spans(result, 1, Kind.LOAD) == {"0L0": (16, 18), "2L0": (21, 23), "3L0": (27, 29)}
    assert result.period_ends_s == (16, 32, 48, 64)  # 4 * 3 + 2 + 2
    assert result.stalls_s() == {0: 2, 1: 0, 2: 0, 3: 2}


def test_compute_before_layers_and_after_the_last() -> None:
    # k=1: a load takes 2 s, a forward 1 s; 0.5 s of other compute before layer 0, 3 s before layer 1, 4 s at the end.
    result = timeline(
        Candidate(k=1, k_prime=1),
        (0, 1),
        costs((20, 20), [1.0, 1.0], bytes_per_s=10.0, before_s=[0.5, 3.0], tail_s=4.0),
    )
    assert spans(result, 0, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (0, 2),
        "0F0": (2, 3),  # other compute until 0.5, then 1.5 s of stall
        "1L0": (3, 5),
        "1F0": (6, 7),  # other compute until 6: the load is hidden
    }
    assert stalls(result, 0) == [1.5, 0]
    assert spans(result, 1, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (7, 9),  # during the tail, 7 to 11
        "0F0": (11.5, 12.5),
        "1L0": (12.5, 14.5),
        "1F0": (15.5, 16.5),
    }
    assert result.period_ends_s == (11, 20.5, 30, 39.5)
    assert (result.cold_s, result.steady_s) == (11, 9.5)  # 0.5 + 1 + 3 + 1 + 4
    assert result.stalls_s() == {0: 0, 1: 0}


def test_cold_pass_fills_the_arena() -> None:
    # k=3 of 4: 1 and 2 stay once they are there; 0 and 3 share a place. A load and a forward take 1 s each.
    result = timeline(Candidate(k=3, k_prime=1), (0, 1, 2, 3), costs((10,) * 4, [1.0] * 4, bytes_per_s=10.0))
    assert spans(result, 0, Kind.LOAD, Kind.FORWARD) == {
        "1L0": (0, 1),
        "2L0": (1, 2),
        "0L0": (2, 3),
        "0F0": (3, 4),
        "3L0": (4, 5),
        "1F0": (4, 5),
        "2F0": (5, 6),
        "3F0": (6, 7),
    }
    assert spans(result, 1, Kind.LOAD, Kind.FORWARD) == {
        "0L0": (7, 8),  # after 3 was evicted at 7
        "0F0": (8, 9),
        "3L0": (9, 10),
        "1F0": (9, 10),
        "2F0": (10, 11),
        "3F0": (11, 12),
    }
    assert (result.cold_s, result.steady_s) == (7, 5)
    assert result.stalls_s() == {0: 1, 1: 0, 2: 0, 3: 0}


def test_layer_loaded_twice_in_a_pass() -> None:
    # k=1, visits 0 1 0 2: four loads of 2 s and four forwards of 1 s, one after another: 12 s.
    result = timeline(Candidate(k=1, k_prime=1), (0, 1, 0, 2), costs((20,) * 3, [1.0] * 4, bytes_per_s=10.0))
    assert spans(result, 1, Kind.LOAD) == {"0L0": (12, 14), "1L0": (15, 17), "0L1": (18, 20), "2L0": (21, 23)}
    assert result.steady_s == 12
    assert result.stalls_s() == {0: 4, 1: 2, 2: 2}  # both stalls of layer 0


def test_latency_counts_once_per_transfer() -> None:
    # Three transfers of 0.25 s + 10 B / 10 B/s, against one of 0.25 s + 30 B / 10 B/s for all three layers.
    one_by_one = costs((10,) * 3, [1.0] * 3, bytes_per_s=10.0, latency_s=0.25)
    assert one_by_one.load_s((1,)) == 1.25
    assert one_by_one.load_s((0, 1, 2)) == 3.25
    assert timeline(Candidate(k=1, k_prime=1), (0, 1, 2), one_by_one).steady_s == 3 * (1.25 + 1)


def test_contended_costs() -> None:
    slow = costs((10, 30), [1.0, 2.0], bytes_per_s=10.0, before_s=[0.5, 0.0], tail_s=3.0, latency_s=1.0).contended(2, 4)
    assert (list(slow.before_s), list(slow.forward_s), slow.tail_s) == ([1, 0], [2, 4], 6)
    assert slow.load_s((1,)) == 4 * (1 + 3)
    assert slow.layer_bytes == (10, 30)


def test_costs_of_a_profile() -> None:
    measured = profile(
        (10, 30),
        (1, 0, 1),
        forward_s=[1.0, 2.0, 3.0],
        before_s=[0.0, 0.5, 0.25],
        tail_s=6.0,
        repeats=4,
        bytes_per_s=100.0,
        latency_s=0.125,
    )
    assert costs_of(measured) == Costs(
        before_s=[0.0, 0.5, 0.25],
        forward_s=[1.0, 2.0, 3.0],
        tail_s=1.5,  # spread over the periods
        layer_bytes=[10, 30],
        read_bytes=[10, 30],
        link_latency_s=0.125,
        link_bytes_per_s=100.0,
        backward=[],
        before_backward_s=[],
        recompute_s=[],
        backward_s=[],
        gradient_bytes=[0, 0],
        activation_bytes=[],
    )


def test_reads_take_the_time_of_what_is_read() -> None:
    machine = link(bytes_per_s=4.0, latency_s=0.5, source=Tier.DISK)
    found = costs_of(profile((10, 30), read_bytes=(14, 38), bytes_per_s=10.0, disk=machine))
    assert (found.read_s((0,)), found.read_s((0, 1)), found.load_s((0, 1))) == (4.0, 13.5, 4.0)


def test_steady_is_the_mean_of_the_last_two_periods() -> None:
    assert Timeline((), (3.0,)).steady_s == 3
    assert Timeline((), (3.0, 8.0)).steady_s == 5
    assert Timeline((), (3.0, 8.0, 10.0)).steady_s == 3.5
    assert Timeline((), (3.0, 8.0, 10.0, 17.0)).steady_s == 4.5


def test_stalls_are_those_of_the_last_period() -> None:
    action = parse("arena=0 residents=5\n\n5F0").actions[0]
    first, last = (Span(action, period, 0.0, 0.0, stall_s=1.0 + period) for period in range(2))
    assert Timeline((first, last), (1.0, 2.0)).stalls_s() == {5: 2.0}


@pytest.mark.parametrize(
    ("candidate", "visits", "cold_s"),
    [
        # Both layers come before the first forward: 3 s, 6 s; compute 3 to 4 and 6 to 7.
        pytest.param(Candidate(k=2, k_prime=1), (0, 1), 7, id="everything fits"),
        # 0L 0-3, 0F 3-4, 1L 4-7, 1F 7-8, 0L 8-11, 0F 11-12.
        pytest.param(Candidate(k=1, k_prime=1), (0, 1, 0), 12, id="first layer is the last one too"),
    ],
)
def test_cold_pass_waits_for_its_loads(candidate: Candidate, visits: tuple[int, ...], cold_s: float) -> None:
    result = timeline(candidate, visits, costs((30, 30), [1.0] * len(visits), bytes_per_s=10.0))
    assert result.cold_s == cold_s


durations = st.lists(st.sampled_from([0.0, 1.0, 100.0]), min_size=12, max_size=12)


@thorough
@given(cases(), durations, st.sampled_from([0.01, 1.0, 100.0]), st.sampled_from([0.0, 5.0]))
def test_no_transfer_touches_what_compute_reads(
    case: Case, forward_s: list[float], bytes_per_s: float, latency_s: float
) -> None:
    """At whatever speeds: while a layer computes nothing is written where it lies, and what lies there is its own."""
    period = len(case.visits)
    schedule = lower(case.candidate, case.layer_bytes, case.visits)
    result = simulate(
        schedule, costs(case.layer_bytes, forward_s[:period], bytes_per_s=bytes_per_s, latency_s=latency_s)
    )
    place: dict[int, tuple[int, int]] = {}
    for action in (*schedule.cold, *schedule.loads):
        begin = action.offset or 0
        for layer in action.layers:
            place[layer] = (begin, begin + case.layer_bytes[layer])
            begin += case.layer_bytes[layer]
    copies = [
        (span.start_s, span.end_s, layer, *place[layer])
        for span in result.spans
        if span.action.kind is Kind.LOAD
        for layer in span.action.layers
    ]
    for span in result.spans:
        layer = span.action.layers[0]
        if span.action.kind is not Kind.FORWARD or layer not in place:
            continue
        low, high = place[layer]
        written = [copy for copy in copies if copy[3] < high and low < copy[4]]
        assert all(end <= span.start_s or start >= span.end_s for start, end, *_ in written)
        assert max(copy for copy in written if copy[1] <= span.start_s and copy[0] < span.end_s)[2] == layer


@thorough
@given(cases(), durations, st.sampled_from([0.01, 1.0, 100.0]))
def test_each_resource_does_one_thing_at_a_time(case: Case, forward_s: list[float], bytes_per_s: float) -> None:
    result = timeline(
        case.candidate,
        case.visits,
        costs(case.layer_bytes, forward_s[: len(case.visits)], bytes_per_s=bytes_per_s, tail_s=1.0),
    )
    for kind in (Kind.LOAD, Kind.FORWARD):
        own = [span for span in result.spans if span.action.kind is kind]
        assert all(earlier.end_s <= later.start_s for earlier, later in pairwise(own))
