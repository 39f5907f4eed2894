"""`module:factory` -> a model. Nothing is executed but the module and the factory that the user names."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autosp.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from autosp.batch import Step

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_RETURNS = "it must return (model, sample_batch) or (model, sample_batch, step)"


@dataclass(frozen=True)
class Subject:
    """What a factory made."""

    model: nn.Module
    batch: Any
    step: Step | None = None


def make_subject(name: str) -> Subject:
    """Import `module`, from the current directory too, and call its `factory` without arguments.

    What the module or the factory itself raises passes through.

    Raises: SettingError naming what was not found, and the close name; or what is wrong with the factory's answer.
    """
    return _subject(name, find_factory(name)())


def names_factory(name: str) -> bool:
    """Whether a text is written as module:factory."""
    return _NAME.fullmatch(name) is not None


def find_factory(name: str) -> Callable[[], Any]:
    """The factory that `module:factory` names. Its module is imported, from the current directory too.

    Raises: SettingError naming what was not found, and the close name.
    """
    if not names_factory(name):
        path = Path(name.partition(":")[0])
        hint = f", as in {path.stem}:make" if path.suffix == ".py" else ", as in my_models:make"
        raise SettingError(f"{name!r} does not name a factory: write module:factory{hint}")
    module_name, _, factory_name = name.partition(":")
    return _factory(_module(module_name), factory_name)


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that theirs imports
        message = f"no module {error.name!r} in {here} or among the installed packages"
        raise SettingError(message + _hint(name, (path.stem for path in Path(here).glob("*.py")))) from error


def _factory(module: ModuleType, name: str) -> Callable[[], Any]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    where = f"module {module.__name__} ({module.__file__})"
    if found is not None:
        raise SettingError(f"{name!r} in {where} is a {type(found).__name__}, not a function")
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise SettingError(f"no {name!r} in {where}{_hint(name, own)}")


def _subject(name: str, made: Any) -> Subject:
    from torch import nn

    if not isinstance(made, tuple) or len(made) not in (2, 3):
        what = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise SettingError(f"{name} returned {what}; {_RETURNS}")
    if not isinstance(made[0], nn.Module):
        swapped = isinstance(made[1], nn.Module) and not isinstance(made[0], Mapping)
        hint = " (the other way round?)" if swapped else ""
        raise SettingError(f"{name} returned a {type(made[0]).__name__} as its model{hint}; {_RETURNS}")
    return Subject(*made)


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
