"""Which readers and blocks a profile finds best, on disks that behave as the test says, and on this one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import autosp
from autosp.batch import call
from autosp.devices import CpuDevice
from autosp.partition import partition
from autosp.profiler.reading import PATIENCE_S, choose_reading, measure_reading
from autosp.runtime.bench import Bench
from autosp.spec import Reading, Tier
from mapped_models import mapped_stack
from models import make

MIB = 2**20
N_BYTES = 64 * MIB


class Disk:
    """A disk with a clock of its own."""

    def __init__(self, seconds: Callable[[Reading], float]) -> None:
        self._seconds = seconds
        self.now_s = 0.0
        self.read: list[Reading] = []

    def read_s(self, reading: Reading) -> float:
        """Read once."""
        taken = self._seconds(reading)
        self.now_s += taken
        self.read.append(reading)
        return taken

    def choose(self, n_bytes: int = N_BYTES) -> Reading:
        return choose_reading(n_bytes, self.read_s, lambda: self.now_s)


def test_a_disk_that_one_reader_saturates_gets_one() -> None:
    assert Disk(lambda reading: 0.02).choose() == Reading(readers=1, block_bytes=32 * MIB)


def test_readers_that_gain_two_percent_are_not_worth_it() -> None:
    assert Disk(lambda reading: 0.02 if reading.readers == 1 else 0.0196).choose().readers == 1


@pytest.mark.parametrize("readers", [2, 4])
def test_a_disk_with_deep_queues_gets_as_many_as_fill_them(readers: int) -> None:
    assert Disk(lambda reading: 0.02 / min(readers, reading.readers)).choose().readers == readers


def test_the_block_that_a_disk_likes() -> None:
    assert Disk(lambda reading: 0.02 + reading.block_bytes / N_BYTES / 20).choose() == Reading(block_bytes=2 * MIB)


def test_one_slow_read_does_not_change_the_choice() -> None:
    disk = Disk(lambda reading: 0.2 if len(disk.read) in (1, 4) else 0.01)
    assert disk.choose() == Reading()


def test_a_slow_disk_is_asked_for_no_longer() -> None:
    disk = Disk(lambda reading: 0.25)
    assert disk.choose() == Reading()
    assert disk.now_s <= 0.25 + PATIENCE_S + 0.25


def test_bytes_that_no_setting_parts_are_not_read_for_it() -> None:
    disk = Disk(lambda reading: 0.01)
    assert disk.choose(MIB) == Reading()
    assert disk.read == []


@pytest.mark.parametrize("where", ["packed", "mapped"])
def test_the_bench_reads_as_was_found_and_the_profile_says_so(where: str, tmp_path: Path) -> None:
    if where == "mapped":
        pytest.importorskip("safetensors")
    model, batch = mapped_stack(tmp_path / "weights") if where == "mapped" else make("stack")
    device = CpuDevice()
    parts = partition(model, lambda: call(model, batch), device.torch_device, slow_tier=Tier.DISK)
    with Bench(model, parts, device, tmp_path / "cache") as bench:
        found = measure_reading(bench, lambda text: None)
        assert found is not None
        assert bench.readers.reading == found.reading
        assert not found.reading.from_cache
        assert found.cached_bytes_per_s is None or found.cached_bytes_per_s > 0
    profile = autosp.profile(model, batch, device=device, progress=False)
    assert profile.link.reading is not None
    device.close()


def test_where_nothing_is_on_disk_there_is_nothing_to_choose() -> None:
    device = CpuDevice(slow_tier=Tier.HOST)
    profile = autosp.profile(*make("stack"), device=device, progress=False)
    assert profile.link.reading is None
    device.close()


def test_the_disk_behind_the_host_is_the_link_that_says_how_it_is_read() -> None:
    device = CpuDevice(slow_tier=Tier.HOST)
    model, batch = make("stack")
    profile = autosp.profile(model, batch, max_cpu_gb="300KB", device=device, progress=False)
    assert profile.link.reading is None
    assert profile.disk_link is not None
    assert profile.disk_link.reading is not None
    device.close()
