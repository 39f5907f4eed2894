"""Everything autosp raises on purpose.

    AutospError
    ├── BudgetError                 the budget itself is not a usable number
    │   └── BudgetTooSmallError     nothing fits in it; names the least that works
    ├── ModelError                  the model cannot be streamed as it is
    │   ├── EmptyModelError         no parameter and no buffer
    │   ├── MetaModelError          some tensors have no data (device "meta")
    │   ├── ModelChangedError       tensors were replaced while a plan was applied
    │   └── CheckpointError         weights on disk that are missing, damaged or of another model
    ├── PlanError                   a plan file or object that cannot be used
    │   ├── PlanFormatError         corrupt, or written by a newer autosp
    │   ├── PlanMismatchError       made for another model, batch or mode
    │   └── OutputMismatchError     the streamed output differed from the plain one
    ├── SettingError                an argument out of its range (k, k', mode, batch, device …)
    ├── TierError                   the slow tier failed
    │   ├── DiskFullError           no room for packed weights, or the optimizer's state
    │   ├── HostMemoryError         no host memory for them
    │   └── ReadError               weights, or the optimizer's state, could not be read back
    ├── IsolationError              a trial's own process does not start, or every one of them ended early
    │   └── NotPicklableError       the model, batch or step cannot be sent to it
    └── StoreError                  the database
        ├── StudyNotFoundError      no study of that name; names the close ones
        ├── StudyMismatchError      the study was made for something else
        ├── StoreVersionError       the database was written by a newer autosp
        └── StoreReadOnlyError      the database cannot be written

An exception raised by the user's own model or step passes through unwrapped.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class AutospError(Exception):
    """Base of all errors raised by autosp."""


class BudgetError(AutospError, ValueError):
    """The budget is not a positive, finite amount of memory."""


class BudgetTooSmallError(BudgetError):
    """No setting fits the budget.

    Attributes: `budget_bytes`, `least_bytes` (the least that works), `layer` (the layer that sets it).
    """

    def __init__(self, message: str, *, budget_bytes: int, least_bytes: int, layer: str) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied, and sent to another process, with its attributes: exceptions are made anew of their arguments."""
        made = partial(type(self), budget_bytes=self.budget_bytes, least_bytes=self.least_bytes, layer=self.layer)
        return made, self.args, self.__dict__


class ModelError(AutospError):
    """The model cannot be streamed as it is."""


class EmptyModelError(ModelError, ValueError):
    """The model owns no data: there is nothing to stream."""


class MetaModelError(ModelError, ValueError):
    """Some tensors are on the `meta` device and have no data."""


class ModelChangedError(ModelError, RuntimeError):
    """A parameter's data was replaced while a plan was applied."""


class CheckpointError(ModelError, ValueError):
    """A checkpoint cannot be loaded: its files are missing or damaged, or their tensors are not the model's."""


class PlanError(AutospError):
    """A plan cannot be used."""


class PlanFormatError(PlanError, ValueError):
    """The file is not a plan this version can read."""


class PlanMismatchError(PlanError, ValueError):
    """The plan was made for something else; the message names both fingerprints."""


class OutputMismatchError(PlanError, RuntimeError):
    """A streamed pass gave another output than the plain pass. Such a plan is never returned."""


class SettingError(AutospError, ValueError):
    """An argument is out of its range."""


class TierError(AutospError, OSError):
    """The slow tier failed."""


class DiskFullError(TierError):
    """The disk has no room for packed weights, or for the optimizer's state. Nothing was left behind."""


class HostMemoryError(TierError, MemoryError):
    """Host memory has no room for the weights."""


class ReadError(TierError):
    """Weights, or the optimizer's state, could not be read back from their file."""


class IsolationError(AutospError, RuntimeError):
    """The process of its own that trials run in does not start, or no trial came to its end in it."""


class NotPicklableError(IsolationError):
    """The model, the batch or the step cannot be sent to another process."""


class StoreError(AutospError):
    """The database cannot be used."""


class StudyNotFoundError(StoreError, KeyError):
    """There is no study of that name."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class StudyMismatchError(StoreError, ValueError):
    """The study of that name was made for another model, device, budget, batch or mode."""


class StoreVersionError(StoreError):
    """The database was written by a newer autosp."""


class StoreReadOnlyError(StoreError, PermissionError):
    """The database cannot be written."""
