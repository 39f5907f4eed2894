"""transformers' Trainer trains a streamed model as it trains any other: the same losses, the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from models import llama
from trained import assert_same_weights, twins

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TEXTS = torch.randint(1, 500, (12, 9), generator=torch.Generator().manual_seed(0))
EXAMPLES = [{"input_ids": row, "labels": row} for row in TEXTS]


def trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    args = transformers.TrainingArguments(str(folder), **(settings | changes))
    return transformers.Trainer(model, args, train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:4])


def streamed(model: nn.Module, **setting: int) -> autosp.StreamedModel[nn.Module]:
    batch = {"input_ids": TEXTS[:2], "labels": TEXTS[:2]}
    setting = {"k": 3, "k_prime": 1} | setting
    plan = autosp.plan(
        model, batch, mode="training", step=lambda model, batch: model(**batch).loss, device="cpu", **setting
    )
    return autosp.apply(model, plan)


def losses(of: Any) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({}, {"k": 6, "k_prime": 2, "residents": 1, "recompute": 4}, id="recompute"),
        pytest.param({"gradient_checkpointing": True}, {}, id="the model's checkpoints"),
        pytest.param({"bf16": True}, {}, id="autocast"),
        pytest.param({"optim": "adafactor", "lr_scheduler_type": "cosine"}, {"k": 1}, id="adafactor"),
    ],
)
def test_a_trainer(changes: dict[str, Any], setting: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = twins(llama(attention_dropout=0.1, use_cache=False))
    expected = trainer(plain, tmp_path / "plain", **changes)
    expected.train()
    with streamed(model, **setting):
        seen = trainer(model, tmp_path / "streamed", **changes)
        seen.train()
        assert losses(seen) == losses(expected)
        assert len(losses(seen)) == 6
        assert seen.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
        assert_same_weights(model, plain)
    assert_same_weights(model, plain)


def test_a_checkpoint_holds_everything(tmp_path: Path) -> None:
    """Training that ends after a checkpoint goes on from it, streamed or not, wherever it was written."""
    torch.manual_seed(0)
    model, plain = twins(llama(use_cache=False))
    second, third = twins(model)
    trainer(plain, tmp_path / "plain").train()
    with streamed(model):
        trainer(model, tmp_path / "streamed").train()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "streamed" / "checkpoint-6")
    assert_same_weights(saved, plain)
    trainer(second, tmp_path / "second").train(str(tmp_path / "streamed" / "checkpoint-3"))
    assert_same_weights(second, plain)
    with streamed(third):
        trainer(third, tmp_path / "third").train(str(tmp_path / "streamed" / "checkpoint-3"))
        assert_same_weights(third, plain)
