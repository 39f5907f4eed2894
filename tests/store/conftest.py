from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import store_samples
from autosp.store import Repository


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """The path of a database that is not there yet."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "autosp.db"


@pytest.fixture
def repository(storage: Path) -> Iterator[Repository]:
    """A new database with one study, `tiny`."""
    with Repository(storage) as repository:
        repository.create_study("tiny", store_samples.study_key())
        yield repository
