"""The models that training is measured on: random weights of one seed, fp32, with a loss of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peer_models import PeerModel
from torch import nn

SCALES = ("tiny", "cpu", "wide")
"""`cpu` sizes are 0.1-0.3 GB of weights, in narrow layers; `wide` ones 0.4-1.3 GB, in layers as wide as those of models
that need a plan; `tiny` ones are for trying the study itself.

How much compute there is for each byte that is moved or allocated grows with a layer's width and the batch.
"""


def build(name: str, scale: str) -> PeerModel:
    """The model `name` (a key of `MODELS`), to be trained, with its batch and a step that gives its loss."""
    torch.manual_seed(0)
    made = MODELS[name](scale)
    made.model.train()
    return made


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss that a model of transformers computes from the labels in its batch."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def _vit(scale: str) -> PeerModel:
    from transformers import ViTConfig, ViTForImageClassification

    width, layers, pixels, images = {
        "tiny": (96, 3, 32, 2),
        "cpu": (768, 8, 112, 4),
        "wide": (1280, 12, 224, 4),
    }[scale]
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        image_size=pixels,
        patch_size=16,
    )
    config.num_labels = 1000
    batch = {"pixel_values": torch.randn(images, 3, pixels, pixels), "labels": torch.arange(images)}
    model = ViTForImageClassification(config)
    return PeerModel(f"ViT, {_size(model)}, {images}×3×{pixels}×{pixels}", model, batch, loss_of)


def _llama(scale: str) -> PeerModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary, length = {
        "tiny": (96, 3, 500, 16),
        "cpu": (768, 6, 8000, 128),
        "wide": (2048, 6, 8000, 256),
    }[scale]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        vocab_size=vocabulary,
    )
    tokens = torch.randint(0, vocabulary, (1, length))
    batch = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    model = LlamaForCausalLM(config)
    return PeerModel(f"Llama shape, {_size(model)}, 1×{length} tokens", model, batch, loss_of)


def _mlp(scale: str) -> PeerModel:
    width, layers, rows = {"tiny": (128, 4, 8), "cpu": (2048, 12, 256), "wide": (4096, 6, 1024)}[scale]
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())))
    return PeerModel(f"MLP, {_size(model)}, {rows} rows", model, torch.randn(rows, width), mean_square)


def mean_square(model: nn.Module, batch: Any) -> torch.Tensor:
    """A loss of whatever a plain model gives."""
    loss: torch.Tensor = model(batch).square().mean()
    return loss


MODELS: dict[str, Callable[[str], PeerModel]] = {"vit": _vit, "llama": _llama, "mlp": _mlp}


def _size(model: nn.Module) -> str:
    return f"{sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6:.0f} MB"
