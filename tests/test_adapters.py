"""LoRA adapters on a streamed model: there before the plan, put in after it, merged, switched off, taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from models import Stack, tokens

peft = pytest.importorskip("peft")

SETTINGS = [
    pytest.param({"k": 1, "k_prime": 1}, id="k=1 k'=1"),
    pytest.param({"k": 4, "k_prime": 1, "residents": 2}, id="ring and residents"),
]
BATCH = tokens(3, 11)


def base() -> nn.Module:
    """The same model at every call."""
    torch.manual_seed(0)
    return Stack().eval()


def wrapped(model: nn.Module, seed: int = 1, **changes: Any) -> nn.Module:
    """The model with a LoRA adapter on every block's linear layers, initialised so that it changes the output."""
    settings = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False, **changes}
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()


def injected(model: nn.Module, seed: int = 1) -> nn.Module:
    """The same adapter put into the model itself."""
    settings = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    torch.manual_seed(seed)
    return peft.inject_adapter_in_model(settings, model).eval()


def run(model: nn.Module) -> torch.Tensor:
    """One call without autograd."""
    with torch.no_grad():
        output = model(BATCH)
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("add", [wrapped, injected])
def test_adapters_before_the_plan(add: Callable[..., nn.Module], setting: dict[str, int]) -> None:
    model = add(base())
    expected = run(model)
    assert not equal(expected, run(base()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with autosp.apply(model, autosp.plan(model, BATCH, device="cpu", **setting)):
        for _ in range(3):
            assert equal(run(model), expected)
    assert equal(dict(model.state_dict()), state)
    assert equal(run(model), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("add", [wrapped, injected])
def test_adapters_after_apply(add: Callable[..., nn.Module], setting: dict[str, int]) -> None:
    model = base()
    expected = run(add(base()))
    streamed = autosp.apply(model, autosp.plan(model, BATCH, device="cpu", **setting))
    run(model)
    adapted = add(model)
    visits = streamed.stats().visits
    for _ in range(3):
        assert equal(run(adapted), expected)
    assert streamed.stats().visits > visits
    streamed.remove()
    assert equal(run(adapted), expected)
    assert all(not isinstance(vars(module).get("forward"), nn.Module) for module in adapted.modules())


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_adapter_switched_off_on_and_exchanged(setting: dict[str, int]) -> None:
    twin, model = wrapped(base()), base()
    streamed = autosp.apply(model, autosp.plan(model, BATCH, device="cpu", **setting))
    adapted = wrapped(model)
    for changed in (twin, adapted):
        torch.manual_seed(2)
        changed.add_adapter("second", peft.LoraConfig(r=8, target_modules=["up"], init_lora_weights=False))
    assert equal(run(adapted), run(twin))
    with adapted.disable_adapter():
        assert equal(run(adapted), run(base()))
    for name in ("second", "default"):
        adapted.set_adapter(name)
        twin.set_adapter(name)
        assert equal(run(adapted), run(twin))
    streamed.remove()
    assert equal(run(adapted), run(twin))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("when", ["before the plan", "after apply"])
def test_merging_while_streamed(when: str, setting: dict[str, int]) -> None:
    twin, model = wrapped(base()), base()
    plain = run(base())
    if when == "before the plan":
        model = wrapped(model)
    streamed = autosp.apply(model, autosp.plan(model, BATCH, device="cpu", **setting))
    adapted = model if when == "before the plan" else wrapped(model)
    expected = run(twin)
    assert equal(run(adapted), expected)
    for _ in range(2):
        for changed in (twin, adapted):
            changed.merge_adapter()
        assert equal(run(adapted), run(twin))
        for changed in (twin, adapted):
            changed.unmerge_adapter()
        assert equal(run(adapted), run(twin))
    streamed.remove()
    assert equal(run(adapted), run(twin))
    assert torch.allclose(run(adapted.unload()), plain, atol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_merged_and_unloaded_while_streamed(setting: dict[str, int]) -> None:
    expected = run(wrapped(base()).merge_and_unload())
    model = base()
    streamed = autosp.apply(model, autosp.plan(model, BATCH, device="cpu", **setting))
    adapted = wrapped(model)
    run(adapted)
    merged = adapted.merge_and_unload()
    for _ in range(2):
        assert equal(run(merged), expected)
    streamed.remove()
    assert equal(run(merged), expected)
    assert merged is model
    assert equal(run(copy.deepcopy(merged)), expected)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("add", [wrapped, injected])
def test_training_an_adapter(add: Callable[..., nn.Module], setting: dict[str, int]) -> None:
    """Frozen weights stream both ways of the pass; gradients leave of the adapters alone."""
    model = add(base()).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    plain = copy.deepcopy(model)
    plan = autosp.plan(model, BATCH, mode="training", step=loss_of, device="cpu", **setting)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    layers = plan.partition.layers
    assert all(layer.gradient_bytes == 0 for layer in layers if not trained.keys() & {*layer.tensors})
    with autosp.apply(model, plan):
        for one in (model, plain):
            optimizer = torch.optim.AdamW([one for one in one.parameters() if one.requires_grad], lr=1e-2)
            for _ in range(4):
                optimizer.zero_grad()
                loss_of(one, BATCH).backward()
                optimizer.step()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None) == (not mine.requires_grad)
            assert mine.grad is None or equal(mine.grad, theirs.grad)
    assert equal(dict(model.state_dict()), dict(plain.state_dict()))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss
