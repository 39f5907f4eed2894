from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import report_samples as samples
from autosp.report import trace
from autosp.report.traffic import expected
from autosp.schedule.actions import Action, Kind
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Plan, Profile
from builders import candidates, profiles, thorough

Event = dict[str, Any]


def checked(made: dict[str, Any]) -> list[Event]:
    """The events, once they are seen to keep the format's rules and those of the readers.

    Times are not negative and whole nanoseconds; slices of a thread do not overlap, also where a reader computes their
    ends; every thread has a name and belongs to one process; a flow begins and ends within a slice of its thread.
    """
    events: list[Event] = json.loads(json.dumps(made, allow_nan=False))["traceEvents"]
    slices: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    processes: dict[int, int] = {}
    named: set[int] = set()
    flows: defaultdict[int, list[Event]] = defaultdict(list)
    for event in events:
        assert event["ph"] in "MXCsf"
        if "tid" in event:
            assert processes.setdefault(event["tid"], event["pid"]) == event["pid"]
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                named.add(event["tid"])
            continue
        assert event["ts"] >= 0
        assert event["ts"] * 1000 == int(event["ts"] * 1000)
        assert event["tid"] in named
        if event["ph"] == "X":
            assert event["dur"] >= 0
            begin = int(event["ts"] * 1000)
            slices[event["tid"]].append((begin, begin + int(event["dur"] * 1000)))
        elif event["ph"] == "C":
            assert all(value >= 0 for value in event["args"].values())
        else:
            flows[event["id"]].append(event)
    for spans in slices.values():
        ordered = sorted(spans)
        assert all(end <= begin for (_, end), (begin, _) in zip(ordered, ordered[1:], strict=False))
    for number, ends in flows.items():
        assert isinstance(number, int)
        assert [(event["ph"], event.get("bp")) for event in ends] == [("s", None), ("f", "e")]
        assert ends[0]["ts"] <= ends[1]["ts"]
        for event in ends:
            at = int(event["ts"] * 1000)
            assert any(begin <= at <= end for begin, end in slices[event["tid"]])
    return events


def track(events: list[Event], process: str, name: str) -> list[Event]:
    """The slices of a track, by time."""
    pid = next(one["pid"] for one in events if one["name"] == "process_name" and one["args"]["name"] == process)
    tid = next(
        one["tid"]
        for one in events
        if one["name"] == "thread_name" and one["args"]["name"] == name and one["pid"] == pid
    )
    return sorted((one for one in events if one["ph"] == "X" and one["tid"] == tid), key=lambda one: one["ts"])


def timeline(*spans: Span, end_s: float = 1.0) -> Timeline:
    return Timeline(spans, (end_s,))


def load(layers: tuple[int, ...], start_s: float, end_s: float) -> Span:
    return Span(Action(Kind.LOAD, layers, 0, offset=4096), 0, start_s, end_s)


def forward(layer: int, start_s: float, end_s: float, stall_s: float = 0.0) -> Span:
    return Span(Action(Kind.FORWARD, (layer,), 0), 0, start_s, end_s, stall_s)


PLAN = samples.plan()


def test_by_hand() -> None:
    measured = timeline(load((1, 2), 0.0, 0.2), forward(1, 0.25, 0.375, stall_s=0.25), forward(2, 0.5, 0.75))
    events = checked(trace.chrome_trace(PLAN, None, measured))
    (copy,) = track(events, "measured", "link")
    assert (copy["ts"], copy["dur"], copy["name"]) == (0, 200_000, "blocks.1 … blocks.2")
    assert copy["args"] == {"layers": [1, 2], "bytes": 800_000_000, "GB/s": 4.0, "arena offset": 4096}
    first, second = track(events, "measured", "compute")
    assert (first["ts"], first["dur"], first["name"]) == (250_000, 125_000, "blocks.1")
    assert first["args"] == {"layer": 1, "bytes": 400_000_000, "resident": False, "stall_us": 250_000}
    assert second["args"]["stall_us"] == 0
    (stall,) = track(events, "measured", "stalls")
    assert (stall["ts"], stall["dur"], stall["name"]) == (0, 250_000, "waits for blocks.1")
    (whole,) = track(events, "measured", "passes")
    assert (whole["ts"], whole["dur"], whole["name"]) == (0, 1_000_000, "pass 1")
    begin, end = (one for one in events if one["ph"] in "sf")
    assert (begin["tid"], begin["ts"]) == (copy["tid"], copy["ts"])
    assert (end["tid"], end["ts"]) == (first["tid"], first["ts"])
    (level,) = (one for one in events if one["ph"] == "C")
    assert (level["ts"], level["args"]) == (0, {"bytes": 800_000_000})


def test_predicted_and_measured_are_two_processes_with_the_same_tracks() -> None:
    predicted = expected(samples.profile(), samples.MIXED, 3)
    events = checked(trace.chrome_trace(PLAN, predicted, timeline(forward(1, 0, 0.5))))
    for process in ("predicted", "measured"):
        for name in trace.TRACKS[:4]:
            track(events, process, name)
    assert len(track(events, "predicted", "compute")) == 36
    assert len(track(events, "predicted", "passes")) == 3
    assert track(events, "measured", "link") == []
    assert {one["args"]["resident"] for one in track(events, "predicted", "compute")} == {True, False}


