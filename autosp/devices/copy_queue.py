"""Copies on a stream: what is known of one, and the queue of those that cannot be issued yet.

[Note: copies keep their order] Copies are asked for by the host in an order in which a later one may overwrite what an
earlier one brings. One whose source is still being read cannot be put on the stream yet, so neither can those asked for
after it: they wait in a queue, which the reader's thread empties as far as it can after each read. By the time that it
comes to a read, every copy asked for before that read has been issued, for the reads that those need were asked for
before them and are over: so the copies that a read waits for are on the stream, and the stream waits only for compute
that was launched before. See [Note: no read waits for a later call].
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autosp.devices.worker import CopyEvent


@dataclass(slots=True)
class StreamTimes:
    """Two timing events on the copy stream, before and after a copy, once it was issued."""

    began: Any = None
    ended: Any = None


class StreamCopy:
    """A copy that was asked for. It is issued at once, or by the reader's thread when its bytes are there."""

    __slots__ = ("_issued", "error", "times")

    def __init__(self) -> None:
        self._issued = threading.Lock()
        self._issued.acquire()
        self.times = StreamTimes()
        self.error: BaseException | None = None

    def set_issued(self) -> None:
        """It is on the stream, or has failed."""
        self._issued.release()

    def is_issued(self) -> bool:
        """Whether that was called."""
        return not self._issued.locked()

    def wait_issued(self) -> None:
        """Block until it is. Raises what its read, or issuing it, raised."""
        with self._issued:  # held until then
            pass
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        """Block until it is over, however it ended; the GIL is free meanwhile."""
        with self._issued:
            pass
        if self.error is None:
            self.times.ended.synchronize()


@dataclass(frozen=True, slots=True)
class AskedCopy:
    """A copy with its (target, source) runs, the compute that it comes after, and the job that brings its source.

    That is a read, or a job of the host's that writes there.
    """

    copied: StreamCopy
    runs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    after: Any
    source: CopyEvent | None

    def can_be_issued(self) -> bool:
        """Whether its source is there, or never will be."""
        return self.source is None or self.source.over()


class CopyQueue:
    """See [Note: copies keep their order]."""

    def __init__(self, issue: Callable[[AskedCopy], None]) -> None:
        """`issue` puts a copy whose source is there on the stream."""
        self._issue = issue
        self._asked: deque[AskedCopy] = deque()
        self._asking = threading.Lock()

    def ask(self, asked: AskedCopy) -> StreamCopy:
        """Issue a copy in its turn: now, if nothing has to be waited for."""
        with self._asking:
            self._asked.append(asked)
            self._issue_what_can_be()
        return asked.copied

    def issue(self) -> None:
        """Issue what can be: on the reader's thread after a read, or where all reads are over."""
        with self._asking:
            self._issue_what_can_be()

    def _issue_what_can_be(self) -> None:
        while self._asked and self._asked[0].can_be_issued():
            self._issue(self._asked.popleft())
