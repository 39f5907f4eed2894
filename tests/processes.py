"""Processes that are there at once: forked from one that has imported what takes seconds, and has done nothing yet."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

forked = multiprocessing.get_context("forkserver")
"""Like "spawn", but for the seconds. The server keeps the environment of the test that needed it first."""

PRELOADED = [
    *["autosp.tune", "autosp.apply", "autosp.search.study", "autosp.store.migrate", "autosp.store.trials"],
    *["alembic.command", "torch._dynamo", "accelerate", "transformers.models.llama.modeling_llama"],
]
"""The compiler, too: whatever applies a plan imports it. And what the models of studies are made of."""

forked.set_forkserver_preload(PRELOADED)


def serve() -> None:
    """Start the server, if it is not there: a study that would be the first to need it has other imports in mind."""
    forked.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


@dataclass(frozen=True)
class Program:
    """Code that runs in a process of its own."""

    _process: BaseProcess
    _folder: tempfile.TemporaryDirectory[str]

    def says(self, *, returncode: int = 0, timeout_s: float = 200) -> str:
        """What it wrote to its stdout, once it has ended as it should."""
        with self._folder as folder:
            self._process.join(timeout_s)
            if self._process.is_alive():  # at its end this process would wait for it
                self._process.kill()
                self._process.join()
            assert self._process.exitcode == returncode, (Path(folder) / "stderr").read_text()
            return (Path(folder) / "stdout").read_text()


def start(code: str, *arguments: object) -> Program:
    """Begin what `python -c code *arguments` would do here, with this process's environment and paths."""
    folder = tempfile.TemporaryDirectory()
    here = Here(folder.name, str(Path.cwd()), dict(os.environ), list(sys.path))
    process = forked.Process(target=_execute, args=(textwrap.dedent(code), list(map(str, arguments)), here))
    process.start()
    return Program(process, folder)


def run(code: str, *arguments: object, returncode: int = 0) -> str:
    """What `code` writes to its stdout in a process of its own, with the tests' modules at hand."""
    return start(code, *arguments).says(returncode=returncode)


class Here(NamedTuple):
    """What a new process inherits from its parent, and a forked one from the server."""

    outputs: str
    folder: str
    environment: dict[str, str]
    paths: list[str]


@dataclass(frozen=True)
class AsHere:
    """What a forked process calls, with the environment and the paths of the one that asks for it."""

    target: Callable[..., object]
    environment: dict[str, str]
    paths: list[str]

    @classmethod
    def of(cls, target: Callable[..., object]) -> AsHere:
        return cls(target, dict(os.environ), list(sys.path))

    def __call__(self, *arguments: object) -> None:
        _inherit(self.environment, self.paths)
        self.target(*arguments)


def _inherit(environment: dict[str, str], paths: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = paths


def _execute(code: str, arguments: list[str], here: Here) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(here.outputs) / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(here.folder)
    _inherit(here.environment, here.paths)
    sys.argv = ["-c", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