def test_periods_are_no_passes() -> None:
    plan = PLAN.model_copy(update={"partition": samples.profile(repeats=4).partition})
    (one,) = track(checked(trace.chrome_trace(plan, None, timeline())), "measured", "passes")
    assert one["name"] == "period 1"


def test_a_load_leads_to_the_first_forward_that_uses_it_and_to_no_other() -> None:
    measured = timeline(
        load((1,), 0.0, 0.1),
        load((2,), 0.1, 0.3),  # prefetched, and used after 1 was used twice
        forward(1, 0.1, 0.2),
        forward(1, 0.3, 0.4),
        forward(2, 0.4, 0.5),
        forward(0, 0.5, 0.6),  # resident
        load((1,), 0.6, 0.7),  # for the next pass
    )
    events = checked(trace.chrome_trace(PLAN, None, measured))
    ends = [(one["ts"], one["tid"]) for one in events if one["ph"] == "f"]
    compute = track(events, "measured", "compute")
    assert ends == [(compute[0]["ts"], compute[0]["tid"]), (compute[2]["ts"], compute[2]["tid"])]


def test_a_layer_called_within_itself_gets_a_track_of_its_own() -> None:
    measured = timeline(forward(1, 0.0, 0.9), forward(1, 0.2, 0.5), forward(1, 0.6, 0.7), forward(2, 0.9, 1.0))
    events = checked(trace.chrome_trace(PLAN, None, measured))
    assert [one["dur"] for one in track(events, "measured", "compute")] == [900_000, 100_000]
    assert [one["dur"] for one in track(events, "measured", "compute (2)")] == [300_000, 100_000]


def test_the_noise_of_a_clock_makes_no_track() -> None:
    measured = timeline(load((1,), 0.0, 0.1), load((2,), 0.1 - 4e-6, 0.2), load((3,), -1e-6, 0.0))
    events = checked(trace.chrome_trace(PLAN, None, measured))
    assert len(track(events, "measured", "link")) == 3


def test_the_counter_knows_what_was_there_before() -> None:
    evict = Span(Action(Kind.EVICT, (3,), 0), 0, 0.5, 0.5)
    events = checked(trace.chrome_trace(PLAN, None, timeline(evict, load((1, 2), 0.5, 0.6))))
    assert [(one["ts"], one["args"]["bytes"]) for one in events if one["ph"] == "C"] == [
        (0, 400_000_000),
        (500_000, 800_000_000),
    ]


@thorough
@given(profiles(contention=True), st.data())
def test_any_timeline_keeps_the_rules(profile: Profile, data: st.DataObject) -> None:
    candidate = data.draw(candidates(profile.partition.visits))
    plan = PLAN.model_copy(update={"partition": profile.partition, "candidate": candidate})
    predicted = expected(profile, candidate, 3)
    late = Timeline(tuple(span for span in predicted.spans if span.period >= 1), predicted.period_ends_s)
    events = checked(trace.chrome_trace(plan, predicted, late))
    loads = predicted.of_kind(Kind.LOAD)
    assert len(track(events, "predicted", "link")) == len(loads)
    used = [
        load
        for load in loads
        if any(
            forward.action.layers[0] in load.action.layers and forward.start_s >= load.end_s - 1e-6
            for forward in predicted.of_kind(Kind.FORWARD)
        )
    ]
    assert len([one for one in events if one["ph"] == "s" and one["pid"] == 1]) == len(used)


def test_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "trace.json"
    measured = timeline(forward(1, 0.0, 0.5))
    trace.save_trace(target, PLAN, None, measured)
    assert json.loads(target.read_text()) == trace.chrome_trace(PLAN, None, measured)
    before = target.read_bytes()

    def interrupted(_plan: Plan, *_timelines: Timeline | None) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "chrome_trace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace.save_trace(target, PLAN, None, None)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_gradients_have_a_track_of_their_own() -> None:
    layers = [layer.model_copy(update={"gradient_bytes": 25 * 10**7}) for layer in PLAN.partition.layers]
    plan = PLAN.model_copy(update={"partition": PLAN.partition.model_copy(update={"layers": tuple(layers)})})
    sent = timeline(Span(Action(Kind.GRADIENTS, (1,), 0), 0, 0.5, 0.75))
    events = checked(trace.chrome_trace(plan, sent, timeline(forward(1, 0, 0.5))))
    (gradients,) = track(events, "predicted", "gradients")
    assert (gradients["ts"], gradients["dur"], gradients["name"]) == (500_000, 250_000, "blocks.1")
    assert gradients["args"] == {"layers": [1], "bytes": 250_000_000, "GB/s": 1.0}
    assert [one["args"]["name"] for one in events if one["name"] == "thread_name"].count("gradients") == 1


def test_reads_have_a_track_of_their_own() -> None:
    timeline = Timeline((Span(Action(Kind.READ, (1,), 0, (), 8192), 0, 0.0, 0.25),), (1.0,))
    plan = samples.plan()
    layers = [layer.model_copy(update={"disk_bytes": layer.n_bytes + 10**8}) for layer in plan.partition.layers]
    plan = plan.model_copy(update={"partition": plan.partition.model_copy(update={"layers": tuple(layers)})})
    events = trace.chrome_trace(plan, None, timeline)["traceEvents"]
    (read,) = track(events, "measured", "disk")
    assert (read["ts"], read["dur"], read["name"]) == (0, 250_000, "blocks.1")
    assert read["args"] == {"layers": [1], "bytes": 500_000_000, "GB/s": 2.0, "staging offset": 8192}
