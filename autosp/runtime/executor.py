"""Runs an action list while the model runs: a cursor over the compute actions, loads issued when their turn comes.

[Note: prefetch is a hint] The schedule says when to load what, never what is right. Whether a layer's weights are on
the device is decided by the state of its group, so a layer that runs out of order, twice or not at all is right too: it
is loaded on the spot (a miss) if it is not there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from autosp.devices.base import nothing_to_do
from autosp.devices.worker import FORKED
from autosp.errors import SettingError
from autosp.runtime.cursor import Cursor
from autosp.runtime.loader import Loader
from autosp.runtime.streamed_layer import StreamedLayer
from autosp.runtime.transfers import Issue, Issued, Prefetch, Visit, prefetches
from autosp.schedule.actions import Kind, Schedule


class Observer:
    """Told of every visit, and does nothing; those of the profiler do."""

    def enter(self, inputs: Any) -> None:
        """A block whose activations will be computed again is called."""

    def leave(self) -> None:
        """It returned, or raised."""

    def arrive(self, layer: int, inputs: Any) -> None:
        """Before anything is waited for. `inputs`: positional and keyword arguments."""

    def start(self, layer: int) -> None:
        """The weights are there."""

    def finish(self, layer: int, output: Any) -> None:
        """The layer's forward returned."""


class Microbatches(Protocol):
    """Those that share a pass: calls of the model in several threads, of which one runs at a time."""

    def runs_here(self) -> bool:
        """Whether the calling thread is the running one's."""

    def take_turn(self, visit: Visit) -> None:
        """Let others run until it is this visit's turn."""


