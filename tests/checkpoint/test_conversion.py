"""Conversions: right, resumable, shared, bounded in memory, and gone when nothing needs them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.checkpoint import cache, convert
from autosp.checkpoint.cache import converted, remove_unreferenced
from autosp.checkpoint.header import read_header
from autosp.checkpoint.source import find_checkpoint, open_tensors
from autosp.errors import CheckpointError, DiskFullError, TierError
from checkpoint_samples import BIG_BYTES, Rotary, big_model, big_state, conversions, files_of, is_mapped
from models import Stack, make
from processes import run, start

safetensors = pytest.importorskip("safetensors.torch")

HALF = torch.bfloat16


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """A saved Stack."""
    path = tmp_path / "weights.safetensors"
    safetensors.save_file(make("stack")[0].state_dict(), path)
    return path


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A saved `big_model`."""
    path = tmp_path / "big.safetensors"
    safetensors.save_file(big_state(), path)
    return path


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """Where `private_folders` put the cache."""
    return tmp_path / "cache"


def load_half(path: Path) -> nn.Module:
    return autosp.load(Stack, weights=path, dtype=HALF)


def the_conversion(cache_dir: Path) -> Path:
    (folder,) = conversions(cache_dir)
    return folder


def loads_half_right(path: Path) -> bool:
    """Whether the loaded model is the one that `.to` makes, over maps."""
    plain, batch = make("stack")
    loaded = load_half(path)
    with torch.no_grad():
        same = equal(loaded(batch), plain.to(HALF)(batch))
    return same and equal(dict(loaded.state_dict()), dict(plain.state_dict())) and files_of(loaded) == {cache.WEIGHTS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_model_is_the_one_that_to_makes(dtype: torch.dtype, tmp_path: Path, cache_dir: Path) -> None:
    plain = Rotary()
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({name: tensor.clone() for name, tensor in plain.state_dict().items()}, path)
    loaded = autosp.load(Rotary, weights=path, dtype=dtype)
    x = torch.rand(2, 8).to(dtype)
    with torch.no_grad():
        assert equal(loaded(x), plain.to(dtype)(x))
    assert all(is_mapped(parameter, the_conversion(cache_dir) / cache.WEIGHTS) for parameter in loaded.parameters())
    assert loaded.count.dtype is torch.int64
    assert loaded.frequencies.dtype is dtype  # in no checkpoint


def test_the_file_is_an_ordinary_one_whose_data_begins_at_a_page(stack: Path, cache_dir: Path) -> None:
    load_half(stack)
    weights = the_conversion(cache_dir) / cache.WEIGHTS
    expected = {name: tensor.to(HALF) for name, tensor in make("stack")[0].state_dict().items()}
    assert equal(safetensors.load_file(weights), expected)
    assert (8 + int.from_bytes(weights.read_bytes()[:8], "little")) % 4096 == 0
    assert list(read_header(weights)) == list(read_header(stack))  # the source's order
    assert sorted(path.name for path in weights.parent.iterdir()) == [
        "checksums.json",
        "lock",
        "model.safetensors",
        "source.json",
    ]


@pytest.mark.parametrize("chunk_bytes", [1 << 8, 1 << 26])
def test_torch_files_of_any_layout(chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "CHUNK_BYTES", chunk_bytes)
    base = torch.arange(120.0).reshape(10, 12)
    state = {
        "flag": torch.tensor([True]),
        "transposed": base.t(),
        "row": base[3],
        "same": base[3],
        "expanded": base[:, :1].expand(10, 5),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "half": base.half(),
        "conjugate": torch.complex(base, base).conj(),
        "parameter": nn.Parameter(base.double()),
    }
    torch.save(state, tmp_path / "weights.pt")
    checkpoint = find_checkpoint(tmp_path / "weights.pt")
    written: list[int] = []
    conversion = converted(checkpoint, open_tensors(checkpoint), {}, written.append)
    expected = {name: value.detach().resolve_conj() for name, value in state.items()}
    assert equal(safetensors.load_file(conversion.weights), expected)
    assert sum(written) == sum(value.nbytes for value in state.values())
    conversion.close()


def test_torch_files_and_their_index(tmp_path: Path) -> None:
    plain, batch = make("stack")
    state = plain.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    shards = tmp_path / "shards"
    shards.mkdir()
    weight_map = {name: f"part-{index % 2}.bin" for index, name in enumerate(state)}
    for shard in set(weight_map.values()):
        torch.save({name: state[name].clone() for name in state if weight_map[name] == shard}, shards / shard)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for weights in (tmp_path / "pytorch_model.bin", tmp_path, shards):
        loaded = autosp.load(Stack, weights=weights)
        with torch.no_grad():
            assert equal(loaded(batch), plain(batch))
        assert files_of(loaded) == {cache.WEIGHTS}


class Code:
    """Unpickled, it would call a function."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Code()}, "holds more than tensors, and loading it could run code: save the state dict alone"),
        ([torch.zeros(1)], "holds a list, not a state dict"),
        ({"epoch": 3, "model": {"a": torch.zeros(1)}}, "'epoch' is a int; save the state dict alone"),
        ({"a": torch.zeros(3).to_sparse()}, "tensor a is sparse or quantised"),
        ({"a": torch.zeros(3, dtype=torch.complex128)}, "tensor a has dtype torch.complex128, which safetensors does"),
    ],
)
def test_torch_files_that_cannot_be_used(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        autosp.load(nn.Identity, weights="weights.pt")
    assert not Path("executed").exists()


def test_torch_files_that_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="damaged, or in torch's old format"):
        autosp.load(Stack, weights=path)
    torch.save({"a": torch.zeros(300)}, path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="cannot be mapped: it is damaged"):
        autosp.load(Stack, weights=path)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from autosp.checkpoint.cache import converted
from autosp.checkpoint.source import find_checkpoint, open_tensors

checkpoint = find_checkpoint(Path(sys.argv[1]))
saved = open_tensors(checkpoint)
written = 0

def show(n_bytes):
    global written
    written += n_bytes
    if written > 80 * 2**20:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

converted(checkpoint, saved, {name: torch.bfloat16 for name in saved.tensors}, show)
"""

RESUMING = """
import sys, torch, autosp
from pathlib import Path
from checkpoint_samples import big_model

def written():
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "wchar" in line).split()[1])

before = written()
model = autosp.load(big_model, weights=sys.argv[1], dtype=torch.bfloat16)
print(written() - before)
"""


@pytest.mark.parametrize(("name", "returncode"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", -signal.SIGINT)])
def test_a_killed_conversion_goes_on(name: str, returncode: int, big: Path, cache_dir: Path) -> None:
    run(KILLED, big, name, returncode=returncode)
    folder = the_conversion(cache_dir)
    assert not (folder / cache.WEIGHTS).exists()
    noted = json.loads((folder / "journal").read_text().splitlines()[-1])["done_bytes"]
    assert noted >= convert.CHUNK_BYTES
    inode = (folder / "partial").stat().st_ino
    written = int(run(RESUMING, big))
    assert written < BIG_BYTES // 2 - noted + 2**20
    assert (folder / cache.WEIGHTS).stat().st_ino == inode
    assert sorted(path.name for path in folder.iterdir()) == [
        "checksums.json",
        "lock",
        "model.safetensors",
        "source.json",
    ]
    loaded = autosp.load(big_model, weights=big, dtype=HALF)
    assert equal(dict(loaded.state_dict()), {key: tensor.to(HALF) for key, tensor in big_state().items()})


@pytest.mark.parametrize("how", ["torn journal", "other journal", "truncated", "no partial"])
def test_a_partial_file_that_cannot_be_gone_on_from(how: str, big: Path, cache_dir: Path) -> None:
    run(KILLED, big, "SIGKILL", returncode=-signal.SIGKILL)
    partial, journal = the_conversion(cache_dir) / "partial", the_conversion(cache_dir) / "journal"
    if how == "torn journal":
        journal.write_text(journal.read_text() + '{"done_bytes": 1048576000, "crc')
    elif how == "other journal":
        journal.write_text('{"header_crc32": 0}\n{"done_bytes": 1048576, "crc32": {}}\n')
    elif how == "truncated":
        os.truncate(partial, 2**20)
    else:
        partial.unlink()
    loaded = autosp.load(big_model, weights=big, dtype=HALF)
    assert equal(dict(loaded.state_dict()), {key: tensor.to(HALF) for key, tensor in big_state().items()})


def test_two_processes_convert_once(big: Path, cache_dir: Path) -> None:
    both = [start(RESUMING, big) for _ in range(2)]
    written = sorted(int(program.says()) for program in both)
    assert written[0] < 2**20 < BIG_BYTES // 2 <= written[1]
    assert (the_conversion(cache_dir) / cache.WEIGHTS).exists()


def test_memory_while_converting_is_bounded(big: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from autosp.checkpoint import convert
from autosp.checkpoint.cache import converted
from autosp.checkpoint.source import find_checkpoint, open_tensors
from checkpoint_samples import AnonymousPeak

convert.CHUNK_BYTES = 4 * 2**20
torch.set_num_threads(1)
checkpoint = find_checkpoint(Path(sys.argv[1]))
saved = open_tensors(checkpoint)
peak = AnonymousPeak()
converted(checkpoint, saved, {name: torch.bfloat16 for name in saved.tensors}, peak.sample)
print(peak.growth_bytes)
"""
    assert int(run(code, big)) < 30 * 2**20  # of 200 MiB; a sample is taken while each chunk is held


def test_a_second_load_writes_nothing(stack: Path, cache_dir: Path) -> None:
    assert loads_half_right(stack)
    before = (the_conversion(cache_dir) / cache.WEIGHTS).stat()
    assert loads_half_right(stack)
    assert (the_conversion(cache_dir) / cache.WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("how", ["flipped", "truncated", "no checksums"])
def test_a_damaged_conversion_is_made_again(how: str, stack: Path, cache_dir: Path) -> None:
    load_half(stack)
    weights = the_conversion(cache_dir) / cache.WEIGHTS
    if how == "flipped":
        with weights.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"\xa5")
    elif how == "truncated":
        os.truncate(weights, weights.stat().st_size - 100)
    else:
        (weights.parent / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="was damaged since it was written: it is converted again"):
        assert loads_half_right(stack)


def test_a_damaged_conversion_that_is_in_use_is_told(
    stack: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "TRIES", 2, raising=False)
    model = load_half(stack)
    (the_conversion(cache_dir) / cache.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is damaged, and in use by a model of this process or of another one"):
        load_half(stack)
    del model
    assert loads_half_right(stack)


def test_a_conversion_that_another_makes_anew_and_keeps_is_used(
    stack: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_half(stack)
    (the_conversion(cache_dir) / cache.WEIGHTS).unlink()
    models: list[nn.Module] = []
    looking = cache._Lock(the_conversion(cache_dir))

    def make_it(_: float) -> None:
        looking.close()
        models.append(load_half(stack))

    monkeypatch.setattr(cache.time, "sleep", make_it)
    assert loads_half_right(stack)
    assert len(models) == 1


def test_a_conversion_that_was_only_touched_is_kept(stack: Path, cache_dir: Path) -> None:
    load_half(stack)
    weights = the_conversion(cache_dir) / cache.WEIGHTS
    inode = weights.stat().st_ino
    os.utime(weights)
    assert loads_half_right(stack)
    assert weights.stat().st_ino == inode
    assert json.loads((weights.parent / "checksums.json").read_text())["file"][1] == weights.stat().st_mtime_ns


def test_a_changed_source_is_converted_anew_and_the_old_conversion_goes(stack: Path, cache_dir: Path) -> None:
    load_half(stack)
    old = the_conversion(cache_dir)
    safetensors.save_file({name: tensor + 1 for name, tensor in Stack().state_dict().items()}, stack)
    loaded = load_half(stack)
    assert the_conversion(cache_dir) != old
    assert torch.equal(loaded.head.weight, safetensors.load_file(stack)["head.weight"].to(HALF))


def replaced_with_other_weights(path: Path) -> None:
    """Of the same size and age."""
    before = path.stat()
    other = path.with_name("other.safetensors")
    safetensors.save_file({name: tensor + 1 for name, tensor in safetensors.load_file(path).items()}, other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_source_of_the_same_size_and_age_is_another_one(stack: Path) -> None:
    load_half(stack)
    replaced_with_other_weights(stack)
    assert torch.equal(load_half(stack).head.weight, safetensors.load_file(stack)["head.weight"].to(HALF))


def test_a_source_that_is_replaced_once_it_is_mapped(stack: Path, cache_dir: Path) -> None:
    checkpoint = find_checkpoint(stack)
    saved = open_tensors(checkpoint)
    replaced_with_other_weights(stack)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors was changed while it was converted"):
        converted(checkpoint, saved, dict.fromkeys(saved.tensors, HALF), lambda _: None)
    assert list(conversions(cache_dir)) == []


def test_conversions_of_a_version_that_knew_less_of_their_sources_go(stack: Path, cache_dir: Path) -> None:
    load_half(stack)
    source = the_conversion(cache_dir) / "source.json"
    source.write_text(json.dumps([identity[:3] for identity in json.loads(source.read_text())]))
    remove_unreferenced()
    assert list(conversions(cache_dir)) == []


def test_what_is_unreferenced_goes_once_no_model_uses_it(stack: Path, cache_dir: Path) -> None:
    model = load_half(stack)
    leftover = cache_dir / "checkpoints" / ".removed-by-a-killed-process"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"")
    stack.unlink()
    remove_unreferenced()
    assert not leftover.exists()
    assert the_conversion(cache_dir).exists()  # held
    code = "from autosp.checkpoint.cache import remove_unreferenced; remove_unreferenced()"
    run(code)
    assert the_conversion(cache_dir).exists()  # other processes see that, too
    del model
    run(code)
    assert list(conversions(cache_dir)) == []


def test_an_unfinished_conversion_goes_with_its_source(big: Path, cache_dir: Path) -> None:
    run(KILLED, big, "SIGKILL", returncode=-signal.SIGKILL)
    remove_unreferenced()
    assert (the_conversion(cache_dir) / "partial").exists()
    big.unlink()
    remove_unreferenced()
    assert list(conversions(cache_dir)) == []


def test_a_source_that_changes_meanwhile(stack: Path, cache_dir: Path) -> None:
    checkpoint = find_checkpoint(stack)
    saved = open_tensors(checkpoint)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors was changed while it was converted"):
        converted(checkpoint, saved, dict.fromkeys(saved.tensors, HALF), lambda _: os.utime(stack))
    assert list(conversions(cache_dir)) == []


def test_a_full_disk_is_said_with_numbers_and_leaves_nothing(
    stack: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"takes \S+ GB \(\d+ bytes\) in .*, which has \S+ GB free; set"):
        load_half(stack)
    assert list(conversions(cache_dir)) == []


def test_a_cache_folder_that_cannot_be_written(stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOSP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(TierError, match="AUTOSP_CACHE_DIR"):
        load_half(stack)
    assert autosp.load(Stack, weights=stack).head.weight.dtype is torch.float32  # needs none


AS_NOBODY = """
import os, sys, torch, autosp
from autosp.errors import TierError
from models import Stack
autosp.load(Stack, weights=sys.argv[1], dtype=torch.bfloat16)  # loads all modules while they can still be read
os.setgid(65534)
os.setuid(65534)
model = autosp.load(Stack, weights=sys.argv[1], dtype=torch.bfloat16)
assert model.head.weight.dtype is torch.bfloat16
try:
    autosp.load(Stack, weights=sys.argv[1], dtype=torch.float16)
except TierError as error:
    print("AUTOSP_CACHE_DIR" in str(error))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody who may not write")
def test_a_finished_conversion_in_a_folder_that_may_not_be_written(
    stack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        monkeypatch.setenv("AUTOSP_CACHE_DIR", str(folder / "cache"))
        shutil.copy(stack, folder)
        (folder / stack.name).chmod(0o644)
        load_half(folder / stack.name)
        assert run(AS_NOBODY, folder / stack.name) == "True\n"


def test_loading_under_inference_mode_gives_countable_parameters(stack: Path) -> None:
    with torch.inference_mode():
        loaded = load_half(stack)
    assert not any(parameter.is_inference() for parameter in loaded.parameters())
    autosp.plan(loaded, make("stack")[1], k=2, k_prime=1, device="cpu")
