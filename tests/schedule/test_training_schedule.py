"""Training passes as action lists: small ones checked by hand, random ones by what must hold for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.simulate import costs_of, simulate
from autosp.schedule.actions import COMPUTES, Kind, Schedule, parse
from autosp.schedule.lowering import lower_for
from autosp.schedule.offload import restores
from autosp.schedule.training import lower_training
from autosp.schedule.updates import with_updates
from autosp.schedule.validate import validate
from autosp.spec import Block, Candidate, Partition
from builders import blocks, candidates, orders, partition, profile, recomputed, sizes, thorough


def trained(layer_bytes: tuple[int, ...], visits: tuple[int, ...], backward: tuple[int, ...]) -> Partition:
    """A model all of whose layers have gradients."""
    parts = partition(layer_bytes, visits)
    layers = tuple(layer.model_copy(update={"gradient_bytes": layer.n_bytes}) for layer in parts.layers)
    return parts.model_copy(update={"layers": layers, "backward": backward})


BY_HAND = {
    "one layer at a time": (
        # At the turn layer 2 stays; layer 0 needs no weights backward. While 1 comes back, the gradients of 2 leave.
        # The next pass begins anew.
        Candidate(k=1, k_prime=1),
        """\
        arena=10 residents=-

        0L0@0[-1E1] 0F0[0L0] 0E0[0F0] 1L0@0[0E0] 1F0[1L0] 1E0[1F0] 2L0@0[1E0] 2F0[2L0]
        2B0[2L0] 2G0[2B0] 2E0[2B0] 1L1@0[2E0] 1B0[1L1,2G0] 0G0[1B0] 1G0[1B0] 1E1[1B0]""",
    ),
    "sliding window, one recomputed": (
        # 0 and 2 share address 0, 1 is at address 10. Layers 1 and 2 are there at the turn: no load in between.
        Candidate(k=2, k_prime=1, recompute=(1,)),
        """\
        arena=20 residents=-

        0L0@0[-2E0] 1L0@10[-1E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0[1L0] 2F0[2L0]
        2B0[2L0] 2G0[2B0] 1C0[1L0] 1B0[1L0,1C0] 0G0[1B0] 1G0[1B0] 1E0[1B0] 2E0[2B0]""",
    ),
    "activations of two offloaded": (
        # They leave after their forwards and come back in the order of need, here at the turn: the ring is as deep.
        Candidate(k=2, k_prime=1, offload=(1, 2)),
        """\
        arena=20 residents=-

        0L0@0[-2E0] 1L0@10[-1E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0[1L0] 1O0[1F0] 2F0[2L0] 2O0[2F0] 2I0[2F0,2O0]
        1I0[2F0,1O0]
        2B0[2L0,2I0] 2G0[2B0] 1B0[1L0,1I0] 0G0[1B0] 1G0[1B0] 1E0[1B0] 2E0[2B0]""",
    ),
    "a resident": (
        # It needs no load, and its gradients stay.
        Candidate(k=2, k_prime=1, residents=(1,)),
        """\
        arena=10 residents=1

        0L0@0[-2E0] 0F0[0L0] 0E0[0F0] 2L0@0[0E0] 1F0 2F0[2L0]
        2B0[2L0] 2G0[2B0] 1B0 0G0[1B0] 2E0[2B0]""",
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    candidate, expected = BY_HAND[name]
    parts = trained((10, 10, 10), (0, 1, 2), (2, 1))
    schedule = lower_for("training", candidate, parts)
    head, cold, *body = expected.replace("        ", "").split("\n")
    assert str(schedule) == "\n".join([head, cold, " ".join(" ".join(body).split())])
    assert schedule.recomputed == set(candidate.recompute)
    assert schedule.offloaded == set(candidate.offload)
    assert schedule.waits_for_gradients == (candidate.k == 1)
    validate(schedule, (10, 10, 10))


@pytest.mark.parametrize(
    ("k", "actions"),
    [
        pytest.param(
            1,  # 1 and 2 are loaded to compute the block again; 2 stays for its backward, 1 is loaded once more
            "3B0[3L0] 3G0[3B0] 3E0[3B0] 1L1@0[3E0] 1C0[1L1,3G0] 1E1[1C0] 2L1@0[1E1] 2C0[2L1] 2B0[2L1,2C0] 2G0[2B0]"
            " 2E1[2B0] 1L2@0[2E1] 1B0[1L2,2G0,1C0] 0G0[1B0] 1G0[1B0] 1E2[1B0]",
            id="a ring of one",
        ),
        pytest.param(
            3,  # the block is there at the turn, but for layer 0, whose place 3 has: no load
            "3B0[3L0] 3G0[3B0] 1C0[1L0] 2C0[2L0] 2B0[2L0,2C0] 2G0[2B0] 1B0[1L0,3G0,1C0] 0G0[1B0] 1G0[1B0]"
            " 1E0[1B0] 2E0[2B0] 3E0[3B0]",
            id="a ring that holds the block",
        ),
    ],
)
def test_a_block_by_hand(k: int, actions: str) -> None:
    parts = trained((10, 10, 10, 10), (0, 1, 2, 3), (3, 2, 1))
    parts = parts.model_copy(update={"blocks": (Block(path="block", layers=(1, 2)),)})
    schedule = lower_training(Candidate(k=k, k_prime=1, recompute=(1, 2)), parts)
    assert str(schedule).endswith(f"3F0[3L0] {actions}")
    validate(schedule, (10,) * 4)
    with pytest.raises(ValueError, match="some layers of block block are recomputed, and others are not"):
        lower_training(Candidate(k=k, k_prime=1, recompute=(2,)), parts)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Candidate, Partition]:
    """Any candidate for any small model; its backward needs some of the visited layers, in any order."""
    layer_bytes = tuple(draw(st.lists(sizes, min_size=1, max_size=8)))
    visits = draw(orders(len(layer_bytes)))
    reverse = visits[::-1][: draw(st.integers(0, len(visits)))]
    backward = draw(st.one_of(st.just(reverse), st.lists(st.sampled_from(visits), max_size=10).map(tuple)))
    saved = tuple(draw(st.lists(st.integers(0, 40), min_size=len(visits), max_size=len(visits))))
    parts = trained(layer_bytes, visits, backward)
    parts = parts.model_copy(update={"blocks": draw(blocks(visits, backward)), "activation_bytes": saved})
    again = draw(recomputed(parts))
    candidate = draw(candidates(visits))
    left = [layer for layer in dict.fromkeys(backward) if layer not in (*again, *candidate.residents)]
    away = draw(st.lists(st.sampled_from(left), unique=True)) if left else []
    return candidate.model_copy(update={"recompute": again, "offload": tuple(sorted(away))}), parts


def layer_bytes_of(parts: Partition) -> tuple[int, ...]:
    return tuple(layer.n_bytes for layer in parts.layers)


def visits_of(schedule: Schedule, kind: Kind) -> list[int]:
    return [action.layers[0] for action in schedule.actions if action.kind is kind]


@thorough
@given(cases())
def test_every_schedule_is_valid_and_round_trips(case: tuple[Candidate, Partition]) -> None:
    candidate, parts = case
    schedule = lower_training(candidate, parts)
    validate(schedule, layer_bytes_of(parts))
    assert parse(str(schedule)) == schedule
    assert schedule.cold == ()
    assert tuple(visits_of(schedule, Kind.FORWARD)) == parts.visits
    assert tuple(visits_of(schedule, Kind.BACKWARD)) == parts.backward
    last = {block.layers[-1]: block.layers for block in parts.blocks}
    others = {layer for block in parts.blocks for layer in block.layers[:-1]}
    again = [layer for layer in parts.backward if layer in candidate.recompute and layer not in others]
    assert visits_of(schedule, Kind.RECOMPUTE) == [one for layer in again for one in last.get(layer, (layer,))]


@thorough
@given(cases())
def test_gradients_leave_once_after_the_last_use(case: tuple[Candidate, Partition]) -> None:
    candidate, parts = case
    schedule = lower_training(candidate, parts)
    sent = visits_of(schedule, Kind.GRADIENTS)
    assert sorted(sent) == [layer.index for layer in parts.layers if layer.index not in candidate.residents]
    for position, action in enumerate(schedule.actions):
        if action.kind is Kind.GRADIENTS:
            later = schedule.actions[position:]
            assert not any(one.kind in COMPUTES and one.layers == action.layers for one in later)


@thorough
@given(st.data(), st.integers(1, 8), sizes, st.integers(1, 3))
def test_weights_are_loaded_twice_but_for_the_turn(data: st.DataObject, count: int, n_bytes: int, k_prime: int) -> None:
    """Of like layers: 2 W - W_turn bytes, with as many groups at the turn as the ring holds."""
    k = data.draw(st.integers(min(k_prime, count), count))
    k_prime = min(k_prime, k)
    order = tuple(range(count))
    parts = trained((n_bytes,) * count, order, order[::-1])
    schedule = lower_training(Candidate(k=k, k_prime=k_prime), parts)
    groups = -(-count // k_prime)
    stay = min(groups, max(1, k // k_prime))
    assert len(schedule.loads) == 2 * groups - stay


@thorough
@given(cases())
def test_never_more_loads_than_visits(case: tuple[Candidate, Partition]) -> None:
    candidate, parts = case
    schedule = lower_training(candidate, parts)
    for group in candidate.groups(parts.visits):
        uses = sum(layer in group for layer in (*parts.visits, *parts.backward))
        assert sum(action.layers == group for action in schedule.loads) <= uses


def test_what_cannot_be_trained_is_refused() -> None:
    parts = trained((10, 10), (0, 1), (1,))
    with pytest.raises(ValueError, match="rest on disk"):
        lower_training(Candidate(k=1, k_prime=1, on_disk=(0,), read_ahead=1), parts)
    with pytest.raises(ValueError, match="recomputed"):
        lower_training(Candidate(k=1, k_prime=1, recompute=(0,)), parts)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1B0[1L0,1C0]", "1B0[1L0]", "1B0 does not wait for 1C0, which brings its activations"),
        ("1B0[1L0,1C0]", "1B0[1C0]", "1B0 does not wait for 1L0"),
        ("2G0[2B0]", "2G0[2L0]", "2G0 waits for nothing that computes them"),
        ("2B0[2L0] 2G0[2B0]", "2E1[2F0] 2B0[2L0] 2G0[2B0]", "2B0 runs without its weights"),
    ],
)
def test_a_wrong_schedule_is_named(old: str, new: str, message: str) -> None:
    candidate, _ = BY_HAND["sliding window, one recomputed"]
    text = str(lower_training(candidate, trained((10, 10, 10), (0, 1, 2), (2, 1))))
    assert old in text
    with pytest.raises(ValueError, match=message):
        validate(parse(text.replace(old, new)), (10, 10, 10))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1O0[1F0]", "1O0[0F0]", "1O0 does not wait for the forward that makes what it sends"),
        ("1I0[2F0,1O0]", "1I0[2F0,2O0]", "1I0 waits for no save of its layer"),
        ("1B0[1L0,1I0]", "1B0[1L0]", "1B0 does not wait for 1I0"),
        ("1I0[2F0,1O0]", "", "1B0 waits for 1I0, which comes later or never"),
    ],
)
def test_activations_that_are_not_there_are_named(old: str, new: str, message: str) -> None:
    candidate, _ = BY_HAND["activations of two offloaded"]
    text = str(lower_training(candidate, trained((10, 10, 10), (0, 1, 2), (2, 1))))
    assert old in text
    with pytest.raises(ValueError, match=message):
        validate(parse(text.replace(old, new, 1)), (10, 10, 10))


def test_what_comes_back_is_held_back_by_its_bytes() -> None:
    """A ring of all layers could bring everything at the turn; two of the largest visits' bytes may be there."""
    parts = trained((10,) * 5, tuple(range(5)), (4, 3, 2, 1, 0))
    parts = parts.model_copy(update={"activation_bytes": (8, 8, 2, 2, 2)})
    candidate = Candidate(k=5, k_prime=1, offload=(0, 1, 2, 3, 4))
    found = [(one.after, one.before, one.n_bytes) for one in restores(candidate, parts)]
    # 2 + 2 + 2 + 8 are 14 of 16 bytes; the last waits until the backwards of 4, 3 and 2 are over: 8 + 8.
    assert found == [(4, 5, 2), (4, 6, 2), (4, 7, 2), (4, 8, 8), (7, 9, 8)]


def test_updates_by_hand() -> None:
    """Two layers a load: it waits for both. Layer 0 stays, so step() itself updates it."""
    schedule = with_updates(
        lower_training(Candidate(k=3, k_prime=2, residents=(0,)), trained((10, 10, 10), (0, 1, 2), (2, 1)))
    )
    assert str(schedule) == "\n".join(
        [
            "arena=20 residents=0",
            "",
            "1+2L0@0[-1+2E0,-1S0,-2S0] 0F0 1F0[1+2L0] 2F0[1+2L0] 2B0[1+2L0] 2G0[2B0] 1B0[1+2L0] 1G0[1B0] 1+2E0[1B0]"
            " 1S0[1B0,1G0] 2S0[1B0,1G0]",
        ]
    )
    assert schedule.steps == (1, 2)
    validate(schedule, (10, 10, 10))


@thorough
@given(cases())
def test_every_schedule_with_updates_is_valid_and_round_trips(case: tuple[Candidate, Partition]) -> None:
    candidate, parts = case
    plain = lower_training(candidate, parts)
    schedule = with_updates(plain)
    validate(schedule, layer_bytes_of(parts))
    assert parse(str(schedule)) == schedule
    assert sorted(schedule.steps) == sorted(one.layers[0] for one in plain.actions if one.kind is Kind.GRADIENTS)
    assert [str(one.ref) for one in plain.actions] == [str(one.ref) for one in schedule.actions[: len(plain.actions)]]


def test_without_gradients_there_are_no_updates() -> None:
    schedule = lower_training(Candidate(k=1, k_prime=1), partition((10, 10)))
    assert with_updates(schedule) == schedule


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0L0@0[-1E1,-0S0]", "0L0@0[-1E1]", "0L0 does not wait for -0S0, which updates its weights"),
        ("1S0[1B0,1G0]", "1S0[1B0,2G0]", "1S0 does not wait for 1G0, the last gradients"),
    ],
)
def test_a_wrong_update_is_named(old: str, new: str, message: str) -> None:
    text = str(with_updates(lower_training(Candidate(k=1, k_prime=1), trained((10, 10, 10), (0, 1, 2), (2, 1)))))
    assert old in text
    with pytest.raises(ValueError, match=message):
        validate(parse(text.replace(old, new)), (10, 10, 10))


def test_updates_run_on_paper() -> None:
    costs = costs_of(profile((10, 10, 10), bytes_per_s=10.0))
    costs = replace(costs, before_backward_s=[0.0] * 3, backward_s=[2.0] * 3, gradient_bytes=[10] * 3)
    schedule = with_updates(lower_training(Candidate(k=1, k_prime=1), trained((10, 10, 10), (0, 1, 2), (2, 1, 0))))
    timeline = simulate(schedule, costs)
    spans = {(span.period, str(span.action.ref)): span for span in timeline.spans}
    assert spans[1, "0L0"].start_s >= spans[0, "0S0"].end_s >= spans[0, "0G0"].end_s
