from __future__ import annotations

from pathlib import Path

import pytest

import report_samples as samples
from autosp.cost_model.floor import floor_s
from autosp.cost_model.predict import predict
from autosp.errors import SettingError
from autosp.report import plots
from autosp.report.units import seconds
from autosp.search.space import rank
from autosp.spec import Candidate

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


def test_a_front_has_what_was_predicted_measured_and_bounded(tmp_path: Path) -> None:
    profile = samples.profile()
    curve = [(n_bytes, floor_s(profile, n_bytes)) for n_bytes in range(10**9, 6 * 10**9, 10**8)]
    plots.front(rank(profile, 6 * 10**9), samples.trials(), curve, samples.BUDGET_BYTES, tmp_path / "f.svg")
    picture = drawn(tmp_path / "f.svg")
    for label in ("predicted", "fastest measured", "measured, over budget", "floor", "budget 4.00 GB", "ms"):
        assert f"<!-- {label} -->" in picture or f"{label} -->" in picture


def test_a_front_of_latencies_far_apart_and_of_nothing_measured(tmp_path: Path) -> None:
    said = predict(samples.profile(), [samples.WINDOW])[0]
    far = said.model_copy(update={"latency_s": 100 * said.latency_s})
    plots.front([said, far], [], [], None, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["picture", "picture.jpg", "no/such/folder/picture.png"])
def test_a_path_that_is_no_picture(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="picture"):
        plots.timeline(samples.profile(), samples.MIXED, tmp_path / name)
    assert not list(tmp_path.iterdir())
