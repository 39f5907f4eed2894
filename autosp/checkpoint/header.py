"""The header of a safetensors file: read to know what is wrong with a file, written for our own.

A file is the header's length (8 bytes, little-endian), the header (JSON: name -> dtype, shape, offsets) and the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from autosp.errors import CheckpointError

DATA_ALIGNMENT = 4096
"""Bytes. Where the data of our own files begins: what O_DIRECT asks of file offsets."""

MOST_HEADER_BYTES = 100_000_000
"""As the format's own reader has it; more is not a safetensors file."""

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class Entry(NamedTuple):
    """A tensor of the file. `begin` and `end` are bytes from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their data.

    Raises: CheckpointError if it is no such file, was truncated, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MOST_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path} ({size} bytes) is no safetensors file, or was cut off inside its header: fetch it again"
                )
            entries = _parse(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    for name, entry in entries.items():
        if 8 + length + entry.end > size:
            raise CheckpointError(
                f"{path} ends at byte {size}, inside tensor {name} (bytes {8 + length + entry.begin} to "
                f"{8 + length + entry.end}): the file was truncated; fetch it again"
            )
    return entries


def _parse(path: Path, text: bytes) -> dict[str, Entry]:
    try:
        found = json.loads(text)
        found.pop("__metadata__", None)
        entries = {name: _entry(record) for name, record in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or its header is damaged: fetch it again") from error
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def _entry(record: dict[str, Any]) -> Entry:
    """Raises: ValueError, KeyError or TypeError for what no file has."""
    begin, end = record["data_offsets"]
    if not (type(begin) is type(end) is int and 0 <= begin <= end):
        raise ValueError(f"data_offsets {begin!r} and {end!r}")
    return Entry(record["dtype"], tuple(record["shape"]), begin, end)


def make_header(entries: Iterable[tuple[str, torch.dtype, torch.Size]]) -> tuple[bytes, dict[str, Entry]]:
    """The header of tensors that follow each other in this order, and where each of them is.

    Padded with spaces, so that the data begins at a multiple of `DATA_ALIGNMENT`.

    Raises: CheckpointError for a dtype that safetensors does not have.
    """
    placed: dict[str, Entry] = {}
    end = 0
    for name, dtype, shape in entries:
        if dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name} has dtype {dtype}, which safetensors does not have: convert it first")
        begin, end = end, end + shape.numel() * dtype.itemsize
        placed[name] = Entry(DTYPE_NAMES[dtype], tuple(shape), begin, end)
    records = {
        name: {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
        for name, entry in placed.items()
    }
    text = json.dumps(records, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, placed
