"""Every test has its own cache folder and database, and a device that is closed afterwards."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autosp.devices import AcceleratorDevice, CpuDevice, Device, VirtualDevice
from autosp.profiler.layers import Repeats
from autosp.spec import Tier
from databases import create_database, memory_folder, postgres_server


def pytest_collection_finish() -> None:
    """What is imported by now lives to the end: no test's collection of garbage need look at it again."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def seen_garbage() -> None:
    """What tests have imported by now lives to the end, too. Every `Bench` begins with a collection."""
    gc.collect()
    gc.freeze()


def _kinds() -> list[object]:
    gpu = [] if torch.accelerator.is_available() else [pytest.mark.skip(reason="torch sees no accelerator here")]
    return ["cpu-disk", "cpu-host", pytest.param("accelerator", marks=[pytest.mark.gpu, *gpu])]


@pytest.fixture(params=[*_kinds(), "virtual"])
def any_device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every implementation, the one with a clock of its own among them."""
    made = VirtualDevice(bytes_per_s=1e9) if request.param == "virtual" else _make(request.param)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights rest on a disk, as a user's; what a database commits needs none, where there is RAM for files."""
    monkeypatch.setenv("AUTOSP_CACHE_DIR", str(tmp_path / "cache"))
    with memory_folder() as folder:
        monkeypatch.setenv("AUTOSP_STORAGE", str(folder / "autosp.db"))
        yield


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are repeated for 0.03 s: no test rests on how well a median is known.

    Those that compare times take them in a fixture of their module, which this does not reach, nor any new process.
    """
    for module in ("layers", "training"):
        monkeypatch.setattr(f"autosp.profiler.{module}.ENOUGH", Repeats(2, 0.03))
    monkeypatch.setattr("autosp.profiler.layers.BRIEF", Repeats(1, 0.03))
    monkeypatch.setattr("autosp.search.validate.ENOUGH_S", 0.03)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A running server: see `databases`."""
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_storage(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database that several processes may open; without a disk to wait for, where there is RAM for files."""
    if request.param == "postgresql":
        yield create_database(request.getfixturevalue("postgres"), f"db-{uuid.uuid4().hex}")
        return
    with memory_folder() as folder:
        yield str(folder / "shared.db")


@pytest.fixture(params=_kinds())
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Every implementation of the protocol that can run here."""
    made = _make(request.param)
    yield made
    made.close()


def _make(kind: str) -> Device:
    if kind == "accelerator":
        return AcceleratorDevice()
    return CpuDevice(slow_tier=Tier.HOST if kind == "cpu-host" else Tier.DISK)
