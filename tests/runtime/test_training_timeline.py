"""On the virtual clock, a training pass takes what was predicted, span by span."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from autosp.cost_model.simulate import Costs, simulate
from autosp.devices import VirtualDevice
from autosp.schedule.actions import Kind
from autosp.schedule.training import lower_training
from autosp.spec import Candidate
from trained import PLANS, Apply, assert_same_gradients, loss_step, twins

FORWARD_S, BACKWARD_S, LOSS_S = (0.3, 0.1, 0.6), (0.5, 0.9, 0.2), 0.25


class Spend(torch.autograd.Function):
    """A product that takes virtual time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, device: VirtualDevice, number: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.device, ctx.number = device, number
        device.spend(FORWARD_S[number % 3])
        return x @ weight

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        ctx.device.spend(BACKWARD_S[ctx.number % 3])  # type: ignore[attr-defined]
        return gradient @ weight.T, x.T @ gradient, None, None


class Timed(nn.Module):
    """One layer. Its output is scaled, so that computing it again does not stop before its end."""

    def __init__(self, device: VirtualDevice, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.clock, self.number = [device], number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(Spend.apply(x, self.weight, self.clock[0], self.number))


@pytest.mark.parametrize("plan", PLANS)
def test_prediction_and_execution_are_the_same_numbers(plan: str, apply: Apply) -> None:
    torch.manual_seed(0)
    device = VirtualDevice(bytes_per_s=3e4, latency_s=0.01)
    model = nn.Sequential(*(Timed(device, number) for number in range(7))).train()
    batch = torch.linspace(-1, 1, 5 * 64).reshape(5, 64).requires_grad_()

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_step(model, batch)
        device.spend(LOSS_S)
        return loss

    streamed = apply(model, batch, PLANS[plan], step, device)
    parts = streamed._bound.partition
    wanted = PLANS[plan]
    residents = tuple(index for index in wanted.residents if index < 7)
    recompute = tuple(index for index in wanted.recompute if index < 7 and index not in residents)
    candidate = Candidate(k=wanted.k, k_prime=wanted.k_prime, residents=residents, recompute=recompute)
    assert parts.backward == (6, 5, 4, 3, 2, 1, 0)
    device.sends.clear()
    ends, sends = [], []
    for _ in range(2):
        model.zero_grad()
        begin_s = device.now_s
        step(model, batch).backward()
        ends.append(device.now_s - begin_s)
        sends.append([(start - begin_s, end - begin_s, n_bytes) for start, end, n_bytes in device.sends])
        device.sends.clear()
        device.spend(5.0)  # the update
    measured = streamed.timeline()
    costs = Costs(
        before_s=[0.0] * 7,
        forward_s=[FORWARD_S[number % 3] for number in range(7)],
        backward=parts.backward,
        before_backward_s=[LOSS_S, *[0.0] * 6],
        recompute_s=[FORWARD_S[number % 3] for number in reversed(range(7))],
        backward_s=[BACKWARD_S[number % 3] for number in reversed(range(7))],
        tail_s=0.0,
        layer_bytes=[layer.n_bytes for layer in parts.layers],
        gradient_bytes=[layer.gradient_bytes for layer in parts.layers],
        link_latency_s=0.01,
        link_bytes_per_s=3e4,
        return_latency_s=0.01,
        return_bytes_per_s=3e4,
    )
    predicted = simulate(lower_training(candidate, parts), costs, 1)
    assert ends == pytest.approx([predicted.period_ends_s[0]] * 2, rel=1e-9)
    assert all(one.end_s <= other.end_s for one, other in pairwise(predicted.of_kind(Kind.GRADIENTS)))
    returned = [(span.start_s, span.end_s) for span in predicted.of_kind(Kind.GRADIENTS)]
    for one in sends:
        assert [pytest.approx(pair, rel=1e-9) for pair in returned] == [(start, end) for start, end, _ in one]
    for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD, Kind.LOAD, Kind.GRADIENTS):
        seen = [span for span in measured.of_kind(kind) if span.period == 0]
        expected = [span for span in predicted.of_kind(kind) if not set(span.action.layers) & set(residents)]
        assert [span.action.layers for span in seen] == [span.action.layers for span in expected]
        for left, right in zip(seen, expected, strict=True):
            assert left.action.offset == right.action.offset
            assert left.start_s == pytest.approx(right.start_s, rel=1e-9)
            if kind is not Kind.BACKWARD:  # which in the executor ends once its gradients have room to leave
                assert left.end_s == pytest.approx(right.end_s, rel=1e-9)


