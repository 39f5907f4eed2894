"""The models that the tuner is measured on: those of the peers' benchmark, and the demo's trained encoder."""

from __future__ import annotations

import torch
from peer_models import MODELS, SCALES, PeerModel, build
from peer_systems import weight_bytes

from autosp.demo.models import load as load_demo

__all__ = ["DEFAULT", "NAMES", "SCALES", "budget_of", "load"]

MINILM = "minilm"

NAMES = (*MODELS, MINILM)

DEFAULT = ("vit", "t5", MINILM)


def load(name: str, scale: str, device: torch.device) -> PeerModel:
    """The model in host memory with its batch. MiniLM has one size, whatever the scale."""
    if name != MINILM:
        return build(name, scale, device)
    example = load_demo(MINILM)
    example.model.requires_grad_(False)
    return PeerModel(example.title, example.model, example.batch, example.step)


def budget_of(example: PeerModel, percent: float) -> int:
    """Bytes of a budget that is given in percent of the weights."""
    return round(weight_bytes(example.model) * percent / 100)
