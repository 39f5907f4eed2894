"""Weights mapped from files, with a host between them and the device: read where they are, never held twice."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.devices import CpuDevice, Device, VirtualDevice
from autosp.devices.memory import read_regions
from autosp.errors import ReadError
from autosp.partition import bind, partition
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.streamed_model import StreamedModel
from autosp.runtime.transfers import TransferGroup
from autosp.schedule.lowering import lower_for
from autosp.settings import settings
from autosp.spec import Candidate, Tier
from autosp.tiers import DiskStore, HostStore, Originals, Readers, forget_pages, open_store
from builders import quick
from mapped_models import map_weights, mapped_bytes, sharded_stack
from models import EarlyExit, vectors

pytest.importorskip("safetensors")

PLANS = {
    "k=1 k'=1": Candidate(k=1, k_prime=1),
    "k=4 k'=2": Candidate(k=4, k_prime=2),
    "residents": Candidate(k=4, k_prime=1, residents=(1, 3)),
    "all but one stay": Candidate(k=7, k_prime=1),
}


@pytest.fixture(params=["cpu", "virtual"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Weights rest in host memory, or behind it."""
    made = CpuDevice(slow_tier=Tier.HOST) if request.param == "cpu" else VirtualDevice(bytes_per_s=1e9)
    yield made
    made.close()


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A folder that cannot be made, so that nothing can be packed."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def streamed_on(
    device: Device, model: nn.Module, batch: Any, candidate: Candidate, folder: Path, readers: Readers | None = None
) -> StreamedModel[nn.Module]:
    """Every second group, and what is never visited, rests on disk."""
    parts = partition(model, lambda: call(model, batch), device.torch_device)
    groups = [*candidate.groups(parts.visits)[::2]]
    groups += [(layer.index,) for layer in parts.layers if layer.index not in parts.visits]
    on_disk = tuple(sorted(layer for group in groups for layer in group))
    candidate = candidate.model_copy(update={"on_disk": on_disk, "read_ahead": 2})
    bound = bind(model, parts)
    schedule = lower_for("inference", candidate, bound.partition)
    store = open_store(device, bound.stored(candidate.residents), folder, Originals.FREED, candidate.on_disk, readers)
    return StreamedModel(bound, schedule, device, store, Originals.FREED, store.close)


