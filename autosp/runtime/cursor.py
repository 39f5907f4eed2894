"""Follows the schedule's visits while the model makes its own, and says what to issue when."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autosp.runtime.transfers import Prefetch, Visit


class Cursor:
    """A position in one period of visits. See [Note: prefetch is a hint] for what depends on it: time only."""

    def __init__(
        self, visits: Sequence[Visit], after: Sequence[Sequence[Prefetch]], issue: Callable[[Prefetch], None]
    ) -> None:
        """`after`: what to issue after each of the `visits`."""
        self._visits = visits
        self._after = after
        self._issue = issue
        self._next = 0

    def restart(self) -> None:
        """The next visit is the period's first."""
        self._next = 0

    def advance(self, visit: Visit) -> int | None:
        """Move past this visit and return its position; None if the schedule has no such visit."""
        visits = self._visits
        position = self._next
        if position < len(visits) and visits[position] == visit:
            self._next = (position + 1) % len(visits)
            return position
        return self._resynchronise(visit)

    def issue_after(self, position: int | None) -> None:
        """Issue what is due once the visit at that position is over."""
        if position is not None:
            for prefetch in self._after[position]:
                self._issue(prefetch)

    def _resynchronise(self, visit: Visit) -> int | None:
        """The order differs from the profiled one. Skipped visits' loads are issued if their user is still to come."""
        period = len(self._visits)
        for skipped in range(1, period):
            position = (self._next + skipped) % period
            if self._visits[position] != visit:
                continue
            if skipped <= period // 2:
                for passed in range(skipped):
                    for prefetch in self._after[(self._next + passed) % period]:
                        if passed + prefetch.needed_in > skipped:
                            self._issue(prefetch)
            self._next = (position + 1) % period
            return position
        return None
