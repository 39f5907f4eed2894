"""A model under a plan: residents on the device, the rest streamed, undone by `remove()`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from autosp.batch import Step, backward, call, call_on
from autosp.devices import Device
from autosp.devices.memory import anonymous
from autosp.errors import SettingError
from autosp.intercept import Around, Intercepted, hide_from_compiler, to_its_end
from autosp.partition import BoundModel, Resting, at_rest
from autosp.partition.placed import tensors_of
from autosp.partition.tensors import address_of
from autosp.runtime.cut_leaf import CutLeaf, ResidentRun, StreamedRun
from autosp.runtime.disk_state import DiskState
from autosp.runtime.executor import Executor, Observer
from autosp.runtime.gradients import Gradients, follow
from autosp.runtime.grouping import Group, gradients_kept
from autosp.runtime.guests import Guests
from autosp.runtime.inputs import taking_from_host
from autosp.runtime.loader import Loader
from autosp.runtime.lookups import Lookups
from autosp.runtime.parts import around_parts
from autosp.runtime.recorder import VisitTimes
from autosp.runtime.residents import Residents
from autosp.runtime.stats import Stats, stats_of
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.surroundings import surrounded
from autosp.runtime.training import TrainingExecutor
from autosp.schedule.actions import Schedule
from autosp.schedule.timeline import Timeline
from autosp.spec import Block, Mode, Usage
from autosp.tiers import Originals, Store, forget_pages

M = TypeVar("M", bound=nn.Module)


class StreamedModel(Generic[M]):
    """The handle of an applied plan. As a context manager it gives the model, and removes itself at the end."""

    def __init__(
        self,
        bound: BoundModel,
        schedule: Schedule,
        device: Device,
        store: Store,
        originals: Originals,
        on_close: Callable[[], None] = lambda: None,
        floor_s: float | None = None,
        mode: Mode = "inference",
        optimizer: Optimizer | None = None,
        most_microbatches: int | None = None,
        disk_state: DiskState | None = None,
    ) -> None:
        """`on_close` frees the store once the model is at rest. `floor_s`: the least that one pass can take.

        `most_microbatches`: those of a group that the plan's memory was computed for; None: nobody computed it.

        `optimizer`: of which `schedule` has the steps, see [Note: updates under way]. `disk_state`: where the state of
        some layers rests, see [Note: state on disk].
        """
        self.model = bound.model
        self._bound = bound
        self._device = device
        self._store = store
        self._originals = originals
        self._on_close = on_close
        self._floor_s = floor_s
        self._most_microbatches = most_microbatches
        self._disk_layers = schedule.on_disk
        self._state_bytes = disk_state.moved_bytes if disk_state is not None else None
        self._wrappers: list[Intercepted] = []
        self._guests: Guests | None = None
        self._lookups: Lookups | None = None
        self._removed = False
        self._final_peak_bytes: int | None = None
        self._applied = ExitStack()
        self._cut: list[CutLeaf] = []
        residents = set(schedule.residents)
        blocks = bound.partition.recomputed_blocks(schedule.recomputed)
        pieces = at_rest(bound.layers)
        moving = [piece for piece in pieces if not residents.issuperset(piece.indices)]
        staying = [place for piece in pieces if piece not in moving for place in piece.placed]
        staying += bound.residents
        runs = [one for piece in moving for one in piece.layers if one.layer.index in residents]
        copied = [place for one in runs for place in one.placed]
        streamed = [(one, piece.leaf) for piece in moving for one in piece.layers if one.layer.index not in residents]
        kept = [*bound.opaque, *tensors_of(bound.lookups.placed if bound.lookups else ())]
        if originals is Originals.KEPT:
            kept += tensors_of(staying)
        self._kept = [(named, named.tensor.data) for named in kept]
        self._addresses: list[int | None] = []
        self._layers: list[StreamedLayer] = []
        self._runs: list[StreamedRun] = []
        try:
            forget_pages(source for place in bound.placed() if (source := place.extent.source) is not None)
            staging = anonymous(schedule.staging_bytes)
            staging.zero_()  # its pages are taken before anything is measured, and before a pass
            device.pin(staging)
            trained = [one for one, _ in streamed] if mode == "training" else ()
            gradients = Gradients(trained, device, schedule.waits_for_gradients)
            hide_from_compiler()
            if mode == "training":
                self._applied.enter_context(device.training())
            if originals is Originals.KEPT or not device.is_host:  # else it begins once they are freed
                device.start_measuring(libraries=originals is Originals.KEPT)
            self._residents = Residents([*staying, *copied], device)
            device.join()
            freed = runs if originals is Originals.FREED else ()
            self._residents.move_in({p.extent: store.regions([one.layer.index]) for one in freed for p in one.placed})
            self._move_opaque()
            if originals is Originals.FREED:
                device.originals_freed(self._residents.n_bytes)
            self._lookups = Lookups(bound.lookups, device, store) if bound.lookups else None
            self._addresses = [address_of(named.tensor) for named in kept]
            self._layers = [StreamedLayer(one) for one, leaf in streamed if leaf is None]
            self._runs = [StreamedRun(one) for one, leaf in streamed if leaf]
            arena = device.allocate(schedule.arena_bytes)
            loader = Loader(schedule, [*self._layers, *self._runs], device, store, arena, staging)
            del arena, staging
            if mode == "training":
                self._executor: Executor = TrainingExecutor(schedule, loader, gradients, bound.model, blocks)
            else:
                self._executor = Executor(schedule, loader)
            self._executor.before_pass, self._executor.enter = self._before_pass, self._around_pass
            self._intercept(moving, blocks)
            if mode == "training":
                follow(self.model.parameters())
            if optimizer is not None:
                layers = [one for one, _ in streamed]
                loader.updates.watch(optimizer, self.model, layers, schedule.steps, disk_state)
            if device.torch_device.type != "cpu":
                in_pass, known = self._executor.running_here, [named.tensor for named in bound.tensors()]
                self._guests = Guests(bound.model, known, lambda data: data.to(device.torch_device))
                self._applied.enter_context(surrounded(bound.model, device.torch_device, mode, in_pass))
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> M:
        return self.model  # type: ignore[return-value]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`self.model(*args, **kwargs)`."""
        return self.model(*args, **kwargs)

    def run_group(self, batches: Iterable[Any], step: Step = call) -> list[Any]:
        """`[step(model, batch) for batch in batches]`, in one pass: what a transfer brings serves all of the batches.

        So weights move as often as for one batch, however many there are; activations of all of them are in memory at
        the same time: a plan that was tuned with `group` has counted that many, and refuses more. Outputs are those of
        the loop, bit for bit, and so are running statistics. But random numbers are drawn per batch: `step` finds
        torch's generators as after `torch.manual_seed(seed)`, with that batch's number of
        `torch.randint(2**63 - 1, (len(batches),))`, which is all that is drawn from the caller's generators.

        Each batch is in a thread of its own; one runs at a time, until the model comes to the next layers. If one
        raises, or Ctrl-C comes, all of them end, and this raises it.

        Raises: SettingError inside a pass, after `remove()`, or for more batches than the plan has counted.
        """
        if self._removed:
            raise SettingError("the plan was removed: apply it again, or run the batches one after another")
        calls = [partial(step, self.model, batch) for batch in batches]
        most = self._most_microbatches
        if most is not None and len(calls) > most:
            raise SettingError(
                f"a group of {len(calls)} microbatches: the plan's memory was computed for {most}. Make a plan with "
                f"group={len(calls)}, or run {-(-len(calls) // most)} groups of {most} one after another"
            )
        return Group(self._executor, calls).run()

    def backward_group(self, batches: Iterable[Any], step: Step) -> list[torch.Tensor]:
        """`run_group` of losses that `step` returns, with their backward passes: gradients are accumulated.

        As `for batch in batches: step(model, batch).backward()`, bit for bit, but for random numbers, see `run_group`;
        where batches choose their layers, sums may be made in another order: [Note: order within a group]. Nothing is
        divided by the number of batches. Returns the losses, detached. Where there were no gradients, the sums leave
        the device, once. If this raises, gradients are what they were; to that end those that there were are kept
        twice meanwhile.

        Raises: SettingError as `run_group` does, for a plan for inference, or if `step` returns no loss.
        """
        if not isinstance(self._executor, TrainingExecutor):
            raise SettingError("the plan is for inference: make one with mode='training'")
        with self._executor.loader.updates.inside:
            parameters = list(self.model.parameters())
        with gradients_kept(parameters), torch.enable_grad():
            return self.run_group(batches, partial(backward, step))

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of every visit of a streamed layer from now on."""
        self._executor.observer = observer

    def keep_within(self, peak_bytes: int) -> None:
        """Give unused memory back where passes take more than `peak_bytes`, which they were seen to need."""
        self._executor.tidy = self._device.keep_within(peak_bytes)

    def stats(self) -> Stats:
        """Counters since the plan was applied, and times of the last passes. Waits for compute, not for loads."""
        peak_bytes = self._device.peak_bytes() if self._final_peak_bytes is None else self._final_peak_bytes
        names = {layer.layer.index: layer.layer.name for layer in self._bound.layers}
        slow_tier, executor = self._device.info.slow_tier, self._executor
        recorder = executor.recorder
        on_disk, floor_s, state_bytes = self._disk_layers, self._floor_s, self._state_bytes
        return stats_of(executor.counters, recorder, peak_bytes, names, slow_tier, on_disk, floor_s, state_bytes)

    @property
    def backward_visits(self) -> tuple[int, ...]:
        """Layers whose weights the last backward pass needed, in the order of need."""
        return tuple(self._executor.backward_visits)

    @property
    def called_again(self) -> tuple[str, ...]:
        """Paths of modules inside layers that backward passes called, of those that the partition names."""
        return tuple(sorted(self._executor.called_again))

    def usage(self, last: int) -> Usage:
        """What the last so many passes (of those that are remembered) spent their time on. Waits for the device."""
        return self._executor.recorder.usage(last)

    def visit_times(self, last: int) -> list[tuple[list[VisitTimes], float]]:
        """What each visit took in the last so many passes, and the compute after the last. Waits for compute."""
        return self._executor.recorder.visit_times(last)

    def timeline(self) -> Timeline:
        """When everything happened in the last passes, in seconds from the first one's beginning. Waits for the device.

        Layers that are resident are not watched. Empty before the first pass.
        """
        return self._executor.recorder.timeline()

    def remove(self) -> None:
        """Make the model an ordinary one in ordinary memory again, with the values it has now. Twice is harmless.

        Raises: what an update that runs beside passes raised, if nobody was told yet; the model is at rest then, too.
        """
        if self._removed:
            return
        executor = getattr(self, "_executor", None)
        with nullcontext() if executor is None else executor.between_passes():
            to_its_end(partial(self._take_down, executor))

    def _take_down(self, executor: Executor | None) -> None:
        self._removed = True
        with ExitStack() as ending:  # from the last to the first, whatever one raises: a lost device lets most of them
            ending.callback(lambda: follow(self.model.parameters()))
            ending.callback(self._on_close)
            ending.callback(self._applied.close)
            ending.callback(self._restore)
            for leaf in self._cut:
                ending.callback(leaf.forget)
            if self._lookups is not None:
                ending.callback(self._lookups.forget)
            for close in [part.close for part in (self._guests, executor) if part is not None]:
                ending.callback(close)
            for wrapper in self._wrappers:
                ending.callback(wrapper.remove)
            if executor is not None:
                ending.callback(executor.loader.updates.close)
            if self._final_peak_bytes is None:
                self._final_peak_bytes = self._device.peak_bytes()
        self._layers, self._runs, self._cut, self._wrappers = [], [], [], []

    def _restore(self) -> None:
        """What was moved, and not streamed, to where it was."""
        for (named, data), address in zip(self._kept, self._addresses or [None] * len(self._kept), strict=True):
            if address is None or address_of(named.tensor) == address:  # else somebody replaced it: theirs stays
                named.tensor.data = data
        self._kept, self._addresses = [], []
        if hasattr(self, "_residents"):
            if self._originals is Originals.FREED:
                self._residents.give_back()
            self._residents.forget()

    def _move_opaque(self) -> None:
        """What cannot be packed goes to the device as it is."""
        for named in self._bound.opaque:
            if self._device.torch_device.type != "cpu":
                named.tensor.data = named.tensor.data.to(self._device.torch_device)

    def _before_pass(self) -> None:
        self._store.check()
        if self._guests is not None:
            self._guests.move_in()
        for leaf in self._cut:
            leaf.renew()

    def _intercept(self, moving: Sequence[Resting], recomputed: Sequence[Block]) -> None:
        """Streamed layers load themselves; whatever contains one begins a pass when it is called from outside."""
        layers = {layer.index: layer for layer in self._layers}
        runs = {run.index: run for run in self._runs}
        again = self._bound.partition.called_again
        around: dict[nn.Module, Around] = dict(around_parts(self.model, again, self._layers, self._executor))
        for piece in moving:
            module = piece.layers[0].module
            if piece.leaf is None:
                around[module] = partial(self._executor.run_layer, layers[piece.layers[0].layer.index])
            else:
                its = [runs.get(one.layer.index) or ResidentRun(one, self._residents) for one in piece.layers]
                self._cut.append(CutLeaf(piece.leaf, piece.layers, its, self._executor))
                around[module] = self._around_leaf(self._cut[-1])
        holders = {self.model}
        for path in (layer.layer.path for layer in (*self._layers, *self._runs)):
            parts = path.split(".")
            holders.update(self.model.get_submodule(".".join(parts[:length])) for length in range(1, len(parts)))
        blocks = {self.model.get_submodule(block.path): self._around_block(block) for block in recomputed}
        around = dict.fromkeys(holders, self._around_pass) | blocks | around
        device, in_pass = self._device.torch_device, self._executor.running_here
        for one in (one for one in self.model.modules() if one in around):
            self._wrappers.append(Intercepted(one, taking_from_host(one, device, in_pass, around[one])))

    def _around_pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = self._device.torch_device
        if device.type == "cpu" or self._executor.running_here():
            return self._executor.run_pass(forward, args, kwargs)
        return call_on(device, lambda *args, **kwargs: self._executor.run_pass(forward, args, kwargs), args, kwargs)

    def _around_leaf(self, leaf: CutLeaf) -> Around:
        def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._around_pass(lambda *args, **kwargs: leaf.forward(forward, args, kwargs), args, kwargs)

        return around

    def _around_block(self, block: Block) -> Around:
        executor, module = self._executor, self.model.get_submodule(block.path)
        assert isinstance(executor, TrainingExecutor), "only training computes anything again"

        def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                return executor.run_block(block, module, forward, args, kwargs)

            return self._around_pass(run, args, kwargs)

        return around
