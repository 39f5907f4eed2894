"""How long a study may go on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from autosp.errors import SettingError

MAX_TRIALS = 12
"""Validations without a limit of the user's. The stop rule usually ends a study before."""


@dataclass(frozen=True)
class Limits:
    """Trials of the whole study, and seconds of this call. At least one trial is made in any case.

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

    def reached(self, trials: int) -> bool:
        """Whether a study with that many trials must stop."""
        if trials >= (MAX_TRIALS if self.max_trials is None else self.max_trials):
            return True
        return bool(trials) and self.timeout_s is not None and time.monotonic() - self._started > self.timeout_s
