"""Functions in threads of their own, of which exactly one runs at a time.

The running one goes on until it hands over to another one, or ends. So they are coroutines that may hand over wherever
they are, in a hook under somebody else's C++ frames too, and what they share needs no lock.

[Note: unwinding] When one raises, or the thread that waits for them is interrupted, the others end one after another:
each raises `StoppedError` where it handed over, or, if it runs, where it next asks. What never began never begins.
`run` returns, or raises, when all threads have ended; but one that was about to begin when Ctrl-C came does not count
as alive yet (threading.Thread.is_alive): it ends by itself right after, and runs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from typing import Any

THREAD_NAME = "autosp-microbatch"


class StoppedError(BaseException):
    """Unwinds a function because another one raised. As Ctrl-C, nobody should catch it on the way."""


class Relay:
    """Runs functions once. `left` are the numbers of those that have not ended, in order."""

    def __init__(self, functions: Sequence[Callable[[], Any]], following: Callable[[], int]) -> None:
        """`following` says who of `left` is next when one ends, and who is first. It is called by the one that ends."""
        self._functions = functions
        self._following = following
        self._turns: list[SimpleQueue[None]] = [SimpleQueue() for _ in functions]
        """Written in C: Ctrl-C cannot come between a turn that is given and its thread that wakes up."""
        self._threads: list[threading.Thread] = []
        self._results: list[Any] = [None] * len(functions)
        self._error: BaseException | None = None
        self._over = threading.Event()
        self.left = list(range(len(functions)))
        self.running = -1

    def run(self) -> list[Any]:
        """What the functions return. Raises what the first of them raises."""
        try:
            self._start()
            self._give_on()
        except BaseException as error:  # noqa: BLE001 - raised below, once all have ended
            self._error = self._error or error
        if self.running < 0:  # nobody began, nor will
            self._over.set()
            for turn in self._turns:
                turn.put(None)
        while True:
            try:  # nothing here is outside of it: Ctrl-C is raised once the running one came to where it asks
                self._over.wait()
                break
            except BaseException as error:  # noqa: BLE001 - likewise
                self._error = self._error or error
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        results, self._results, self._functions = self._results, [], ()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its traceback holds the frames of a whole pass
        return results

    def hand_over(self, number: int) -> None:
        """Let another one run, and go on when it is the caller's turn again. Raises: StoppedError."""
        mine = self.running
        self._give(number)
        self._turns[mine].get()
        self.check()

    def check(self) -> None:
        """Raises: StoppedError if the caller has to end."""
        if self._error is not None:
            raise StoppedError

    def runs_here(self) -> bool:
        """Whether the calling thread is that of the running one."""
        return self.running >= 0 and threading.current_thread() is self._threads[self.running]

    def _start(self) -> None:
        for number in self.left:
            name, context = f"{THREAD_NAME}-{number}", copy_context()
            self._threads.append(
                threading.Thread(target=context.run, args=(self._work, number), name=name, daemon=True)
            )
            self._threads[-1].start()

    def _work(self, number: int) -> None:
        self._turns[number].get()
        if self._error is None:
            with self._ending_all():
                self._results[number] = self._functions[number]()
        self.left.remove(number)
        self._give_on()

    def _give_on(self) -> None:
        """One has ended, or the first begins."""
        if not self.left:
            self._over.set()
            return
        following = self.left[0]
        if self._error is None:
            with self._ending_all():
                following = self._following()
        self._give(following)

    def _give(self, number: int) -> None:
        self.running = number
        self._turns[number].put(None)

    @contextmanager
    def _ending_all(self) -> Iterator[None]:
        """What is raised inside is kept for `run`, if it is the first: see [Note: unwinding]."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - `run` raises it
            if self._error is None:
                self._error = error
