"""Random questions for the tuner: a small model of some family, a batch, a budget. One number names one question."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peer_models import PeerModel
from torch import nn

WIDTHS = {"tiny": 64, "cpu": 128, "gpu": 768}
"""The unit of all widths, by scale."""

VOCABULARY = 2000

ROOM = 1.2
"""Budgets go up to this many times the weights: there, some models fit whole with their activations."""


@dataclass(frozen=True)
class Draw:
    """One question. `width` is in units of the scale; `length` is tokens, or pixels in units of eight."""

    family: str
    seed: int
    layers: int
    width: int
    batch: int
    length: int
    share: float
    """Of the way from nothing, or from the least that works, to `ROOM` times the weights."""


def draw(number: int) -> Draw:
    """The question of that number, the same on every machine."""
    rng = random.Random(number)
    return Draw(
        family=rng.choice(list(FAMILIES)),
        seed=number,
        layers=rng.randint(3, 10),
        width=rng.randint(1, 3),
        batch=rng.choice((1, 2, 4, 8)),
        length=rng.choice((1, 4, 8, 16)),
        share=round(rng.random(), 3),
    )


def budget_between(least_bytes: int, weight_bytes: int, share: float) -> int:
    """The draw's budget, given the least that may be asked for."""
    return round(least_bytes + share * max(0.0, ROOM * weight_bytes - least_bytes))


def build(drawn: Draw, scale: str) -> PeerModel:
    """The model with random weights, and its batch."""
    torch.manual_seed(drawn.seed)
    model, batch = FAMILIES[drawn.family](drawn, WIDTHS[scale] * drawn.width)
    return PeerModel(f"{drawn.family}, {drawn.layers} layers", model.eval().requires_grad_(False), batch)


def import_families() -> None:
    """Import all that `build` will, and compute nothing: processes that are forked from this one find it there."""
    from transformers import (  # noqa: F401
        BertModel,
        GPT2Model,
        LlamaModel,
        T5ForConditionalGeneration,
        ViTModel,
    )


Made = tuple[nn.Module, Any]


def _mlp(drawn: Draw, width: int) -> Made:
    """Linear layers of unlike widths."""
    rng = random.Random(drawn.seed)
    widths = [2 * width * rng.randint(1, 4) for _ in range(drawn.layers + 1)]
    layers = [module for pair in pairwise(widths) for module in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers), torch.randn(drawn.batch * drawn.length, widths[0])


def _convolutions(drawn: Draw, width: int) -> Made:
    """More activations than weights, where images are large."""
    channels = width // 2
    body = [nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()) for _ in range(drawn.layers)]
    pixels = 8 * min(drawn.length, 4)
    return nn.Sequential(nn.Conv2d(3, channels, 1), *body), torch.randn(drawn.batch, 3, pixels, pixels)


def _bert(drawn: Draw, width: int) -> Made:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**_shape(drawn, width), vocab_size=VOCABULARY)), _tokens(drawn)


def _llama(drawn: Draw, width: int) -> Made:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**_shape(drawn, width), vocab_size=VOCABULARY, use_cache=False)), _tokens(drawn)


def _gpt2(drawn: Draw, width: int) -> Made:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_embd=width,
        n_layer=drawn.layers,
        n_head=4,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2Model(config), _tokens(drawn)


def _t5(drawn: Draw, width: int) -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=width,
        d_ff=4 * width,
        d_kv=width // 4,
        num_heads=4,
        num_layers=drawn.layers,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    tokens = _tokens(drawn)["input_ids"]
    return T5ForConditionalGeneration(config), {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}


def _vit(drawn: Draw, width: int) -> Made:
    from transformers import ViTConfig, ViTModel

    pixels = 8 * drawn.length
    model = ViTModel(ViTConfig(**_shape(drawn, width), image_size=pixels, patch_size=8), add_pooling_layer=False)
    return model, {"pixel_values": torch.randn(drawn.batch, 3, pixels, pixels)}


def _shape(drawn: Draw, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": drawn.layers,
        "num_attention_heads": 4,
    }


def _tokens(drawn: Draw) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (drawn.batch, 8 * drawn.length))}


FAMILIES: dict[str, Callable[[Draw, int], Made]] = {
    "mlp": _mlp,
    "convolutions": _convolutions,
    "bert": _bert,
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "vit": _vit,
}
