"""Timelines as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: predicted and measured, one below the
other.

The format is Chrome's Trace Event Format, as JSON: complete events (`X`) on named tracks, flows (`s`, `f`) from a load
to the forward that needed it, a counter (`C`) of the arena's occupied bytes. Times are in microseconds.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autosp.cost_model.memory import occupancy
from autosp.files import write_atomically
from autosp.schedule.actions import Kind
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Layer, Partition, Plan

Event = dict[str, Any]

PASSES, COMPUTE, STALLS, LINK, DISK, RETURN = "passes", "compute", "stalls", "link", "disk", "gradients"
TRACKS = (PASSES, COMPUTE, STALLS, LINK, DISK, RETURN)
OCCUPIED = "arena, occupied"

TICKS_PER_US = 8
"""Times are whole eighths of a microsecond, which binary fractions hold exactly: slices that touch do so in every
reader, whatever it computes with."""

CLOCK_NOISE = 40
"""In ticks. A device's clock is read to single precision: slices that overlap by no more follow each other."""

LANES = 1000
"""Room between the ids of two tracks: slices that do overlap (a layer called within itself) get tracks of their own, so
that on each track one slice ends before the next begins."""


@dataclass(frozen=True)
class _Slice:
    track: str
    name: str
    start: int
    end: int
    """Both in ticks."""
    arguments: dict[str, Any]
    lane: int = 0


def chrome_trace(plan: Plan, predicted: Timeline | None, measured: Timeline | None) -> dict[str, Any]:
    """The trace of one plan: a process per timeline, with the tracks passes, compute, stalls and link, a counter,
    the track disk where layers rest on disk behind the host, and the track gradients where these leave the device.

    Of what was measured there are streamed layers only: resident ones ran between the slices of the compute track.
    """
    events: list[Event] = []
    flows = itertools.count(1)
    for process, (name, timeline) in enumerate((("predicted", predicted), ("measured", measured)), start=1):
        if timeline is not None:
            events += _process(process, name, timeline, plan, flows)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "model": plan.model_name,
            "batch": plan.batch_signature,
            "plan": plan.candidate.label(),
            "device": plan.device.name,
            "autosp": plan.autosp_version,
        },
    }


def save_trace(path: str | os.PathLike[str], plan: Plan, predicted: Timeline | None, measured: Timeline | None) -> None:
    """Write the trace as JSON, atomically: the file is either the old one or the whole new one.

    Raises: OSError if it cannot be written.
    """
    trace = chrome_trace(plan, predicted, measured)
    write_atomically(path, json.dumps(trace, separators=(",", ":"), allow_nan=False))


def _process(process: int, name: str, timeline: Timeline, plan: Plan, flows: Iterator[int]) -> list[Event]:
    partition = plan.partition
    computes = timeline.computes
    tracks = {
        PASSES: _passes(timeline, "pass" if partition.repeats == 1 else "period"),
        COMPUTE: [_compute(span, partition, plan.candidate.residents) for span in computes],
        STALLS: [_stall(span, partition) for span in computes if span.stall_s > 0],
        LINK: [_transfer(LINK, "arena offset", span, partition) for span in timeline.of_kind(Kind.LOAD)],
        DISK: [_transfer(DISK, "staging offset", span, partition) for span in timeline.of_kind(Kind.READ)],
        RETURN: [_transfer(RETURN, "offset", span, partition) for span in timeline.of_kind(Kind.GRADIENTS)],
    }
    slices = {track: _laned(tracks[track]) for track in TRACKS}
    everything = [one for track in TRACKS for one in slices[track]]
    return [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}},
        *_thread_names(process, everything),
        *(_complete(process, one) for one in everything),
        *_flows(process, slices[LINK], slices[COMPUTE], flows),
        *_counter(process, timeline, partition),
    ]


# -- slices -------------------------------------------------------------------------------------------------------


SUFFIXES = {Kind.FORWARD: "", Kind.RECOMPUTE: ", again", Kind.BACKWARD: ", backward"}


def _compute(span: Span, partition: Partition, residents: Sequence[int]) -> _Slice:
    layer = span.action.layers[0]
    arguments = {
        "layer": layer,
        "bytes": partition.layers[layer].n_bytes,
        "resident": layer in residents,
        "stall_us": round(span.stall_s * 1e6, 3),
    }
    name = _name([layer], partition) + SUFFIXES[span.action.kind]
    return _slice(COMPUTE, name, span.start_s, span.end_s, arguments)


def _stall(span: Span, partition: Partition) -> _Slice:
    name = f"waits for {_name(span.action.layers, partition)}"
    return _slice(STALLS, name, span.start_s - span.stall_s, span.start_s, {"layer": span.action.layers[0]})


def _transfer(track: str, address: str, span: Span, partition: Partition) -> _Slice:
    layers = span.action.layers
    n_bytes = sum(_moved_bytes(span.action.kind, partition.layers[layer]) for layer in layers)
    took_s = span.end_s - span.start_s
    arguments: dict[str, Any] = {"layers": list(layers), "bytes": n_bytes}
    if took_s > 0:
        arguments["GB/s"] = round(n_bytes / took_s / 1e9, 3)
    if span.action.offset is not None:
        arguments[address] = span.action.offset
    return _slice(track, _name(layers, partition), span.start_s, span.end_s, arguments)


