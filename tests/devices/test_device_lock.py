"""One measurement at a time on a device, and devices in other processes."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from autosp.devices import AcceleratorDevice, CpuDevice, Device
from autosp.devices.lock import device_lock, hardware_name
from autosp.errors import TierError
from autosp.spec import Tier


def test_who_waits_for_a_device_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    waiting, held = threading.Event(), threading.Event()

    def progress(text: str) -> None:
        told.append(text)
        waiting.set()

    def other() -> None:
        with device_lock(CpuDevice(), tmp_path, progress):
            held.set()

    thread = threading.Thread(target=other)
    with device_lock(CpuDevice(slow_tier=Tier.HOST), tmp_path, told.append):  # the same hardware
        thread.start()
        assert waiting.wait(60)
        assert not held.is_set()
    assert held.wait(60)
    thread.join(60)
    (text,) = told
    assert text.startswith("waiting for ")
    assert text.endswith("which another process measures on")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "locks").touch()
    with pytest.raises(TierError, match="AUTOSP_CACHE_DIR"), device_lock(CpuDevice(), tmp_path, print):
        pass


def test_the_name_is_the_hardware_s(device: Device) -> None:
    name = hardware_name(device)
    assert name == hardware_name(device)
    assert name.startswith(device.torch_device.type)
    assert "/" not in name


def test_a_device_in_another_process_is_one_like_it(device: Device) -> None:
    copy = pickle.loads(pickle.dumps(device))
    assert type(copy) is type(device)
    assert (copy.info, copy.torch_device) == (device.info, device.torch_device)
    copy.close()
    paced = CpuDevice(slow_tier=Tier.HOST, paced_bytes_per_s=2e9)
    assert pickle.loads(pickle.dumps(paced)).info == paced.info


def test_only_errors_of_the_runtime_make_a_device_unusable(device: Device) -> None:
    for error in (RuntimeError("shapes cannot be multiplied"), MemoryError(), ValueError("CUDA error")):
        assert not device.is_fatal(error)
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert device.is_fatal(lost) == isinstance(device, AcceleratorDevice)
