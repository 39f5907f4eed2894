"""Where a model says that it is. torch's device without memory stands for an accelerator."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import nn

from autosp.partition.located import located

META = torch.device("meta")


def model() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 3)), nn.LayerNorm(3, dtype=torch.float64))


def test_a_pass_begins_with_a_parameter_on_the_device() -> None:
    made = model()
    running = True
    placed = located(made, META, lambda: running)
    own = list(made[0][0].parameters())
    assert [one.device.type for one in made.parameters()] == ["meta", *["cpu"] * 4]
    stand_in = next(made[0].parameters())
    assert (stand_in.device, stand_in.dtype, stand_in.numel()) == (META, torch.float32, 0)
    made[1].to(META)
    assert [one.device.type for one in made.parameters()] == ["meta", "cpu", "cpu", "meta"]
    assert {id(one) for one in made.parameters()} == {id(one) for one in (*own, *made[1].parameters())}
    running = False
    assert [id(one) for one in made.parameters()] == [id(one) for one in (*own, *made[1].parameters())]
    assert list(made.parameters(recurse=False)) == []
    running = True
    assert list(made.parameters(recurse=False)) == []
    for one in placed:
        one.remove()
    assert not any("parameters" in vars(module) for module in made.modules())


def test_a_copy_has_its_own_parameters() -> None:
    made = model()
    placed = located(made, META, lambda: True)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert [one.device.type for one in copied.parameters()] == ["cpu"] * 4
        assert {id(one) for one in copied.parameters()}.isdisjoint(id(one) for one in made.parameters())
        assert next(copied[0].parameters()) is copied[0][0].weight
    for one in placed:
        one.remove()
