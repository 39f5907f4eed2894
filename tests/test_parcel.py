"""Models in the form in which they go to another process; here they stay in this one."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autosp.batch import call, equal
from autosp.devices.heap import trim_heap
from autosp.devices.memory import anonymous_bytes
from autosp.errors import DiskFullError, NotPicklableError, ReadError, TierError
from autosp.parcel import Parcel, open_parcel
from autosp.partition.mapped import locate
from autosp.partition.tensors import collect
from mapped_models import mapped_stack
from models import MAKERS, FusedViews, Tied, make


def sent(contents: Any, folder: Path) -> Any:
    """What arrives; the parcel is closed."""
    parcel = Parcel(contents, folder)
    try:
        return open_parcel(parcel.pickled, parcel.places, parcel.descriptor)
    finally:
        parcel.close()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_what_arrives_is_the_same_model(name: str, tmp_path: Path) -> None:
    model, batch = make(name)
    arrived, its_batch = sent((model, batch), tmp_path)
    with torch.no_grad():
        assert equal(call(arrived, its_batch), call(model, batch))
    assert list(arrived.state_dict()) == list(model.state_dict())
    assert list(tmp_path.iterdir()) == []


def test_what_shared_memory_shares_it_again(tmp_path: Path) -> None:
    tied = sent(Tied(), tmp_path)
    mine, theirs = collect(Tied()), collect(tied)
    assert [item.names for extent in theirs.extents for item in extent.tensors] == [
        item.names for extent in mine.extents for item in extent.tensors
    ]
    fused = sent(FusedViews(), tmp_path)
    assert len(collect(fused).extents) == len(collect(FusedViews()).extents)


def test_a_write_to_what_arrived_is_seen_by_nobody_else(tmp_path: Path) -> None:
    model, _ = make("stack")
    before = copy.deepcopy(model.state_dict())
    parcel = Parcel(model, tmp_path)
    first = open_parcel(parcel.pickled, parcel.places, parcel.descriptor)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    second = open_parcel(parcel.pickled, parcel.places, parcel.descriptor)
    parcel.close()
    assert equal(dict(model.state_dict()), dict(before))
    assert equal(dict(second.state_dict()), dict(before))


def test_weights_in_a_file_are_mapped_from_it_again(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights.safetensors")
    parcel = Parcel(model, tmp_path)
    assert os.fstat(parcel.descriptor).st_size < sum(tensor.nbytes for tensor in model.parameters())
    arrived = open_parcel(parcel.pickled, parcel.places, parcel.descriptor)
    parcel.close()
    extents, theirs = collect(model).extents, collect(arrived).extents
    locate(extents)
    locate(theirs)
    places = [extent.source and (extent.source.file, extent.source.offset) for extent in theirs]
    assert any(places)
    assert places == [extent.source and (extent.source.file, extent.source.offset) for extent in extents]
    assert equal(arrived(batch).detach(), model(batch).detach())


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    model, _ = mapped_stack(tmp_path / "weights.safetensors")
    parcel = Parcel(model, tmp_path)
    (tmp_path / "weights.safetensors").rename(tmp_path / "away")
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "away").read_bytes())
    with pytest.raises(ReadError, match=r"weights\.safetensors was replaced"):
        open_parcel(parcel.pickled, parcel.places, parcel.descriptor)
    parcel.close()


def test_ram_is_free_as_long_as_a_model_is_moved(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    n_bytes = sum(tensor.nbytes for tensor in model.parameters())
    trim_heap()  # what others left in it
    held = anonymous_bytes()
    parcel = Parcel(model, tmp_path)
    with parcel.moved(model):
        assert anonymous_bytes() < held - 0.9 * n_bytes
        assert all(torch.equal(tensor, before[name][1]) for name, tensor in model.named_parameters())
    parcel.close()
    assert anonymous_bytes() > held - 0.1 * n_bytes
    assert all(
        (id(tensor), True) == (before[name][0], torch.equal(tensor, before[name][1]))
        for name, tensor in model.named_parameters()
    )


def test_what_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    class Local(nn.Linear):
        """Of no module."""

    with pytest.raises(NotPicklableError, match=r"Local.*top of a module"):
        Parcel(Local(3, 3), tmp_path)
    with pytest.raises(NotPicklableError, match="lambda"):
        Parcel(lambda model, batch: model(batch), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TierError, match="AUTOSP_CACHE_DIR") as caught:
        Parcel(nn.Linear(3, 3), tmp_path / "file")
    assert not isinstance(caught.value, DiskFullError)
