"""Training passes predicted: by hand, as the simulator has them, and never below the floor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.answers import draw_front
from autosp.cost_model.calibrate import calibrated
from autosp.cost_model.floor import floor_s
from autosp.cost_model.predict import contended_periods, predict, with_rings
from autosp.cost_model.simulate import costs_of, simulate
from autosp.cost_model.training_memory import TrainingMemory, freed_bytes, used_up_after
from autosp.schedule.actions import Kind
from autosp.schedule.training import lower_training
from autosp.search.space import rank
from autosp.spec import BackwardProfile, Block, Candidate, Prediction, Profile, Tier, Usage
from builders import blocks, candidates, link, profile, profiles, quick, recomputed, seconds, thorough, trial


def trained(
    measured: Profile,
    backward: tuple[int, ...],
    *,
    backward_s: list[float],
    recompute_s: list[float],
    before_s: list[float] | None = None,
    kept: list[tuple[int, int]] | None = None,
    return_bytes_per_s: float = 1.0,
) -> Profile:
    """The profile, of training: all layers have gradients as large as they are. `kept`: activations and inputs."""
    parts = measured.partition
    layers = tuple(layer.model_copy(update={"gradient_bytes": layer.n_bytes}) for layer in parts.layers)
    back = link(bytes_per_s=return_bytes_per_s).model_copy(update={"source": Tier.DEVICE, "target": Tier.HOST})
    befores = before_s or [0.0] * len(backward)
    times = zip(backward, befores, recompute_s, backward_s, strict=True)
    sizes = kept or [(0, 0)] * len(parts.visits)
    least = Candidate(k=1, k_prime=1, recompute=tuple(sorted(set(backward))))
    found = measured.model_copy(
        update={
            "mode": "training",
            "partition": parts.model_copy(update={"layers": layers, "backward": backward, "repeats": 1}),
            "visits": tuple(
                visit.model_copy(update={"kept_bytes": all_of_it, "input_bytes": inputs})
                for visit, (all_of_it, inputs) in zip(measured.visits, sizes, strict=True)
            ),
            "backward": tuple(
                BackwardProfile(layer=layer, before_s=before, recompute_s=again, backward_s=own)
                for layer, before, again, own in times
            ),
            "links": (measured.link, back),
        }
    )
    found = found.model_copy(update={"least_compute_s": found.compute_s})
    (prediction,) = predict(found, [least])
    return found.model_copy(update={"observed": trial(prediction)})


# Three layers of 10 B at 10 B/s: 1 s a load, and a send. Forward 1 s, backward 2 s, 1 s to compute again.
SMALL = trained(
    profile((10, 10, 10), bytes_per_s=10.0, resident_bytes=5, workspace_bytes=7),
    (2, 1, 0),
    backward_s=[2.0] * 3,
    recompute_s=[1.0] * 3,
    kept=[(20, 4), (20, 4), (20, 4)],
    return_bytes_per_s=10.0,
)


@pytest.mark.parametrize(
    ("candidate", "expected_s"),
    [
        # Loads at 0, 2, 4; forward 1-2, 3-4, 5-6; at the turn 2 stays: 6-8; 1: load 8-9, 9-11; 0: load 11-12, 12-14.
        pytest.param(Candidate(k=1, k_prime=1), 15, id="one at a time: the last gradients leave after 14"),
        pytest.param(Candidate(k=1, k_prime=1, recompute=(1,)), 16, id="one of them computed again"),
        # Loads 0-1, 1-2, 2-3 (place of 0, free at 2); backward 4-6, 6-8, 0: load 6-7, 8-10; gradients until 11.
        pytest.param(Candidate(k=2, k_prime=1), 11, id="overlapped"),
        pytest.param(Candidate(k=3, k_prime=1, residents=(0, 1, 2)), 9, id="compute alone; gradients stay"),
    ],
)
def test_time_by_hand(candidate: Candidate, expected_s: float) -> None:
    (prediction,) = predict(SMALL, [candidate])
    assert prediction.latency_s == expected_s
    schedule = lower_training(candidate, SMALL.partition)
    timeline = simulate(schedule, costs_of(SMALL))
    assert timeline.period_ends_s == tuple(expected_s * count for count in range(1, 5))  # passes do not overlap
    assert prediction.moved_bytes == 10 * len(schedule.loads)


@pytest.mark.parametrize(
    ("candidate", "expected_bytes"),
    [
        # 5 resident, 7 workspace, an arena of 10; at the turn 60 of activations, and the first gradient.
        pytest.param(Candidate(k=1, k_prime=1), 5 + 7 + 10 + 60 + 10, id="kept"),
        # At the second: two inputs, all of the one whose backward it is, its gradient, and one that leaves.
        pytest.param(Candidate(k=1, k_prime=1, recompute=(0, 1, 2)), 5 + 7 + 10 + 8 + 16 + 20, id="recomputed"),
        # The last two are gone when the gradients of all three are there: 20 + 30. At the turn: 60 + 10.
        pytest.param(Candidate(k=3, k_prime=1, residents=(0, 1, 2)), 5 + 7 + 30 + 70, id="resident"),
    ],
)
def test_memory_by_hand(candidate: Candidate, expected_bytes: int) -> None:
    (prediction,) = predict(SMALL, [candidate])
    assert prediction.peak_bytes == expected_bytes


@pytest.mark.parametrize(
    ("layer_bytes", "backward", "residents", "expected_bytes"),
    [
        pytest.param((10, 10, 10), (2, 1, 0), (), 20, id="one leaves, one is made"),
        pytest.param((40, 10, 20, 10), (3, 2, 1, 0), (), 80, id="of those before it as many as are as large"),
        pytest.param((10, 20, 10, 40), (3, 2, 1, 0), (3,), 40 + 10 + 20, id="the largest stays, the others leave"),
        pytest.param((10, 10, 10), (2, 1), (), 20, id="the first one's comes after the last visit"),
        pytest.param((10, 10, 10), (), (), 20, id="all of them, one after another"),
        pytest.param((10, 10, 10), (2, 1), (0, 1, 2), 30, id="all stay"),
    ],
)
def test_gradients_by_hand(
    layer_bytes: tuple[int, ...], backward: tuple[int, ...], residents: tuple[int, ...], expected_bytes: int
) -> None:
    times = [1.0] * len(backward)
    measured = trained(profile(layer_bytes), backward, backward_s=times, recompute_s=times)
    assert TrainingMemory(measured).moving_bytes((), residents) == expected_bytes


def test_a_front_is_drawn_up_to_where_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations and gradients take more than the weights."""
    drawn: list[Prediction] = []
    pictures = SimpleNamespace(front=lambda profile, predictions, *_, **__: drawn.extend(predictions))
    monkeypatch.setattr("autosp.answers.load_pictures", lambda name: pictures)
    draw_front(SMALL, [], [66], None, Path("front.png"))
    assert any(not prediction.candidate.ring and not prediction.candidate.recompute for prediction in drawn)


