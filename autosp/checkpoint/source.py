"""Finds the files of a checkpoint, and maps their tensors.

[Note: mapped tensors] What `open_tensors` gives are views of private memory maps of their files: nothing is read until
it is used, pages come and go with the page cache, and a write to a tensor copies its page and never reaches the file.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import torch

from autosp.checkpoint.header import Entry, read_header
from autosp.errors import CheckpointError, SettingError

SAFETENSORS = ".safetensors"
INDEX = ".index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
FOUND_FIRST = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In a directory, in the order in which transformers looks for them."""

ACCEPTED = f"a {SAFETENSORS} file, an *{INDEX}, a state dict saved by torch ({', '.join(TORCH_SUFFIXES)}), or a folder"


class Format(Enum):
    """How the files are written."""

    SAFETENSORS = auto()
    TORCH = auto()


@dataclass(frozen=True)
class Checkpoint:
    """The files that hold a model's tensors."""

    path: Path
    """What they were found by: a folder, an index, or the one file."""
    files: tuple[Path, ...]
    format: Format
    identities: tuple[tuple[str | int, ...], ...]
    """Of the files, see `identity_of`, as they were when they were found: before anything of them was mapped."""


@dataclass(frozen=True)
class SavedTensors:
    """A checkpoint's tensors, in the order of its files: see [Note: mapped tensors]."""

    tensors: dict[str, torch.Tensor]
    files: dict[str, Path]
    """Tensor -> the file that holds it."""


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a file, an index or a folder stands for. Headers of safetensors files are checked.

    Raises: CheckpointError naming what is missing, truncated, or not a checkpoint.
    """
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint {path}: pass {ACCEPTED}")
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(INDEX):
        return _indexed(path)
    return _of_files(path, [path])


def exists(path: Path) -> bool:
    """Raises: CheckpointError if that cannot be said: of a name that is too long, or in a folder that is not ours."""
    try:
        return path.exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked for: {error.strerror}") from error


def _in_folder(folder: Path) -> Checkpoint:
    for name in FOUND_FIRST:
        if exists(folder / name):
            return find_checkpoint(folder / name)
    indices = sorted(folder.glob(f"*{INDEX}"))
    if len(indices) == 1:
        return _indexed(indices[0])
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(f"{folder} holds {len(indices)} checkpoints: pass one of {names}")
    shards = sorted(folder.glob(f"*{SAFETENSORS}"))
    if shards:
        return _of_files(folder, shards)
    saved = sorted(path for path in folder.iterdir() if path.suffix in TORCH_SUFFIXES)
    if len(saved) == 1:
        return _of_files(saved[0], saved)
    found = f"{len(saved)} files saved by torch and no index" if saved else "no checkpoint"
    raise CheckpointError(f"{folder} holds {found}: pass {ACCEPTED} with one checkpoint in it")


def _indexed(index: Path) -> Checkpoint:
    """The shards that an index names. Every tensor that it promises must be in its shard."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is no index of a checkpoint: it has no usable weight_map") from error
    missing = [name for name, shard in shards.items() if not exists(shard)]
    if missing or not shards:
        count = sum(shard in missing for shard in weight_map.values())
        raise CheckpointError(
            f"{index} names {len(shards)} shards, of which {len(missing)} are not there, {missing[0]} first "
            f"({count} tensors in all): fetch them"
            if missing
            else f"{index} names no shard"
        )
    checkpoint = _of_files(index, list(shards.values()))
    if checkpoint.format is Format.SAFETENSORS:
        held = {name: read_header(shard) for name, shard in shards.items()}
        lost = next((tensor for tensor, shard in weight_map.items() if tensor not in held[shard]), None)
        if lost is not None:
            raise CheckpointError(f"{index} says that {weight_map[lost]} holds tensor {lost}, which it does not")
    return checkpoint


def _of_files(path: Path, files: list[Path]) -> Checkpoint:
    suffixes = {file.suffix for file in files}
    try:
        identities = tuple(identity_of(file) for file in files)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    if suffixes == {SAFETENSORS}:
        for file in files:
            read_header(file)
        return Checkpoint(path, tuple(files), Format.SAFETENSORS, identities)
    if suffixes <= set(TORCH_SUFFIXES):
        return Checkpoint(path, tuple(files), Format.TORCH, identities)
    raise CheckpointError(f"{path} is no checkpoint that autosp reads: pass {ACCEPTED}")


def identity_of(path: Path) -> tuple[str | int, ...]:
    """What tells that other bytes came to be at a path: where, size, times of change, inode. Raises: OSError."""
    real = path.resolve()
    found = real.stat()
    return str(real), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def open_tensors(checkpoint: Checkpoint) -> SavedTensors:
    """Map every tensor of a checkpoint.

    Raises: CheckpointError if a file is damaged, holds code or something else than tensors, or if two files hold a
    tensor of the same name; SettingError if safetensors is not installed.
    """
    opened = SavedTensors({}, {})
    for file in checkpoint.files:
        found = _map_safetensors(file) if checkpoint.format is Format.SAFETENSORS else _map_torch(file)
        for name, tensor in found.items():
            if name in opened.tensors:
                other = opened.files[name]
                raise CheckpointError(f"tensor {name} is in {other} and in {file}: name one checkpoint, not both")
            opened.tensors[name] = tensor
            opened.files[name] = file
    return opened


def _map_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise SettingError(f"reading {file} needs {error.name}: pip install 'autosp[hf]'") from error

    entries: dict[str, Entry] = read_header(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in entries}
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from error


def _map_torch(file: Path) -> dict[str, torch.Tensor]:
    """Nothing but tensors and plain containers is unpickled."""
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, and loading it could run code: save the state dict alone, "
            "torch.save(model.state_dict(), path), where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be mapped: it is damaged, or in torch's old format; fetch it again, or load and save it "
            f"with torch ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__}, not a state dict: tensors by name")
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{file} is no state dict: {name!r} is a {type(value).__name__}; save the state dict alone"
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise CheckpointError(f"{file}: tensor {name} is sparse or quantised; only plain tensors can be mapped")
    return {name: value.detach().resolve_conj().resolve_neg() for name, value in found.items()}
