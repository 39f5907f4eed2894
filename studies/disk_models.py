"""The model of the disk tier's studies: a Llama shape with random weights, as a sharded safetensors checkpoint.

`cpu` is the peers' decoder (4.42 GB of fp32), `toy` one of 36 MB for trying the studies themselves.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch
from peer_models import PeerModel, build, prefill
from peer_systems import weight_bytes
from torch import nn


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    shape: str
    """The peers' name of the model's scale."""
    tokens: tuple[int, ...]
    """Lengths of the batch: the disk limits the first; compute the last."""
    shard: str
    probe_bytes: int
    """Read to know the disk's bandwidth, before and after the passes of a measurement."""
    place_bytes: tuple[int, ...]
    """Sizes of one place of a ring that reads go to."""
    beside_bytes: int
    """That size where passes run beside the reads."""
    block_bytes: tuple[int, ...]
    """Sizes of one read."""
    windows: tuple[int, ...]
    """Layers in the windows that are set by hand."""
    narrow_percent: float
    """The budget at which other systems are compared with, of the weights."""
    max_trials: int | None
    """Of one search; None: as the user's default."""


MIB = 2**20

SCALES = {
    "toy": Scale(
        shape="tiny",
        tokens=(1, 8, 32),
        shard="8MB",
        probe_bytes=8 * MIB,
        place_bytes=(MIB, 4 * MIB),
        beside_bytes=4 * MIB,
        block_bytes=(MIB, 2 * MIB),
        windows=(2, 4),
        narrow_percent=40,
        max_trials=4,
    ),
    "cpu": Scale(
        shape="cpu",
        tokens=(1, 128, 512),
        shard="1GB",
        probe_bytes=1024 * MIB,
        place_bytes=(4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB),
        beside_bytes=64 * MIB,
        block_bytes=(MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, 64 * MIB),
        windows=(2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
        narrow_percent=12,
        max_trials=None,
    ),
}


def checkpoint_of(scratch: Path, scale: str) -> Path:
    """Where the checkpoint is."""
    return scratch / f"checkpoint-{scale}"


def write_checkpoint(scratch: Path, scale: str) -> None:
    """Save the checkpoint unless it is there. It appears whole or not at all."""
    from transformers.utils import logging

    folder = checkpoint_of(scratch, scale)
    if folder.exists():
        return
    logging.disable_progress_bar()
    made = build("llama-prefill", SCALES[scale].shape, torch.device("cpu"))
    partial = Path(mkdtemp(dir=scratch, prefix="partial-"))
    try:
        made.model.save_pretrained(partial, max_shard_size=SCALES[scale].shard)  # type: ignore[operator]
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(scratch: Path, scale: str, tokens: int) -> PeerModel:
    """The model as transformers loads it, its weights mapped from the checkpoint's files, with a prompt of [1, tokens].

    Raises: RuntimeError if a weight is not mapped: the figures would mean something else then.
    """
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = checkpoint_of(scratch, scale)
    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    unmapped = _not_mapped(model, folder)
    if unmapped:
        raise RuntimeError(f"{len(unmapped)} weights are not mapped from {folder}, {unmapped[0]} first")
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr,assignment]
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    title = f"Llama shape, {weight_bytes(model) / 1e9:.2f} GB of fp32 weights, 1×{tokens} tokens"
    return PeerModel(title, model, {"input_ids": ids}, prefill)


def _not_mapped(model: nn.Module, folder: Path) -> list[str]:
    ranges = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if f"{folder}/" in line:
            begin, end = line.split(" ", 1)[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return [
        name
        for name, weight in model.named_parameters()
        if not any(begin <= weight.data_ptr() < end for begin, end in ranges)
    ]
