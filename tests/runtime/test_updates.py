"""Updates beside the next forward: the bits of an ordinary loop, and nobody sees a weight half updated."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import VirtualDevice
from autosp.errors import SettingError
from autosp.schedule.actions import Kind
from autosp.spec import Candidate
from models import make, tokens
from trained import PLANS, Apply, assert_same_gradients, assert_same_weights, backward, loss_of, loss_step, twins
from updated import OPTIMIZERS, RESETS, Held, loop, scaled_loop

PLAN_NAMES = list(PLANS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_of_a_whole_step(name: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    optimizer, expected = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    plan = PLAN_NAMES[list(OPTIMIZERS).index(name) % len(PLANS)]
    streamed = apply(model, batch, PLANS[plan], optimizer=optimizer)
    loop(model, optimizer, batch)
    loop(plain, expected, batch)
    assert equal(optimizer.state_dict()["state"], expected.state_dict()["state"])
    assert_same_weights(model, plain)
    streamed.remove()
    loop(model, optimizer, batch, 2)
    loop(plain, expected, batch, 2)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("before", [1, 3])
def test_state_that_is_reset_after_a_step_stays_so(before: int, reset: str, apply: Apply) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    optimizers = [OPTIMIZERS["adam"](one) for one in (model, plain)]
    apply(model, batch, PLANS["k=3 k'=1"], optimizer=optimizers[0])
    for steps in (before, 2, 1):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            for step in range(steps):
                backward(one, batch, step)
                optimizer.step()
                optimizer.zero_grad()
            RESETS[reset](optimizer)
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        backward(one, batch)
        optimizer.step()
    assert equal(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])
    assert_same_weights(model, plain)


@pytest.mark.parametrize("name", ["tied", "shared", "borrowed", "fused_views", "fast_path", "convolutions"])
def test_any_model(name: str, apply: Apply) -> None:
    model, batch = make(name)
    model, plain = twins(model)
    optimizers = [OPTIMIZERS["adam"](one) for one in (model, plain)]
    apply(model, batch, PLANS["k=3 k'=1"], optimizer=optimizers[0])
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        loop(one, optimizer, batch)
    assert_same_weights(model, plain)


class Pair:
    """A model whose updates have not begun though `step()` returned, and its plain twin after the same step."""

    def __init__(self, apply: Apply, plan: str = "k=3 k'=1", optimizer: str = "adam") -> None:
        model, self.batch = make("stack")
        self.model, self.plain = twins(model)
        self.device = Held()
        self.optimizer, self.expected = OPTIMIZERS[optimizer](self.model), OPTIMIZERS[optimizer](self.plain)
        self.streamed = apply(self.model, self.batch, PLANS[plan], device=self.device, optimizer=self.optimizer)

    def step(self) -> None:
        """Both; the updates of the streamed one are held."""
        backward(self.plain, self.batch)
        self.expected.step()
        backward(self.model, self.batch)
        self.device.hold()
        self.optimizer.step()
        assert self.under_way()

    def under_way(self) -> bool:
        held = (one for module in self.model.modules() for one in module._parameters.values())
        return any(type(one) is not nn.Parameter for one in held if one is not None)


@pytest.fixture
def pair(apply: Apply) -> Pair:
    made = Pair(apply)
    made.step()
    return made


def averaged(model: Any, _: Any) -> Any:
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(64, 500))
    average.n_averaged.fill_(1)
    average.module.load_state_dict({"weight": torch.ones(500, 64), "bias": torch.ones(500)})
    average.update_parameters(model.head)
    return list(average.parameters())


def written(model: Any, _: Any) -> None:
    with torch.no_grad():
        model.head.weight.mul_(2)


Use = Callable[[Any, torch.optim.Optimizer], Any]
USES: dict[str, Use] = {
    "read": lambda model, _: model.head.weight.detach().clone(),
    "data": lambda model, _: model.blocks[3].up.weight.data.clone(),
    "as numpy": lambda model, _: torch.from_numpy(model.head.weight.detach().numpy().copy()),
    "one element": lambda model, _: model.head.weight[3, 5].item(),
    "norms": lambda model, _: torch._foreach_norm(list(model.parameters())),
    "gradient": lambda model, _: model.head.weight.grad.clone(),
    "clipping": lambda model, _: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "state dict": lambda model, _: {name: one.clone() for name, one in model.state_dict().items()},
    "the optimizer's state dict": lambda _, optimizer: copy.deepcopy(optimizer.state_dict()),
    "the state of one": lambda model, optimizer: copy.deepcopy(dict(optimizer.state[model.head.weight])),
    "a copy of one": lambda model, _: copy.deepcopy(model.head.weight),
    "a pickle of one": lambda model, _: pickle.loads(pickle.dumps(model.head.weight)),
    "an average": averaged,
    "a write": written,
    "gradients to zero": lambda model, _: model.zero_grad(set_to_none=False),
    "a load": lambda _, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "a sub-module's forward": lambda model, _: model.blocks[2](torch.ones(2, 64)),
    "a whole pass": lambda model, _: model(tokens(2, 5)),
}


@pytest.mark.parametrize("name", USES)
def test_whatever_uses_a_weight_waits(name: str, pair: Pair) -> None:
    use = USES[name]
    pair.device.release_soon()
    assert equal(use(pair.model, pair.optimizer), use(pair.plain, pair.expected))
    assert_same_weights(pair.model, pair.plain)
    for _ in range(2):
        pair.device.release_soon()
        pair.step()
        pair.device.release_soon()
        assert_same_gradients(pair.model, pair.plain)
    assert_same_weights(pair.model, pair.plain)


def test_letting_gradients_go_waits_for_nothing(pair: Pair) -> None:
    pair.optimizer.zero_grad()
    pair.model.zero_grad()
    pair.model.head.weight.grad = None
    assert pair.model.head.weight.grad is None
    assert pair.under_way()
    pair.device.release_soon()
    assert all(one.grad is None for one in pair.model.parameters())
    assert not pair.under_way()
    assert_same_weights(pair.model, pair.plain)


def test_a_forward_waits_layer_by_layer(pair: Pair) -> None:
    """Of a pass that leaves layers out, those are still under way at its end."""
    pair.device.release_soon()
    with torch.no_grad():
        assert equal(pair.model.embed(pair.batch), pair.plain.embed(pair.batch))
    assert type(pair.model.embed.__dict__["_parameters"]["weight"]) is nn.Parameter
    assert pair.under_way()
    assert_same_weights(pair.model, pair.plain)


def test_removal_waits(pair: Pair) -> None:
    pair.device.release_soon()
    pair.streamed.remove()
    assert not pair.under_way()
    assert_same_weights(pair.model, pair.plain)
    assert "zero_grad" not in pair.model.__dict__
    assert "zero_grad" not in pair.optimizer.__dict__
    assert not pair.optimizer._optimizer_step_pre_hooks
    assert not pair.optimizer._optimizer_step_post_hooks


def test_a_copy_of_the_model_is_a_model_of_its_own(pair: Pair) -> None:
    pair.device.release_soon()
    copied = copy.deepcopy(pair.model)
    assert_same_weights(copied, pair.plain)
    copied.zero_grad()
    assert pair.model.head.weight.grad is not None
    assert all(one.grad is None for one in copied.parameters())


def test_a_graph_of_before_the_step_is_refused_as_torch_does(apply: Apply) -> None:
    pair = Pair(apply)
    loss = loss_of(pair.model(pair.batch))
    loss.backward(retain_graph=True)
    pair.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_the_user_see_an_ordinary_step(apply: Apply) -> None:
    """Whenever they were registered: gradients before it, updated weights after it."""
    seen: list[list[Any]] = []
    for streamed in (True, False):
        model, batch = make("stack")
        optimizer = OPTIMIZERS["sgd"](model.train())
        log: list[Any] = []

        def look(optimizer: Any, *_: Any, log: list[Any] = log) -> None:
            for one in optimizer.param_groups[0]["params"]:
                log.append((one.detach().clone(), one.grad.clone()))

        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
        if streamed:
            apply(model, batch, PLANS["residents"], optimizer=optimizer)
        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
        for step in range(3):
            backward(model, batch, step)
            optimizer.step()
        seen.append(log)
    assert equal(*seen)
    assert len(seen[0]) == 3 * 4 * len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adam", "adam fused"])
def test_a_scaler_s_steps(name: str, apply: Apply) -> None:
    """One of them is skipped; a fused optimizer skips it by itself."""
    pair = Pair(apply, "recompute some", name)
    both = (pair.model, pair.optimizer), (pair.plain, pair.expected)
    scales = [scaled_loop(model, optimizer) for model, optimizer in both]
    assert scales[0] == scales[1]
    assert_same_weights(pair.model, pair.plain)
    assert equal(pair.optimizer.state_dict()["state"], pair.expected.state_dict()["state"])


def test_an_update_that_fails(apply: Apply) -> None:
    """The next pass says so, once; what comes after it in its step is not updated, and the next step is right."""
    pair = Pair(apply)
    for one, optimizer in ((pair.model, pair.optimizer), (pair.plain, pair.expected)):
        backward(one, pair.batch)
        optimizer.step()
    weight = pair.model.blocks[2].down.weight
    before = [one.clone() for one in pair.model.blocks[2:].parameters() if one.ndim > 1]
    right = pair.optimizer.state[weight]["exp_avg"]
    saved = copy.deepcopy((pair.expected.state_dict(), pair.plain.state_dict()))
    pair.optimizer.state[weight]["exp_avg"] = torch.zeros(3)
    pair.optimizer.step()
    with pytest.raises(RuntimeError, match="size of tensor"):
        pair.model(pair.batch)
    after = [one.clone() for one in pair.model.blocks[2:].parameters() if one.ndim > 1]
    assert equal(before[1:], after[1:])
    assert not equal(before[0], after[0])
    pair.optimizer.state[weight]["exp_avg"] = right
    pair.optimizer.load_state_dict(saved[0])
    pair.model.load_state_dict(saved[1])
    for one, optimizer in ((pair.model, pair.optimizer), (pair.plain, pair.expected)):
        loop(one, optimizer, pair.batch, 3)
    assert_same_weights(pair.model, pair.plain)


def test_a_failure_is_told_at_removal_at_the_latest(apply: Apply) -> None:
    pair = Pair(apply)
    backward(pair.model, pair.batch)
    pair.optimizer.state[pair.model.head.weight].update(dict.fromkeys(("step", "exp_avg", "exp_avg_sq")))
    pair.optimizer.step()
    with pytest.raises((KeyError, TypeError)):
        pair.streamed.remove()
    assert equal(pair.model.head.weight, pair.plain.head.weight)
    assert not equal(pair.model.blocks[5].down.weight, pair.plain.blocks[5].down.weight)
    backward(pair.plain, pair.batch)
    assert_same_gradients(pair.model, pair.plain)


def test_a_step_that_raises_at_once_keeps_all_gradients(apply: Apply) -> None:
    """What stays on the device is updated by `step()` itself; here that fails, so nothing else is updated."""
    pair = Pair(apply)
    for one, optimizer in ((pair.model, pair.optimizer), (pair.plain, pair.expected)):
        backward(one, pair.batch)
        betas = optimizer.param_groups[0]["betas"]
        optimizer.param_groups[0]["betas"] = ("none", "none")
        with pytest.raises(TypeError):
            optimizer.step()
        optimizer.param_groups[0]["betas"] = betas
    assert_same_weights(pair.model, pair.plain)
    assert_same_gradients(pair.model, pair.plain)
    assert all(one.grad is not None for one in pair.model.parameters())
    for one in (pair.model, pair.plain):
        backward(one, pair.batch)
    assert_same_gradients(pair.model, pair.plain)
    assert pair.model.head.weight.grad is not None


@pytest.mark.parametrize("scheduled", ["before", "meanwhile", "never"])
def test_removal_gives_the_optimizer_its_own_step(scheduled: str, apply: Apply) -> None:
    """Also where a scheduler, which counts the steps, has put itself around it."""
    model, batch = make("stack")
    optimizer = OPTIMIZERS["adam"](model.train())
    if scheduled == "before":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = optimizer.__dict__.get("step")
    streamed = apply(model, batch, PLANS["k=3 k'=1"], optimizer=optimizer)
    if scheduled == "meanwhile":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        before = optimizer.__dict__["step"]
    streamed.remove()
    assert optimizer.__dict__.get("step") is before
    backward(model, batch)
    weight = model.head.weight.clone()
    optimizer.step()
    assert not equal(weight, model.head.weight)
    if scheduled == "meanwhile":
        scheduler.step()  # warns of steps that it did not see


def test_loads_wait_for_their_update_only(apply: Apply) -> None:
    """By the clock of a device whose jobs take a second each."""
    model, batch = make("stack")
    device = VirtualDevice(bytes_per_s=1e9, job_s=1.0)
    optimizer = OPTIMIZERS["adam"](model.train())
    streamed = apply(model, batch, Candidate(k=2, k_prime=1), device=device, optimizer=optimizer)
    backward(model, batch)
    optimizer.step()
    began_s = device.now_s
    device.copies.clear()
    with torch.no_grad():
        model(batch)
    starts = [start for start, _, _ in device.copies]
    assert starts == pytest.approx([began_s + 1.0 + number for number in range(14)], abs=0.1)
    steps = [span.action.layers[0] for span in streamed.timeline().of_kind(Kind.STEP)]
    assert sorted(steps) == sorted(streamed._executor.loader.group_of)


def test_a_group_of_microbatches_waits_layer_by_layer(apply: Apply) -> None:
    """As the pass of one batch does: see above."""
    model, batch = make("stack")
    model, plain = twins(model)
    device = VirtualDevice(bytes_per_s=1e9, job_s=1.0)
    optimizer, expected = OPTIMIZERS["adam"](model), OPTIMIZERS["adam"](plain)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1), device=device, optimizer=optimizer)
    for step in range(3):
        began_s = device.now_s
        device.copies.clear()
        streamed.backward_group([batch, batch + 1], loss_step)
        for one in (batch, batch + 1):
            loss_step(plain, one).backward()
        starts = [start for start, _, _ in device.copies[:14]]
        wanted = [began_s + 1.0 + number for number in range(14)] if step else [began_s] * 14
        assert starts == pytest.approx(wanted, abs=0.1)
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
    assert_same_weights(model, plain)


class Coupled(torch.optim.SGD):
    """Not torch's own step."""

    def step(self, closure: Any = None) -> None:
        """Nothing."""


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "lbfgs": (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS cannot be stepped layer by layer"),
    "a step of its own": (lambda model: Coupled(model.parameters(), lr=1.0), "Coupled cannot be stepped"),
    "of another model": (lambda _: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0), "holds no parameter"),
    "differentiable": (lambda model: torch.optim.SGD(model.parameters(), lr=1.0, differentiable=True), "differentia"),
    "none": (lambda _: "adam", "optimizer is a str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    model, batch = make("stack")
    make_it, message = REFUSED[name]
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=lambda m, b: loss_of(m(b)), device="cpu")
    with pytest.raises(SettingError, match=message):
        autosp.apply(model, plan, optimizer=make_it(model))
    plan = autosp.plan(model, batch, k=2, k_prime=1, device="cpu")
    with pytest.raises(SettingError, match="only training has an optimizer"):
        autosp.apply(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def test_a_closure_is_refused(apply: Apply) -> None:
    pair = Pair(apply)
    with pytest.raises(SettingError, match=r"step\(closure\) cannot be overlapped"):
        pair.optimizer.step(lambda: 1.0)


@pytest.mark.parametrize("setting", [{"k": 1}, {"k": 5, "residents": 3}, {"k": 14, "residents": 14}])
def test_by_the_public_names(setting: dict[str, int]) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    plan = autosp.plan(
        model, batch, k_prime=1, mode="training", step=lambda m, b: loss_of(m(b)), device="cpu", **setting
    )
    optimizers = [OPTIMIZERS["adam"](one) for one in (model, plain)]
    with autosp.apply(model, plan, optimizer=optimizers[0]):
        loop(model, optimizers[0], batch)
    loop(plain, optimizers[1], batch)
    assert_same_weights(model, plain)
