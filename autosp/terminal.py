"""What every command shares: the console, how errors and Ctrl-C end it, and where its answers go."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from autosp.errors import AutospError, SettingError

PIPE_COLUMNS = 160
"""Width of tables that no terminal limits."""


class Commands(TyperGroup):
    """Turns what autosp raises on purpose into a message; everything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AutospError as error:
            tell(str(error), style="red")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            tell("interrupted")
            raise typer.Exit(130) from interrupt


@contextmanager
def interruptible(
    factory: str, storage: str | None, device: str | None, isolate: bool, study: Callable[[], str | None]
) -> Iterator[None]:
    """On Ctrl-C, say that the study is kept, and how to go on with it in the same way."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        name = study()
        if name is None:
            tell("interrupted before the study began: nothing was measured")
        else:
            command = ["autosp", "resume", name, factory]
            for option, value in (("--storage", storage), ("--device", device)):
                command += [option, value] if value else []
            command += ["--isolate"] if isolate else []
            tell(f"interrupted; study {name} keeps what was measured: go on with `{shlex.join(command)}`")
        raise typer.Exit(130) from interrupt


def load_pictures(name: str) -> ModuleType:
    """`autosp.report.<name>`, which draws.

    Raises: SettingError if matplotlib is not installed.
    """
    try:
        return import_module(f"autosp.report.{name}")
    except ImportError as error:
        raise SettingError(f"drawing needs {error.name}: pip install 'autosp[viz]'") from error


def budget_of(text: str) -> float | str:
    """A bare number is GB."""
    try:
        return float(text)
    except ValueError:
        return text


def check_folder(output: Path | None) -> None:
    """Before anything is measured: its answer must have a place to go."""
    if output is not None and not output.absolute().parent.is_dir():
        raise SettingError(f"{output}: there is no folder {output.parent}")


def save(what: str, output: Path, write: Callable[[Path], None]) -> None:
    """Write an answer where the user wants it, and say so.

    Raises: SettingError if it cannot be written.
    """
    try:
        write(output)
    except OSError as error:
        raise SettingError(f"{output} cannot be written: {error.strerror}") from error
    tell(f"{what} written to {output}")


def console() -> Console:
    """For the answer, on stdout."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPE_COLUMNS if piped else None)


def tell(text: str, style: str | None = None) -> None:
    """One line beside the answer, on stderr."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
