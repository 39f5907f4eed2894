"""What a step does, and what modules do and were told, as texts that are the same in every process.

A study is of one step, and of modules with one code and one set of attributes: others may need other memory and time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from dis import get_instructions
from functools import cached_property, partial
from inspect import unwrap
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from autosp.batch import PLAIN, Step

ORIGINS = ("name_or_path", "transformers_version", "architectures", "model_type", "dtype", "torch_dtype")
"""Attributes that say where a model is from, or what its tensors say: some change as it is saved."""

CHOICE = "implementation"
"""In the names of private attributes of configs that count. Others hold what a library notes for itself."""

DEEPEST = 8
"""Calls of functions by functions, and what else is inside each other, that are looked into."""


def step_name(step: Step | None) -> str:
    """What runs a pass: `call`, or the step's name with a hash of its code, defaults, closure and globals.

    Of what the step closes over, and of the globals that it uses and does not assign, plain values, tuples of them and
    functions count by value; other objects, which may change between calls (a counter, a list), by type.
    """
    if step is None:
        return "call"
    name = f"{getattr(step, '__module__', '')}.{getattr(step, '__qualname__', type(step).__qualname__)}"
    return f"{name}#{hashlib.sha256(_described(step, 0, set()).encode()).hexdigest()[:12]}"


def behaviour_of(model: nn.Module) -> str:
    """A hash of what its modules do, beside their tensors: the code of `forward`, and public attributes that are plain
    values or configs.

    Sizes, flags, names of implementations, `training`. What passes write to counts by nothing: what `forward` assigns,
    lists and other objects.
    """
    found = hashlib.sha256()
    configs: dict[int, str] = {}
    forwards: dict[Any, _Forward] = {}
    for path, module in model.named_modules():
        own = vars(module).get("forward", module.__class__)
        if own not in forwards:
            forwards[own] = _forward_of(own, module.__class__)
        forward = forwards[own]
        found.update(f"{path}:{forward.digest}\n".encode())
        for name, value in sorted(vars(module).items()):
            if not _counts(name) or name in forward.assigned:
                continue
            if _is_config(value):
                if id(value) not in configs:
                    configs[id(value)] = _text_of(vars(value), 0)
                found.update(f"{path}.{name}={configs[id(value)]}\n".encode())
            elif isinstance(value, tuple | frozenset) or _is_plain(value):
                found.update(f"{path}.{name}={_text_of(value, 0)}\n".encode())
    return found.hexdigest()[:12]


class _Forward(NamedTuple):
    """Of a class of modules: its `forward`, the methods that this names, and so on."""

    assigned: frozenset[str]
    """Attributes that they assign: counters and the like."""
    digest: str
    """Of their code."""


def _forward_of(own: Any, kind: type[nn.Module]) -> _Forward:
    """`own`: the class, or a `forward` that a module has for itself."""
    assigned = {name for one in kind.__mro__ for name, value in vars(one).items() if isinstance(value, cached_property)}
    digest = hashlib.sha256()
    seen: set[str] = set(vars(nn.Module)) - {"forward"}
    names = ["forward"]
    while names:
        name = names.pop()
        method = None if name in seen else own if name == "forward" and own is not kind else getattr(kind, name, None)
        seen.add(name)
        for code in _codes_of(method):
            assigned.update(one.argval for one in get_instructions(code) if one.opname == "STORE_ATTR")
            digest.update(_described(code, 0, set()).encode())
            names += code.co_names
    return _Forward(frozenset(assigned), digest.hexdigest())


def _codes_of(method: Any) -> Iterator[CodeType]:
    """Of what a method runs, whatever is wrapped around it."""
    with suppress(ValueError):  # something that wraps itself
        function = unwrap(getattr(method, "__func__", method)) if callable(method) else None
        if isinstance(function, FunctionType):
            yield from _codes_in(function.__code__)


def _counts(name: str) -> bool:
    return name not in ORIGINS and (not name.startswith("_") or CHOICE in name)


def _is_config(value: Any) -> bool:
    """A dataclass, or of a class that calls itself one, as those of transformers do."""
    named = "config" in type(value).__name__.lower() and hasattr(value, "__dict__")
    return not isinstance(value, type) and (named or is_dataclass(value)) and hasattr(value, "__dict__")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (*PLAIN, torch.dtype, torch.device))


def _text_of(value: Any, depth: int) -> str:
    """Plain values, containers of them and configs; the class of anything else."""
    if _is_plain(value):
        return repr(value)
    if depth < DEEPEST and isinstance(value, Mapping):
        items = (f"{key}:{_text_of(item, depth + 1)}" for key, item in value.items() if _counts(str(key)))
        return "{" + ",".join(sorted(items)) + "}"
    if depth < DEEPEST and isinstance(value, list | tuple):
        return "(" + ",".join(_text_of(item, depth + 1) for item in value) + ")"
    if depth < DEEPEST and isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(_text_of(item, depth + 1) for item in value)) + "}"
    if depth < DEEPEST and _is_config(value):
        return _text_of(vars(value), depth + 1)
    return type(value).__qualname__


def _described(value: Any, depth: int, seen: set[int]) -> str:
    """A text that differs where the behaviour of a step may, and is the same in every process."""
    if _is_plain(value):
        return repr(value)
    if depth > DEEPEST:
        return type(value).__qualname__
    parts: list[Any]
    if isinstance(value, tuple):
        parts = list(value)
    elif isinstance(value, frozenset):
        return "{" + ",".join(sorted(_described(item, depth + 1, seen) for item in value)) + "}"
    elif isinstance(value, partial):
        parts = [value.func, value.args, *(item for pair in value.keywords.items() for item in pair)]
    elif isinstance(value, MethodType):
        parts = [value.__func__]
    elif isinstance(value, CodeType):
        parts = [value.co_code, value.co_names, value.co_consts]
    elif isinstance(value, FunctionType):
        if id(value) in seen:
            return value.__qualname__
        seen.add(id(value))
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        keywords = [item for pair in (value.__kwdefaults__ or {}).items() for item in pair]
        parts = [value.__code__, value.__defaults__, *keywords, *cells, *_globals_of(value)]
    elif isinstance(vars(type(value)).get("__call__"), FunctionType):
        return f"{type(value).__qualname__}({_described(vars(type(value))['__call__'], depth + 1, seen)})"
    else:
        return getattr(value, "__qualname__", type(value).__qualname__)
    return f"{type(value).__name__}({','.join(_described(part, depth + 1, seen) for part in parts)})"


def _globals_of(function: FunctionType) -> list[Any]:
    """What it uses of its module's, and does not assign: plain values, tuples, functions that are defined there."""
    used = [one for code in _codes_in(function.__code__) for one in get_instructions(code)]
    names = {one.argval for one in used if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names -= {one.argval for one in used if one.opname == "STORE_GLOBAL"}
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    return [
        value
        for _, value in sorted(found.items())
        if _is_plain(value)
        or isinstance(value, tuple | frozenset)
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    ]


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """It, and those of functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
