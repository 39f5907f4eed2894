"""Weights that are read from the file they are mapped from: right bytes, nothing written, and every fault is said."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from autosp.batch import call
from autosp.devices import CpuDevice
from autosp.devices.memory import memory_of
from autosp.errors import ReadError, TierError
from autosp.partition import BoundLayer, bind, partition
from autosp.spec import Tier
from autosp.tiers import DiskStore, Originals, Readers
from mapped_models import mapped_stack
from models import make
from processes import run

pytest.importorskip("safetensors")


def bound_layers(model: nn.Module, batch: torch.Tensor) -> tuple[BoundLayer, ...]:
    parts = partition(model, lambda: call(model, batch), torch.device("cpu"), slow_tier=Tier.DISK)
    return bind(model, parts, Tier.DISK).layers


def loaded(store: DiskStore, bound: BoundLayer) -> torch.Tensor:
    """The layer as a pass would get it."""
    memory = CpuDevice().allocate(bound.layer.n_bytes)
    done = 0
    for region in store.regions([bound.layer.index]):
        region.read_into(memory_of(memory[done : done + region.n_bytes]))
        done += region.n_bytes
    assert done == bound.layer.n_bytes
    return memory


def is_right(store: DiskStore, layers: tuple[BoundLayer, ...]) -> bool:
    """Whether every layer loads as the bytes that its tensors have."""
    return all(
        torch.equal(memory[place.offset : place.offset + place.extent.n_bytes], place.current_bytes())
        for bound in layers
        for memory in [loaded(store, bound)]
        for place in bound.placed
    )


@pytest.mark.parametrize("originals", list(Originals))
def test_layers_in_place_load_right_and_need_no_cache_folder(originals: Originals, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    layers = bound_layers(model, batch)
    (tmp_path / "file").write_text("")
    store = DiskStore(layers, tmp_path / "file" / "no folder can be here", originals)
    assert is_right(store, layers)
    store.close()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize("originals", list(Originals))
def test_a_mixed_layer_is_read_from_both_files(originals: Originals, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    model.blocks[2].up.bias.data = torch.ones(256)
    expected = call(model, batch)
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path / "cache", originals)
    assert list((tmp_path / "cache").iterdir()) == []
    assert is_right(store, layers)
    with torch.no_grad():
        model.blocks[2].up.bias.mul_(2)
        model.blocks[2].up.weight.mul_(2)
    assert is_right(store, layers) == (originals is Originals.FREED)  # what was packed and kept rests in two places
    store.close()
    with torch.no_grad():
        model.blocks[2].up.bias.div_(2)
        model.blocks[2].up.weight.div_(2)
    assert torch.equal(call(model, batch), expected)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda weight: weight.detach().mul_(2),
    ".data": lambda weight: weight.data.mul_(2),
    "one element, numpy": lambda weight: weight.detach().numpy().reshape(-1).__setitem__(1234, 5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_at_rest_is_in_the_next_load(write: Callable[[torch.Tensor], object], tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    checksum = zlib.crc32((tmp_path / "weights").read_bytes())
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path / "cache", Originals.FREED)
    for weight in (model.blocks[2].up.weight, model.blocks[3].down.weight, model.blocks[2].up.weight):
        write(weight)
        assert is_right(store, layers)
    store.close()
    assert zlib.crc32((tmp_path / "weights").read_bytes()) == checksum


def test_windows_cover_the_files_without_their_checks(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    model.blocks[2].up.weight.data = torch.ones(256, 64)
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path / "cache", Originals.KEPT)
    whole = torch.cat([loaded(store, bound)[: -bound.layout.padding_bytes or None] for bound in layers])
    whole = torch.cat([whole, whole])
    memory = CpuDevice().allocate(65536)
    for begin in range(0, len(whole) - 65536, 16384):
        window = store.window(begin + 77, 65536)
        assert window.n_bytes == 65536
        window.read_into(memory_of(memory))
        assert torch.equal(memory, whole[begin : begin + 65536])
    store.close()


def test_a_disk_that_reads_short_refuses_o_direct_and_fails_twice(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    layers = bound_layers(model, batch)
    calls = [0]

    def poor(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls[0] += 1
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if calls[0] % 5 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, [buffers[0][: 4096 + 77 * (calls[0] % 3)]], offset)

    store = DiskStore(layers, tmp_path / "cache", Originals.KEPT, Readers(read=poor))
    assert is_right(store, layers)
    assert calls[0] > 100
    store.close()


def test_a_disk_that_always_fails_is_an_error_with_file_layer_and_place(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    layers = bound_layers(model, batch)

    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = DiskStore(layers, tmp_path / "cache", Originals.KEPT, Readers(read=broken))
    with pytest.raises(ReadError, match=rf"weights: reading layer {layers[1].layer.name} failed at byte \d+: Input"):
        loaded(store, layers[1])
    store.close()


def test_signals_do_not_disturb_reads(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path / "cache", Originals.KEPT)
    rung = [0]
    before = signal.signal(signal.SIGALRM, lambda *_: rung.__setitem__(0, rung[0] + 1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        while rung[0] < 20:
            assert is_right(store, layers)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    store.close()


@pytest.mark.parametrize("fault", ["truncated", "written", "written, its time set back"])
def test_a_file_that_changes_is_an_error_with_file_and_layer(fault: str, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path / "cache", Originals.KEPT)
    store.check()
    times = (tmp_path / "weights").stat()
    with (tmp_path / "weights").open("r+b") as file:
        if fault == "truncated":
            file.truncate(5000)
        else:
            file.seek(times.st_size - 100)
            file.write(b"other")
    if fault == "written, its time set back":
        os.utime(tmp_path / "weights", ns=(times.st_atime_ns, times.st_mtime_ns))
    named = max(layers, key=lambda bound: bound.layout.runs[-1].offset)
    with pytest.raises(ReadError, match=rf"weights .*layer {named.layer.name}.*(truncated|remove\(\))"):
        loaded(store, named)
    with pytest.raises(ReadError, match=r"weights (was written|has 5000 bytes).*remove\(\)"):
        store.check()
    store.close()


@pytest.mark.parametrize("how", ["replaced", "removed", "linked"])
def test_a_file_replaced_at_its_path_is_the_old_one_for_us(how: str, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path / "cache", Originals.KEPT)
    if how == "replaced":
        (tmp_path / "other").write_bytes(b"other weights")
        (tmp_path / "other").replace(tmp_path / "weights")
    elif how == "removed":
        (tmp_path / "weights").unlink()
    else:
        (tmp_path / "another name").hardlink_to(tmp_path / "weights")
    store.check()
    assert is_right(store, layers)
    store.close()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_goes_before_the_store_opens_it(how: str, tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    layers = bound_layers(model, batch)
    if how == "replaced":
        (tmp_path / "other").write_bytes((tmp_path / "weights").read_bytes())
        (tmp_path / "other").replace(tmp_path / "weights")
    else:
        (tmp_path / "weights").unlink()
    with pytest.raises(ReadError, match="weights was replaced since|cannot open .*weights, which weights are mapped"):
        DiskStore(layers, tmp_path / "cache", Originals.KEPT)
    packed = bound_layers(model, batch)
    store = DiskStore(packed, tmp_path, Originals.KEPT)
    assert is_right(store, packed)
    store.close()


def corrupt(store: DiskStore, layer: int, *, keep_times: bool) -> None:
    """Change a byte of a layer in the packed file: as a bad disk does if `keep_times`, else as a program does."""
    (region,) = store.regions([layer])
    path = f"/proc/self/fd/{region.pack.file.descriptor}"
    times = Path(path).stat()
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, b"\x55\xaa", region.offset + 1000)
    os.close(descriptor)
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_corrupted_packed_layer_is_an_error_with_file_and_layer(tmp_path: Path) -> None:
    layers = bound_layers(*make("stack"))
    store = DiskStore(layers, tmp_path, Originals.KEPT)
    corrupt(store, 2, keep_times=True)
    name = layers[2].layer.name
    for _ in range(2):
        with pytest.raises(ReadError, match=rf"packed-\w+\.autosp: the checksum of layer {name} .* AUTOSP_CACHE_DIR"):
            loaded(store, layers[2])
    loaded(store, layers[1])
    store.close()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_packed_layer_written_at_rest_before_its_first_load_is_right(
    write: Callable[[torch.Tensor], object], tmp_path: Path
) -> None:
    model, batch = make("stack")
    layers = bound_layers(model, batch)
    store = DiskStore(layers, tmp_path, Originals.FREED)
    write(model.blocks[2].up.weight)
    assert is_right(store, layers)
    store.close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TierError, match="AUTOSP_CACHE_DIR"):
        DiskStore(bound_layers(*make("stack")), tmp_path / "file", Originals.KEPT)


def test_a_process_killed_while_packing_leaves_nothing(tmp_path: Path) -> None:
    """It kills itself when the first layer's bytes are asked for, which is in the middle of packing."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from autosp.tiers import DiskStore, Originals
        from models import make
        from test_in_place import bound_layers

        class Deadly(tuple):
            def __iter__(self):
                assert os.listdir(sys.argv[1]) == []
                os.kill(os.getpid(), signal.SIGKILL)

        layers = bound_layers(*make("stack"))
        object.__setattr__(layers[3].layout, "packed", Deadly(layers[3].layout.packed))
        DiskStore(layers, Path(sys.argv[1]), Originals.KEPT)
    """
    folder = tmp_path / "cache"
    run(script, folder, returncode=-signal.SIGKILL)
    assert list(folder.iterdir()) == []