def plain(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return call(model, batch)


def addresses(model: nn.Module) -> dict[str, int]:
    """Where the weights are."""
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
def test_a_checkpoint_in_shards_is_read_where_it_is(
    candidate: Candidate, device: Device, nowhere: Path, tmp_path: Path
) -> None:
    model, batch = sharded_stack(tmp_path / "shards")
    expected, before = plain(model, batch), addresses(model)
    with streamed_on(device, model, batch, candidate, nowhere) as streamed:
        for _ in range(3):
            assert equal(call(streamed, batch), expected)
    assert addresses(model) == before  # maps again, all of them
    assert equal(plain(model, batch), expected)


def test_what_is_read_is_counted_and_no_more_is_read(device: Device, nowhere: Path, tmp_path: Path) -> None:
    model, batch = sharded_stack(tmp_path / "shards")
    counts: list[int] = []

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        counts.append(os.preadv(descriptor, buffers, offset))
        return counts[-1]

    streamed = streamed_on(device, model, batch, Candidate(k=2, k_prime=1), nowhere, Readers(read=counted))
    call(model, batch)
    device.synchronize()
    before, counted_before = streamed.stats(), sum(counts)
    for _ in range(3):
        call(model, batch)
    device.synchronize()
    after = streamed.stats()
    layers = streamed._bound.partition.layers
    resting = [layers[index] for index in streamed._disk_layers]
    assert all(layer.read_bytes > layer.n_bytes for layer in resting)
    assert after.read_bytes - before.read_bytes == 3 * sum(layer.read_bytes for layer in resting)
    assert after.link_bytes["disk->host"] == after.read_bytes
    assert after.moved_bytes - before.moved_bytes == 3 * sum(layer.n_bytes for layer in layers)
    weights = sum(layer.weight_bytes or 0 for layer in resting)
    assert 3 * weights <= sum(counts) - counted_before <= after.read_bytes - before.read_bytes
    streamed.remove()


def test_writes_at_rest_are_seen_by_the_next_pass(device: Device, nowhere: Path, tmp_path: Path) -> None:
    """On either tier, and what was written to stays written when the model is an ordinary one again."""
    model, batch = sharded_stack(tmp_path / "shards")
    twin, before = copy.deepcopy(model), addresses(model)
    streamed = streamed_on(device, model, batch, Candidate(k=2, k_prime=1), nowhere)
    layers, on_disk = streamed._bound.partition.layers, streamed._disk_layers
    resting = {layer.tensors[0] for layer in layers if layer.index in on_disk and layer.index % 5 == 0}
    moving = {layer.tensors[0] for layer in layers if layer.index not in on_disk and layer.index % 3 == 0}
    assert resting and moving
    for write in (lambda data: data.mul_(1.25), lambda data: data[..., :1].add_(0.5)):
        assert equal(call(model, batch), plain(twin, batch))
        for one in (model, twin):
            for name in resting | moving:
                write(one.get_parameter(name).data)
    assert equal(call(model, batch), plain(twin, batch))
    streamed.remove()
    assert equal(plain(model, batch), plain(twin, batch))
    moved = {name for name, address in addresses(model).items() if address != before[name]}
    assert moved == moving


@pytest.mark.parametrize("shard", ["one", "two"])
@pytest.mark.parametrize("fault", ["truncated", "written"])
def test_a_file_that_changes_is_an_error_before_the_next_pass(
    fault: str, shard: str, device: Device, nowhere: Path, tmp_path: Path
) -> None:
    model, batch = sharded_stack(tmp_path / "shards")
    streamed = streamed_on(device, model, batch, Candidate(k=2, k_prime=1), nowhere)
    call(model, batch)
    with (tmp_path / "shards" / f"{shard}.safetensors").open("r+b") as file:
        if fault == "truncated":
            file.truncate(5000)
        else:
            file.seek(-100, os.SEEK_END)
            file.write(b"other")
    for _ in range(2):
        with pytest.raises(ReadError, match=rf"{shard}\.safetensors (was written|has 5000 bytes).*remove\(\)"):
            call(model, batch)
    streamed.remove()


@pytest.mark.parametrize("every", ["some on disk", "all on the host"])
@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_goes_before_it_is_opened_leaves_the_model_as_it_was(
    how: str, every: str, device: Device, nowhere: Path, tmp_path: Path
) -> None:
    model, batch = sharded_stack(tmp_path / "shards")
    expected, before = plain(model, batch), addresses(model)
    bound = bind(model, partition(model, lambda: call(model, batch), device.torch_device))
    path = tmp_path / "shards" / "two.safetensors"
    if how == "replaced":
        (tmp_path / "other").write_bytes(path.read_bytes())
        (tmp_path / "other").replace(path)
    else:
        path.unlink()
    with pytest.raises(ReadError, match="two.safetensors was replaced since|cannot open .*two.safetensors, which wei"):
        open_store(device, bound.stored(), nowhere, Originals.FREED, (1, 2) if every == "some on disk" else ())
    assert addresses(model) == before
    assert equal(plain(model, batch), expected)


def test_the_host_has_mapped_weights_once(tmp_path: Path) -> None:
    model, batch = sharded_stack(tmp_path / "shards")
    expected, before = plain(model, batch), addresses(model)
    layers = bind(model, partition(model, lambda: call(model, batch), torch.device("cpu"))).layers
    path = tmp_path / "shards" / "one.safetensors"
    forget_pages(place.extent.source for bound in layers for place in bound.placed if place.extent.source)
    shared = mapped_bytes(str(path))  # of no extent alone
    assert shared < path.stat().st_size // 4
    device = CpuDevice(slow_tier=Tier.HOST)
    store = HostStore(layers, device)
    assert mapped_bytes(str(path)) == shared
    assert all(addresses(model)[name] != before[name] for bound in layers for name in bound.layer.tensors)
    assert equal(plain(model, batch), expected)
    model.head.bias.data.add_(1)
    store.close()
    assert mapped_bytes(str(path)) == shared
    moved = {name for name, address in addresses(model).items() if address != before[name]}
    assert moved == {"head.bias"}
    model.head.bias.data.sub_(1)
    device.close()


def test_a_plan_of_three_tiers_needs_no_cache_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = EarlyExit(blocks=8, width=384).eval(), vectors(4, 384)  # of 4.7 MB each
    map_weights(model, tmp_path / "weights")
    expected, before = plain(model, batch), addresses(model)
    device = CpuDevice(slow_tier=Tier.HOST)
    plan = autosp.tune(model, batch, 0.030, max_cpu_gb=0.008, device=device, progress=False, max_trials=3)
    assert plan.candidate.on_disk and plan.prediction is not None
    assert plan.prediction.host_bytes <= 8_000_000
    with autosp.apply(model, plan) as streamed:
        assert equal(plain(streamed, batch), expected)
    assert addresses(model) == before
    assert [path.name for path in settings().cache_dir.iterdir()] == ["locks"]
    device.close()


@quick
@given(data=st.data())
def test_any_extents_of_any_files_come_to_their_places(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Read as they lie in the files, in groups of any layers, and copied piece by piece."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("shards")
    sizes = data.draw(st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=4), min_size=1, max_size=4))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in sizes)
    for layer, counts in zip(model.layers, sizes, strict=True):
        for number, count in enumerate(counts):
            values = torch.arange(count).remainder(251).to(data.draw(dtypes))
            layer.register_parameter(f"p{number}", nn.Parameter(values, requires_grad=False))
    shard_of = {name: data.draw(st.integers(0, 2)) for name, _ in model.named_parameters()}  # 2: in no file
    for shard in range(2):
        names = [name for name, chosen in shard_of.items() if chosen == shard]
        save_file({name: model.get_parameter(name).data for name in names}, folder / str(shard))
        with safe_open(folder / str(shard), "pt") as file:
            for name in names:
                model.get_parameter(name).data = file.get_tensor(name)
    for layer in model.layers:
        layer.forward = lambda: None
    model.forward = lambda: [layer() for layer in model.layers]
    layers = bind(model, partition(model, model, torch.device("cpu"))).layers
    store = DiskStore(layers, folder / "cache", Originals.KEPT)
    begin = 0
    while begin < len(layers):
        count = data.draw(st.integers(1, len(layers) - begin))
        check_group([StreamedLayer(bound) for bound in layers[begin : begin + count]], store)
        begin += count
    store.close()


