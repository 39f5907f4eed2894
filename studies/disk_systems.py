"""The systems of the disk tier's studies: each is put on a model whose weights are mapped from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disk_models import checkpoint_of
from peer_systems import PLAIN, SYSTEMS, TUNED, OwnPeak, Setting, System
from torch import nn

PLANNED = "planned"
"""A plan that was set by hand, or another than the search's answer."""

DAT = "accelerate"
SAFETENSORS = "accelerate-safetensors"


@contextmanager
def _in_ram(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    """Copied from the maps into memory of the process's own."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    yield None


@contextmanager
def _accelerate_safetensors(model: nn.Module, setting: Setting) -> Iterator[OwnPeak]:
    """Everything on the disk, read from the checkpoint itself: the index that transformers gives `dispatch_model`.

    Where the folder has no checkpoint, one is saved first, as `disk_offload` saves its own files.
    """
    from accelerate import dispatch_model
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not list(setting.folder.glob("*.safetensors")):
        save_file(model.state_dict(), setting.folder / "model.safetensors")
    index: dict[str, dict[str, str]] = {}
    for path in sorted(setting.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        index |= {name: {"safetensors_file": str(path), "weight_name": name} for name in names}
    dispatch_model(model, {"": "disk"}, main_device="cpu", offload_index=index)
    yield None


DISK_SYSTEMS: dict[str, System] = {
    PLAIN: System("all weights in RAM", _in_ram),
    TUNED: SYSTEMS[TUNED],
    PLANNED: System("autosp, set by hand", SYSTEMS[TUNED].apply, planned=True),
    DAT: System("accelerate disk_offload, its .dat files", SYSTEMS["accelerate-offload"].apply),
    SAFETENSORS: System("accelerate, the safetensors checkpoint", _accelerate_safetensors),
}


def folder_of(system: str, scratch: Path, scale: str) -> Path:
    """Where the files are that the system reads. accelerate's are written once and found there by the next process."""
    return scratch / f"accelerate-{scale}" if system == DAT else checkpoint_of(scratch, scale)
