"""What only an accelerator shows: two kinds of memory, streams, and what other libraries do with a model there.

`make test-simulated` runs these, and all others that need an accelerator, where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autosp
from autosp.batch import call, call_on, equal
from autosp.devices import AcceleratorDevice
from models import make, vectors
from trained import laid_otherwise, loss_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="torch sees no accelerator here"),
]


@pytest.fixture
def device() -> Iterator[AcceleratorDevice]:
    made = AcceleratorDevice()
    yield made
    made.close()


def twin_on(device: AcceleratorDevice, model: nn.Module) -> nn.Module:
    """The model on the accelerator, taking its batch from the host as a streamed one does."""
    twin = copy.deepcopy(model).to(device.torch_device)
    forward = twin.forward
    twin.forward = lambda *args, **kwargs: call_on(device.torch_device, forward, args, kwargs)
    return twin


def assert_same_gradients(model: nn.Module, twin: nn.Module) -> None:
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad.cpu(), other.grad.cpu()), name


class Positioned(nn.Embedding):
    """Makes its positions where its weight is, as BART does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(torch.arange(len(x), device=self.weight.device))


def mixed() -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64)) for _ in range(4))
    return nn.Sequential(Positioned(64, 64), *blocks)


class Asks(nn.Module):
    """Makes tensors where its first parameter is, and where other modules' weights are, as models of transformers do.

    `shift` is used from here alone; `first`, `table` and `norm` are called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.table = nn.Embedding(64, 64)
        self.shift = nn.Embedding(64, 64)
        self.blocks = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x), device=next(self.parameters()).device)
        rows += (x > 9).sum()  # what is written to must be in the right place from the start
        x = self.first(x.to(self.first.weight.device)) + self.table(rows)
        x = x + self.shift.weight[: len(x)] * torch.ones(1, 64, device=self.shift.weight.device)
        return self.norm(self.blocks(x).to(self.norm.weight.device))


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("ring", [{"k": 1, "k_prime": 1}, {"k": 3, "k_prime": 1, "residents": 1}])
def test_a_model_that_asks_where_its_weights_are(mode: Any, ring: dict[str, int], device: AcceleratorDevice) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(Asks(), nn.Linear(64, 64)), vectors()
    twin = twin_on(device, model)
    plan = autosp.plan(model, batch, device=device, mode=mode, step=loss_step if mode == "training" else None, **ring)
    assert {"0.first", "0.norm"} <= {layer.name for layer in plan.partition.layers}
    with autosp.apply(model, plan, device=device):
        for _ in range(2):
            if mode == "training":
                loss_step(model, batch).backward()
                loss_step(twin, batch).backward()
            else:
                with torch.no_grad():
                    assert equal(model(batch), twin(batch))
    assert_same_gradients(model, twin)
    assert not any("parameters" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tuned_under_autocast(dtype: torch.dtype, device: AcceleratorDevice) -> None:
    """What autocast converts depends on where a weight is: from the first look at the model on."""
    model = mixed()
    twin = twin_on(device, model)

    def step(model: nn.Module, batch: torch.Tensor) -> Any:
        with torch.no_grad(), torch.autocast(device.torch_device.type, dtype):
            return call(model, batch)

    plan = autosp.tune(model, vectors(), "4GB", step=step, device=device, max_trials=2, progress=False)
    with autosp.apply(model, plan, device=device):
        assert equal(step(model, vectors()), step(twin, vectors()))


@pytest.mark.parametrize("ring", [{"k": 3, "k_prime": 1, "residents": 1}, {"k": 12, "k_prime": 1}])
def test_passes_on_streams_of_the_user_s(ring: dict[str, int], device: AcceleratorDevice) -> None:
    """Nobody waits between them: not the host, nor one stream for another."""
    model = mixed()
    twin = twin_on(device, model)
    module = torch.get_device_module(device.torch_device)
    streams = [module.Stream(device.torch_device) for _ in range(2)]
    batch = vectors().to(device.torch_device)
    with torch.no_grad():
        expected = twin(batch)
    module.synchronize(device.torch_device)
    outputs = []
    with autosp.apply(model, autosp.plan(model, vectors(), device=device, **ring), device=device):
        for stream in (None, streams[0], streams[1], streams[0], None):
            with module.stream(stream):
                outputs.append(model(batch))
        module.synchronize(device.torch_device)
    assert all(equal(output, expected) for output in outputs)


class CheckpointsInside(nn.Module):
    """A layer that computes a part of itself again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=False)


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "stack": lambda: make("stack"),
    "tied": lambda: make("tied"),
    "laid otherwise": laid_otherwise,
    "checkpoints inside": lambda: (nn.Sequential(*(CheckpointsInside() for _ in range(40))), vectors()),
}