def check_group(layers: list[StreamedLayer], store: DiskStore) -> None:
    """Read it and copy its pieces; every extent is where the layer looks for it."""
    device = CpuDevice(slow_tier=Tier.HOST)
    n_bytes = sum(layer.layer.n_bytes for layer in layers)
    regions = store.regions([layer.layer.index for layer in layers])
    group = TransferGroup(tuple(layers), regions, device.allocate(n_bytes), 0, n_bytes, 0)
    staged = device.allocate(group.read_bytes)
    assert read_regions(regions, staged) == group.read_bytes
    for piece in group.pieces:
        group.target[piece.target : piece.target + piece.n_bytes] = staged[piece.source : piece.source + piece.n_bytes]
    for layer in layers:
        memory = group.place_of(layer)
        for place in layer._placed:
            assert torch.equal(memory[place.offset : place.offset + place.extent.n_bytes], place.current_bytes())
    device.close()


def test_neighbours_in_a_file_are_one_copy(tmp_path: Path) -> None:
    """So that a layer costs no copy per tensor."""
    torch.manual_seed(0)
    model, batch = EarlyExit(blocks=3, width=64).eval(), vectors()
    map_weights(model, tmp_path / "weights")
    bound = bind(model, partition(model, lambda: call(model, batch), torch.device("cpu")))
    for one in bound.layers:
        layer = StreamedLayer(one)
        group = TransferGroup((layer,), (), torch.empty(0), 0, layer.layer.n_bytes, 0)
        assert len(layer.pieces) == 2
        assert len(group.pieces) == 1
