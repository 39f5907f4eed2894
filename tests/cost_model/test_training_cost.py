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
from autosp.cost_model.training_memory import TrainingMemory, freed_bytes
from autosp.schedule.actions import Kind, Ref
from autosp.schedule.training import lower_training
from autosp.schedule.visits import used_up_after
from autosp.search.space import rank
from autosp.spec import Block, Candidate, Prediction, Profile, Usage
from builders import blocks, candidates, link, profile, profiles, quick, recomputed, seconds, thorough, trained, trial

# Three layers of 10 B at 10 B/s: 1 s a load, and a send. Forward 1 s, backward 2 s, 1 s to compute again.
SMALL = trained(
    profile((10, 10, 10), bytes_per_s=10.0, resident_bytes=5, workspace_bytes=7),
    (2, 1, 0),
    backward_s=[2.0] * 3,
    recompute_s=[1.0] * 3,
    kept=[(20, 4), (20, 4), (20, 4)],
    return_bytes_per_s=10.0,
)


KEEPING = SMALL.model_copy(update={"partition": SMALL.partition.model_copy(update={"activation_bytes": ()})})
"""The same where nothing can be offloaded."""


@pytest.mark.parametrize(
    ("candidate", "expected_s"),
    [
        # Loads at 0, 2, 4; forward 1-2, 3-4, 5-6; at the turn 2 stays: 6-8; 1: load 8-9, 9-11; 0: load 11-12, 12-14.
        pytest.param(Candidate(k=1, k_prime=1), 15, id="one at a time: the last gradients leave after 14"),
        pytest.param(Candidate(k=1, k_prime=1, recompute=(1,)), 16, id="one of them computed again"),
        # 20 B each, so 2 s each way. Forward as above; 0 leaves 2-4; at the turn 2: 6-8; it comes back 8-10 once 1 has
        # its weights at 9, so 9-11, and its own weights follow: 11-12, 12-14.
        pytest.param(Candidate(k=1, k_prime=1, offload=(0,)), 15, id="one of them offloaded"),
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
        # At the turn: three inputs, all of the last, and its gradient.
        pytest.param(Candidate(k=1, k_prime=1, recompute=(0, 1, 2)), 5 + 7 + 10 + 12 + 16 + 10, id="recomputed"),
        # At the second: two inputs, all of the one whose backward it is, its gradient, and one that leaves.
        pytest.param(Candidate(k=2, k_prime=1, recompute=(0, 1, 2)), 5 + 7 + 20 + 8 + 16 + 20, id="two at a time"),
        # The last two are gone when the gradients of all three are there: 20 + 30. At the turn: 60 + 10.
        # And an optimizer keeps twice their 30 beside them.
        pytest.param(Candidate(k=3, k_prime=1, residents=(0, 1, 2)), 5 + 7 + 30 + 70 + 60, id="resident"),
    ],
)
def test_memory_by_hand(candidate: Candidate, expected_bytes: int) -> None:
    (prediction,) = predict(SMALL, [candidate])
    assert prediction.peak_bytes == expected_bytes


def test_an_optimizers_state_is_on_the_device_beside_what_never_leaves_it() -> None:
    tied = SMALL.model_copy(update={"partition": SMALL.partition.model_copy(update={"resident_gradient_bytes": 4})})
    on_cpu = tied.model_copy(update={"device": tied.device.model_copy(update={"kind": "cpu"})})
    memories = [TrainingMemory(one) for one in (SMALL, tied, on_cpu)]
    streamed, resident = Candidate(k=1, k_prime=1), Candidate(k=2, k_prime=1, residents=(1,))
    assert [memory.state_bytes(streamed.residents) for memory in memories] == [0, 8, 0]
    assert [memory.state_bytes(resident.residents) for memory in memories] == [20, 28, 0]
    for candidate in (streamed, resident):
        without, counted = memories[2].peak_bytes(candidate, 10), memories[1].peak_bytes(candidate, 10)
        assert counted - without == memories[1].state_bytes(candidate.residents)


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
    memory = TrainingMemory(measured)
    k = len(residents) + 2
    assert memory.moving_bytes(Candidate(k=k, k_prime=1, residents=residents)) == expected_bytes
    if not residents and len(backward) == len(layer_bytes):
        assert memory.moving_bytes(Candidate(k=1, k_prime=1)) == max(layer_bytes)


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
    assert floor_s(KEEPING, budget_bytes) == expected_s


def test_floor_where_activations_may_leave() -> None:
    """As much is offloaded as makes the links' time the compute's."""
    assert floor_s(SMALL, 40) == 9  # 32 B each way at 10 B/s beside 1.6 s of loads and of gradients
    back = SMALL.links[1].model_copy(update={"bytes_per_s": 4.0})
    # 16 B of gradients; 22.4 B of activations leave: 38.4 B at 4 B/s, and 9.6 B are freed by computing 0.6 s more.
    assert floor_s(SMALL.model_copy(update={"links": (SMALL.links[0], back)}), 40) == pytest.approx(9.6)


