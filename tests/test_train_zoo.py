"""A sample of the zoo that is trained, one model type per kind, through the functions of `studies/train_zoo.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from train_zoo import SETTINGS, report, summary
from train_zoo_checks import examine
from zoo import Row
from zoo_models import NotBuiltError, Specimen, build

SAMPLE = {
    "gpt2": "decoder",
    "t5": "encoder-decoder with a shared embedding",
    "vit": "vision",
    "resnet": "convolutions with BatchNorm",
    "mixtral": "mixture of experts",
    "albert": "one layer run again and again",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only get slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_gradients_and_weights_of_plain_training(model_type: str) -> None:
    finding = examine(build(model_type))
    assert finding.problems == ()
    assert finding.remarks == ()
    assert [outcome.setting for outcome in finding.outcomes] == list(SETTINGS)
    assert all(outcome.gradients_equal and outcome.weights_equal for outcome in finding.outcomes)
    assert all(outcome.loads > 10 for outcome in finding.outcomes)
    assert finding.backward_layers >= 5


class Blend(nn.Module):
    """Answers otherwise while a plan is applied."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.parts(x)
        return y * (2 if "forward" in self.parts.__dict__ else 1)


def test_other_gradients_are_found() -> None:
    specimen: Any = Specimen("blend", Blend(), {"x": torch.ones(2, 64)}, None)  # type: ignore[arg-type]
    finding = examine(specimen)
    assert "window of one: gradients differ" in finding.problems
    row = Row("blend", 1.0, finding=finding)
    records = [{**row.record(), "why": row.why}]
    assert summary(records).endswith("1 fail")
    assert "## Failures" in report(records)


def test_what_cannot_be_trained_has_a_reason() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    specimen: Any = Specimen("frozen", model, {"input": torch.ones(2, 4)}, None)  # type: ignore[arg-type]
    with pytest.raises(NotBuiltError, match="no output depends on a parameter"):
        examine(specimen)
