"""Which weights can be read from the file they are mapped from, and how they lie in a layer's memory then."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from autosp.batch import call
from autosp.errors import PlanMismatchError, ReadError
from autosp.partition import bind, partition
from autosp.partition.mapped import locate
from autosp.partition.placed import lay_out
from autosp.partition.tensors import Extent, collect
from autosp.spec import Tier
from mapped_models import map_weights, mapped_stack
from models import make

pytest.importorskip("safetensors")

CPU = torch.device("cpu")


def located(model: nn.Module) -> dict[str, Extent]:
    """The model's extents by name, looked for in files."""
    extents = collect(model).extents
    locate(extents)
    return {extent.name: extent for extent in extents}


def test_every_mapped_weight_is_found_with_its_bytes_in_the_file(tmp_path: Path) -> None:
    model, _ = mapped_stack(tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    for name, extent in located(model).items():
        assert extent.source, name
        begin = extent.source.offset
        assert content[begin : begin + extent.n_bytes] == bytes(extent.raw().numpy())


def test_torch_s_own_maps_are_found_too(tmp_path: Path) -> None:
    model, _ = make("stack")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True, weights_only=True), assign=True)
    content = (tmp_path / "weights.pt").read_bytes()
    for extent in located(model).values():
        assert extent.source
        assert content[extent.source.offset :][: extent.n_bytes] == bytes(extent.raw().numpy())


def test_weights_in_ram_are_in_no_file() -> None:
    model, _ = make("stack")
    assert not any(extent.source for extent in located(model).values())


@pytest.mark.parametrize("write", ["in place", ".data", "numpy"])
def test_a_written_weight_is_not_in_place_and_the_others_still_are(write: str, tmp_path: Path) -> None:
    model, _ = mapped_stack(tmp_path / "weights")
    weight = model.blocks[3].up.weight
    with torch.no_grad():
        if write == "in place":
            weight[200, 7] = 1
        elif write == ".data":
            weight.data[200, 7] = 1
        else:
            weight.detach().numpy()[200, 7] = 1
    found = located(model)
    assert found["blocks.3.up.weight"].source is None
    assert found["blocks.2.up.weight"].source is not None


def test_written_pages_are_told_one_by_one(tmp_path: Path) -> None:
    model, _ = mapped_stack(tmp_path / "weights")
    source = located(model)["blocks.3.up.weight"].source
    assert source
    weight = model.blocks[3].up.weight.data.view(-1).view(torch.uint8)
    assert source.written() == []
    first = -source.address % mmap.PAGESIZE
    for page in (0, 1, 4):
        weight[first + page * mmap.PAGESIZE + 5] = 1
    page = mmap.PAGESIZE
    assert source.written() == [(first, first + 2 * page), (first + 4 * page, first + 5 * page)]
    weight[0] = weight[-1] = 1
    assert source.written()[0][0] == 0
    assert source.written()[-1][1] == source.n_bytes


@pytest.mark.parametrize("change", ["removed", "replaced", "shared"])
def test_a_map_whose_file_is_another_now_is_not_in_place(change: str, tmp_path: Path) -> None:
    model, _ = mapped_stack(tmp_path / "weights")
    if change == "removed":
        (tmp_path / "weights").unlink()
    elif change == "replaced":
        (tmp_path / "copy").write_bytes((tmp_path / "weights").read_bytes())
        (tmp_path / "copy").replace(tmp_path / "weights")
    else:
        n_bytes = model.head.weight.numel()
        shared = torch.from_file(str(tmp_path / "shared"), shared=True, size=n_bytes, dtype=torch.float32)
        model.head.weight.data = shared.view_as(model.head.weight)
        assert located(model)["head.weight"].source is None
        return
    assert not any(extent.source for extent in located(model).values())


def test_weights_at_odd_places_are_not_in_place(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(range(256)) * 64)
    with (tmp_path / "odd").open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    model = nn.Linear(16, 16, bias=False)
    for shift, in_place in ((0, True), (2, False), (4, True)):
        model.weight.data = torch.frombuffer(pages, dtype=torch.float32, count=256, offset=shift).view(16, 16)
        assert (located(model)["weight"].source is not None) == in_place


def test_a_truncated_file_is_said_before_a_page_of_it_is_touched(tmp_path: Path) -> None:
    model, _ = mapped_stack(tmp_path / "weights")
    os.truncate(tmp_path / "weights", 5000)
    with pytest.raises(ReadError, match=r"weights has 5000 bytes, but .* is mapped from its bytes .* was truncated"):
        located(model)


