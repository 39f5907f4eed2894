"""The systems that train a model whose weights, gradients or optimizer state are not all on the device.

Each is put on a model as its documentation tells a user to, on whatever device is here. Their settings on an
accelerator were written from their sources; on a processor all of them were tried.

DeepSpeed is no dependency of autosp's. Where it is installed beside autosp, in an environment made for that, it is
measured; elsewhere its rows say that it is not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peer_models import PeerModel
from torch import nn
from torch.optim import Optimizer

import autosp
from autosp.devices import Device
from autosp.spec import Plan

PLAIN = "plain"
TUNED = "autosp"

ADAMW = "AdamW"
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-2}),
    ADAMW: (torch.optim.AdamW, {"lr": 1e-4, "fused": True}),
}
"""On a processor the fastest that torch has and that every system takes: FSDP2 has no fused SGD."""


@dataclass(frozen=True)
class Setting:
    """What a system is given."""

    device: Device
    optimizer: str
    """A key of `OPTIMIZERS`."""
    plan: Plan | None = None
    """For autosp."""

    def optimizer_of(self, model: nn.Module) -> Optimizer:
        """torch's own."""
        kind, options = OPTIMIZERS[self.optimizer]
        return kind(model.parameters(), **options)


@dataclass(frozen=True)
class Trained:
    """A model under a system."""

    model: nn.Module
    """What a step calls."""
    optimizer: Optimizer
    """Whose state rests in memory."""
    update: Callable[[], None]
    """The optimizer's step; afterwards there are no gradients."""
    backward: Callable[[torch.Tensor], None] = field(default=torch.Tensor.backward)
    own_peak: Callable[[], int] | None = None
    """Peak bytes as the system counts them, which it does from when it was applied."""


Apply = Callable[[PeerModel, Setting], AbstractContextManager[Trained]]


@dataclass(frozen=True)
class System:
    """One row of the table."""

    title: str
    apply: Apply
    weights_at_rest: int = 0
    """How many copies of the weights are in host memory between steps. 0: weights, gradients and state are on the
    device, as far as a processor's memory can tell."""
    gradients_reserved: bool = False
    """Whether host memory for gradients is taken once. Else it is taken as they come."""
    distributed: bool = False
    """Whether it needs a process group, which has this process alone."""


@contextmanager
def process_group(device: Device, folder: Path) -> Iterator[None]:
    """Of this process alone."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    backend = dist.get_default_backend_for_device(device.torch_device)
    dist.init_process_group(backend, init_method=f"file://{folder.resolve() / 'group'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def trained_by(model: nn.Module, optimizer: Optimizer, **more: Any) -> Trained:
    """A model whose loop is plain torch's."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Trained(model, optimizer, update, **more)


@contextmanager
def _plain(made: PeerModel, setting: Setting) -> Iterator[Trained]:
    model = made.model.to(setting.device.torch_device)
    yield trained_by(model, setting.optimizer_of(model))


@contextmanager
def _autosp(made: PeerModel, setting: Setting) -> Iterator[Trained]:
    assert setting.plan is not None
    optimizer = setting.optimizer_of(made.model)
    streamed = autosp.apply(made.model, setting.plan, optimizer=optimizer)
    with streamed:
        yield trained_by(made.model, optimizer, own_peak=lambda: streamed.stats().peak_bytes)


@contextmanager
def _fsdp2(made: PeerModel, setting: Setting) -> Iterator[Trained]:
    """`fully_shard` of every block, then of the model; one process has all shards."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    device = setting.device.torch_device
    mesh = dist.init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    for module in [*blocks_of(made.model), made.model]:
        fully_shard(module, mesh=mesh, offload_policy=policy)
    yield trained_by(made.model, setting.optimizer_of(made.model))


@contextmanager
def _accelerate_offload(made: PeerModel, setting: Setting) -> Iterator[Trained]:
    """`cpu_offload`: every module's weights come for its forward."""
    from accelerate import cpu_offload

    model = cpu_offload(made.model, execution_device=setting.device.torch_device)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        parameters = list(model.parameters())
        without = sum(one.grad is None for one in parameters)
        if without:
            kinds = ", ".join(sorted({one.device.type for one in parameters}))
            raise RuntimeError(
                f"{without} of {len(parameters)} parameters have no gradient after backward(): outside a module's "
                f"forward they are other tensors (on {kinds}) than those that it used"
            )

    yield trained_by(model, setting.optimizer_of(model), backward=backward)


