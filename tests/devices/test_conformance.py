"""What every Device promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from autosp.devices import CpuDevice, Device, VirtualDevice, choose_device
from autosp.devices.memory import anonymous, memory_of
from autosp.errors import ReadError, SettingError
from autosp.partition import bind, partition
from autosp.tiers import Originals, open_store
from models import make

MIB = 2**20


def _store(device: Device, tmp_path: Path):
    model, batch = make("stack")
    parts = partition(model, lambda: model(batch), torch.device("cpu"))
    return open_store(device, bind(model, parts).layers, tmp_path, Originals.KEPT), parts, model


def test_allocation_is_aligned_and_writable(device: Device) -> None:
    memory = device.allocate(3 * MIB)
    assert memory.dtype is torch.uint8
    assert memory.numel() == 3 * MIB
    assert memory.data_ptr() % 4096 == 0
    assert memory.device.type == device.torch_device.type
    memory.fill_(7)
    assert bool((memory == 7).all())
    assert device.allocate(0).numel() == 0


def test_copies_run_in_order_and_deliver_the_bytes(device: Device, tmp_path: Path) -> None:
    store, parts, _ = _store(device, tmp_path)
    layer = max(parts.layers, key=lambda layer: layer.n_bytes)
    other = next(one for one in parts.layers if one.n_bytes != layer.n_bytes)
    target = device.allocate(layer.n_bytes)
    device.copy(store.regions([layer.index]), target, device.record())
    last = device.copy(store.regions([other.index]), target[: other.n_bytes], device.record())
    device.wait(last)
    device.synchronize()
    assert device.finished(last)
    expected = store.rest(layer.index).clone()
    expected[: other.n_bytes] = store.rest(other.index)
    assert torch.equal(target.cpu(), expected)
    store.close()


def test_compute_after_wait_sees_the_copy(device: Device, tmp_path: Path) -> None:
    store, parts, _ = _store(device, tmp_path)
    layer = max(parts.layers, key=lambda layer: layer.n_bytes)
    target = device.allocate(layer.n_bytes)
    for _ in range(20):
        target.zero_()
        device.wait(device.copy(store.regions([layer.index]), target, device.record()))
        copied = target.clone()
        device.finish_compute()
        assert torch.equal(copied.cpu(), store.rest(layer.index))
    store.close()


def test_time_goes_forward(device: Device) -> None:
    start = device.stamp()
    torch.ones(200, 200, device=device.torch_device) @ torch.ones(200, 200, device=device.torch_device)
    end = device.stamp()
    device.synchronize()
    assert device.seconds(start, end) > 0


def test_peak_counts_what_is_in_use_beyond_the_start(device: Device) -> None:
    held = device.allocate(64 * MIB)
    device.start_measuring()
    assert device.peak_bytes() < 8 * MIB
    more = device.allocate(96 * MIB)
    more.fill_(1)
    assert 90 * MIB < device.peak_bytes() < 120 * MIB
    del more
    assert device.peak_bytes() > 90 * MIB
    del held


def test_out_of_memory_is_recognised(device: Device) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=device.torch_device)
    assert device.is_out_of_memory(caught.value)
    assert not device.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_reader_s_error_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    device = CpuDevice()

    class Broken:
        n_bytes = 8
        host = None

        def read_into(self, target: memoryview) -> None:
            raise ReadError("layer 3 is gone")

    event = device.copy([Broken()], device.allocate(8))
    with pytest.raises(ReadError, match="layer 3 is gone"):
        device.wait(event)
    ok = device.copy([], device.allocate(8))
    device.wait(ok)
    device.close()


def test_close_ends_the_reader_and_a_later_copy_starts_another(tmp_path: Path) -> None:
    device = CpuDevice()
    device.wait(device.copy([], device.allocate(8)))
    device.close()
    device.wait(device.copy([], device.allocate(8)))
    device.close()


def test_virtual_clock_is_exact(tmp_path: Path) -> None:
    device = VirtualDevice(bytes_per_s=100.0, latency_s=1.0)

    class Bytes:
        n_bytes = 200
        host = None

        def read_into(self, target: memoryview) -> None:
            target[:] = bytes(range(200))

    target = device.allocate(200)
    device.spend(5.0)
    first = device.copy([Bytes()], target, device.record())  # 5 + 1 + 2
    second = device.copy([Bytes()], target, device.record())  # 8 + 1 + 2
    assert ((first.began, first.ended), (second.began, second.ended)) == ((5.0, 8.0), (8.0, 11.0))
    device.wait(first)
    assert device.now_s == 8.0
    assert device.finished(first) and not device.finished(second)
    assert bytes(memory_of(target)) == bytes(range(200))


def test_choose_device_names_what_is_not_there() -> None:
    assert choose_device("cpu").info.kind == "cpu"
    mine = CpuDevice()
    assert choose_device(mine) is mine
    with pytest.raises(SettingError, match="not a torch device"):
        choose_device("warp")
    with pytest.raises(SettingError, match="cuda and|cuda, xpu"):
        choose_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="not here"):
            choose_device("cuda")


def test_paced_link_delivers_the_bytes() -> None:
    device = CpuDevice(paced_bytes_per_s=1e12)
    assert "paced" in device.info.name
    model = nn.Linear(4, 4)
    assert model.weight.numel() == 16
    device.wait(device.copy([], device.allocate(8)))
    device.close()


def test_a_copy_s_span_lies_between_the_stamps_around_it(device: Device, tmp_path: Path) -> None:
    store, parts, _ = _store(device, tmp_path)
    layer = max(parts.layers, key=lambda layer: layer.n_bytes)
    target = device.allocate(layer.n_bytes)
    before = device.stamp()
    copied = device.copy(store.regions([layer.index]), target, device.record())
    device.wait(copied)
    after = device.stamp()
    device.synchronize()
    began, ended = copied.times.began, copied.times.ended
    assert device.seconds(before, began) >= 0
    assert device.seconds(began, ended) > 0
    assert device.seconds(ended, after) >= 0
    store.close()


def test_lookups_read_host_memory_in_place(device: Device) -> None:
    if not device.reads_host:
        pytest.skip(f"{device.info.name} does not read host memory: tables stream or stay there")
    memory = anonymous(4 * MIB)
    memory.copy_(torch.arange(4 * MIB) % 251)
    device.pin(memory)
    table = device.host_view(memory).view(torch.float16).view(-1, 64)
    assert table.device == device.torch_device or device.torch_device.type == "cpu"
    rows = torch.tensor([0, 17, 4 * MIB // 128 - 1])
    found = torch.nn.functional.embedding(rows.to(device.torch_device), table).cpu()
    assert torch.equal(found.view(torch.uint8), memory.view(torch.float16).view(-1, 64)[rows].view(torch.uint8))
