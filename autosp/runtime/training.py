"""Runs training passes: layers are streamed in the forward pass, and again, in reverse, in the backward pass.

The backward pass is autograd's own. It is followed through what it asks for: a layer's visit begins with the first of
its weights that is unpacked ([Note: what autograd saved]), and ends when another layer's begins. Parameters are bound
to the device in forwards only, so whatever raises where, they are at rest.

[Note: what follows a backward visit] Of layers that stay on the device nothing is unpacked, and so nothing is seen: a
visit lasts through their backwards. But what follows it in the schedule is due when the layer's own backward is over.
Autograd goes backward in the reverse order of the forward, so that is when it comes to what made one of its inputs.

[Note: weights after a backward pass] The next thing to come is the update, which may write to weights in ways that no
version counter sees. So what the arena holds of trained layers is forgotten when the next pass begins.

One thread at a time trains a model: another that calls it between a forward and the end of its backward is not held up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from autosp.batch import tensors_in
from autosp.errors import ModelChangedError
from autosp.runtime.executor import Executor, uncached_autocast, without_fast_path
from autosp.runtime.gradients import Gradients
from autosp.runtime.loader import Loader
from autosp.runtime.offload import Offload, Visit
from autosp.runtime.recompute import Recomputed, in_checkpoint
from autosp.runtime.saved import SavedTensors
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.thread_state import backward_task
from autosp.runtime.transfers import ComingBack, Issued, prefetches_of_one_pass
from autosp.schedule.actions import Kind, Schedule
from autosp.spec import Block


class TrainingExecutor(Executor):
    """An executor whose passes may go on backward. Without autograd its passes are those of inference."""

    def __init__(
        self,
        schedule: Schedule,
        loader: Loader,
        gradients: Gradients,
        model: nn.Module,
        blocks: Sequence[Block] = (),
    ) -> None:
        """`gradients` of the layers that `loader` loads; `blocks` are computed again as a whole, by `run_block`."""
        super().__init__(schedule, loader, prefetches_of_one_pass)
        self._recomputed = schedule.recomputed.difference(*(block.layers for block in blocks))
        self._again = Recomputed(lambda: self._group is not None)
        self._gradients = gradients
        self._gradients.connect(self.counters, self.recorder, self._enter_backward)
        self._offload = Offload(schedule.offloaded, loader.device, self.counters, self.recorder, model)
        self._saved = SavedTensors(
            self.loader, self._offload, self._needed, self._activations_needed, self._again.beginning
        )
        self._tasks: set[int] = set()
        """Backward passes under way, the innermost last; one that raised is still among them."""
        self._visiting: int | None = None
        """The layer whose backward visit it is."""
        self._due: int | None = None
        """The position of that visit; None if what follows it in the schedule is issued."""
        self._called: int | None = None
        """The layer that was called last in the forward pass."""
        self._updated = False
        """Whether a backward pass ended since the last pass began: see [Note: weights after a backward pass]."""
        self._closed = False

    def running_here(self) -> bool:
        """Whether this thread is inside a pass, or in a backward pass that computes activations again."""
        return super().running_here() or (backward_task() is not None and not self._updated)

    def close(self) -> None:
        """As for inference. A backward pass of what ran before is refused from now on."""
        self._closed = True
        self._gradients.close()
        super().close()
        self._offload.close()

    # -- forward --------------------------------------------------------------------------------------------------

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Autograd as the caller has it."""
        kind = self.device.torch_device.type
        slow = kind != "cpu" and not torch.is_grad_enabled()
        with uncached_autocast(kind), without_fast_path() if slow else nullcontext():
            yield

    def run_pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As for inference. What the model is given is kept by who gives it."""
        if self.running_here():
            return forward(*args, **kwargs)

        def given(*args: Any, **kwargs: Any) -> Any:
            self._offload.stays(tensors_in((args, kwargs)))
            return forward(*args, **kwargs)

        return super().run_pass(given, args, kwargs)

    def issue(self, prefetch: Issued) -> None:
        """A load, or activations that come back."""
        if isinstance(prefetch, ComingBack):
            self._offload.restore(prefetch.layer, prefetch.visits)
        else:
            super().issue(prefetch)

    def begin_pass(self) -> None:
        """From the schedule's beginning, whatever came before."""
        self._abandon_backward()
        self.loader.updates.give_back()
        with self.loader.updates.inside:
            self._offload.begin_pass()
            self._gradients.watch()
            if self._updated:
                groups = self.loader.groups.values()
                self.loader.evict(group for group in groups if self._gradients.trains(group.indices))
            self._updated = False
            self._called = None
            super().begin_pass()

    def prime(self) -> None:
        """In every pass: none finds in the arena what the one before prepared."""
        self.cursor.restart()
        self.issue_start()

    def end_forward(self) -> None:
        """Without autograd the pass is over; otherwise it ends with its backward."""
        if not torch.is_grad_enabled():
            super().end_forward()

    def end_shared_pass(self) -> None:
        """With all backward passes that there were."""
        if self._tasks:
            self._gradients.finish()
            self._close_backward()
        super().end_shared_pass()

    def abort(self) -> None:
        """As for inference; of a group, microbatches may have been in their backward passes."""
        super().abort()
        self._offload.settle()
        if self._group is not None:
            self._abandon_backward()

    def suspend(self) -> int | None:
        """Its backward visit is over."""
        self._leave()
        return super().suspend()

    def begin_turn(self, microbatch: int | None, others_follow: bool) -> None:
        """See [Note: gradients of a group]."""
        self._gradients.begin_turn(microbatch, others_follow)
        self._offload.begin_turn(microbatch)

    def end_round(self) -> None:
        """Gradients that waited for others leave."""
        self._gradients.let_go()
        super().end_round()

    def visit(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a layer: in a forward, or where a checkpoint around it computes its activations again."""
        index = layer.index
        if backward_task() is None:
            self._leave()  # of a group's microbatch that went backward before
        if not torch.is_grad_enabled():
            return super().visit(layer, forward, args, kwargs)
        if backward_task() is None:
            self._watch_inputs(index, (args, kwargs))
        if index not in self._recomputed or in_checkpoint():  # of the user's, with what it does twice
            return self._visit(layer, forward, args, kwargs)
        self._offload.stays(tensors_in((args, kwargs)))
        name = layer.layer.name
        return self._again.layer(layer.module, name, lambda *a, **k: self._visit(layer, forward, a, k), args, kwargs)

    def run_block(self, block: Block, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of a block that is computed again as a whole, within a pass."""
        if not torch.is_grad_enabled() or in_checkpoint():
            return forward(*args, **kwargs)
        self._offload.stays(tensors_in((args, kwargs)))
        observer = self.observer if backward_task() is None else None
        return self._again.block(module, block.path, block.layers[-1], forward, args, kwargs, observer)

    def _visit(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call with autograd."""
        index = layer.index
        leaving = Visit() if backward_task() is None and index in self._offload.layers else None

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._saved.hooks(index, leaving):
                output = forward(*args, **kwargs)
            if leaving is not None:
                self._offload.send(index, leaving)
            return output

        if backward_task() is None:
            output = super().visit(layer, watched, args, kwargs)
            self._gradients.called(index, output)
            return output
        if self._again.before_last(index):
            return self._recompute(layer, watched, args, kwargs)
        return self.compute_again(layer, watched, args, kwargs)

    def compute_again(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a checkpoint calls in the backward pass, within the layer's visit."""
        index = layer.index
        begins = self._arrive(index)
        group = self.loader.acquire(layer)
        try:
            if begins:
                self.recorder.start()
            return self.loader.own(forward(*args, **kwargs))
        finally:  # a checkpoint stops its forward by an exception once it has what it needs
            if index in self._recomputed or self._again.at_last(index):
                self.recorder.recomputed()
            self.loader.release(layer, group)

    def _recompute(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A visit of its own, in a block that is computed again."""
        index = layer.index
        self._enter_backward()
        self._leave()
        self.take_turn((Kind.RECOMPUTE, index))
        self.recorder.arrive(index, Kind.RECOMPUTE)
        self.counters.visits += 1
        position = self.cursor.advance((Kind.RECOMPUTE, index))
        self._gradients.make_room()
        group = self.loader.acquire(layer)
        try:
            self.recorder.start()
            return self.loader.own(forward(*args, **kwargs))
        finally:  # as above
            self.recorder.finish()
            self.loader.release(layer, group)
            self.cursor.issue_after(position)

    # -- backward -------------------------------------------------------------------------------------------------

    def _needed(self, index: int) -> torch.Tensor | None:
        """A backward node unpacks weights of a layer. Where they are if not at its address."""
        if self._closed:
            raise ModelChangedError(
                "the plan was removed between a forward pass and its backward: the weights that backward needs are not "
                "where forward left them; call remove() after backward()"
            )
        begins = self._arrive(index)
        elsewhere = self.loader.need(index)
        if begins:
            self._offload.wait_for(index)
            self.recorder.start()
        return elsewhere

    def _activations_needed(self, index: int) -> None:
        """A backward node unpacks what a layer offloaded: its visit begins, too."""
        if index != self._visiting or self._closed:
            self._needed(index)

    def _arrive(self, index: int) -> bool:
        """A layer's backward visit begins, unless it is its visit already."""
        self._enter_backward()
        if index == self._visiting:
            return False
        self._leave()
        self.take_turn((Kind.BACKWARD, index))
        self.recorder.arrive(index, Kind.BACKWARD)
        self.counters.visits += 1
        self.backward_visits.append(index)
        self._visiting = index
        self._due = self.cursor.advance((Kind.BACKWARD, index))
        self._gradients.make_room()
        return True

    def _watch_inputs(self, index: int, inputs: Any) -> None:
        """Of a call of a layer. Two in a row are one visit backward, which goes on at the inputs of the second."""
        if index != self._called:
            for tensor in tensors_in(inputs):
                if tensor.grad_fn is not None and tensor.device.type == self.device.torch_device.type:
                    tensor.register_hook(partial(self._at_inputs, index))
        self._called = index

    def _at_inputs(self, index: int, _: torch.Tensor) -> None:
        """Issue what is due, if it is that layer's visit: see [Note: what follows a backward visit]."""
        if index == self._visiting:
            self.cursor.issue_after(self._due)
            self._due = None

    def _leave(self) -> None:
        """The visit is over: another layer's begins, or the pass ends."""
        if self._visiting is None:
            return
        self.recorder.finish()
        self.cursor.issue_after(self._due)
        self._visiting = self._due = None

    def _enter_backward(self) -> None:
        """Have its end told. Engines run inside each other where a checkpoint is reentrant."""
        task = backward_task()
        if task is None or task in self._tasks:
            return
        if not self._tasks:
            self.backward_visits = []
        self._tasks.add(task)
        if self._group is None:  # else it ends with the group
            Variable._execution_engine.queue_callback(partial(self._end_backward, task))

    def _end_backward(self, task: int) -> None:
        """Autograd is done, or raised: gradients are at rest when its caller goes on.

        Where one cannot be brought there, the pass raises, and stays among those that did.
        """
        if task not in self._tasks:
            return
        outermost = task == min(self._tasks)
        if outermost:
            self._leave()
        self._gradients.finish()
        self._tasks.discard(task)
        if outermost:
            self.recorder.end_pass()
            self.loader.take_samples()
            self._close_backward()

    def _abandon_backward(self) -> None:
        """If one raised."""
        if self._tasks:
            self.loader.reset()
            self._gradients.abandon()
            self._close_backward()

    def _close_backward(self) -> None:
        self._tasks.clear()
        self._visiting = self._due = None
        self._updated = True
        self._offload.settle()