@contextmanager
def _accelerate_whole(made: PeerModel, setting: Setting) -> Iterator[Trained]:
    """`cpu_offload_with_hook`: the whole model comes for a forward, and leaves before the update."""
    from accelerate import cpu_offload_with_hook

    model, hook = cpu_offload_with_hook(made.model, setting.device.torch_device)
    optimizer = setting.optimizer_of(model)

    def update() -> None:
        hook.offload()
        optimizer.step()
        optimizer.zero_grad()

    yield Trained(model, optimizer, update)


def _torchao(offload_gradients: bool) -> Apply:
    """The optimizer's state in host memory, and its step there; weights stay on the device."""

    @contextmanager
    def apply(made: PeerModel, setting: Setting) -> Iterator[Trained]:
        from torchao.optim import CPUOffloadOptimizer

        model = made.model.to(setting.device.torch_device)
        kind, options = OPTIMIZERS[setting.optimizer]
        optimizer = CPUOffloadOptimizer(model.parameters(), kind, offload_gradients=offload_gradients, **options)
        yield trained_by(model, optimizer)

    return apply


def _deepspeed(stage: int) -> Apply:
    """ZeRO of one process: 2 has optimizer and gradients in host memory, 3 the weights as well.

    With DeepSpeed's own Adam, which it asks for with an offloaded optimizer; it has no such SGD.
    """

    @contextmanager
    def apply(made: PeerModel, setting: Setting) -> Iterator[Trained]:
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        host = {"device": "cpu", "pin_memory": setting.device.torch_device.type != "cpu"}
        own = setting.optimizer == ADAMW
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "offload_optimizer": host}
            | ({"offload_param": host} if stage == 3 else {}),
            "zero_force_ds_cpu_optimizer": own,
            "zero_allow_untested_optimizer": not own,
        }
        learning_rate = OPTIMIZERS[setting.optimizer][1]["lr"]
        parameters = made.model.parameters()
        optimizer = (
            DeepSpeedCPUAdam(parameters, lr=learning_rate, weight_decay=1e-2)
            if own
            else setting.optimizer_of(made.model)
        )
        engine, zero, _, _ = deepspeed.initialize(model=made.model, optimizer=optimizer, config=config)
        yield Trained(engine, zero.optimizer, engine.step, engine.backward)

    return apply


SYSTEMS: dict[str, System] = {
    PLAIN: System("everything in memory", _plain),
    "fsdp2": System("FSDP2, CPUOffloadPolicy", _fsdp2, weights_at_rest=1, distributed=True),
    "accelerate": System("accelerate cpu_offload", _accelerate_offload, weights_at_rest=1),
    "accelerate-whole": System("accelerate cpu_offload_with_hook", _accelerate_whole),
    "deepspeed-2": System("DeepSpeed ZeRO-Offload", _deepspeed(2), 1, gradients_reserved=True, distributed=True),
    "deepspeed-3": System(
        "DeepSpeed ZeRO 3, weights offloaded too", _deepspeed(3), 2, gradients_reserved=True, distributed=True
    ),
    "torchao": System("torchao CPUOffloadOptimizer", _torchao(offload_gradients=False)),
    "torchao-gradients": System("torchao CPUOffloadOptimizer, gradients too", _torchao(offload_gradients=True)),
    TUNED: System("autosp", _autosp),
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What FSDP's users shard: the members of the model's lists, if they have weights."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [child for module in lists for child in module if next(child.parameters(), None) is not None]