class Executor:
    """Streams the layers of one model through one arena. One pass at a time: other threads wait for their turn.

    [Note: the heap of a group] Where the device is the host, each microbatch's thread has a part of the C library's
    heap to itself, in which freed memory would stay: eight microbatches were seen to take 110 MB instead of 74. So
    while they run, large pieces are given back at once, as in training.
    """

    def __init__(self, schedule: Schedule, loader: Loader, issue: Issue = prefetches) -> None:
        """`loader` is of the same schedule; `issue` reads from it what to issue when."""
        self.loader = loader
        self.device = loader.device
        self.counters = loader.counters
        self.recorder = loader.recorder
        self.observer: Observer | None = None
        self.before_pass: Callable[[], None] = nothing_to_do
        self.enter: Callable[..., Any] = self.run_pass
        """What a layer that is called from outside the model goes through: a pass, wherever its inputs are."""
        self.tidy: Callable[[], None] = nothing_to_do
        self.backward_visits: list[int] = []
        """Layers whose weights the last backward pass needed, in the order of need."""
        self.called_again: set[str] = set()
        """Modules inside layers that backward passes called: see [Note: checkpoints inside layers]."""
        visits, self._start, after = issue(schedule, loader.groups)
        self.cursor = Cursor(visits, after, self.issue)
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._group: Microbatches | None = None
        self._primed = False
        self._process = os.getpid()

    def run_pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an outermost call of the model. Nested calls run as they are.

        If it raises, every layer is at rest again and the next pass starts from the schedule's beginning.

        Raises: SettingError in a process that was forked since: what loads were under way are its parent's.
        """
        if self.running_here():
            return forward(*args, **kwargs)
        if self._group is not None and self._group.runs_here():
            self._owner = threading.get_ident()
            try:
                with self.modes():
                    return forward(*args, **kwargs)
            finally:
                self._owner = None
        self._refuse_forked()
        with self._lock:
            self._owner = threading.get_ident()
            try:
                with self.modes():
                    self.begin_pass()
                    output = forward(*args, **kwargs)
                    self.end_forward()
                    return output
            except BaseException:
                self.abort()
                raise
            finally:
                self.loader.take_samples()
                self._owner = None

    def run_layer(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one layer's forward with its weights on the device."""
        if not self.running_here():
            return self.enter(lambda *a, **k: self.run_layer(layer, forward, a, k), args, kwargs)
        return self.visit(layer, forward, args, kwargs)

    def running_here(self) -> bool:
        """Whether this thread is inside a pass."""
        return self._owner == threading.get_ident()

    @contextmanager
    def shared_pass(self, group: Microbatches) -> Iterator[None]:
        """One pass, of which all calls of the model are a part that `group` makes meanwhile.

        Raises: SettingError within a pass, within another group, or in a forked process.
        """
        self._refuse_forked()
        if self.running_here() or (self._group is not None and self._group.runs_here()):
            raise SettingError("a group of microbatches begins inside a pass: give a step that calls the model only")
        with self._lock, self.device.training():
            self._group = group
            try:
                with self.modes():
                    self.begin_pass()
                yield
                self.end_shared_pass()
            except BaseException:
                self.abort()
                raise
            finally:
                self.begin_turn(None, others_follow=False)
                self.loader.take_samples()
                self._group = None

    def between_passes(self) -> AbstractContextManager[Any]:
        """Once other threads' passes are over; new ones wait. A pass of this thread's own, or a group, goes on."""
        return nullcontext() if self._group is not None and self._group.runs_here() else self._lock

    def close(self) -> None:
        """Bring every layer to rest and let go of the arena, so that its memory is free when this returns."""
        try:
            self.device.synchronize()
            self.abort()
        finally:
            self.loader.close()
            self._start = ()
            self.cursor = Cursor((), (), self.issue)

    # -- what a pass consists of; training does more at each of these -----------------------------------------------

    @contextmanager
    def modes(self) -> Iterator[None]:
        """The torch modes of a pass."""
        with torch.no_grad(), uncached_autocast(self.device.torch_device.type):
            yield

    def _refuse_forked(self) -> None:
        if os.getpid() != self._process:
            raise SettingError(FORKED)

    def begin_pass(self) -> None:
        """Prepare for the first visit."""
        self.device.join()
        self.before_pass()
        self.tidy()
        self.counters.passes += 1
        self.recorder.begin_pass()
        self.loader.drop_written()
        self.prime()

    def prime(self) -> None:
        """Issue what is due before the first visit, once: later passes are prepared by the ones before them."""
        if not self._primed:
            self._primed = True
            self.issue_start()

    def issue_start(self) -> None:
        """Issue what is due before the first visit."""
        for prefetch in self._start:
            self.issue(prefetch)

    def issue(self, prefetch: Issued) -> None:
        """Start what is due."""
        assert isinstance(prefetch, Prefetch), "only a training pass brings anything else"
        self.loader.issue(prefetch)

    def end_forward(self) -> None:
        """The outermost call returned."""
        self.recorder.end_pass()

    def end_shared_pass(self) -> None:
        """All microbatches of a group are done."""
        self.recorder.end_pass()

    def take_turn(self, visit: Visit) -> None:
        """In a group, wait until the others have come to this visit, too."""
        if self._group is not None:
            self._group.take_turn(visit)

    def suspend(self) -> int | None:
        """Another microbatch of the group is next; what it gives is for `resume`."""
        owner, self._owner = self._owner, None
        return owner

    def resume(self, owner: int | None) -> None:
        """A microbatch goes on, inside the model or not."""
        self._owner = owner

    def begin_turn(self, microbatch: int | None, others_follow: bool) -> None:
        """Which one is next, None outside a group; and whether others visit the same layers after it."""

    def end_round(self) -> None:
        """All microbatches of the group have visited these layers."""
        self.cursor.end_round()

    def visit(
        self, layer: StreamedLayer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call of a layer within a pass."""
        observer, recorder = self.observer, self.recorder
        index = layer.index
        visit = (Kind.FORWARD, index)
        self.take_turn(visit)
        self.tidy()
        if observer is not None:
            observer.arrive(index, (args, kwargs))
        recorder.arrive(index)
        self.counters.visits += 1
        position = self.cursor.advance(visit)
        group = self.loader.acquire(layer)
        try:
            recorder.start()
            if observer is not None:
                observer.start(index)
            output = self.loader.own(forward(*args, **kwargs))
            recorder.finish()
            if observer is not None:
                observer.finish(index, output)
        finally:
            self.loader.release(layer, group)
        self.cursor.issue_after(position)
        return output

    def abort(self) -> None:
        """A pass raised: what it had bound is brought to rest."""
        self.loader.reset()
        self.cursor.restart()
        self.recorder.drop_pass()


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Without autograd `nn.TransformerEncoderLayer` takes its children's weights and does not call them.

    Where training showed that these are the layers, their weights are at rest then, and on an accelerator of no use.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def uncached_autocast(kind: str) -> Iterator[None]:
    """Autocast keeps its copy of every weight until its context ends: all of them, whatever the budget."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
