"""Hugging Face directories: what `from_pretrained` gives, over maps of the files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.errors import CheckpointError, SettingError
from checkpoint_samples import conversions, files_of, is_mapped
from models import llama, mamba, mixtral, t5, tokens

transformers = pytest.importorskip("transformers")

BATCH = {"input_ids": tokens(2, 9)}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    )
    return transformers.BertForMaskedLM(config)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama bfloat16": lambda: llama().to(torch.bfloat16),
    "t5": t5,
    "mamba": mamba,
    "bert": bert,
    "mixtral": lambda: mixtral(intermediate_size=512),
}
MAPPED = [name for name in MAKERS if name != "mixtral"]


def saved(name: str, folder: Path, **options: Any) -> Path:
    """A saved model."""
    torch.manual_seed(0)
    MAKERS[name]().save_pretrained(folder / name, **options)
    return folder / name


def batch_of(name: str) -> dict[str, torch.Tensor]:
    return {**BATCH, "decoder_input_ids": tokens(2, 4)} if name == "t5" else BATCH


def is_as(loaded: nn.Module, folder: Path, batch: Any, **options: Any) -> bool:
    """Whether class, state, dtypes, buffers, generation config and outputs are those of `from_pretrained`."""
    plain = type(loaded).from_pretrained(folder, **options)
    with torch.no_grad():
        outputs = [dict(call(model, batch).items()) for model in (loaded, plain)]
    return (
        equal(dict(loaded.state_dict()), dict(plain.state_dict()))
        and equal(dict(loaded.named_buffers()), dict(plain.named_buffers()))
        and equal(outputs[0].get("logits"), outputs[1].get("logits"))
        and not loaded.training
        and loaded.name_or_path == str(folder)
        and (not plain.can_generate() or loaded.generation_config == plain.generation_config)
    )


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("shards", [False, True])
def test_as_from_pretrained_and_every_parameter_is_mapped(name: str, shards: bool, tmp_path: Path) -> None:
    folder = saved(name, tmp_path, **({"max_shard_size": "150KB"} if shards else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = autosp.load(folder)
    assert is_as(loaded, folder, batch_of(name), dtype="auto")
    files = files_of(loaded)
    assert ("RAM" in files) == (name == "bert")  # the bias of its head, 2 kB, which transformers makes itself
    assert (len(files - {"RAM"}) > 1) == shards
    assert list(conversions(tmp_path / "cache")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama tied", "t5", "mamba"])
def test_another_dtype(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    loaded = autosp.load(folder, dtype=dtype)
    assert is_as(loaded, folder, batch_of(name), dtype=dtype)
    assert files_of(loaded) == {"model.safetensors"}
    (conversion,) = conversions(tmp_path / "cache")
    assert is_mapped(next(loaded.parameters()), conversion / "model.safetensors")


def test_a_config_of_another_dtype_than_its_weights(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    loaded = autosp.load(folder)
    assert loaded.dtype is torch.bfloat16
    assert is_as(loaded, folder, BATCH, dtype="auto")
    assert "RAM" not in files_of(loaded)


@pytest.mark.parametrize("generation_config", [True, False])
def test_files_of_torch(generation_config: bool, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(plain.state_dict(), folder / "pytorch_model.bin")
    if not generation_config:
        (folder / "generation_config.json").unlink()
    loaded = autosp.load(folder)
    assert is_as(loaded, folder, BATCH, dtype="auto")
    assert files_of(loaded) == {"model.safetensors"}


def test_a_file_in_the_directory_means_the_directory(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path, max_shard_size="150KB")
    for name in ("config.json", "model.safetensors.index.json", "model-00002-of-00006.safetensors"):
        if name.endswith(".safetensors"):
            name = sorted(folder.glob("*.safetensors"))[1].name
        assert is_as(autosp.load(folder / name), folder, BATCH, dtype="auto")
    (folder / "consolidated.safetensors").write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"are model\.safetensors\.index\.json, not consolidated\.safetensors"):
        autosp.load(folder / "consolidated.safetensors")


def test_what_transformers_merges_is_told(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    with pytest.warns(UserWarning, match=r"6 parameters of MixtralForCausalLM, \S+ GB, are in RAM: model\.layers\.0"):
        loaded = autosp.load(folder)
    assert is_as(loaded, folder, BATCH, dtype="auto")


def test_tune_apply_and_generate(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    plan = autosp.plan(autosp.load(folder), BATCH, k=2, k_prime=1, device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False}
    with autosp.load(folder, plan) as streamed:
        assert equal(streamed.generate(**BATCH, **options), plain.generate(**BATCH, **options))


def changed_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_config_that_is_not_of_these_weights(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    changed_config(folder, num_hidden_layers=5)
    with pytest.raises(
        CheckpointError, match=r"lacks 9 tensors of LlamaForCausalLM: model\.layers\.4\..* would be random"
    ):
        autosp.load(folder)
    changed_config(folder, num_hidden_layers=4, vocab_size=501)
    with pytest.raises(CheckpointError, match=r"has shape \(500, 64\), LlamaForCausalLM needs \(501, 64\)"):
        autosp.load(folder)


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    changed_config(folder, architectures=["TheirModel"], auto_map={"AutoModelForCausalLM": "theirs.TheirModel"})
    with pytest.raises(CheckpointError, match="architecture TheirModel, which transformers .* does not have, and code"):
        autosp.load(folder)
    changed_config(folder, architectures=["LlamaForCausalLM"], auto_map={"AutoConfig": "theirs.TheirConfig"})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "theirs.py").read_text())
    autosp.load(folder)
    assert not (tmp_path / "executed").exists()


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    with pytest.raises(SettingError, match="has weights of its own: weights= goes with a factory"):
        autosp.load(folder, weights=folder)
    changed_config(folder, architectures=None)
    with pytest.raises(CheckpointError, match="names no architecture, so the class to build is unknown"):
        autosp.load(folder)
    for text in ("{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="names no architecture"):
            autosp.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        autosp.load(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": "x"}, r"\(StrictDataclass.*hidden_size"),
        ({"num_attention_heads": 0}, r"\(ZeroDivisionError"),
        ({"hidden_act": "x"}, r"\(KeyError: 'x'\)"),
        ({"vocab_size": -1}, r"\(RuntimeError: .*negative"),
        ({"dtype": []}, r"\(IndexError"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_values_that_transformers_cannot_use(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    changed_config(folder, **change)
    with pytest.raises(CheckpointError, match=rf"(?s)transformers cannot use .*llama.* {why}.*or fetch it again"):
        autosp.load(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path, max_shard_size="150KB")
    first = min(folder.glob("*.safetensors"))
    first.unlink()
    with pytest.raises(CheckpointError, match=rf"of which 1 are not there, {first.name} first"):
        autosp.load(folder)
