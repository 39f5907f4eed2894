"""Follows the schedule's visits while the model makes its own, and says what to issue when."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autosp.runtime.transfers import Issued, Visit


class Cursor:
    """A position in one period of visits. See [Note: prefetch is a hint] for what depends on it: time only."""

    def __init__(
        self, visits: Sequence[Visit], after: Sequence[Sequence[Issued]], issue: Callable[[Issued], None]
    ) -> None:
        """`after`: what to issue after each of the `visits`."""
        self._visits = visits
        self._after = after
        self._issue = issue
        self._next = 0
        self._round = 0
        """Where the round began."""
        self._made: list[int] = []
        """Visits that each microbatch of the round moved past."""
        self._put_off: dict[int, None] | None = None
        """Positions that visits of the round ended at, in order; None outside rounds."""

    def restart(self) -> None:
        """The next visit is the period's first, and no round is under way."""
        self._next = 0
        self._put_off = None

    def distance(self, visit: Visit) -> int:
        """How many visits of the schedule come before this one is next; a whole period if it has no such visit."""
        period = len(self._visits)
        ahead = (skipped for skipped in range(period) if self._visits[(self._next + skipped) % period] == visit)
        return next(ahead, period)

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
        if position is None:
            return
        if self._put_off is not None:
            self._put_off[position] = None
            return
        for prefetch in self._after[position]:
            self._issue(prefetch)

    def begin_round(self) -> None:
        """Several microbatches make the next visits, one after another. Until the round ends nothing is issued."""
        self._round, self._made, self._put_off = self._next, [], {}

    def begin_again(self) -> None:
        """The next microbatch makes the round's visits."""
        if self._next != self._round:
            self._made.append((self._next - self._round) % len(self._visits))
        self._next = self._round

    def end_round(self) -> None:
        """If one is under way, issue what is due after its visits, and go on from the fewest that a microbatch made."""
        if self._put_off is None:
            return
        self.begin_again()
        if self._made:
            self._next = (self._round + min(self._made)) % len(self._visits)
        positions, self._put_off = self._put_off, None
        for position in positions:
            self.issue_after(position)

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
