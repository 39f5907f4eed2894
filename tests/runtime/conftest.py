"""A model under each of two plans: one layer at a time, and a ring beside residents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

import autosp

SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]


@pytest.fixture(params=SETTINGS)
def stream(request: pytest.FixtureRequest) -> Iterator[Callable[..., autosp.StreamedModel[nn.Module]]]:
    """Plans for a batch and applies, on a CPU; removed at the end."""
    applied: list[autosp.StreamedModel[nn.Module]] = []

    def make_it(model: nn.Module, batch: Any) -> autosp.StreamedModel[nn.Module]:
        plan = autosp.plan(model, batch, device="cpu", **request.param)
        applied.append(autosp.apply(model, plan))
        return applied[-1]

    yield make_it
    for streamed in applied:
        streamed.remove()
