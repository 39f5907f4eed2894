from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

import report_samples as samples
from autosp.cost_model.predict import predict
from autosp.errors import SettingError
from autosp.report import plots
from autosp.report.traffic import expected, traffic
from autosp.report.units import seconds
from autosp.schedule.actions import Kind
from autosp.schedule.timeline import Span, Timeline
from autosp.spec import Candidate
from builders import profile, trained

KINDS = ("streamed", "resident")
PNG = b"\x89PNG\r\n\x1a\n"


def drawn(path: Path) -> str:
    """The labels of an SVG, which matplotlib leaves as comments beside their glyphs."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("candidate", [samples.EVERYTHING, samples.WINDOW, samples.MIXED, Candidate(k=1, k_prime=1)])
def test_a_timeline_shows_the_predicted_latency(candidate: Candidate, tmp_path: Path) -> None:
    profile = samples.profile()
    (prediction,) = predict(profile, [candidate])
    plots.timeline(profile, candidate, tmp_path / "t.svg", samples.BUDGET_BYTES)
    picture = drawn(tmp_path / "t.svg")
    assert f"{seconds(prediction.latency_s)}, {seconds(prediction.stall_s)} of it stalled" in picture
    assert "budget, 4.00 GB" in picture
    assert ("nothing moves" in picture) == (candidate is samples.EVERYTHING)
    assert ("compute, resident layer" in picture) == bool(candidate.residents)


def test_a_timeline_says_that_it_shows_one_of_many_periods(tmp_path: Path) -> None:
    plots.timeline(samples.profile(repeats=16), samples.MIXED, tmp_path / "t.svg")
    picture = drawn(tmp_path / "t.svg")
    assert "one of 16 periods of a pass" in picture
    assert "budget" not in picture


def test_a_timeline_of_many_thin_layers(tmp_path: Path) -> None:
    few = Candidate(k=12, k_prime=1, residents=tuple(range(0, 150, 15)))
    plots.timeline(samples.profile(150), few, tmp_path / "t.png", 10**10)
    assert (tmp_path / "t.png").read_bytes().startswith(PNG)


def shifted(timeline: Timeline, by_s: float) -> Timeline:
    """A timeline as a device might measure it: everything takes longer, and resident layers are not seen."""
    scale = 1 + by_s
    return Timeline(
        tuple(
            Span(one.action, one.period, one.start_s * scale, one.end_s * scale, one.stall_s * scale)
            for one in timeline.spans
            if one.action.kind is not Kind.FORWARD or one.action.layers[0] not in samples.MIXED.residents
        ),
        tuple(end * scale for end in timeline.period_ends_s),
    )


@pytest.mark.parametrize("candidate", [samples.EVERYTHING, samples.WINDOW, samples.MIXED])
@pytest.mark.parametrize("passes", [1, 2, 5])
def test_what_was_measured_stands_beside_what_was_predicted(candidate: Candidate, passes: int, tmp_path: Path) -> None:
    profile = samples.profile()
    measured = shifted(expected(profile, candidate, passes), 0.25)
    plots.timeline(profile, candidate, tmp_path / "t.svg", samples.BUDGET_BYTES, measured)
    picture = drawn(tmp_path / "t.svg")
    found = traffic(measured, profile.partition, candidate)
    assert f"measured {seconds(found.pass_s)}, {seconds(found.stall_s)} of it stalled" in picture
    for row in ("predicted", "measured"):
        assert f"<!-- {row}" in picture
    assert ("not timed apart" in picture) == bool(candidate.residents)
    assert found.stall_s > 0 or candidate is not samples.WINDOW


def test_without_a_measurement_there_is_nothing_beside(tmp_path: Path) -> None:
    plots.timeline(samples.profile(), samples.MIXED, tmp_path / "t.svg", None, Timeline((), ()))
    assert "<!-- measured" not in drawn(tmp_path / "t.svg")


@pytest.mark.parametrize("calls", [1, 4])
def test_periods_of_a_pass_measured_in_one_call_or_in_many(calls: int, tmp_path: Path) -> None:
    """Of both the last two periods are shown: as wide as the prediction, that they equal."""
    profile = samples.profile(repeats=4)
    periods = expected(profile, samples.WINDOW, 8)
    measured = Timeline(
        tuple(Span(one.action, one.period // calls, one.start_s, one.end_s, one.stall_s) for one in periods.spans),
        periods.period_ends_s[calls - 1 :: calls],
    )
    group = plots._Group.measured(measured, profile, samples.WINDOW)
    assert len(group.bounds_s) == 3
    assert group.bounds_s[-1] == periods.period_ends_s[-1]
    assert group.bounds_s[-1] - group.bounds_s[0] == pytest.approx(2 * periods.steady_s, rel=0.1)
    plots.timeline(profile, samples.WINDOW, tmp_path / "t.png", None, measured)


TRAINED = trained(
    profile((10, 10, 10, 10), bytes_per_s=10.0, resident_bytes=5, workspace_bytes=7),
    (3, 2, 1, 0),
    backward_s=[2.0] * 4,
    recompute_s=[1.0] * 4,
    kept=[(20, 4)] * 4,
    return_bytes_per_s=10.0,
)


@pytest.mark.parametrize(
    ("candidate", "shown"),
    [
        (Candidate(k=2, k_prime=1), {"forward, streamed", "backward, streamed", "gradients"}),
        (
            Candidate(k=3, k_prime=1, residents=(1,), recompute=(0, 1), offload=(2,)),
            {
                *(f"{kind}, {which}" for kind in ("forward", "computed again", "backward") for which in KINDS),
                "gradients",
                "activations, out and back",
            },
        ),
    ],
)
def test_a_timeline_of_training_tells_its_actions_apart(candidate: Candidate, shown: set[str], tmp_path: Path) -> None:
    plots.timeline(TRAINED, candidate, tmp_path / "t.svg", None, expected(TRAINED, candidate, 3))
    picture = drawn(tmp_path / "t.svg")
    possible = {f"{kind}, {which}" for kind in ("forward", "computed again", "backward") for which in KINDS}
    possible |= {"activations, out and back"}
    assert all(f"<!-- {name}" in picture for name in shown)
    assert not any(f"<!-- {name}" in picture for name in possible - shown)
    assert "return link" in picture
    assert "<!-- activations, at most" in picture
    assert "<!-- gradients, at most" in picture
    assert "<!-- workspace, at most 7 B" in picture


def test_memory_of_training_visit_by_visit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the top of what is drawn is the peak that the cost model predicts, and nothing is above it."""
    tops: list[float] = []
    fill_between = Axes.fill_between

    def noted(axes: Axes, places: Any, below: Any, above: Any = 0, **look: Any) -> Any:
        tops.append(max(np.max(below), np.max(above)))
        return fill_between(axes, places, below, above, **look)

    monkeypatch.setattr(Axes, "fill_between", noted)
    for candidate in (Candidate(k=1, k_prime=1), Candidate(k=2, k_prime=1, residents=(3,), recompute=(0,))):
        tops.clear()
        (prediction,) = predict(TRAINED, [candidate])
        plots.timeline(TRAINED, candidate, tmp_path / "t.png")
        assert max(tops) * 1e6 == pytest.approx(prediction.peak_bytes)


@pytest.mark.parametrize("name", ["picture", "picture.jpg", "no/such/folder/picture.png"])
def test_a_path_that_is_no_picture(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="picture"):
        plots.timeline(samples.profile(), samples.MIXED, tmp_path / name)
    assert not list(tmp_path.iterdir())