def test_floor_of_links() -> None:
    slow = KEEPING.model_copy(update={"links": (link(bytes_per_s=0.5), SMALL.links[1])})
    assert floor_s(slow, 12) == 120  # all twice
    assert floor_s(slow, 12 + 22) == (8 + 20) / 0.5  # beside 12 B of inputs, 10 B are there at the turn
    back = SMALL.links[1].model_copy(update={"bytes_per_s": 0.1})
    assert floor_s(KEEPING.model_copy(update={"links": (SMALL.links[0], back)}), 12 + 20) == 200  # half of 20 B stay


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
    found = trained(
        measured,
        backward,
        backward_s=draw(st.lists(seconds, min_size=count, max_size=count)),
        recompute_s=draw(st.lists(seconds, min_size=count, max_size=count)),
        before_s=draw(st.lists(st.sampled_from([0.0, 0.5]), min_size=count, max_size=count)),
        kept=draw(st.lists(sizes, min_size=len(visits), max_size=len(visits))),
        return_bytes_per_s=draw(st.sampled_from([0.5, 3.0, 1000.0])),
    )
    return found.model_copy(update={"waiting_bytes": draw(st.integers(0, 5))})


@st.composite
def training_candidates(draw: st.DrawFn, measured: Profile) -> Candidate:
    """Any setting that `autosp.plan` would accept."""
    parts = measured.partition
    again = draw(recomputed(parts))
    candidate = draw(candidates(parts.visits))
    left = [layer for layer in dict.fromkeys(parts.backward) if layer not in (*again, *candidate.residents)]
    away = draw(st.lists(st.sampled_from(left), unique=True)) if left else []
    chosen = {"recompute": again, "offload": tuple(sorted(away)), "group": draw(st.sampled_from((1, 3)))}
    return candidate.model_copy(update=chosen)


@thorough
@given(training_profiles(contention=True), st.data())
def test_the_fast_predictor_and_the_simulator_agree(measured: Profile, data: st.DataObject) -> None:
    candidate = data.draw(training_candidates(measured))
    schedule = lower_training(candidate, measured.partition)
    periods = contended_periods(measured, with_rings(measured, [candidate]))
    factors = (float(one[0]) for one in (periods.compute_factor, periods.link_factor, periods.disk_factor))
    timeline = simulate(schedule, costs_of(measured, candidate.group).contended(*factors), periods=2)
    (prediction,) = predict(measured, [candidate])
    assert prediction.latency_s == pytest.approx(timeline.period_ends_s[0])
    assert prediction.stall_s == pytest.approx(sum(timeline.stalls_s().values()))
    assert timeline.period_ends_s[1] == pytest.approx(2 * timeline.period_ends_s[0])


@thorough
@given(training_profiles(), st.data())
def test_floor_below_any_plan_at_its_own_peak(measured: Profile, data: st.DataObject) -> None:
    (predicted,) = predict(measured, [data.draw(training_candidates(measured))])
    floor = floor_s(measured, predicted.peak_bytes, group=predicted.candidate.group)
    assert floor <= predicted.latency_s * (1 + 1e-9)


def test_activations_are_offloaded_where_that_is_faster() -> None:
    """Eight layers of 20 B of activations, 5 or 6 of which may stay; computing one of them again takes 30 s."""
    measured = trained(
        profile((10,) * 8, bytes_per_s=10.0, resident_bytes=5, workspace_bytes=7),
        tuple(reversed(range(8))),
        backward_s=[2.0] * 8,
        recompute_s=[30.0] * 8,
        kept=[(20, 4)] * 8,
        return_bytes_per_s=10.0,
    )
    best = rank(measured, 5 + 7 + 20 + 10 + 110)[0]
    assert best.candidate.offload and not best.candidate.recompute
    on_cpu = measured.model_copy(update={"device": measured.device.model_copy(update={"kind": "cpu"})})
    assert not any(one.candidate.offload for one in rank(on_cpu, 10**7))


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


def with_memory_of_activations_only(measured: Profile, *, kept: bool) -> Profile:
    """Without gradients; not `kept`: without activations too."""
    parts = measured.partition
    layers = tuple(layer.model_copy(update={"gradient_bytes": 0}) for layer in parts.layers)
    parts = parts.model_copy(update={"layers": layers})
    if kept:
        return measured.model_copy(update={"partition": parts})
    nothing = {"kept_bytes": 0, "input_bytes": 0}
    visits = tuple(visit.model_copy(update=nothing) for visit in measured.visits)
    parts = parts.model_copy(update={"activation_bytes": (0,) * len(visits)})
    return measured.model_copy(update={"partition": parts, "visits": visits})


