"""One measurement in a process of its own: memory is comparable, and a crash is a row."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any


class NoAnswerError(RuntimeError):
    """The process ended without an answer; `outcome` says how: "crashed" or "timed out"."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def answer_of(target: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float) -> dict[str, Any]:
    """What `target(job, path)` wrote to `path`, a JSON file in `folder`, from a fresh process.

    Raises: NoAnswerError if it crashed or took longer than `timeout_s`.
    """
    return _answer_of(multiprocessing.get_context("spawn"), target, job, folder, timeout_s)


def forked_answer_of(target: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float) -> dict[str, Any]:
    """`answer_of` from a process that has all that this one imported: many small measurements need not import anew.

    This process must never have computed with torch: its threads are not there after a fork. On Linux.
    """
    return _answer_of(multiprocessing.get_context("fork"), target, job, folder, timeout_s)


def _answer_of(
    context: SpawnContext | ForkContext, target: Callable[[Any, str], None], job: Any, folder: Path, timeout_s: float
) -> dict[str, Any]:
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    process = context.Process(target=target, args=(job, str(answer)))
    process.start()
    try:
        process.join(timeout_s)
    finally:
        late = process.exitcode is None
        if late:
            process.kill()
            process.join()
    if late:
        raise NoAnswerError("timed out", f"stopped after {timeout_s:g} s")
    if not answer.exists():
        raise NoAnswerError("crashed", f"the process ended with {process.exitcode}")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found
