"""What every Device promises."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from autosp.devices import CpuDevice, Device, Piece, VirtualDevice, choose_device
from autosp.devices.accelerator import AcceleratorDevice
from autosp.devices.memory import anonymous, memory_of, part
from autosp.errors import ReadError, SettingError
from autosp.partition import bind, partition
from autosp.spec import Tier
from autosp.tiers import DiskStore, Originals, open_store
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


def test_memory_is_where_it_is_taken_wherever_tensors_are_made_by_default(device: Device) -> None:
    with torch.device("meta"):
        for n_bytes in (0, 4096):
            assert device.allocate(n_bytes).device.type == device.torch_device.type
            memory = anonymous(n_bytes)
            assert memory.device.type == part(memory, 0, 0).device.type == "cpu"


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


def _disk_store(tmp_path: Path):
    model, batch = make("stack")
    parts = partition(model, lambda: model(batch), torch.device("cpu"))
    return DiskStore(bind(model, parts).layers, tmp_path, Originals.KEPT), parts


def _whole(n_bytes: int) -> list[Piece]:
    return [Piece(0, 0, n_bytes)]


def _staging(device: Device, n_bytes: int) -> torch.Tensor:
    memory = anonymous(n_bytes)
    device.pin(memory)
    return memory


def test_what_is_read_is_copied_in_pieces(any_device: Device, tmp_path: Path) -> None:
    device = any_device
    store, parts = _disk_store(tmp_path)
    n_bytes = max(layer.n_bytes for layer in parts.layers)
    staging, target = _staging(device, n_bytes), device.allocate(n_bytes)
    for layer in parts.layers:
        target.fill_(0)
        half = layer.n_bytes // 2
        read = device.read(store.regions([layer.index]), staging, [])
        pieces = [Piece(half, 0, layer.n_bytes - half), Piece(0, layer.n_bytes - half, half)]
        copied = device.copy_staged(read, staging, pieces, target, device.record())
        device.wait(copied)
        device.synchronize()
        assert device.finished(copied)
        rest = store.rest(layer.index)
        assert torch.equal(target.cpu()[: layer.n_bytes], torch.cat([rest[half:], rest[:half]]))
    store.close()


def test_one_place_of_staging_serves_many_reads_ahead_of_their_copies(any_device: Device, tmp_path: Path) -> None:
    """All is asked for at once: reads wait for the copies before them, copies for their reads, compute for copies."""
    device = any_device
    store, parts = _disk_store(tmp_path)
    staging = _staging(device, max(layer.n_bytes for layer in parts.layers))
    targets = [device.allocate(layer.n_bytes) for layer in parts.layers]
    for _ in range(3):
        emptied: list[object] = []
        copies = []
        for layer, target in zip(parts.layers, targets, strict=True):
            target.fill_(0)
            place = staging[: layer.n_bytes]
            read = device.read(store.regions([layer.index]), place, emptied)
            copied = device.copy_staged(read, place, _whole(layer.n_bytes), target, device.record())
            emptied = [copied]
            copies.append(copied)
        for layer, target, copied in zip(parts.layers, targets, copies, strict=True):
            device.wait(copied)
            assert torch.equal(target.cpu(), store.rest(layer.index))
    store.close()


def test_what_compute_made_is_sent_to_the_host_in_order(any_device: Device) -> None:
    device = any_device
    target = _staging(device, 3 * MIB)
    sources = []
    sent: list[object] = []
    for value in range(12):
        source = device.allocate(MIB)
        source.fill_(value)
        begin = value % 3 * MIB
        sent.append(device.send(source, target[begin : begin + MIB], device.record()))
        sources.append(source)
    for copied in sent:
        device.settle(copied)
        assert device.finished(copied)
    expected = torch.arange(9, 12, dtype=torch.uint8).repeat_interleave(MIB)
    assert torch.equal(target, expected)
    device.synchronize()
    assert device.seconds(sent[0].times.began, sent[-1].times.ended) > 0


def test_a_copy_waits_for_the_job_that_writes_its_source(any_device: Device, tmp_path: Path) -> None:
    device = any_device
    store, parts, _ = _store(device, tmp_path)
    done: list[int] = []

    def write(value: int) -> None:
        store.rest(0)[:8] = value
        done.append(value)

    target = device.allocate(parts.layers[0].n_bytes)
    for value in range(20):
        job = device.work(partial(write, value))
        device.wait(device.copy(store.regions([0]), target, device.record(), job))
        copied = target.clone()
        assert torch.equal(copied[:8].cpu(), torch.full((8,), value, dtype=torch.uint8))
    job.settle()
    device.synchronize()
    assert done == list(range(20))
    assert device.seconds(job.times.began, job.times.ended) >= 0
    store.close()


def test_a_failed_job_reaches_who_waits_for_its_copy(any_device: Device, tmp_path: Path) -> None:
    device = any_device
    store, parts, _ = _store(device, tmp_path)

    def fail() -> None:
        raise KeyError("in a job")

    target = device.allocate(parts.layers[0].n_bytes)
    failed = device.copy(store.regions([0]), target, device.record(), device.work(fail))
    with pytest.raises(KeyError, match="in a job"):
        device.wait(failed)
    device.wait(device.copy(store.regions([0]), target, device.record()))
    device.synchronize()
    assert torch.equal(target.cpu(), store.rest(0))
    store.close()


def test_only_tensors_of_a_host_device_can_be_added_to_the_host_s(any_device: Device) -> None:
    assert not any_device.is_host or any_device.torch_device.type == "cpu"
    assert any_device.is_host == isinstance(any_device, CpuDevice)


def test_a_failed_read_reaches_who_waits_for_its_copy_and_nobody_else(any_device: Device, tmp_path: Path) -> None:
    device = any_device
    store, parts = _disk_store(tmp_path)
    layer = parts.layers[0]
    staging, target = _staging(device, layer.n_bytes), device.allocate(layer.n_bytes)
    read = device.read([_Broken(layer.n_bytes)], staging, [])
    failed = device.copy_staged(read, staging, _whole(layer.n_bytes), target, device.record())
    again = device.read(store.regions([layer.index]), staging, [failed])
    copied = device.copy_staged(again, staging, _whole(layer.n_bytes), target, device.record())
    device.wait(copied)
    with pytest.raises(ReadError, match="layer 3 is gone"):
        device.wait(failed)
    device.synchronize()
    assert torch.equal(target.cpu(), store.rest(layer.index))
    store.close()


def test_a_read_lies_between_the_stamps_around_it(device: Device, tmp_path: Path) -> None:
    store, parts = _disk_store(tmp_path)
    n_bytes = parts.layers[0].n_bytes
    staging, target = _staging(device, n_bytes), device.allocate(n_bytes)
    before = device.stamp()
    device.synchronize()  # where there is a device's queue, what is stamped has happened then
    read = device.read(store.regions([0]), staging, [])
    copied = device.copy_staged(read, staging, _whole(n_bytes), target, device.record())
    device.wait(copied)
    after = device.stamp()
    device.synchronize()
    moments = [before, read.times.began, read.times.ended, copied.times.began, copied.times.ended, after]
    spans_s = [device.seconds(one, other) for one, other in pairwise(moments)]
    two_clocks_s = device.clock_error_s if isinstance(device, AcceleratorDevice) else 0.0
    assert all(span_s >= -two_clocks_s for span_s in spans_s)
    store.close()


class _Broken:
    """A region that cannot be read."""

    host = None

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def read_into(self, target: memoryview) -> None:
        raise ReadError("layer 3 is gone")


def test_a_reader_s_error_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    device = CpuDevice()

    event = device.copy([_Broken(8)], device.allocate(8))
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


def test_a_virtual_link_carries_both_ways_at_once() -> None:
    device = VirtualDevice(bytes_per_s=100.0, latency_s=1.0)
    source, target = device.allocate(200), torch.zeros(200, dtype=torch.uint8)
    device.spend(5.0)
    device.copy([], device.allocate(0), device.record())  # 5 + 1
    first = device.send(source, target, device.record())  # 5 + 1 + 2, beside the copy
    second = device.send(source[:100], target[:100], device.record())  # 8 + 1 + 1
    assert ((first.began, first.ended), (second.began, second.ended)) == ((5.0, 8.0), (8.0, 10.0))
    assert device.sends == [(5.0, 8.0, 200), (8.0, 10.0, 100)]
    device.settle(first)
    assert device.now_s == 8.0
    assert torch.equal(source, target)


def test_virtual_disk_is_exact() -> None:
    device = VirtualDevice(bytes_per_s=100.0, latency_s=1.0, disk_bytes_per_s=50.0, disk_latency_s=0.5)

    class Bytes:
        n_bytes = 100
        host = None

        def read_into(self, target: memoryview) -> None:
            target[:] = bytes(range(100))

    staging, target = device.allocate(100), device.allocate(100)
    device.spend(5.0)
    read = device.read([Bytes()], staging, [])  # 5 + 0.5 + 2
    copied = device.copy_staged(read, staging, _whole(100), target, device.record())  # 7.5 + 1 + 1
    again = device.read([Bytes()], staging, [copied])  # 9.5 + 0.5 + 2
    assert [(one.began, one.ended) for one in (read, copied, again)] == [(5.0, 7.5), (7.5, 9.5), (9.5, 12.0)]
    assert (device.reads, device.copies) == ([(5.0, 7.5, 100), (9.5, 12.0, 100)], [(7.5, 9.5, 100)])
    assert bytes(memory_of(target)) == bytes(range(100))


def test_choose_device_names_what_is_not_there() -> None:
    assert choose_device("cpu").info.kind == "cpu"
    mine = CpuDevice()
    assert choose_device(mine) is mine
    with pytest.raises(SettingError, match="rest on disk, and training updates them"):
        choose_device(mine, "training")
    in_ram = CpuDevice(slow_tier=Tier.HOST)
    assert choose_device(in_ram, "training") is in_ram
    assert choose_device("cpu").info.slow_tier is Tier.DISK
    assert choose_device("cpu", "training").info.slow_tier is Tier.HOST
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


def test_keeping_within_a_bound_changes_no_memory_that_is_in_use(any_device: Device) -> None:
    memory = any_device.allocate(MIB)
    memory.fill_(7)
    any_device.start_measuring()
    any_device.keep_within(0)()
    assert bool((memory == 7).all())


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
