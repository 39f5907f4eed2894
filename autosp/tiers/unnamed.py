"""Files of this process alone, gone when closed or when the process ends, however it does."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from autosp.files import cache_error
from autosp.tiers.reader import WeightFile
from autosp.tiers.readers import Readers


def create_unnamed(cache_dir: Path, n_bytes: int, readers: Readers, kind: str, doing: str) -> tuple[int, WeightFile]:
    """A new file with all its blocks reserved, so that a full disk is known before anything is written; and a reader.

    It has a name, which begins with `kind`, only until it is open: no crash leaves it behind. `doing`: what needs it.

    Raises: DiskFullError, TierError.
    """
    with ExitStack() as opened:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=cache_dir, prefix=f"{kind}-", suffix=".autosp")
            opened.callback(os.close, descriptor)
            try:
                file = WeightFile(Path(name), readers)
                opened.callback(file.close)
            finally:
                Path(name).unlink()
            os.posix_fallocate(descriptor, 0, n_bytes)
        except OSError as error:
            raise cache_error(error, doing, n_bytes, cache_dir) from error
        opened.pop_all()
    return descriptor, file
