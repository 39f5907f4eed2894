"""Blocks in plans of training: what computing one again frees and costs is measured, and the tuner uses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.cost_model.predict import predict
from autosp.spec import Candidate
from trained import assert_same_gradients

ROWS, WIDTH, BLOCKS = 1024, 64, 7
INPUT_BYTES = 4 * ROWS * WIDTH


class Wide(nn.Module):
    """A block that keeps much between its two layers: eight times its input, twice, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8 * WIDTH)
        self.down = nn.Linear(8 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(torch.tanh(self.up(x))))


def wide() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Wide() for _ in range(BLOCKS))).train(), torch.randn(ROWS, WIDTH)


def loss_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def peak_of(recompute: int, residents: int = 0) -> tuple[int, Candidate]:
    model, batch = wide()
    setting = {"k": max(2, residents), "k_prime": 1, "residents": residents, "recompute": recompute}
    plan = autosp.plan(model, batch, mode="training", step=loss_step, device="cpu", **setting)
    streamed = autosp.apply(model, plan)
    for _ in range(3):
        model.zero_grad()
        loss_step(model, batch).backward()
    streamed.remove()
    return streamed.stats().peak_bytes, plan.candidate


@pytest.fixture(scope="module")
def profiled() -> autosp.Profile:
    model, batch = wide()
    return autosp.profile(model, batch, mode="training", step=loss_step, device="cpu", progress=False)


def test_a_profile_counts_what_a_block_keeps_between_its_layers(profiled: autosp.Profile) -> None:
    parts = profiled.partition
    assert [block.layers for block in parts.blocks] == [(2 * one + 1, 2 * one + 2) for one in range(BLOCKS)]
    assert parts.recomputable == tuple(block.layers for block in parts.blocks)  # the first layer needs no weights
    figures = {visit.layer: (visit.kept_bytes, visit.input_bytes) for visit in profiled.visits}
    assert [figures[up] for up, _ in parts.recomputable] == [(17 * INPUT_BYTES, INPUT_BYTES)] * BLOCKS
    of_the_loss = (INPUT_BYTES, INPUT_BYTES)  # what is saved behind the last layer goes with that
    assert [figures[down] for _, down in parts.recomputable] == [(0, 0)] * (BLOCKS - 1) + [of_the_loss]
    assert all(visit.recompute_s > 0 and visit.backward_s > 0 for visit in profiled.backward)


@pytest.mark.parametrize("residents", [0, 2 * BLOCKS + 1])
def test_what_a_block_keeps_is_freed(residents: int, profiled: autosp.Profile) -> None:
    """Whatever of it is resident."""
    kept, again = peak_of(0, residents), peak_of(BLOCKS, residents)
    freed = 16 * INPUT_BYTES * (BLOCKS - 1)  # the last one's are there again at once
    predicted = predict(profiled, [kept[1], again[1]])
    assert predicted[0].peak_bytes - predicted[1].peak_bytes == pytest.approx(freed, rel=0.02)  # and a gradient more
    assert kept[0] - again[0] == pytest.approx(freed, rel=0.25)  # two peaks, with the noise of two heaps


def test_the_tuner_computes_blocks_again_where_that_fits(profiled: autosp.Profile) -> None:
    model, batch = wide()
    twin = copy.deepcopy(model)
    all_kept = min(one.peak_bytes for one in autosp.estimate(profiled, "1GB") if not one.candidate.recompute)
    budget_bytes = all_kept - 4 * INPUT_BYTES
    plan = autosp.tune(model, batch, f"{budget_bytes}B", mode="training", step=loss_step, device="cpu", progress=False)
    again = {*plan.candidate.recompute}
    assert again
    assert all(again.issuperset(block.layers) or again.isdisjoint(block.layers) for block in plan.partition.blocks)
    assert plan.measurement is not None and plan.measurement.peak_bytes <= budget_bytes
    assert plan.measurement.misses == 0
    assert autosp.Plan.model_validate_json(plan.model_dump_json()) == plan
    with autosp.apply(model, plan):
        for one in (model, twin):
            loss_step(one, batch).backward()
        assert_same_gradients(model, twin)
    assert equal(dict(model.state_dict()), dict(twin.state_dict()))
