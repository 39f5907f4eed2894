"""Runs a model under a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from autosp.devices import Device, device_for
from autosp.errors import PlanMismatchError, SettingError
from autosp.intercept import call_all, check_plain, to_its_end
from autosp.partition import bind, model_fingerprint
from autosp.runtime.disk_state import open_disk_state
from autosp.runtime.gradients import gradient_bytes
from autosp.runtime.stepwise import check_optimizer
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.lowering import lower_for
from autosp.schedule.updates import with_updates
from autosp.settings import settings
from autosp.spec import Plan
from autosp.tiers import Originals, Readers, open_store
from autosp.workload import parse_budget

M = TypeVar("M", bound=nn.Module)


def apply(
    model: M,
    plan: Plan,
    *,
    device: torch.device | str | Device | None = None,
    optimizer: Optimizer | None = None,
    max_cpu_gb: float | str | None = None,
) -> StreamedModel[M]:
    """Make `model` run under `plan`: inside its budget, with unchanged output.

    The weights leave the memory they are in: residents go to the device, streamed layers to pinned host memory or, on a
    CPU and where the plan says so, to a packed file. Outside a pass the model is an ordinary CPU model whose streamed
    parameters are views of that memory. `remove()`, or leaving the context, makes it an ordinary model in RAM again.

    Weights on disk that are mapped from a file, as `from_pretrained` and `safetensors` load them, are read from that
    file: nothing is packed, and their parameters stay the maps that they are. Those that leave their maps are read from
    the file too, and are maps again at the end unless they were written to. The file must stay as it is meanwhile: the
    pass after one that layers are read from was written or truncated raises ReadError.

    Passes run without autograd, and calls from other threads wait for the running pass. Under a plan of mode
    "training" a pass may go on with `backward()`: gradients are in host memory when that returns (a resident's: on the
    device), and clipping, optimizers and schedulers work on parameters and gradients as they are. One thread trains.

    `device`: which of several of the plan's kind, "cuda:1" say. Default: the current one.

    With `optimizer`, the one that updates the model's weights, its `step()` returns early: streamed layers are updated
    beside the next forward, each before it is needed, and whatever uses a parameter, its gradient or its state before
    that waits. The loop stays as it is, with clipping, accumulation, schedulers and scalers, and so do all bits; only
    a view of a parameter's data or gradient made before `step()`, and `optimizer.state.values()`, may show them half
    updated until the parameter is used. Any optimizer of torch.optim will do that treats every parameter by itself;
    `step(closure)` is refused.

    `max_cpu_gb`, with `optimizer`, bounds the host memory that streamed weights at rest, their gradients and their
    optimizer's state take together. The state of as many layers as it has no room for rests on disk, in a file in
    `AUTOSP_CACHE_DIR` that has no name and ends with the process. It is read ahead of each update and written after it;
    its tensors are maps of the file, so `state_dict()`, `load_state_dict()` and checkpoints are as ever. After
    `remove()` they still are, and the disk space is free once the optimizer lets go of them. Weights and gradients stay
    in memory, and so does state that the optimizer, with its options of now, would not make in a first step.

    A plan with `group` serves plain calls too, and groups of up to so many microbatches. Under a plan of one microbatch
    and a budget there are no groups; one that the user set by hand, without `group`, limits none.

    Raises: PlanMismatchError if the plan was made for another model, SettingError if its device is not here or the
    optimizer cannot be stepped layer by layer, BudgetTooSmallError naming the least `max_cpu_gb` that works,
    DiskFullError or HostMemoryError if there is no room for the streamed weights, or in training for their gradients
    and what rests on disk of their optimizer's state, ReadError if a file that weights are mapped from was truncated or
    replaced (the model is unchanged then).
    """
    if not isinstance(plan, Plan):
        raise SettingError(f"plan is a {type(plan).__name__}; use autosp.tune, autosp.plan or Plan.load")
    check_plain(model)
    found = model_fingerprint(model)
    if found != plan.model_fingerprint:
        raise PlanMismatchError(
            f"the plan is for {plan.model_name} with fingerprint {plan.model_fingerprint}; this "
            f"{type(model).__name__} has {found}: other module classes, tensor names, shapes, dtypes or ties"
        )
    if optimizer is not None:
        if plan.mode != "training":
            raise SettingError(f"the plan is for {plan.mode}: only training has an optimizer")
        check_optimizer(optimizer, model)
    elif max_cpu_gb is not None:
        raise SettingError(
            "max_cpu_gb without optimizer=: it says how much of the optimizer's state may be in memory; for inference "
            "give it to autosp.tune or autosp.plan"
        )
    host_bytes = None if max_cpu_gb is None else parse_budget(max_cpu_gb, "max_cpu_gb")
    chosen = device_for(plan.device, device)
    bound = bind(model, plan.partition, chosen.info.slow_tier)
    schedule = lower_for(plan.mode, plan.candidate, bound.partition)
    if optimizer is not None:
        schedule = with_updates(schedule)
    stored = bound.stored(plan.candidate.residents)
    opened: list[Callable[[], None]] = []
    close = partial(call_all, opened)
    try:
        readers = Readers(plan.reading)
        opened.append(readers.close)
        if chosen is not device:
            opened.append(chosen.close)
        disk_state = None
        if optimizer is not None and host_bytes is not None:
            streamed = [one for one in bound.layers if one.layer.index not in plan.candidate.residents]
            fixed_bytes = sum(one.layer.n_bytes for one in stored) + gradient_bytes(streamed)
            folder = settings().cache_dir
            disk_state = open_disk_state(optimizer, streamed, schedule.steps, fixed_bytes, host_bytes, folder)
            if disk_state is not None:
                opened.append(disk_state.close)
        store = open_store(chosen, stored, settings().cache_dir, Originals.FREED, plan.candidate.on_disk, readers)
        opened.append(store.close)
    except BaseException:
        to_its_end(close)
        raise
    group = plan.candidate.group
    pass_floor_s = plan.floor_s / plan.partition.repeats if plan.floor_s else None
    most = group if plan.budget_bytes is not None or group > 1 else None
    applied: StreamedModel[M] = StreamedModel(
        bound, schedule, chosen, store, Originals.FREED, close, pass_floor_s, plan.mode, optimizer, most, disk_state
    )
    if plan.usual_bytes is not None:
        applied.keep_within(plan.usual_bytes)
    return applied
