from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import report_samples as samples
from autosp.cost_model.predict import predict
from autosp.report.traffic import calls_periods, expected, periods_of, traffic
from autosp.schedule.actions import Action, Kind
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Candidate, Profile
from builders import candidates, partition, profiles, thorough

PARTS = partition((100, 10, 1))
STREAMED = Candidate(k=2, k_prime=1, residents=(2,))


def one_pass(begin: float, period: int, stalls: tuple[float, float] = (2.0, 1.0)) -> list[Span]:
    """Ten seconds: loads of layers 0 and 1 that take 4 s and 1 s, and their forwards."""
    load, other = Action(Kind.LOAD, (0,), 0), Action(Kind.LOAD, (1,), 0)
    return [
        Span(load, period, begin, begin + 4),
        Span(other, period, begin + 4, begin + 5),
        Span(Action(Kind.FORWARD, (0,), 0), period, begin + 4, begin + 6, stalls[0]),
        Span(Action(Kind.FORWARD, (1,), 0), period, begin + 7, begin + 8, stalls[1]),
    ]


def test_a_steady_pass_is_one_of_those_after_the_first() -> None:
    spans = [*one_pass(0, 0, (90, 90)), *one_pass(30, 1, (2, 1)), *one_pass(40, 2, (4, 0))]
    found = traffic(Timeline(tuple(spans), (30, 40, 50)), PARTS, STREAMED)
    assert found.pass_s == 10
    assert found.moved_bytes == 110
    assert found.link_busy_s == 5
    assert found.bytes_per_s == 22
    assert found.layer_stalls_s == {0: 3, 1: 0.5}
    assert found.stall_s == 3.5


def test_a_single_pass_is_all_there_is() -> None:
    found = traffic(Timeline(tuple(one_pass(0, 0)), (12,)), PARTS, STREAMED)
    assert (found.pass_s, found.moved_bytes, found.stall_s) == (12, 110, 3)


def test_a_disturbed_pass_does_not_move_the_median() -> None:
    spans = [span for period in range(4) for span in one_pass(10 * period, period)]
    assert traffic(Timeline(tuple(spans), (10, 20, 30, 99)), PARTS, STREAMED).pass_s == 10


def test_nothing_moves_where_everything_is_resident() -> None:
    everything = Candidate(k=3, k_prime=1, residents=(0, 1, 2))
    found = traffic(Timeline((), (5, 8)), PARTS, everything)
    assert (found.pass_s, found.moved_bytes, found.bytes_per_s, found.layer_stalls_s) == (3, 0, None, {})


def test_no_pass_has_no_traffic() -> None:
    with pytest.raises(ValueError, match="no period"):
        traffic(Timeline((), ()), PARTS, STREAMED)


def test_a_layer_that_never_stalled_is_named() -> None:
    spans = tuple(span for span in one_pass(0, 0) if span.action.layers != (1,))
    assert traffic(Timeline(spans, (10,)), PARTS, STREAMED).layer_stalls_s == {0: 2, 1: 0}


@pytest.mark.parametrize("calls", [1, 2])
def test_a_pass_of_several_periods(calls: int) -> None:
    """A step that calls the model twice, and a model that runs its layers twice: the same pass of two periods."""
    parts = partition((100, 10, 1), repeats=2)
    spans: list[Span] = []
    ends: list[float] = []
    for number in range(6):
        spans += one_pass(10 * number, number // calls)
        if number % calls == calls - 1:
            ends.append(10.0 * (number + 1))
    timeline = Timeline(tuple(spans), tuple(ends))
    assert calls_periods(timeline, parts, STREAMED) == calls
    assert periods_of(timeline, parts, STREAMED) == 6
    found = traffic(timeline, parts, STREAMED)
    assert (found.pass_s, found.moved_bytes, found.link_busy_s) == (20, 220, 10)
    assert found.layer_stalls_s == {0: 4, 1: 2}


@thorough
@given(profiles(contention=True), st.data())
def test_what_is_expected_is_what_is_predicted(profile: Profile, data: st.DataObject) -> None:
    """Bytes, stalls and latency of the simulated timeline are those of the prediction that ranked the candidate."""
    candidate = data.draw(candidates(profile.partition.visits))
    (prediction,) = predict(profile, [candidate])
    timeline = expected(profile, candidate, 4)
    ends = timeline.period_ends_s
    settled = Timeline(
        tuple(span for span in timeline.spans if span.period >= 1),
        ends,
    )
    found = traffic(settled, profile.partition, candidate)
    assert found.moved_bytes == pytest.approx(prediction.moved_bytes)
    assert timeline.steady_s * profile.partition.repeats == pytest.approx(prediction.latency_s)
    stalled = sum(span.stall_s for span in timeline.spans if span.period >= 2) / 2
    assert stalled * profile.partition.repeats == pytest.approx(prediction.stall_s, abs=1e-9)


def test_expected_is_slower_under_contention() -> None:
    profile = samples.profile()
    alone = profile.link.model_copy(update={"link_slowdown": 1.0, "compute_slowdown": 1.0})
    calm = profile.model_copy(update={"links": (alone,)})
    assert expected(profile, samples.WINDOW, 4).steady_s > 1.01 * expected(calm, samples.WINDOW, 4).steady_s
