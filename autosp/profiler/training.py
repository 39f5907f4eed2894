"""What only training passes tell: whose weights the backward needs, what gets gradients, which activations are kept.

[Note: activations kept] What autograd saves of a layer's forward, or between the layers of a block, is counted as it is
saved, whether it is kept or dropped, to be computed again: each storage once, for the first visit that saves it. What
is saved between two layers that no block holds is kept in any case, and goes with the visit after it, whose backward
comes just before its own. Weights, buffers and the batch are there anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from autosp.batch import tensors_in
from autosp.devices import Device
from autosp.partition import follows
from autosp.profiler.layers import ENOUGH, LEAST_MEMORY, MemoryObserver, Observation, measured_passes
from autosp.profiler.saving import ForwardOrder, Storages, storages_of, watching
from autosp.runtime.bench import Bench, timed_pass
from autosp.runtime.parts import parts_of
from autosp.runtime.recorder import VisitTimes
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.actions import Kind
from autosp.spec import BackwardProfile, Candidate, LayerProfile, Partition
from autosp.workload import Workload


def layers_of(workload: Workload, device: Device, cache_dir: Path) -> Partition:
    """The layers of a workload of either mode: by one pass, in training by two."""
    if workload.mode == "training":
        return training_partition(workload, device, cache_dir)
    return workload.layers(device)


def training_partition(workload: Workload, device: Device, cache_dir: Path) -> Partition:
    """The layers in the order of the forward, and of the backward as one pass under the least-memory plan shows it.

    The model is left as it was; what it raises passes through. Which layers can be computed again is not known yet: all
    activations are kept, in host memory, for a device may have no room for them.

    Raises: SettingError if the step gives no loss; and what `partition` and `Bench` raise.
    """
    model = workload.model
    with workload.leaving_no_trace():
        parts = workload.layers(device)
        visits = parts.visits * parts.repeats
        inside = parts_of(model, dict.fromkeys(layer.path for layer in parts.layers))
        expected = parts.model_copy(
            update={"visits": visits, "repeats": 1, "backward": tuple(reversed(visits)), "called_again": inside}
        )
        with Bench(model, expected, device, cache_dir, mode="training") as bench:
            streamed = bench.apply(LEAST_MEMORY)
            there = [*model.parameters(), *model.buffers(), *tensors_in(workload.batch)]
            forward = ForwardOrder(there, device.torch_device)
            streamed.observe(forward)
            try:
                with save_on_cpu(), forward.watching():
                    workload.run()
                backward, called_again = streamed.backward_visits, streamed.called_again
            finally:
                streamed.remove()
        gradients = {
            name: parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    resident = sum(gradients.get(name, 0) for name in expected.resident_tensors)
    layers = tuple(
        layer.model_copy(update={"gradient_bytes": sum(gradients.get(name, 0) for name in layer.tensors)})
        for layer in expected.layers
    )
    visits = tuple(forward.visits)  # a pass with autograd may visit others than one without, which found the layers
    blocks = tuple(block for block in parts.blocks if follows(block, visits, backward))
    return expected.model_copy(
        update={
            "layers": layers,
            "resident_gradient_bytes": resident,
            "visits": visits,
            "backward": backward,
            "blocks": blocks,
            "called_again": called_again,
            "activation_bytes": tuple(forward.saved_bytes),
        }
    )


def observe_training(
    bench: Bench, candidate: Candidate, workload: Workload, progress: Callable[[str], None]
) -> Observation:
    """Run training passes under a plan that recomputes: a cold one, one for memory, and some for time."""
    partition = bench.partition
    memory = _ActivationObserver(bench, candidate, workload)
    passes: list[list[VisitTimes]] = []

    def time_pass(streamed: StreamedModel[nn.Module]) -> tuple[float, Any]:
        timed = timed_pass(bench.device, workload.run)
        passes.extend(_again_apart(visits) for visits, _ in streamed.visit_times(1))
        return timed

    with workload.leaving_no_trace():
        measurement = measured_passes(bench, candidate, workload.run, memory, time_pass, progress, ENOUGH)
    forward = _by_visit(passes, Kind.FORWARD, partition.visits)
    backward = _by_visit(passes, Kind.BACKWARD, partition.backward)
    again = _by_layer(passes, Kind.RECOMPUTE)
    kept, inputs = memory.kept_bytes(), memory.input_bytes()
    return Observation(
        visits=tuple(
            LayerProfile(
                layer=layer,
                before_s=_median(mine, "before_s"),
                forward_s=_median(mine, "compute_s"),
                peak_bytes=max(0, memory.visits.get(layer, (0, 0))[0]),
                output_bytes=memory.visits.get(layer, (0, 0))[1],
                kept_bytes=kept[visit] if visit < len(kept) else 0,
                input_bytes=inputs[visit] if visit < len(inputs) else 0,
            )
            for visit, (layer, mine) in enumerate(zip(partition.visits, forward, strict=True))
        ),
        backward=tuple(
            BackwardProfile(
                layer=layer,
                before_s=_median(mine, "before_s"),
                recompute_s=_median(mine, "recompute_s") + _median(again.get(layer, ()), "recompute_s"),
                backward_s=_median(mine, "compute_s"),
            )
            for layer, mine in zip(partition.backward, backward, strict=True)
        ),
        tail_s=0.0,  # the last visit ends with autograd; what follows is the wait for its gradients
        least_compute_s=_least_compute_s([*forward, *backward]),
        measurement=measurement,
    )


def _by_visit(passes: Sequence[Sequence[VisitTimes]], kind: Kind, planned: Sequence[int]) -> list[list[VisitTimes]]:
    """What each planned visit took in every pass; where a pass ran otherwise than planned, all visits of its layer."""
    found = [[visit for visit in one if visit.kind is kind] for one in passes]
    if all([visit.layer for visit in one] == list(planned) for one in found):
        return [[one[position] for one in found] for position in range(len(planned))]
    return [[visit for one in found for visit in one if visit.layer == layer] for layer in planned]


def _by_layer(passes: Sequence[Sequence[VisitTimes]], kind: Kind) -> dict[int, list[VisitTimes]]:
    found: dict[int, list[VisitTimes]] = {}
    for visit in (visit for one in passes for visit in one if visit.kind is kind):
        found.setdefault(visit.layer, []).append(visit)
    return found


def _again_apart(visits: Sequence[VisitTimes]) -> list[VisitTimes]:
    """With all of what computing a block again takes in `recompute_s`, its compute between layers too.

    What is before the first of its visits is before the BACKWARD that follows.
    """
    found: list[VisitTimes] = []
    before_s: float | None = None
    for visit in visits:
        between_s = visit.before_s if before_s is not None else 0.0
        if visit.kind is Kind.RECOMPUTE:
            before_s = visit.before_s if before_s is None else before_s
            found.append(replace(visit, recompute_s=between_s + visit.compute_s))
            continue
        if before_s is not None:
            visit = replace(visit, before_s=before_s, recompute_s=between_s + visit.recompute_s)
        before_s = None
        found.append(visit)
    return found


def _median(visits: Sequence[VisitTimes], name: str) -> float:
    return max(0.0, median(getattr(visit, name) for visit in visits)) if visits else 0.0


def _least_compute_s(visits: Sequence[Sequence[VisitTimes]]) -> float:
    """Each visit at the fastest that it was seen, nothing computed again."""
    return sum(min((one.before_s + one.compute_s for one in mine), default=0.0) for mine in visits)


class _ActivationObserver(MemoryObserver):
    """Peaks of forward visits, and what is kept of each for its backward: see [Note: activations kept]."""

    def __init__(self, bench: Bench, candidate: Candidate, workload: Workload) -> None:
        super().__init__(bench.device, bench.partition.resident_bytes + bench.arena_bytes(candidate))
        self._workload = workload
        self._there: Storages = {}
        self._saved: list[Storages] = []
        self._inputs: list[Storages] = []
        self._open: list[Storages] = [{}]
        """What was saved since the last visit, then in the block, then in each visit under way: see the last."""
        self._hooks: list[saved_tensors_hooks] = []
        self._block: Storages | None = None
        """Inside a block: its inputs."""
        self._entered = False
        """Whether the block's first visit is to come."""

    def enter(self, inputs: Any) -> None:
        """A block's inputs are its first visit's, and so is what it saves between two visits or after the last."""
        self._block, self._entered = self._counted(tensors_in(inputs)), True
        self._open.append({})
        self._watch()

    def leave(self) -> None:
        """From here on each visit has inputs of its own."""
        self._hooks.pop().__exit__(None, None, None)
        self._open.pop()
        self._block = None

    def __enter__(self) -> Self:
        """From here on what is saved between two visits is watched, too."""
        model = self._workload.model
        self._there = storages_of([*model.parameters(), *model.buffers(), *tensors_in(self._workload.batch)])
        self._watch()
        return self

    def arrive(self, layer: int, inputs: Any) -> None:
        """Its inputs are what is kept if it is computed again."""
        super().arrive(layer, inputs)
        if self._block is None:
            self._saved.append({})
            self._inputs.append(self._counted(tensors_in(inputs)))
        elif self._entered:
            self._saved.append(self._open[-1])
            self._inputs.append(self._block)
        else:
            self._saved.append({})
            self._inputs.append({})
        self._entered = False
        self._keep_between()

    def start(self, layer: int) -> None:
        """Autograd's saving is watched from here."""
        super().start(layer)
        self._open.append(self._saved[-1])
        self._watch()

    def finish(self, layer: int, output: Any) -> None:
        """Until here."""
        self._open.pop()
        self._hooks.pop().__exit__(None, None, None)
        super().finish(layer, output)

    def __exit__(self, *_: object) -> None:
        """Visits that raised never finished: without this their hooks would outlive the pass."""
        self._keep_between()
        while self._hooks:
            self._hooks.pop().__exit__(None, None, None)

    def kept_bytes(self) -> list[int]:
        """Forward visit -> what is kept of it, and of none before it."""
        return self._held(self._saved)

    def input_bytes(self) -> list[int]:
        """The same if all of them are computed again."""
        return self._held(self._inputs)

    def _watch(self) -> None:
        """See what autograd saves, also where hooks around make something else of it; but not for a backward pass."""
        self._hooks.append(watching(lambda tensor: self._open[-1].update(self._counted([tensor]))))
        self._hooks[-1].__enter__()

    def _keep_between(self) -> None:
        """What was saved since the last visit goes with this one; after the last one, with that."""
        for visit in (*self._saved[-1:], *self._inputs[-1:]):
            visit.update(self._open[0])
        self._open[0].clear()

    def _held(self, held: Sequence[Storages]) -> list[int]:
        """What a layer saves of some layer's inputs is there whether that is computed again or not."""
        either: set[StorageWeakRef] = set()
        for saved, inputs in zip(self._saved, self._inputs, strict=True):
            either |= saved.keys() & inputs.keys()
        counted: set[StorageWeakRef] = set()
        sizes = []
        for saved, inputs, mine in zip(self._saved, self._inputs, held, strict=True):
            all_of_it = saved | inputs
            new = {one for one in all_of_it if one in mine or one in either} - counted
            sizes.append(sum(all_of_it[one] for one in new))
            counted |= new
        return sizes

    def _counted(self, tensors: Sequence[torch.Tensor]) -> Storages:
        return {one: n_bytes for one, n_bytes in storages_of(tensors).items() if one not in self._there}