@pytest.mark.parametrize(
    ("budget_bytes", "expected_s"),
    [
        # 9 s of compute; room of 188 for all.
        pytest.param(200, 9, id="everything fits"),
        # Room 28: 32 of 60 B must be freed, 16 B a second. Loads: 3 - 2.8, and 30 - 16 at the turn: 1.6 s.
        pytest.param(40, 11, id="two are computed again"),
        pytest.param(12, 12, id="all are"),
    ],
)
def test_floor_by_hand(budget_bytes: int, expected_s: float) -> None:
    assert floor_s(SMALL, budget_bytes) == expected_s


def test_floor_of_links() -> None:
    slow = SMALL.model_copy(update={"links": (link(bytes_per_s=0.5), SMALL.links[1])})
    assert floor_s(slow, 12) == 120  # all twice
    assert floor_s(slow, 12 + 22) == (8 + 20) / 0.5  # beside 12 B of inputs, 10 B are there at the turn
    back = SMALL.links[1].model_copy(update={"bytes_per_s": 0.1})
    assert floor_s(SMALL.model_copy(update={"links": (SMALL.links[0], back)}), 12 + 20) == 200  # half of 20 B stay


def with_blocks(measured: Profile, found: tuple[Block, ...]) -> Profile:
    """The profile, of a model that has blocks."""
    return measured.model_copy(update={"partition": measured.partition.model_copy(update={"blocks": found})})


