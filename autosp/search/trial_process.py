"""What the process runs in which isolated trials are made: see `autosp.search.isolated`."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from torch import nn

from autosp.batch import Step
from autosp.devices import Device
from autosp.errors import IsolationError, NotPicklableError
from autosp.parcel import open_parcel
from autosp.runtime.bench import Bench
from autosp.search.numerics import use_numerics
from autosp.search.validate import Reference, validate
from autosp.spec import Partition, Reading
from autosp.workload import Workload

PR_SET_PDEATHSIG = 1
"""prctl(2)."""


@dataclass(frozen=True)
class Job:
    """What a process must know to make trials."""

    model: nn.Module
    batch: Any
    step: Step | None
    mode: str
    seed: int
    group: int
    device: Device
    partition: Partition
    reading: Reading
    cache_dir: Path
    budget_bytes: int
    host_budget_bytes: int | None
    numerics: dict[str, Any]


class Said(Enum):
    """What an answer is."""

    STARTED = auto()
    READY = auto()
    MEASURED = auto()
    RAISED = auto()
    DEVICE_ERROR = auto()
    PROGRESS = auto()
    WARNED = auto()


@dataclass(frozen=True)
class Answer:
    """What the process tells its parent."""

    said: Said
    content: Any = None


def serve(pipe: Connection) -> None:
    """Take a parcel, then validate one candidate after another, until the parent closes the pipe or dies."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    with suppress(EOFError, OSError):  # the parent is gone
        pipe.send(Answer(Said.STARTED))
        try:
            _serve(pipe, _received(pipe))
        except Exception as error:  # noqa: BLE001 - handed to the parent, which raises it
            pipe.send(Answer(Said.RAISED, _sendable(error)))


def _received(pipe: Connection) -> Job:
    descriptor = recv_handle(pipe)
    places, pickled = pipe.recv(), pipe.recv_bytes()
    try:
        job: Job = open_parcel(pickled, places, descriptor)
    except (pickle.UnpicklingError, AttributeError, ImportError, TypeError) as error:
        raise NotPicklableError(
            f"the process for isolated trials cannot make the model, batch or step that was sent to it ({error}): "
            "define their classes in a module that can be imported; or leave out isolate=True"
        ) from error
    finally:
        os.close(descriptor)
    return job


def _serve(pipe: Connection, job: Job) -> None:
    use_numerics(job.numerics)

    def tell(said: Said, content: Any = None) -> None:
        pipe.send(Answer(said, content))

    warnings.showwarning = lambda message, category, *_: tell(Said.WARNED, (str(message), category))
    workload = Workload.of(job.model, job.batch, job.step, job.mode, job.device, job.seed, job.group)
    reference = None if workload.mode == "training" else Reference.of_inference(job.device, workload)
    with Bench(job.model, job.partition, job.device, job.cache_dir, job.host_budget_bytes, workload.mode) as bench:
        bench.readers.use(job.reading)
        reference = reference or Reference.of_training(bench, workload)
        tell(Said.READY)
        trial = partial(validate, bench, workload, reference, job.budget_bytes, progress=partial(tell, Said.PROGRESS))
        while True:
            try:
                measured = trial(*pipe.recv())
            except Exception as error:
                if not job.device.is_fatal(error):
                    raise
                tell(Said.DEVICE_ERROR, str(error).splitlines()[0])
                os._exit(1)  # nothing on the device can be freed any more
            tell(Said.MEASURED, measured)


def _sendable(error: Exception) -> Exception:
    """The exception, with where it was raised; or what can be said of one that cannot be pickled."""
    where = "in the process of isolated trials:\n" + "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception as failure:  # noqa: BLE001 - whatever their exception's own methods raise
        copy = IsolationError(f"{type(error).__qualname__}: {error} (it could not be sent: {failure})")
    if not isinstance(copy, Exception):
        copy = IsolationError(f"{type(error).__qualname__}: {error}")
    copy.add_note(where)
    return copy


def _end_with_parent() -> None:
    """Have the kernel kill this process when the parent is gone, in the middle of a trial too."""
    parent = parent_process()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)
