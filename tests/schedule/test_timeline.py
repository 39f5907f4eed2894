"""What timelines say of themselves. Their figures are tested with the simulator, which makes them."""

from __future__ import annotations

from hypothesis import given

from autosp.cost_model.memory import occupancy
from autosp.cost_model.simulate import Costs, simulate
from autosp.schedule.actions import Action, Kind
from autosp.schedule.streaming import lower
from autosp.schedule.timeline import Span, Timeline
from builders import Case, cases, thorough

LAYER_BYTES = (100, 10, 1)


def span(kind: Kind, layer: int, start_s: float, end_s: float | None = None, period: int = 0) -> Span:
    return Span(Action(kind, (layer,), 0), period, start_s, start_s if end_s is None else end_s)


def levels(*spans: Span) -> list[tuple[float, int]]:
    """Arena bytes in use, the last value of each moment."""
    return list(dict(occupancy(Timeline(spans, (9.0,)).completed(), LAYER_BYTES)).items())


def simulated(case: Case) -> Timeline:
    count = len(case.visits)
    costs = Costs(
        before_s=[0.5] * count,
        forward_s=[1.0] * count,
        tail_s=0.25,
        layer_bytes=case.layer_bytes,
        link_latency_s=0.125,
        link_bytes_per_s=8.0,
    )
    return simulate(lower(case.candidate, case.layer_bytes, case.visits), costs)


def test_of_kind_keeps_the_order() -> None:
    load, forward, later = span(Kind.LOAD, 0, 0, 1), span(Kind.FORWARD, 0, 1, 2), span(Kind.LOAD, 1, 0, 1)
    timeline = Timeline((load, forward, later), (2.0,))
    assert timeline.of_kind(Kind.LOAD) == [load, later]
    assert timeline.of_kind(Kind.EVICT) == []


def test_what_is_evicted_before_any_load_was_there_before() -> None:
    assert levels(span(Kind.EVICT, 0, 2), span(Kind.LOAD, 1, 2, 3), span(Kind.LOAD, 2, 4, 5)) == [
        (0.0, 100),
        (2, 10),
        (4, 11),
    ]


def test_what_is_loaded_again_was_thrown_away_unseen() -> None:
    assert levels(span(Kind.LOAD, 0, 0, 1), span(Kind.LOAD, 0, 5, 6)) == [(0, 100), (5, 100)]


def test_spans_need_not_be_in_the_order_of_time() -> None:
    assert levels(span(Kind.EVICT, 1, 3), span(Kind.LOAD, 1, 1, 2)) == [(1, 10), (3, 0)]


def test_an_eviction_ends_with_its_span() -> None:
    assert levels(span(Kind.LOAD, 0, 0, 1), span(Kind.EVICT, 0, 2, 4), span(Kind.LOAD, 0, 4, 5)) == [(0, 100), (4, 100)]


@thorough
@given(cases())
def test_a_whole_timeline_is_complete(case: Case) -> None:
    timeline = simulated(case)
    completed = timeline.completed()
    assert sorted(map(str, completed.spans)) == sorted(map(str, timeline.spans))
    assert occupancy(completed, case.layer_bytes) == occupancy(timeline, case.layer_bytes)


@thorough
@given(cases())
def test_what_is_cut_off_is_made_up_for(case: Case) -> None:
    """Without its first period, a timeline's last one shows the same memory."""
    timeline = simulated(case)
    cut = Timeline(tuple(one for one in timeline.spans if one.period >= 1), timeline.period_ends_s)
    last = timeline.period_ends_s[-2]

    def steady(one: Timeline) -> list[tuple[float, int]]:
        return [step for step in occupancy(one, case.layer_bytes) if step[0] > last]

    moved = {layer for one in cut.spans if one.action.kind is not Kind.FORWARD for layer in one.action.layers}
    staying = {
        layers
        for layers in (one.action.layers for one in timeline.of_kind(Kind.LOAD) if one.period == 0)
        if not moved.intersection(layers)
    }
    hidden = sum(case.layer_bytes[layer] for layers in staying for layer in layers)
    assert [(when, n_bytes + hidden) for when, n_bytes in steady(cut.completed())] == steady(timeline)
