"""What microbatches of a group hold while they wait: against following them visit by visit."""

from __future__ import annotations

import pytest
from cost_model.test_training_cost import training_candidates, training_profiles
from hypothesis import given
from hypothesis import strategies as st

from autosp.cost_model.predict import predict
from autosp.cost_model.rounds import Rounds
from autosp.cost_model.training_memory import TrainingMemory
from autosp.errors import BudgetTooSmallError
from autosp.schedule.actions import Kind
from autosp.schedule.visits import Visit, used_up_after, visits_of
from autosp.search.space import least_bytes, rank
from autosp.search.training_space import Packs
from autosp.spec import Block, Candidate, Profile
from builders import profile, thorough, trained


def rounds_of(candidate: Candidate, measured: Profile) -> list[list[Visit]]:
    """Who comes to a streamed layer that another transfer brings than the one before waits for the others."""
    visits = measured.partition.visits
    brought_by = {layer: number for number, layers in enumerate(candidate.groups(visits)) for layer in layers}
    rounds: list[list[Visit]] = [[]]
    there = -1
    for visit in visits_of(candidate, measured.partition):
        if brought_by.get(visit.layer, there) != there:
            there = brought_by[visit.layer]
            rounds.append([])
        rounds[-1].append(visit)
    return rounds if rounds[0] else rounds[1:]


class Follower:
    """A microbatch on its way through a pass: what it holds, in bytes."""

    def __init__(self, measured: Profile, candidate: Candidate) -> None:
        parts, again = measured.partition, set(candidate.recompute)
        self._layers = parts.visits
        self._until = used_up_after(parts.visits, parts.backward)
        self._kept = [one.input_bytes if one.layer in again else one.kept_bytes for one in measured.visits]
        self._beyond = [
            max(0, one.kept_bytes - one.input_bytes) if one.layer in again else 0 for one in measured.visits
        ]
        self._there: set[int] = set()
        self._again: set[int] = set()
        self._forward = self._backward = 0

    @property
    def held(self) -> int:
        return sum(self._kept[visit] for visit in self._there) + sum(self._beyond[visit] for visit in self._again)

    def during(self, visit: Visit) -> int:
        """What it holds during its next visit."""
        mine: set[int] = set()
        if visit.kind is Kind.FORWARD:
            self._there.add(self._forward)
            self._forward += 1
        else:
            if visit.kind is Kind.BACKWARD:
                mine = {one for one, last in enumerate(self._until) if last == self._backward}
                self._backward += 1
            self._again |= mine or {one for one in self._there if self._layers[one] == visit.layer}
        during = self.held
        self._there -= mine
        self._again -= mine
        return during


def followed(measured: Profile, candidate: Candidate) -> int:
    """Activations and gradients of a group at their peak, up to the last visit.

    A gradient stays on the device until the last microbatch of its round has added its own; then as much may be under
    way as the largest layer's, nothing with one layer on the device at once.
    """
    parts, others = measured.partition, candidate.group - 1
    sizes = [layer.gradient_bytes for layer in parts.layers]
    made_by = {layer: position for position, layer in enumerate(parts.backward)}
    streamed = [size for layer, size in enumerate(sizes) if layer not in candidate.residents]
    most = max(streamed, default=0) if candidate.k > 1 else 0
    one = Follower(measured, candidate)
    leaving: list[int] = []
    peak = staying = backward = 0
    for visits in rounds_of(candidate, measured):
        before, during, makes = one.held, [], []
        for visit in visits:
            during.append(one.during(visit))
            is_last = visit.kind is Kind.BACKWARD and made_by[visit.layer] == backward
            makes.append(visit.layer if is_last else None)
            backward += visit.kind is Kind.BACKWARD
        after, waiting = one.held, sum(sizes[layer] for layer in makes if layer is not None)
        for number in range(candidate.group):
            there = 0
            for held, layer in zip(during, makes, strict=True):
                new = 0 if layer is None else sizes[layer]
                there = there + new if number == 0 else waiting
                gradients = staying + there + (new if number else 0) + sum(leaving)
                peak = max(peak, held + number * after + (others - number) * before + gradients)
                if number == others and layer is not None:  # it leaves, or stays for good
                    waiting -= new
                    there -= new
                    if layer in candidate.residents:
                        staying += new
                        continue
                    leaving.append(new)
                    while sum(leaving) > most:
                        leaving.pop(0)
    return peak


@thorough
@given(training_profiles(), st.data())
def test_no_group_takes_more_than_predicted(measured: Profile, data: st.DataObject) -> None:
    candidate = data.draw(training_candidates(measured)).model_copy(update={"offload": (), "group": 3})
    assert followed(measured, candidate) <= TrainingMemory(measured).moving_bytes(candidate)


@thorough
@given(training_profiles(), st.data())
def test_rounds_begin_where_microbatches_wait(measured: Profile, data: st.DataObject) -> None:
    candidate = data.draw(training_candidates(measured)).model_copy(update={"offload": ()})
    expected = [number for number, visits in enumerate(rounds_of(candidate, measured)) for _ in visits]
    rounds = Rounds.of(candidate, measured.partition)
    assert rounds.number.tolist() == expected
    assert rounds.first.tolist() == [expected.index(number) for number in range(expected[-1] + 1)]