def test_a_layer_is_laid_out_as_its_file_with_the_rest_behind(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    model.blocks[2].up.bias.data = torch.ones(256)
    parts = partition(model, lambda: call(model, batch), CPU, slow_tier=Tier.DISK)
    layers = bind(model, parts, Tier.DISK).layers
    assert [bound.layer for bound in layers] == list(parts.layers)
    for bound in layers:
        layout = bound.layout
        ends = []
        for place in sorted(bound.placed, key=lambda place: place.offset):
            source = place.extent.source
            assert place.offset >= (ends[-1] if ends else 0)
            ends.append(place.offset + place.extent.n_bytes)
            assert (source is None) == (place.offset >= layout.run_bytes)
            if source:
                assert (place.offset - source.address) % 4096 == 0
                assert (place.offset - source.offset) % 4096 == 0
        assert ends[-1] <= bound.layer.n_bytes == layout.n_bytes
        weights = sum(place.extent.n_bytes for place in bound.placed)
        assert layout.run_bytes <= weights + 8192 * len(bound.placed)
        assert 0 <= layout.padding_bytes <= 12288 * len(bound.placed)
        assert len(layout.runs) <= 3
        assert all(len(run.sources) == 1 for run in layout.runs)
        assert all(run.offset % 4096 == run.n_bytes % 4096 == 0 for run in layout.runs)
    assert sum(len(bound.layout.packed) for bound in layers) == 1


def test_layers_with_tensors_alike_are_alike_wherever_their_files_have_them(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(65, 65) for _ in range(12)))
    map_weights(model[:6], tmp_path / "in one")
    for index in range(6, 12):
        map_weights(model[index], tmp_path / f"weights {index}")
    other = nn.Linear(65, 65)
    map_weights(other, tmp_path / "bias")
    model[3].bias = other.bias
    by_name = located(model)
    layouts = [lay_out([by_name[f"{index}.weight"], by_name[f"{index}.bias"]]) for index in range(12)]
    assert len({len(layout.runs) for layout in layouts}) == 2
    assert len({layout.run_bytes for layout in layouts}) > 1
    assert len({layout.n_bytes for layout in layouts}) == 1


def test_two_maps_of_the_same_bytes_do_not_share_memory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    map_weights(model[0], tmp_path / "weights")
    map_weights(model[1], tmp_path / "weights")
    layout = lay_out(list(located(model).values()))
    ranges = sorted((place.offset, place.offset + place.extent.n_bytes) for place in layout.placed)
    assert len(ranges) == 4
    assert all(end <= begin for (_, end), (begin, _) in zip(ranges, ranges[1:], strict=False))


def test_a_plan_holds_wherever_the_weights_are(tmp_path: Path) -> None:
    ram, batch = make("stack")
    mapped, _ = mapped_stack(tmp_path / "weights")
    packed = partition(ram, lambda: call(ram, batch), CPU, slow_tier=Tier.DISK)
    in_place = partition(mapped, lambda: call(mapped, batch), CPU, slow_tier=Tier.DISK)
    assert [layer.n_bytes for layer in packed.layers] != [layer.n_bytes for layer in in_place.layers]
    assert bind(mapped, packed, Tier.DISK).partition == in_place
    assert bind(ram, in_place, Tier.DISK).partition == packed
    behind = partition(mapped, lambda: call(mapped, batch), CPU)
    assert bind(mapped, in_place, Tier.HOST).partition == bind(mapped, packed, Tier.HOST).partition == behind
    assert bind(ram, behind, Tier.HOST).partition == packed
    assert [layer.n_bytes for layer in behind.layers] == [layer.n_bytes for layer in packed.layers]
    assert [layer.disk_bytes for layer in behind.layers] == [layer.n_bytes for layer in in_place.layers]


def test_a_plan_of_an_older_schema_is_checked_by_its_packed_sizes(tmp_path: Path) -> None:
    mapped, batch = mapped_stack(tmp_path / "weights")
    parts = partition(mapped, lambda: call(mapped, batch), CPU)
    old = parts.model_copy(
        update={"layers": tuple(layer.model_copy(update={"weight_bytes": None}) for layer in parts.layers)}
    )
    bind(mapped, old, Tier.DISK)
    wrong = old.layers[0].model_copy(update={"n_bytes": old.layers[0].n_bytes + 4096})
    with pytest.raises(PlanMismatchError, match="layer 0 .* the plan says"):
        bind(mapped, old.model_copy(update={"layers": (wrong, *old.layers[1:])}), Tier.DISK)