@thorough
@given(training_profiles(), st.data())
def test_what_is_away_by_the_action_list(measured: Profile, data: st.DataObject) -> None:
    """No more is on the device than predicted: it may come back later than it might in any ring. Also beside blocks.

    Of a group, for which something is away, each microbatch is taken to hold what the visiting one does.
    """
    candidate = data.draw(training_candidates(measured))
    if not candidate.offload:
        candidate = candidate.model_copy(update={"group": 1})
    parts, group, again = measured.partition, candidate.group, set(candidate.recompute)
    until = used_up_after(parts.visits, parts.backward)
    assert parts.activation_bytes == tuple(one.kept_bytes for one in measured.visits)
    kept = [group * (one.input_bytes if one.layer in again else one.kept_bytes) for one in measured.visits]
    block_of = {layer: set(block.layers) for block in parts.blocks for layer in block.layers}
    anew = [
        max(0, one.kept_bytes - one.input_bytes) * (group if one.layer in block_of else 1) if one.layer in again else 0
        for one in measured.visits
    ]
    there: dict[int, int] = {}
    there_again: set[int] = set()
    leaving: list[tuple[Ref, int]] = []
    visit_of: dict[Ref, int] = {}
    peak = backward = forward = 0
    for action in lower_training(candidate, parts).actions:
        if action.kind in (Kind.FORWARD, Kind.BACKWARD):
            while any(ref in action.waits for ref, _ in leaving):
                del there[leaving.pop(0)[1]]
        if action.kind is Kind.FORWARD:
            there[forward] = kept[forward]
            forward += 1
        elif action.kind is Kind.SAVE:
            visit_of[action.ref] = forward - 1
            leaving.append((action.ref, forward - 1))
        elif action.kind is Kind.RESTORE:
            brought = [visit_of[ref] for ref in action.waits if ref.kind is Kind.SAVE]
            leaving = [one for one in leaving if one[1] not in brought]
            there.update((visit, kept[visit]) for visit in brought)
        elif action.kind is Kind.BACKWARD:
            mine = [visit for visit, last in enumerate(until) if last == backward]
            with_it = {one for visit in mine for one in block_of.get(parts.visits[visit], ())}
            there_again |= {visit for visit, layer in enumerate(parts.visits) if visit in mine or layer in with_it}
        peak = max(peak, sum(there.values()) + sum(anew[visit] for visit in there_again))
        if action.kind is Kind.BACKWARD:
            there_again -= set(mine)
            there = {visit: n_bytes for visit, n_bytes in there.items() if until[visit] != backward}
            backward += 1
    whole, bare = (with_memory_of_activations_only(measured, kept=one) for one in (True, False))
    predicted = TrainingMemory(whole).peak_bytes(candidate, 0) - TrainingMemory(bare).peak_bytes(candidate, 0)
    assert peak <= predicted <= TrainingMemory(whole).activation_bytes(candidate.recompute, group)


def test_where_host_memory_is_the_devices_nothing_is_away() -> None:
    on_cpu = SMALL.model_copy(update={"device": SMALL.device.model_copy(update={"kind": "cpu"})})
    on_gpu = SMALL.model_copy(update={"device": SMALL.device.model_copy(update={"kind": "cuda"})})
    away, kept = Candidate(k=1, k_prime=1, offload=(0, 1)), Candidate(k=1, k_prime=1)
    peaks = {
        kind: [one.peak_bytes for one in predict(of, [away, kept])] for kind, of in (("cpu", on_cpu), ("gpu", on_gpu))
    }
    assert peaks["cpu"][0] == peaks["cpu"][1]
    assert peaks["gpu"][0] == peaks["gpu"][1] - 20  # at the turn that of 1 is back already
    assert [one.offloaded_bytes for one in predict(on_gpu, [away, kept])] == [40, 0]


@thorough
@given(training_profiles(), st.data())
def test_gradients_as_the_executor_lets_them_go(measured: Profile, data: st.DataObject) -> None:
    """Each is sent when it is there, after the oldest of those before it beyond the largest layer's.

    With one layer on the device at once it has left before the next one's backward begins.
    """
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
        while sum(leaving) > (max(streamed) if candidate.k > 1 or layer not in last_first else 0):
            leaving.pop(0)
    bare = [visit.model_copy(update={"kept_bytes": 0, "input_bytes": 0}) for visit in measured.visits]
    memory = TrainingMemory(measured.model_copy(update={"visits": tuple(bare)}))
    expected = memory.moving_bytes(Candidate(k=candidate.k, k_prime=1, residents=candidate.residents))
    assert peak <= expected
    if len(last_first) == len(sizes):
        assert peak == expected


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