def blocks_of(count: int, size: int, layer_bytes: int = 10) -> Profile:
    """Layers: one, then `count` blocks of `size`, then one. All keep 100 bytes, inputs are 5."""
    number = count * size + 2
    backward = tuple(reversed(range(number)))
    measured = trained(
        profile((layer_bytes,) * number, bytes_per_s=10.0),
        backward,
        backward_s=[2.0] * number,
        recompute_s=[1.0] * number,
        kept=[(100, 5 if (layer - 1) % size == 0 or layer in (0, number - 1) else 0) for layer in range(number)],
        return_bytes_per_s=10.0,
    )
    blocks = tuple(
        Block(path=f"blocks.{index}", layers=tuple(range(1 + index * size, 1 + (index + 1) * size)))
        for index in range(count)
    )
    parts = measured.partition.model_copy(update={"blocks": blocks})
    return measured.model_copy(update={"partition": parts, "waiting_bytes": 0})


def activations(measured: Profile, candidate: Candidate) -> int:
    there, _ = TrainingMemory(measured).curves(candidate)
    return int(there.max())


def test_a_block_that_moves_at_once_is_computed_again_by_one_microbatch_at_a_time() -> None:
    measured = blocks_of(4, 3)
    again = tuple(range(14))
    one_by_one = Candidate(k=1, k_prime=1, recompute=again, group=8)
    by_block = Candidate(k=4, k_prime=3, residents=(0,), recompute=again[1:], group=8)
    one = Candidate(k=1, k_prime=1, recompute=again)
    assert activations(measured, one) == 5 + 4 * 5 + 3 * 100 - 5  # inputs, and a block's
    assert activations(measured, one_by_one) > 7 * 2 * 100 + 3 * 100  # of a block each that waits has two layers
    # Of each that waits the inputs, and what the first layer keeps, which stays.
    assert activations(measured, by_block) == 100 + 4 * 5 + 3 * 100 - 5 + 7 * (100 + 4 * 5)


def test_where_all_stays_nobody_waits() -> None:
    measured = blocks_of(2, 2)
    everything = Candidate(k=6, k_prime=1, residents=tuple(range(6)), group=5)
    assert activations(measured, everything) == 6 * 100
    assert TrainingMemory(measured).moving_bytes(everything) == 6 * 100 + 6 * 10 + 10


def test_a_round_keeps_its_gradients() -> None:
    measured = blocks_of(2, 2)
    bare = [visit.model_copy(update={"kept_bytes": 0, "input_bytes": 0}) for visit in measured.visits]
    memory = TrainingMemory(measured.model_copy(update={"visits": tuple(bare)}))
    assert memory.moving_bytes(Candidate(k=1, k_prime=1, group=2)) == 20
    assert memory.moving_bytes(Candidate(k=3, k_prime=3, group=2)) == 30 + 10 + 10  # and one of the round before
    assert memory.moving_bytes(Candidate(k=3, k_prime=3)) == 20


def test_whole_blocks_stay_as_many_as_fit() -> None:
    measured = blocks_of(6, 3)
    packs = Packs.of(measured.partition)
    assert packs is not None
    assert packs.between == (0,)
    again = tuple(range(20))
    plan = packs.plan(2, 2, 8, again)
    assert plan.groups(measured.partition.visits)[:4] == [tuple(range(first, first + 3)) for first in (1, 7, 10, 16)]
    assert set(plan.recompute) == set(range(1, 20))
    fitting = list(packs.filled(8, again, lambda one: len(one.residents) <= 7))
    assert [(one.k - len(one.residents)) // 3 for one in fitting] == [1, 2, 3]
    assert all(len(one.residents) == 7 for one in fitting)
    assert not list(packs.filled(8, again, lambda one: False))


@pytest.mark.parametrize("sizes", [(2, 3), ()])
def test_blocks_of_unlike_length_are_no_transfers(sizes: tuple[int, ...]) -> None:
    measured = blocks_of(2, 3)
    first, second = (block.layers for block in measured.partition.blocks)
    blocks = [Block(path="a", layers=first[: sizes[0]]), Block(path="b", layers=second[: sizes[1]])] if sizes else []
    assert Packs.of(measured.partition.model_copy(update={"blocks": tuple(blocks)})) is None


def test_groups_are_tuned_by_blocks_too() -> None:
    measured = blocks_of(6, 3, 50)
    by_block = [one for one in rank(measured, 3000, group=16) if one.candidate.k_prime == 3 and one.candidate.residents]
    one_by_one = Candidate(k=1, k_prime=1, recompute=tuple(range(20)), group=16)
    assert min(one.peak_bytes for one in by_block) < predict(measured, [one_by_one])[0].peak_bytes
    assert all(0 in one.candidate.residents for one in by_block)


def test_the_least_that_works_for_a_group() -> None:
    measured = blocks_of(6, 3, 50)
    least = least_bytes(measured, 16)
    ranked = rank(measured, least, group=16)
    assert min(one.peak_bytes for one in ranked) == least
    with pytest.raises(BudgetTooSmallError, match="layers that travel together") as error:
        rank(measured, least // 2, group=16)
    assert error.value.least_bytes == least
