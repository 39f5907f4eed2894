"""Converted checkpoints in the cache folder: each made once, shared by all processes, gone when nothing refers to it.

A conversion is a folder `checkpoints/<key>`, where the key hashes the source files (paths, sizes, times of change,
inodes, from before they were mapped) and the header of the result: another source, or another dtype, is another
conversion. In it are

    source.json        the source files as they were: once one is gone or changed, the conversion is unreferenced
    partial, journal   an unfinished conversion: see autosp.checkpoint.convert
    checksums.json     the CRC-32 of every tensor, and the finished file's size, time and inode
    model.safetensors  the finished file: renamed from `partial` last of all, so that it is whole if it is there
    lock               flock: exclusive while the conversion is written or removed, shared while it is in use

[Note: when a conversion is checked] A file whose size, time of change and inode are those in checksums.json is the one
that was written, fsynced and renamed here: it is trusted unread. A file for which they differ (truncated, written to,
copied from elsewhere) is read whole and compared with its checksums, and converted again if they differ. What no
process did, bits that rot on the disk, is not looked for: reading 100 GB would cost a minute at every load.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from autosp.checkpoint.convert import Layout, Show, is_as_written, lay_out, write
from autosp.checkpoint.source import Checkpoint, SavedTensors, identity_of
from autosp.errors import CheckpointError, TierError
from autosp.files import NO_ROOM, cache_error, write_atomically
from autosp.settings import settings

FORMAT_VERSION = 2
"""Counts up when the files of a conversion change their meaning."""

WEIGHTS = "model.safetensors"
_REMOVED = ".removed-"

TRIES, PAUSE_S = 50, 0.1
"""How long a conversion that is damaged is waited for before it counts as in use: a model keeps it as long as it lives.
"""


class Conversion:
    """A converted checkpoint, which no process removes before `close()`."""

    def __init__(self, folder: Path, lock: _Lock) -> None:
        self.folder = folder
        self._lock = lock

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / WEIGHTS

    def close(self) -> None:
        """The conversion may go. What is mapped stays readable."""
        self._lock.close()


def converted(checkpoint: Checkpoint, saved: SavedTensors, dtypes: Mapping[str, torch.dtype], show: Show) -> Conversion:
    """The checkpoint as one safetensors file, its tensors as `dtypes` says or as they are.

    Written now unless that was done before; a process that is at it is waited for. `show` is told of bytes written.

    Raises: CheckpointError if a source changes meanwhile or has a dtype that safetensors lacks, or if the conversion is
    damaged and in use; DiskFullError if there is no room (nothing is left behind then), TierError if the cache folder
    cannot be written.
    """
    layout = lay_out(saved.tensors, dtypes)
    sources = [list(identity) for identity in checkpoint.identities]
    root = _root()
    text = json.dumps([FORMAT_VERSION, sources]).encode() + layout.header
    folder = root / hashlib.sha256(text).hexdigest()[:32]
    try:
        while True:
            lock = _Lock(folder)
            try:
                if not _is_sound(folder, layout):
                    if not lock.take_alone(folder):
                        lock.close()
                        continue
                    if lock.is_of(folder) and not _is_sound(folder, layout):
                        _convert(folder, layout, sources, show)
                    lock.take(fcntl.LOCK_SH)  # let go of for a moment: another process may have removed it
                if lock.is_of(folder) and (folder / WEIGHTS).exists():
                    return Conversion(folder, lock)
            except BaseException:
                lock.close()
                raise
            lock.close()
    except OSError as error:
        if isinstance(error, TierError):
            raise
        raise cache_error(error, "converting the checkpoint", layout.n_bytes, folder.parent) from error


def _root() -> Path:
    return settings().cache_dir / "checkpoints"


def remove_unreferenced() -> None:
    """Remove every conversion whose source files are gone or changed, unless a process holds it.

    What cannot be removed, on a read-only disk say, stays.
    """
    try:
        folders = list(_root().iterdir())
    except OSError:
        return  # there are none
    for folder in folders:
        try:
            if folder.name.startswith(_REMOVED):
                shutil.rmtree(folder)
            elif not _is_referenced(folder):
                _remove(folder)
        except OSError:
            continue


class _Lock:
    """The lock of a conversion's folder, shared at first. Waits for whoever has it exclusively."""

    def __init__(self, folder: Path, mode: int = fcntl.LOCK_SH) -> None:
        self._descriptor = _open_lock(folder)
        try:
            self.take(mode)
        except BaseException:
            self.close()
            raise

    def take(self, mode: int) -> None:
        """Change to LOCK_SH or LOCK_EX; not in one step, so what was seen before may have changed."""
        fcntl.flock(self._descriptor, mode)

    def take_alone(self, folder: Path) -> bool:
        """Change to LOCK_EX. False if another converts, or did meanwhile: look again.

        Raises: CheckpointError if others keep it shared, who use what is there.
        """
        seen = _seen(folder)
        for _ in range(TRIES):
            if self._takes(fcntl.LOCK_EX):
                return True
            if not self._takes(fcntl.LOCK_SH) or _seen(folder) != seen:
                return False
            self.take(fcntl.LOCK_UN)  # who looks at a conversion at the same time lets go of it as soon
            time.sleep(PAUSE_S)
        raise CheckpointError(
            f"the conversion {folder} is damaged, and in use by a model of this process or of another one: let go of "
            "that model, or delete the folder; then load again"
        )

    def _takes(self, mode: int) -> bool:
        try:
            self.take(mode | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_of(self, folder: Path) -> bool:
        """Whether the folder is still the one that was locked, not removed or made anew meanwhile."""
        try:
            found = (folder / "lock").stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._descriptor))

    def close(self) -> None:
        """Let go."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open_lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # removed in between
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES) or not (folder / "lock").exists():
                raise
            return os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)  # a finished conversion can be used as it is


def _convert(folder: Path, layout: Layout, sources: list[list[Any]], show: Show) -> None:
    """Under the exclusive lock."""
    partial, journal = folder / "partial", folder / "journal"
    if (folder / WEIGHTS).exists():
        warnings.warn(f"{folder / WEIGHTS} was damaged since it was written: it is converted again", stacklevel=6)
        (folder / WEIGHTS).unlink()
    write_atomically(folder / "source.json", json.dumps(sources))
    try:
        crc32 = write(layout, partial, journal, show)
    except OSError as error:
        if error.errno in NO_ROOM:
            _discard(folder)
        raise
    changed = next((path for path, *_ in sources if not _is_unchanged(sources, path)), None)
    if changed is not None:
        _discard(folder)
        raise CheckpointError(f"{changed} was changed while it was converted: load it again")
    _save_checksums(folder, partial, crc32)
    partial.rename(folder / WEIGHTS)
    journal.unlink()


def _is_sound(folder: Path, layout: Layout) -> bool:
    """See [Note: when a conversion is checked]."""
    weights = folder / WEIGHTS
    if not weights.exists():
        return False
    try:
        record = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        if record["file"] == _fingerprint(weights):
            return True
        if not is_as_written(weights, layout, record["crc32"]):
            return False
    except (FileNotFoundError, ValueError, KeyError):
        return False
    with suppress(OSError):  # on a read-only disk it is read again the next time
        _save_checksums(folder, weights, record["crc32"])
    return True


def _save_checksums(folder: Path, weights: Path, crc32: Mapping[str, int]) -> None:
    write_atomically(folder / "checksums.json", json.dumps({"file": _fingerprint(weights), "crc32": crc32}))


def _fingerprint(weights: Path) -> list[int]:
    found = weights.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _seen(folder: Path) -> list[int] | None:
    """What of the finished file another conversion changes; None if there is none."""
    try:
        return _fingerprint(folder / WEIGHTS)
    except FileNotFoundError:
        return None


def _is_unchanged(sources: list[list[Any]], path: str) -> bool:
    try:
        return list(identity_of(Path(path))) in sources
    except OSError:
        return False


def _is_referenced(folder: Path) -> bool:
    try:
        sources = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        return all(_is_unchanged(sources, path) for path, *_ in sources)
    except (FileNotFoundError, ValueError, TypeError):
        return False


def _remove(folder: Path) -> None:
    try:
        lock = _Lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # in use
    try:
        if lock.is_of(folder) and not _is_referenced(folder):
            _discard(folder)
    finally:
        lock.close()


def _discard(folder: Path) -> None:
    """Under the exclusive lock. Renamed first: a process that comes meanwhile makes a folder of its own."""
    shutil.rmtree(folder.rename(folder.with_name(f"{_REMOVED}{uuid.uuid4().hex}")))