class Linear(Timed):
    """One layer, which saves its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Spend.apply(x, self.weight, self.clock[0], self.number)


@pytest.mark.parametrize(("k", "k_prime"), [(1, 1), (3, 1), (4, 2)])
def test_activations_move_when_predicted(k: int, k_prime: int, apply: Apply) -> None:
    torch.manual_seed(0)
    device = VirtualDevice(bytes_per_s=6e4, latency_s=0.01)
    model = nn.Sequential(*(Linear(device, number) for number in range(7))).train()
    rows = 80
    batch = torch.linspace(-1, 1, rows * 64).reshape(rows, 64).requires_grad_()
    candidate = Candidate(k=k, k_prime=k_prime, offload=(1, 2, 4))

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = loss_step(model, batch)
        device.spend(LOSS_S)
        return loss

    streamed = apply(model, batch, candidate, step, device)
    parts = streamed._bound.partition
    assert parts.activation_bytes == (0, *[rows * 64 * 4] * 6)
    begin_s = device.now_s
    step(model, batch).backward()
    costs = Costs(
        before_s=[0.0] * 7,
        forward_s=[FORWARD_S[number % 3] for number in range(7)],
        backward=parts.backward,
        before_backward_s=[LOSS_S, *[0.0] * 6],
        recompute_s=[0.0] * 7,
        backward_s=[BACKWARD_S[number % 3] for number in reversed(range(7))],
        tail_s=0.0,
        layer_bytes=[layer.n_bytes for layer in parts.layers],
        gradient_bytes=[layer.gradient_bytes for layer in parts.layers],
        activation_bytes=parts.activation_bytes,
        link_latency_s=0.01,
        link_bytes_per_s=6e4,
        return_latency_s=0.01,
        return_bytes_per_s=6e4,
    )
    predicted = simulate(lower_training(candidate, parts), costs, 1)
    assert device.now_s - begin_s == pytest.approx(predicted.period_ends_s[0], rel=1e-9)
    measured = streamed.timeline()
    for kind in (Kind.SAVE, Kind.RESTORE, Kind.LOAD):
        seen, expected = measured.of_kind(kind), predicted.of_kind(kind)
        assert [span.action.layers for span in seen] == [span.action.layers for span in expected]
        for left, right in zip(seen, expected, strict=True):
            assert (left.start_s, left.end_s) == pytest.approx((right.start_s, right.end_s), rel=1e-9)


def test_the_gradients_of_a_layer_leave_as_one_and_those_of_each_microbatch_by_themselves(apply: Apply) -> None:
    """Where there are gradients already, a group's are added to them one microbatch after another."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))), torch.ones(5, 64, requires_grad=True)
    streamed = apply(model, batch, Candidate(k=1, k_prime=1), device=VirtualDevice(bytes_per_s=1e4))
    loss_step(model, batch).backward()
    streamed.backward_group([batch, batch], loss_step)
    sent = streamed.timeline().of_kind(Kind.GRADIENTS)
    whole = [span for span in sent if span.period == 0]
    assert [span.action.layers for span in whole] == [(2,), (1,), (0,)]
    assert [span.end_s - span.start_s for span in whole] == pytest.approx([(64 * 64 + 64) * 4 / 1e4] * 3)
    assert [span.action.layers for span in sent if span.period == 1] == [(2,), (2,), (1,), (1,), (0,), (0,)]


@pytest.mark.parametrize("k", [1, 2])
def test_with_one_layer_at_a_time_there_is_one_gradient_at_a_time(k: int, apply: Apply) -> None:
    """Of the second layer they take longer than the weights of the first, which is visited after it."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 1024), nn.Linear(1024, 8)), torch.ones(5, 64)
    candidate = Candidate(k=k, k_prime=1)
    streamed = apply(model, batch.requires_grad_(), candidate, device=VirtualDevice(bytes_per_s=1e4))
    loss_step(model, batch).backward()
    measured = streamed.timeline()
    begins = {span.action.layers[0]: span.start_s for span in measured.of_kind(Kind.BACKWARD)}
    gone = {span.action.layers[0]: span.end_s for span in measured.of_kind(Kind.GRADIENTS)}
    assert [begins[layer - 1] >= gone[layer] for layer in (2, 1)] == [k == 1] * 2


def test_stalls_count_backward_too(apply: Apply) -> None:
    torch.manual_seed(0)
    device = VirtualDevice(bytes_per_s=1e4)
    model = nn.Sequential(*(Timed(device, number) for number in range(4))).train()
    batch = torch.ones(5, 64, requires_grad=True)
    streamed = apply(model, batch, Candidate(k=1, k_prime=1), loss_step, device)
    loss_step(model, batch).backward()
    (visits, tail_s) = streamed.visit_times(1)[0]
    assert [visit.kind for visit in visits] == [Kind.FORWARD] * 4 + [Kind.BACKWARD] * 4
    load_s = 64 * 64 * 4 / 1e4
    assert [visit.wait_s for visit in visits] == pytest.approx([load_s] * 4 + [0.0] + [load_s] * 3)
    assert tail_s == pytest.approx(load_s)  # the last gradient


class Twice(nn.Module):
    """The second of its layers is called twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def test_two_calls_in_a_row_are_one_visit_backward(apply: Apply) -> None:
    """What follows it in the schedule does not take the layer's place between the two."""
    torch.manual_seed(0)
    model, plain = twins(Twice())
    batch = torch.ones(5, 64, requires_grad=True)
    streamed = apply(model, batch, Candidate(k=1, k_prime=1), device=VirtualDevice(bytes_per_s=1e4))
    for _ in range(2):
        loss_step(model, batch).backward()
        loss_step(plain, batch).backward()
    assert streamed.backward_visits == (2, 1, 0)
    assert (streamed.stats().misses, streamed.stats().loads) == (0, 2 * 5)
    assert_same_gradients(model, plain)