@st.composite
def training_profiles(draw: st.DrawFn, *, contention: bool = False) -> Profile:
    """A small model that is trained on any machine."""
    measured = draw(profiles(contention=contention))
    visits = measured.partition.visits
    reverse = visits[::-1][: draw(st.integers(0, len(visits)))]
    backward = draw(st.one_of(st.just(reverse), st.lists(st.sampled_from(visits), max_size=8).map(tuple)))
    measured = with_blocks(measured, draw(blocks(visits, backward)))
    count = len(backward)
    sizes = st.tuples(st.integers(0, 40), st.integers(0, 20))
    return trained(
        measured,
        backward,
        backward_s=draw(st.lists(seconds, min_size=count, max_size=count)),
        recompute_s=draw(st.lists(seconds, min_size=count, max_size=count)),
        before_s=draw(st.lists(st.sampled_from([0.0, 0.5]), min_size=count, max_size=count)),
        kept=draw(st.lists(sizes, min_size=len(visits), max_size=len(visits))),
        return_bytes_per_s=draw(st.sampled_from([0.5, 3.0, 1000.0])),
    )


@st.composite
def training_candidates(draw: st.DrawFn, measured: Profile) -> Candidate:
    """Any setting that `autosp.plan` would accept."""
    parts = measured.partition
    return draw(candidates(parts.visits)).model_copy(update={"recompute": draw(recomputed(parts))})


@thorough
@given(training_profiles(contention=True), st.data())
def test_the_fast_predictor_and_the_simulator_agree(measured: Profile, data: st.DataObject) -> None:
    candidate = data.draw(training_candidates(measured))
    schedule = lower_training(candidate, measured.partition)
    periods = contended_periods(measured, with_rings(measured, [candidate]))
    factors = (float(one[0]) for one in (periods.compute_factor, periods.link_factor, periods.disk_factor))
    timeline = simulate(schedule, costs_of(measured).contended(*factors), periods=2)
    (prediction,) = predict(measured, [candidate])
    assert prediction.latency_s == pytest.approx(timeline.period_ends_s[0])
    assert prediction.stall_s == pytest.approx(sum(timeline.stalls_s().values()))
    assert timeline.period_ends_s[1] == pytest.approx(2 * timeline.period_ends_s[0])


@thorough
@given(training_profiles(), st.data())
def test_floor_below_any_plan_at_its_own_peak(measured: Profile, data: st.DataObject) -> None:
    (predicted,) = predict(measured, [data.draw(training_candidates(measured))])
    assert floor_s(measured, predicted.peak_bytes) <= predicted.latency_s * (1 + 1e-9)


@quick
@given(training_profiles(), st.integers(0, 200))
def test_whatever_is_ranked_fits_and_is_above_the_floor(measured: Profile, extra: int) -> None:
    budget = measured.observed.prediction.peak_bytes + extra
    ranked = rank(measured, budget)
    assert all(prediction.peak_bytes <= budget for prediction in ranked)
    assert all(floor_s(measured, budget) <= prediction.latency_s * (1 + 1e-9) for prediction in ranked)


@thorough
@given(training_profiles(), st.data())
def test_activations_by_the_action_list(measured: Profile, data: st.DataObject) -> None:
    """The peak is what following the actions one by one has it be."""
    candidate = data.draw(training_candidates(measured))
    parts = measured.partition
    until = used_up_after(parts.visits, parts.backward)
    again = set(candidate.recompute)
    block_of = {layer: set(block.layers) for block in parts.blocks for layer in block.layers}
    held = [one.input_bytes if one.layer in again else one.kept_bytes for one in measured.visits]
    anew = [max(0, one.kept_bytes - one.input_bytes) if one.layer in again else 0 for one in measured.visits]
    now = peak = backward = forward = 0
    there: set[int] = set()
    for action in lower_training(candidate, parts).actions:
        if action.kind is Kind.FORWARD:
            now += held[forward]
            forward += 1
        elif action.kind is Kind.BACKWARD:
            mine = [visit for visit, last in enumerate(until) if last == backward]
            with_it = {one for visit in mine for one in block_of.get(parts.visits[visit], ())}
            there |= {visit for visit, layer in enumerate(parts.visits) if visit in mine or layer in with_it}
            peak = max(peak, now + sum(anew[visit] for visit in there))
            now -= sum(held[visit] for visit in mine)
            there -= set(mine)
            backward += 1
        peak = max(peak, now)
    assert TrainingMemory(measured).activation_bytes(candidate.recompute) == peak


