"""How long a study may go on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from autosp.errors import SettingError

MAX_TRIALS = 8
"""Validations without a limit of the user's. The stop rule usually ends a study before."""

EFFORT_PASSES, EFFORT_S = 25, 5.0
"""What a study may take without a limit of the user's: so many passes of the best plan, and so many seconds."""

LEAST_TRIALS = 2
"""Whatever they take: one alone may have been disturbed."""


@dataclass(frozen=True)
class Limits:
    """Trials of the whole study, and seconds of this call. At least one trial is made in any case.

    Neither set: `MAX_TRIALS`, and the effort. One set: seconds go with `MAX_TRIALS`, trials with nothing.

    Raises: SettingError if one is not positive.
    """

    max_trials: int | None = None
    timeout_s: float | None = None
    _started: float = field(default_factory=time.monotonic, compare=False)

    def __post_init__(self) -> None:
        trials, seconds = self.max_trials, self.timeout_s
        if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
            raise SettingError(f"max_trials={trials!r}: pass a whole number of at least 1, or None")
        if seconds is not None and not (type(seconds) in (int, float) and math.isfinite(seconds) and seconds > 0):
            raise SettingError(f"timeout_s={seconds!r}: pass a positive number of seconds, or None")

    @property
    def by_default(self) -> bool:
        """Whether the user set none."""
        return self.max_trials is None and self.timeout_s is None

    def reached(self, trials: int, spent_s: float = 0.0, pass_s: float = math.inf, due: int = 0) -> bool:
        """Whether a study with that many trials must stop.

        `spent_s`: what it took so far, its profile included, and one more trial would. `pass_s`: of its best plan.
        `due`: how many candidates are to be tried whatever that takes, and were not yet.
        """
        if trials >= (MAX_TRIALS if self.max_trials is None else self.max_trials):
            return True
        if self.by_default:
            return not due and trials >= LEAST_TRIALS and self.beyond_effort(spent_s, pass_s)
        return bool(trials) and self.timeout_s is not None and time.monotonic() - self._started > self.timeout_s

    def beyond_effort(self, spent_s: float, pass_s: float) -> bool:
        """Whether so many seconds are more than a study may take. Never, where the user set a limit."""
        return self.by_default and spent_s > EFFORT_PASSES * pass_s + EFFORT_S