@pytest.mark.parametrize("residents", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, residents: int, device: AcceleratorDevice) -> None:
    """Of single passes, added up, and of a group."""
    model, batch = MODELS[name]()
    twin = twin_on(device, model.train())
    options: dict[str, Any] = {"mode": "training", "step": loss_step, "device": device, "group": 3}
    plan = autosp.plan(model, batch, k=3 + residents, k_prime=1, residents=residents, **options)
    with autosp.apply(model, plan, device=device) as streamed:
        assert streamed is model
        for _ in range(2):
            for one in (model, twin):
                loss_step(one, batch).backward()
            assert_same_gradients(model, twin)
        for one in (model, twin):
            one.zero_grad()
    streamed = autosp.apply(model, plan, device=device)
    try:
        streamed.backward_group([batch] * 3, loss_step)
        for _ in range(3):
            loss_step(twin, batch).backward()
        assert_same_gradients(model, twin)
    finally:
        streamed.remove()


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_layer_that_is_called_by_itself_takes_its_batch_from_the_host(mode: str, device: AcceleratorDevice) -> None:
    model = mixed().eval()
    twin = twin_on(device, model)
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = [call_on(device.torch_device, one, (x,), {}) for one in (twin[1][0], twin[2])]
    options: dict[str, Any] = {"mode": "training", "step": loss_step} if mode == "training" else {}
    plan = autosp.plan(model, vectors(), k=3, k_prime=1, residents=1, device=device, **options)
    with autosp.apply(model, plan, device=device), torch.no_grad():
        outputs = [model[1][0](x), model[2](x)]
        assert equal(outputs, expected)
        assert all(output.device == x.device for output in outputs)
        one_layer = nn.Sequential(nn.Linear(64, 64))
    plan = autosp.plan(one_layer, x, k=1, k_prime=1, device=device)
    twin = twin_on(device, one_layer)
    with autosp.apply(one_layer, plan, device=device), torch.no_grad():
        assert equal(one_layer(x), twin(x))


def test_evaluation_under_a_plan_for_training(device: AcceleratorDevice) -> None:
    """torch's fast path would take weights of layers that it does not call."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).train()
    batch = torch.randn(2, 5, 64)
    twin = twin_on(device, model)
    plan = autosp.plan(model, batch, k=3, k_prime=1, mode="training", step=loss_step, device=device)
    with autosp.apply(model, plan, device=device):
        for one in (model, twin):
            loss_step(one, batch).backward()
        assert_same_gradients(model, twin)
        with torch.no_grad():
            found, expected = (one.eval()(batch) for one in (model, twin))
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(found, expected)


def test_a_scaler_on_the_accelerator(device: AcceleratorDevice) -> None:
    """Its figures go to the host for the gradients there, and are waited for."""
    model, batch = make("stack")
    twin = twin_on(device, model.train())
    plan = autosp.plan(model, batch, k=3, k_prime=1, mode="training", step=loss_step, device=device)
    with autosp.apply(model, plan, device=device):
        for one in (model, twin):
            scaler = torch.amp.GradScaler(device.torch_device.type, init_scale=2.0**8)
            optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_step(one, batch).to(device.torch_device)).backward()
                scaler.unscale_(optimizer)
                scaler.update()
        assert_same_gradients(model, twin)


def test_an_optimizer_goes_on_before_under_and_after_a_plan(device: AcceleratorDevice) -> None:
    """Its state is where its parameters are; and a move of the model to the accelerator, as a trainer makes it, is none."""
    model, batch = make("stack")
    optimizer = torch.optim.Adam(model.parameters())
    options: dict[str, Any] = {"mode": "training", "step": loss_step, "device": device}
    plan = autosp.plan(model, batch, k=4, k_prime=1, residents=2, **options)

    def step() -> None:
        loss_step(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    for _ in range(2):
        with autosp.apply(model, plan, device=device):
            assert model.to(device.torch_device) is model
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu", device.torch_device.type}
            step()
            step()
        step()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


class Branches(nn.Module):
    """Computes one of two branches on a stream of its own, in the order that torch asks for."""

    def __init__(self, side: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))
        self.side = [side]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        main = torch.accelerator.current_stream()
        (side,) = self.side
        for one, other in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            side.wait_stream(main)
            first = one(x)
            with side:
                second = other(x)
            main.wait_stream(side)
            x = first + second
        return x

    def __deepcopy__(self, memo: Any) -> Branches:
        made = Branches(self.side[0])
        made.load_state_dict(self.state_dict())
        return made


@pytest.mark.parametrize("setting", [{"k": 4, "k_prime": 2}, {"k": 2, "k_prime": 1}], ids=str)
def test_streams_of_the_model_s_own(setting: dict[str, int], device: AcceleratorDevice) -> None:
    """What one stream waited for is there for another, and nothing is overwritten that another still reads."""
    torch.manual_seed(0)
    model = Branches(torch.get_device_module(device.torch_device).Stream(device.torch_device)).eval()
    batch = torch.randn(32, 256)
    twin = twin_on(device, model)
    with torch.no_grad():
        expected = twin(batch).cpu()
    plan = autosp.plan(model, batch, device=device, **setting)
    with autosp.apply(model, plan, device=device), torch.no_grad():
        outputs = [model(batch) for _ in range(3)]
    assert all(torch.equal(output.cpu(), expected) for output in outputs)


class Answer:
    """An output that nobody looks into."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Answering(nn.Linear):
    def forward(self, x: Any) -> Any:
        return Answer(super().forward(x.value if isinstance(x, Answer) else x))


def test_layers_that_hide_their_outputs_and_run_twice(device: AcceleratorDevice) -> None:
    """Each call gives a gradient: they are added to each other before what the user had is."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Answering(64, 64) for _ in range(4))).train()
    twin = copy.deepcopy(model).to(device.torch_device)
    batch = vectors()

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = (model(batch).value * model(2 * batch).value).square().mean()
        return loss

    plan = autosp.plan(model, batch, k=3, k_prime=1, mode="training", step=step, device=device)
    with autosp.apply(model, plan, device=device):
        for _ in range(3):
            step(model, batch.to(device.torch_device)).backward()
            step(twin, batch.to(device.torch_device)).backward()
        assert_same_gradients(model, twin)
