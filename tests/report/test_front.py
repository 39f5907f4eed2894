from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

import report_samples as samples
from autosp.cost_model.floor import floor_s
from autosp.cost_model.predict import predict
from autosp.errors import SettingError
from autosp.report.front import front, pareto
from autosp.search.space import rank
from autosp.spec import Prediction
from builders import thorough

BUDGETS = (samples.BUDGET_BYTES, 6_000_000_000)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[float, float]]]:
    """Label -> points of every line that is drawn."""
    drawn: dict[str, list[tuple[float, float]]] = {}

    def noted(name: str) -> None:
        draw = getattr(Axes, name)

        def note(axes: Axes, x: list[float], y: list[float], *arguments: object, **options: object) -> object:
            drawn[str(options.get("label"))] = list(zip(x, y, strict=True))
            return draw(axes, x, y, *arguments, **options)

        monkeypatch.setattr(Axes, name, note)

    noted("plot")
    noted("step")
    return drawn


def test_a_front_has_what_was_predicted_measured_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "f.svg"
    front(samples.profile(), rank(samples.profile(), BUDGETS[1]), samples.trials(), BUDGETS, path, chosen=samples.MIXED)
    picture = path.read_text(encoding="utf-8")
    for label in (
        "chosen plan, measured: 400 ms",
        "least-memory plan, observed: 1.00 s",
        "predicted end of a validated setting",
        "measured",
        "measured, over budget",
        "floor: the least time under a budget",
        "Pareto-optimal predictions",
        "budget 4.00 GB",
        "budget 6.00 GB",
        "latency of a pass, ms",
        "peak device memory, or budget, GB",
    ):
        assert f"<!-- {label} -->" in picture, label
    assert "predicted settings" in picture
    assert "Net, chosen: k=6 k'=1 residents=4" in picture


def test_the_floor_is_drawn_over_all_budgets(tmp_path: Path, lines: dict[str, list[tuple[float, float]]]) -> None:
    profile = samples.profile()
    front(profile, rank(profile, BUDGETS[1]), samples.trials(), BUDGETS, tmp_path / "f.png")
    floor = lines["floor: the least time under a budget"]
    assert floor[0][0] < 0.5 < 6 < floor[-1][0]  # from the observed least-memory plan to the largest budget
    for gigabytes, milliseconds in floor[:: len(floor) // 7]:
        assert milliseconds == pytest.approx(1e3 * floor_s(profile, round(gigabytes * 1e9)))
    assert floor[0][1] > floor[-1][1]


def test_the_line_goes_through_the_best_predictions(
    tmp_path: Path, lines: dict[str, list[tuple[float, float]]]
) -> None:
    (near,) = predict(samples.profile(), [samples.WINDOW])
    worse = near.model_copy(update={"peak_bytes": near.peak_bytes + 10**9})
    better = worse.model_copy(update={"latency_s": near.latency_s / 2})
    front(samples.profile(), [better, worse, near], [], [], tmp_path / "f.png")
    assert lines["Pareto-optimal predictions"] == [
        pytest.approx((one.peak_bytes / 1e9, one.latency_s * 1e3)) for one in (near, better)
    ]


@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_a_front_of_little(factor: float, tmp_path: Path) -> None:
    """Equal latencies, latencies far apart, nothing predicted."""
    (said,) = predict(samples.profile(), [samples.WINDOW])
    far = said.model_copy(update={"latency_s": factor * said.latency_s})
    predictions: list[list[Prediction]] = [[said, far], []]
    for number, some in enumerate(predictions):
        front(samples.profile(), some, [], [], tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_a_path_that_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="picture"):
        front(samples.profile(), [], [], [], tmp_path / "front.gif")


def test_pareto_by_hand() -> None:
    assert pareto([(3, 1), (1, 5), (2, 5), (2, 2), (4, 1), (1, 6)]) == [(1, 5), (2, 2), (3, 1)]
    assert pareto([]) == []


@thorough
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_pareto_keeps_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    best = pareto(points)
    assert set(best) == {
        one for one in points if not any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)
    }
    assert best == sorted(best)
