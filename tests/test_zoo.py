"""A sample of the zoo, one model type per kind of architecture, through the same functions as `studies/zoo.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from autosp.partition.tensors import collect

pytest.importorskip("transformers")

import autosp
from processes import serve
from zoo import Row, kind_of, report, run_all, summary
from zoo_checks import Setting, examine, partition_problems, run, settings_for, try_plan
from zoo_inputs import OTHER, PROFILED
from zoo_models import MODEL_TYPES, NotBuiltError, Specimen, build

SAMPLE = {
    "bert": "encoder",
    "gpt2": "decoder",
    "t5": "encoder-decoder with a shared embedding",
    "vit": "vision",
    "convnext": "convolutions",
    "resnet": "convolutions with BatchNorm",
    "wav2vec2": "audio",
    "clip": "two towers",
    "llava": "vision-language",
    "mixtral": "mixture of experts",
    "mamba": "state space",
    "albert": "one layer run again and again",
}
built: dict[str, Specimen] = {}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only get slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def specimen_of(model_type: str) -> Specimen:
    if model_type not in built:
        built[model_type] = build(model_type)
    return built[model_type]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_same_bits_under_every_plan_and_afterwards(model_type: str) -> None:
    finding = examine(specimen_of(model_type))
    assert finding.problems == ()
    assert finding.remarks == ()
    assert finding.restored
    assert (finding.other_batch, finding.other_misses) == ("equal", 0)
    assert {outcome.setting.name for outcome in finding.outcomes} >= {"window of one", "residents", "all resident"}
    assert all(outcome.equal for outcome in finding.outcomes)
    assert finding.visited_layers >= 5


@pytest.mark.parametrize("model_type", SAMPLE)
def test_layers_really_stream_without_misses(model_type: str) -> None:
    specimen = specimen_of(model_type)
    outcome, _ = try_plan(specimen, Setting("window of one", 1, 1, 0), run(specimen.model, specimen.batch))
    assert outcome.misses == 0
    assert outcome.visits >= 10
    assert outcome.loads >= 10  # fewer than visits where a layer runs twice in a row


def test_a_vision_language_model_runs_its_vision_tower() -> None:
    specimen = specimen_of("llava")
    assert {"input_ids", "pixel_values"} <= specimen.batch.keys()
    plan = autosp.plan(specimen.model, specimen.batch, k=1, k_prime=1, device="cpu")
    visited = {plan.partition.layers[index].name.split(".")[0] for index in plan.partition.visits}
    assert {"vision_tower", "language_model"} <= visited


def test_a_wrong_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: one changed element of one weight, while the plan is applied, is a problem."""
    specimen = build("bert")
    apply = autosp.apply

    def spoilt(model: Any, plan: Any) -> Any:
        streamed = apply(model, plan)
        with torch.no_grad():
            model.encoder.layer[1].output.dense.weight[3, 5] += 1
        return streamed

    monkeypatch.setattr("zoo_checks.autosp.apply", spoilt)
    finding = examine(specimen)
    assert not finding.passed
    assert not finding.restored
    assert any(problem.endswith("output differs") for problem in finding.problems)
    assert any("other bytes" in problem for problem in finding.problems)


class Moody(nn.Module):
    """Counts its passes in a buffer, and answers with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.linear(x) * self.passes


def test_the_models_own_ways_are_remarks() -> None:
    specimen: Any = Specimen("moody", Moody(), {"x": torch.ones(2, 64)}, None)  # type: ignore[arg-type]
    finding = examine(specimen)
    assert set(finding.remarks) == {"not deterministic by itself", "changes its own tensors in a pass"}
    assert finding.other_batch == "one size only"
    assert finding.problems == ()


def test_a_tensor_in_two_layers_is_found() -> None:
    specimen = specimen_of("bert")
    parts = autosp.plan(specimen.model, specimen.batch, k=1, k_prime=1, device="cpu").partition
    assert partition_problems(specimen.model, parts) == []
    again = parts.model_copy(update={"layers": (*parts.layers, parts.layers[0])})
    assert any("in two places" in problem for problem in partition_problems(specimen.model, again))
    fewer = parts.model_copy(update={"layers": parts.layers[1:]})
    assert any("nowhere" in problem for problem in partition_problems(specimen.model, fewer))
    lighter = parts.model_copy(update={"resident_bytes": parts.resident_bytes - collect(specimen.model).total_bytes})
    assert any("bytes, the model has" in problem for problem in partition_problems(specimen.model, lighter))


def test_every_weight_matters() -> None:
    """No weight is constant: a lost or swapped one would change the output."""
    for tensor in specimen_of("bert").model.parameters():
        assert tensor.flatten().unique().numel() > 1


def test_small_models_and_unlike_batches() -> None:
    for model_type in SAMPLE:
        specimen = specimen_of(model_type)
        assert 200_000 < collect(specimen.model).total_bytes < 20_000_000
        assert specimen.other is not None
        first = next(iter(specimen.batch))
        assert len(specimen.batch[first]) % PROFILED.rows == 0
        assert len(specimen.other[first]) % OTHER.rows == 0


def test_what_cannot_be_built_has_a_reason() -> None:
    assert len(MODEL_TYPES) > 300
    with pytest.raises(NotBuiltError, match=r"^constructor: LookupError: no model is made") as caught:
        build("sam_mask_decoder")
    assert kind_of("plain pass on cuda:0: no kernel") == "does not run on this device by itself"
    assert kind_of(str(caught.value)) == "no model of its own"
    assert kind_of("constructor: ImportError: DinatModel requires the natten library") == "needs the package natten"
    assert kind_of("constructor: ModuleNotFoundError: No module named 'av'") == "needs the package av"
    assert kind_of("constructor: ValueError: no") == "needs a configuration made by hand"
    assert kind_of("forward: TypeError: missing 'task_inputs'") == "needs inputs made by hand"


def test_settings_fit_any_number_of_layers() -> None:
    for layers in range(1, 12):
        for setting in settings_for(layers):
            assert 1 <= setting.k <= layers
            assert setting.residents == layers or setting.k - setting.residents >= setting.k_prime


def test_the_command_runs_types_in_processes_of_their_own() -> None:
    serve()
    rows = {row.model_type: row for row in run_all(["albert", "sam_mask_decoder"], jobs=2, limit_s=60)}
    assert rows["albert"].finding is not None
    assert rows["albert"].finding.passed
    assert "no model is made" in rows["sam_mask_decoder"].not_built
    crashed = Row("hypothetical", 1.0, crashed="the process died with -11")
    text = report([*rows.values(), crashed])
    assert text.index("## Failures") < text.index("hypothetical") < text.index("## Models") < text.index("albert")
    assert summary([crashed]).startswith("1 model types, 0 run plainly")