@thorough
@given(training_profiles(), st.data())
def test_gradients_as_the_executor_lets_them_go(measured: Profile, data: st.DataObject) -> None:
    """Each is sent when it is there, after the oldest of those before it beyond the largest layer's."""
    candidate = data.draw(training_candidates(measured))
    parts = measured.partition
    sizes = [layer.gradient_bytes for layer in parts.layers]
    streamed = [size for layer, size in enumerate(sizes) if layer not in candidate.residents]
    last_first = dict.fromkeys(reversed(parts.backward))
    order = [*reversed(last_first), *(layer for layer in range(len(sizes)) if layer not in last_first)]
    staying = peak = 0
    leaving: list[int] = []
    for layer in order:
        peak = max(peak, staying + sum(leaving) + sizes[layer])
        if layer in candidate.residents:
            staying += sizes[layer]
            continue
        leaving.append(sizes[layer])
        while sum(leaving) > max(streamed):
            leaving.pop(0)
    bare = [visit.model_copy(update={"kept_bytes": 0, "input_bytes": 0}) for visit in measured.visits]
    memory = TrainingMemory(measured.model_copy(update={"visits": tuple(bare)}))
    assert peak <= memory.moving_bytes((), candidate.residents)
    if len(last_first) == len(sizes):
        assert peak == memory.moving_bytes((), candidate.residents)


@pytest.mark.parametrize(
    ("visits", "backward", "expected"),
    [
        ((0, 1, 2), (2, 1, 0), [2, 1, 0]),
        ((0, 1, 2), (2, 1), [2, 1, 0]),  # the first one's until the end of the pass
        ((0, 1, 1, 1, 2), (2, 1, 0), [2, 1, 1, 1, 0]),  # neighbours are one backward visit
        ((1, 0, 1), (1, 0, 1), [2, 1, 0]),
    ],
)
def test_what_uses_activations_up(visits: tuple[int, ...], backward: tuple[int, ...], expected: list[int]) -> None:
    assert used_up_after(visits, backward) == expected


def test_a_block_by_hand() -> None:
    """Its inputs are kept, all of it is there again from its first backward visit, and one more pass of it is made."""
    block = Block(path="block", layers=(0, 1, 2))
    found = with_blocks(SMALL, (block,))
    visits = tuple(visit.model_copy(update={"input_bytes": 4 if visit.layer == 0 else 0}) for visit in found.visits)
    found = found.model_copy(update={"visits": visits})
    (kept, again) = predict(found, [Candidate(k=1, k_prime=1), Candidate(k=1, k_prime=1, recompute=(0, 1, 2))])
    # 5 resident, 7 workspace, an arena of 10; 4 of inputs and 16 + 20 + 20 beyond them, with 10 of gradients.
    assert (kept.peak_bytes, again.peak_bytes) == (5 + 7 + 10 + 60 + 10, 5 + 7 + 10 + 60 + 10)
    # As kept until 6; loads 0: 6-7, again 7-8; 1: 8-9, 9-10; 2: 10-11, again and backward 11-14; as kept from there.
    assert (kept.latency_s, again.latency_s) == (15, 15 + 3 + 3)
    assert (kept.moved_bytes, again.moved_bytes) == (50, 80)
    assert freed_bytes(found) == {(0, 1, 2): 56}


def test_what_is_computed_again_is_not_slower_compute() -> None:
    """Calibration knows that a plan which computes more takes longer for that."""
    candidate = Candidate(k=3, k_prime=1, residents=(0, 1, 2), recompute=(0, 1, 2))
    usage = Usage(stall_s=0.0, stalls=0, link_s=0.0, loads=0)
    seen = trial(predict(SMALL, [candidate])[0])
    assert seen.measurement.latency_s == 12
    seen = seen.model_copy(update={"measurement": seen.measurement.model_copy(update={"usage": usage})})
    assert calibrated(SMALL, [seen]).compute_s == pytest.approx(SMALL.compute_s)
    assert calibrated(SMALL, [seen]).return_link == SMALL.return_link