def _moved_bytes(kind: Kind, layer: Layer) -> int:
    if kind is Kind.READ:
        return layer.read_bytes
    return layer.gradient_bytes if kind is Kind.GRADIENTS else layer.n_bytes


def _passes(timeline: Timeline, word: str) -> list[_Slice]:
    ends = timeline.period_ends_s
    return [
        _slice(PASSES, f"{word} {number}", begin, end, {})
        for number, (begin, end) in enumerate(zip((0.0, *ends), ends, strict=False), start=1)
    ]


def _slice(track: str, name: str, start_s: float, end_s: float, arguments: dict[str, Any]) -> _Slice:
    """Times are rounded, not durations: slices that touch do so in the trace, too."""
    start = max(0, round(start_s * 1e6 * TICKS_PER_US))
    return _Slice(track, name, start, max(start, round(end_s * 1e6 * TICKS_PER_US)), arguments)


def _name(layers: Sequence[int], partition: Partition) -> str:
    names = [partition.layers[layer].name or "(the model itself)" for layer in layers]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _laned(slices: Iterable[_Slice]) -> list[_Slice]:
    """In the order of their begin, each on the first lane that is free by then."""
    placed: list[_Slice] = []
    ends: list[int] = []
    for one in sorted(slices, key=lambda one: (one.start, one.end)):
        lane = next((lane for lane, end in enumerate(ends) if end <= one.start + CLOCK_NOISE), len(ends))
        if lane == len(ends):
            ends.append(0)
        start = max(one.start, ends[lane])
        end = max(start, one.end)
        ends[lane] = end
        placed.append(replace(one, start=start, end=end, lane=lane))
    return placed


# -- events -------------------------------------------------------------------------------------------------------


def _thread(process: int, track: str, lane: int = 0) -> int:
    """An id that no other thread of the trace has: some readers know threads by it alone."""
    return (process * len(TRACKS) + TRACKS.index(track)) * LANES + lane


def _thread_names(process: int, slices: Sequence[_Slice]) -> list[Event]:
    """The first four tracks in their order, whether anything is on them or not, the others and the lanes that are."""
    used = {one.track for one in slices}
    names = {_thread(process, track): track for track in TRACKS if track in used or track not in (DISK, RETURN)}
    names |= {_thread(process, one.track, one.lane): f"{one.track} ({one.lane + 1})" for one in slices if one.lane}
    return [
        {"ph": "M", "pid": process, "tid": thread, "name": kind, "args": {field: value}}
        for thread, name in sorted(names.items())
        for kind, field, value in (("thread_name", "name", name), ("thread_sort_index", "sort_index", thread))
    ]


def _complete(process: int, one: _Slice) -> Event:
    return {
        "ph": "X",
        "pid": process,
        "tid": _thread(process, one.track, one.lane),
        "ts": one.start / TICKS_PER_US,
        "dur": (one.end - one.start) / TICKS_PER_US,
        "name": one.name,
        "cat": one.track,
        "args": one.arguments,
    }


def _flows(process: int, loads: Sequence[_Slice], forwards: Sequence[_Slice], ids: Iterator[int]) -> list[Event]:
    """From each load to the first forward of one of its layers that began when it was over.

    Each end lies at the begin of its slice. Ids are numbers: readers take a string for a hexadecimal one.
    """
    events: list[Event] = []
    waiting: dict[int, _Slice] = {}  # layer -> the load that brought it, until one of its layers is used
    arrivals = sorted(loads, key=lambda load: load.end, reverse=True)
    for forward in forwards:
        while arrivals and arrivals[-1].end <= forward.start + CLOCK_NOISE:
            load = arrivals.pop()
            waiting.update(dict.fromkeys(load.arguments["layers"], load))
        needed = waiting.get(forward.arguments["layer"])
        if needed is None:
            continue
        waiting = {layer: load for layer, load in waiting.items() if load is not needed}
        number = next(ids)
        for phase, one in (("s", needed), ("f", forward)):
            flow = {"ph": phase, "pid": process, "tid": _thread(process, one.track, one.lane), "id": number}
            flow |= {"ts": one.start / TICKS_PER_US, "name": "needs", "cat": "needs"}
            events.append(flow if phase == "s" else flow | {"bp": "e"})
    return events


def _counter(process: int, timeline: Timeline, partition: Partition) -> list[Event]:
    """One value per moment: what is evicted and overwritten at once leaves no dip."""
    curve = occupancy(timeline.completed(), [layer.n_bytes for layer in partition.layers])
    values = {max(0, round(when * 1e6 * TICKS_PER_US)): n_bytes for when, n_bytes in curve}
    named = {"ph": "C", "pid": process, "tid": _thread(process, PASSES), "name": OCCUPIED}
    return [
        {**named, "ts": when / TICKS_PER_US, "args": {"bytes": n_bytes}} for when, n_bytes in sorted(values.items())
    ]
