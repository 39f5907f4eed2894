"""The slow tier holds the bytes, and fails cleanly."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import autosp
from autosp.batch import call
from autosp.devices import CpuDevice
from autosp.devices.memory import memory_of
from autosp.errors import AutospError, DiskFullError, HostMemoryError, ReadError, TierError
from autosp.partition import bind, partition
from autosp.spec import Tier
from autosp.tiers import DiskStore, HostStore, Originals, Readers, TieredStore, host, open_store
from models import Headed, make, tokens


def _layers(name: str = "stack"):
    model, batch = make(name)
    parts = partition(model, lambda: call(model, batch), torch.device("cpu"))
    return model, bind(model, parts).layers


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_regions_and_rest_hold_every_layer_s_bytes(kind: str, tmp_path: Path) -> None:
    _, layers = _layers()
    expected = {placed: placed.current_bytes().clone() for bound in layers for placed in bound.placed}
    store = DiskStore(layers, tmp_path, Originals.KEPT) if kind == "disk" else HostStore(layers, CpuDevice())
    device = CpuDevice()
    for bound in layers:
        index, n_bytes = bound.layer.index, bound.layer.n_bytes
        memory = device.allocate(n_bytes)
        (region,) = store.regions([index])
        device.wait(device.copy([region], memory))
        for placed in bound.placed:
            window = slice(placed.offset, placed.offset + placed.extent.n_bytes)
            assert torch.equal(memory[window], expected[placed])
            assert torch.equal(store.rest(index)[window], expected[placed])
    device.close()
    store.close()


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_adjacent_layers_are_one_region_and_gaps_split(kind: str, tmp_path: Path) -> None:
    _, layers = _layers()
    store = DiskStore(layers, tmp_path, Originals.KEPT) if kind == "disk" else HostStore(layers, CpuDevice())
    assert len(store.regions([0, 1, 2])) == 1
    assert len(store.regions([0, 2, 3])) == 2
    assert sum(region.n_bytes for region in store.regions([0, 2, 3])) == sum(
        layers[index].layer.n_bytes for index in (0, 2, 3)
    )
    store.close()


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_a_write_at_rest_reaches_the_next_load(kind: str, tmp_path: Path) -> None:
    _, layers = _layers()
    store = DiskStore(layers, tmp_path, Originals.KEPT) if kind == "disk" else HostStore(layers, CpuDevice())
    device = CpuDevice()
    memory = device.allocate(layers[1].layer.n_bytes)
    store.rest(1)[:16].fill_(42)
    device.wait(device.copy(store.regions([1]), memory))
    assert bool((memory[:16] == 42).all())
    device.close()
    store.close()


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    _, layers = _layers()
    store = DiskStore(layers, tmp_path, Originals.KEPT)
    assert list(tmp_path.iterdir()) == []  # unlinked while open: a killed process leaves nothing either
    store.close()


def test_a_full_disk_is_a_typed_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = _layers()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"takes \S+ GB \(\d+ bytes\) in .* has \S+ GB free; set AUTOSP_CACHE_DIR"):
        DiskStore(layers, tmp_path, Originals.KEPT)
    assert list(tmp_path.iterdir()) == []
    plan = autosp.plan(model, tokens(3, 11), k=2, k_prime=1, device="cpu")
    before = model(tokens(3, 11))
    with pytest.raises(AutospError):
        autosp.apply(model, plan)
    assert torch.equal(model(tokens(3, 11)), before)


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    _, layers = _layers()
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="AUTOSP_CACHE_DIR"):
        DiskStore(layers, tmp_path / "file" / "cache", Originals.KEPT)


def test_a_truncated_file_names_the_layer(tmp_path: Path) -> None:
    _, layers = _layers()
    store = DiskStore(layers, tmp_path, Originals.KEPT)
    (region,) = store.regions([layers[-1].layer.index])
    memory = CpuDevice().allocate(region.n_bytes)
    os.truncate(f"/proc/self/fd/{region.pack.file.descriptor}", region.offset + 5000)
    with pytest.raises(ReadError, match=f"inside layer {layers[-1].layer.name} .* truncated"):
        region.read_into(memory_of(memory))


def test_io_errors_are_retried_then_reported(tmp_path: Path) -> None:
    _, layers = _layers()
    failures = [2]

    def flaky(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    store = DiskStore(layers, tmp_path, Originals.KEPT, Readers(read=flaky))
    (region,) = store.regions([0])
    device = CpuDevice()
    memory = device.allocate(region.n_bytes)
    device.wait(device.copy([region], memory))
    assert torch.equal(memory, store.rest(0))
    failures[0] = 100
    with pytest.raises(ReadError, match="reading layer embed failed at byte 0"):
        device.wait(device.copy([region], memory))
    device.close()
    store.close()


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_layers_that_moved_in_move_out_again_and_aliases_stay_valid(kind: str, tmp_path: Path) -> None:
    model, layers = _layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    store = DiskStore(layers, tmp_path, Originals.FREED) if kind == "disk" else HostStore(layers, CpuDevice())
    streamed = {named.name for bound in layers for place in bound.placed for named in place.extent.tensors}
    rests = {store.rest(bound.layer.index).untyped_storage().data_ptr() for bound in layers}
    alias = model.state_dict()  # a user's own, taken at rest
    for name, tensor in alias.items():
        assert (tensor.untyped_storage().data_ptr() in rests) == (name in streamed)
    store.close()
    for name, tensor in model.state_dict().items():
        assert tensor.untyped_storage().data_ptr() not in rests
        assert torch.equal(tensor, before[name])
        assert torch.equal(alias[name], before[name])


def test_moving_to_host_memory_never_holds_the_weights_twice() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(16)))  # 64 MiB
    batch = torch.ones(1, 1024)
    parts = partition(model, lambda: call(model, batch), torch.device("cpu"))
    device = CpuDevice()
    device.start_measuring()
    store = HostStore(bind(model, parts).layers, device)
    moved_in = device.peak_bytes()
    store.close()
    assert max(moved_in, device.peak_bytes()) < 32 * 2**20  # a second copy would be 64 MiB
    device.close()


def test_too_little_host_memory_is_said_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = _layers()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(host, "available_bytes", lambda: 10)
    with pytest.raises(HostMemoryError, match=r"host memory, of which 0\.00 GB are free"):
        HostStore(layers, CpuDevice())
    assert before == {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def test_available_memory_respects_the_container_s_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("3000\n")
    monkeypatch.setattr(host, "CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert host.available_bytes() == 2000
    (tmp_path / "max").write_text("max\n")
    assert host.available_bytes() > 10**6


@pytest.mark.parametrize(
    ("stat", "expected"),
    [
        ("anon 1000\nfile 2000\ninactive_file 1500\nactive_file 400\nfile_dirty 200\nfile_writeback 100\n", 3600),
        (
            "cache 9\ninactive_file 1\nactive_file 1\ndirty 2\nwriteback 0\n"
            "total_inactive_file 1500\ntotal_active_file 400\ntotal_dirty 200\ntotal_writeback 100\n",
            3600,
        ),
        ("inactive_file 8000\nactive_file 0\n", 5000),
        ("inactive_file 10\nfile_dirty 500\n", 2000),
        ("inactive_file max\n", 2000),
        ("inactive_file\n", 2000),
        ("", 2000),
    ],
    ids=["version 2", "version 1", "more than is used", "all unwritten", "no number", "no value", "empty"],
)
def test_page_cache_that_is_on_disk_already_takes_none_of_a_container_s_memory(
    stat: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text("5000\n")
    (tmp_path / "current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(host, "CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert host.available_bytes() == expected


def test_two_stores_as_one(tmp_path: Path) -> None:
    model, layers = _layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    device = CpuDevice(slow_tier=Tier.HOST)
    store = open_store(device, layers, tmp_path, Originals.FREED, on_disk=(1, 2))
    assert isinstance(store, TieredStore)
    regions = store.regions([0, 1, 2, 3])
    sizes = [bound.layer.n_bytes for bound in layers]
    assert [(region.n_bytes, region.host is None) for region in regions] == [
        (sizes[0], False),
        (sizes[1] + sizes[2], True),
        (sizes[3], False),
    ]
    for bound in layers:
        memory = device.allocate(bound.layer.n_bytes)
        device.wait(device.copy(store.regions([bound.layer.index]), memory))
        assert torch.equal(memory, store.rest(bound.layer.index))
    assert store.window(0, 4096).host is not None
    store.close()
    device.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_went_to_disk_comes_back_if_the_host_has_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers = _layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(host, "available_bytes", lambda: 10)
    with pytest.raises(HostMemoryError):
        open_store(CpuDevice(slow_tier=Tier.HOST), layers, tmp_path, Originals.FREED, on_disk=(1, 2))
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_rows_of_a_weight_rest_where_some_do(tmp_path: Path) -> None:
    """Also those of which the schedule does not say that they are on disk, because they are resident."""
    model = Headed().eval()
    parts = partition(model, lambda: model(tokens(2, 5)), torch.device("cpu"))
    first, *others = (layer.index for layer in parts.layers if layer.rows)
    bound = bind(model, parts)
    before = model.head.weight.detach().clone()
    device = CpuDevice(slow_tier=Tier.HOST)
    store = open_store(device, bound.stored([first]), tmp_path, Originals.FREED, others)
    assert all(region.host is None for region in store.regions(others))
    assert all(region.host is not None for region in store.regions([0]))
    assert torch.equal(model.head.weight, before)
    store.close()
    assert torch.equal(model.head.weight, before)
    device.close()
