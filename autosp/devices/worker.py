"""One thread that does jobs in the order in which they are asked for: reads, and copies that take the processor."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

from autosp.errors import SettingError

FORKED = "this process was forked while a plan was applied: call remove() in it first, and apply the plan again"
"""A forked process has no threads but one, and what was under way in others never ends in it."""


class Settling(Protocol):
    """Something that will be over."""

    def settle(self) -> None:
        """Block until it is, however it ended."""


@dataclass(slots=True)
class EventTimes:
    """Seconds of `time.perf_counter`."""

    began: float = 0.0
    ended: float = 0.0


class CopyEvent:
    """The end of one job of a worker, a copy or a read, with the exception it ended in."""

    __slots__ = ("_done", "error", "times")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self.times = EventTimes()
        self.error: BaseException | None = None

    def begin(self) -> None:
        """The worker took the job, and what it waits for is over."""
        self.times.began = time.perf_counter()

    def set(self) -> None:
        """The job is over."""
        self.times.ended = time.perf_counter()
        self._done.release()

    def over(self) -> bool:
        """Whether it is."""
        return not self._done.locked()

    def settle(self) -> None:
        """Block until it is over, however it ended."""
        with self._done:  # held until then
            pass

    def wait(self) -> None:
        """Block until it is over. Raises what the worker raised."""
        self.settle()
        if self.error is not None:
            raise self.error


class Worker:
    """A thread that is started with the first job and ends with `close`. It keeps nothing of a job that is over."""

    def __init__(self, name: str, after_each: Callable[[], None] = lambda: None) -> None:
        """`after_each` is called on the thread after every job, and must not raise."""
        self._name = name
        self._after_each = after_each
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], Sequence[Settling], CopyEvent] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._last: CopyEvent | None = None
        self._unfinished: deque[CopyEvent] = deque()
        _WORKERS.add(self)

    def start(self, work: Callable[[], object], after: Sequence[Settling] = ()) -> CopyEvent:
        """Queue a job: once everything in `after` is over, and all jobs before it, `work` is called."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        job = CopyEvent()
        self._last = job
        self._unfinished.append(job)
        self._jobs.put((work, after, job))
        return job

    def settle(self) -> None:
        """Block until the last job is over; its error, if any, is its waiter's to raise."""
        if self._last is not None:
            self._last.settle()

    def close(self) -> None:
        """End the thread after its queued jobs."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (queued := self._jobs.get()) is not None:
            work, after, job = queued
            del queued
            try:
                for earlier in after:
                    earlier.settle()
                job.begin()
                work()
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the job
                job.error = error
            del work, after
            job.set()
            self._unfinished.popleft()
            del job
            self._after_each()

    def begin_anew(self) -> None:
        """In a forked process: no job is under way, and those that were not over end in an error."""
        self._thread, self._jobs = None, queue.SimpleQueue()
        for job in self._unfinished:
            if not job.over():
                job.error = SettingError(FORKED)
                job.set()
        self._unfinished.clear()


_WORKERS: WeakSet[Worker] = WeakSet()


def _forked() -> None:
    for worker in list(_WORKERS):
        worker.begin_anew()


os.register_at_fork(after_in_child=_forked)
