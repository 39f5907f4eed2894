"""Who imports whom, what is public, and how long a module is: the design's rules, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import autosp

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "autosp"

MAY_IMPORT = {
    "errors": "",
    "files": "",
    "apart": "",
    "spec": "errors files",
    "settings": "",
    "intercept": "",
    "batch": "",
    "described": "batch",
    "factory": "",
    "devices": "files",
    "schedule": "",
    "cost_model": "schedule",
    "partition": "batch intercept",
    "tiers": "devices files partition",
    "parcel": "devices files partition",
    "workload": "batch described devices intercept partition",
    "runtime": "batch devices intercept partition schedule tiers",
    "profiler": "batch cost_model devices intercept partition runtime schedule tiers workload",
    "checkpoint": "devices files partition settings",
    "store": "files settings",
    "search": "batch cost_model devices parcel runtime schedule store workload",
    "studies": "store",
    "apply": "devices intercept partition runtime schedule settings tiers workload",
    "load": "apply checkpoint factory runtime",
    "manual": "batch cost_model devices partition profiler settings workload",
    "progress": "",
    "estimate": "batch cost_model devices partition profiler progress runtime search settings workload",
    "tune": "apart batch cost_model devices partition profiler progress runtime search settings store workload",
    "pareto": "batch devices search store tune",
    "batch_size": "batch devices estimate profiler search store tune workload",
    "report": "cost_model files schedule",
}
"""Room -> rooms it may import, besides errors, spec and itself. Each room stands below those it may import."""

NO_TORCH = {"schedule", "cost_model", "spec", "errors", "files"}

TOP = {"cli", "service"}
"""Nothing imports these."""

PUBLIC = {
    "BatchSizes",
    "Front",
    "Plan",
    "Prediction",
    "Profile",
    "Stats",
    "StreamedModel",
    "Throughput",
    "apply",
    "delete_study",
    "estimate",
    "floor",
    "list_studies",
    "load",
    "load_plan",
    "pareto",
    "plan",
    "profile",
    "resume",
    "tune",
    "tune_batch",
}


def module_name(path: Path) -> str:
    """`autosp.schedule.actions`; a package is named as its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The folder, or the single file, under autosp/."""
    return module.split(".")[1] if "." in module else ""


def statements(tree: ast.AST, *, whole: bool) -> Iterator[ast.stmt]:
    """What runs when the module is imported; with `whole`, when its functions are called too. No type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not whole:
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from statements(node, whole=whole)


def imports(source: str, *, whole: bool) -> set[str]:
    """Names of the modules that a source imports."""
    found: set[str] = set()
    for node in statements(ast.parse(source), whole=whole):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in MODULES} or {node.module}
    return found


@cache
def imported_by(module: str, *, whole: bool) -> frozenset[str]:
    """Names of the modules that a module of autosp imports."""
    return frozenset(imports(MODULES[module].read_text(encoding="utf-8"), whole=whole))


def way_to_torch(module: str, seen: set[str]) -> list[str] | None:
    """The chain of imports that ends in torch, if there is one. The package's own `__init__` is left out."""
    seen.add(module)
    for name in sorted(imported_by(module, whole=False)):
        if name.split(".")[0] == "torch":
            return [module, name]
        chain = [".".join(name.split(".")[:length]) for length in range(2, name.count(".") + 2)]
        for step in chain:
            if step in MODULES and step not in seen:
                way = way_to_torch(step, seen)
                if way is not None:
                    return [module, *way]
    return None


def test_the_reader_of_imports_reads() -> None:
    source = "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e"
    source += "\ntry:\n    import f\nexcept ImportError:\n    import g"
    inside = "\nclass H:\n    import h\ndef i():\n    import i\n    if True:\n        import j"
    assert imports(source + inside, whole=False) == {"a.b", "c", "f", "g", "h"}
    assert imports(source + inside, whole=True) == {"a.b", "c", "f", "g", "h", "i", "j"}
    assert imports("from autosp.schedule import actions", whole=True) == {"autosp.schedule.actions"}
    assert imports("from autosp.schedule.actions import parse", whole=True) == {"autosp.schedule.actions"}
    assert way_to_torch("autosp.runtime.bench", set()) is not None
    assert way_to_torch("autosp.workload", set()) is not None


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in MAY_IMPORT])
def test_import_table(module: str) -> None:
    room = room_of(module)
    allowed = {room, *MAY_IMPORT[room].split()} | (set() if room in ("errors", "spec") else {"errors", "spec"})
    inside = {name for name in imported_by(module, whole=True) if name.split(".")[0] == "autosp"}
    assert {room_of(name) for name in inside} <= allowed


def test_import_table_is_in_order() -> None:
    """Rooms stand above each other: no two can import each other."""
    below: set[str] = set()
    for room, others in MAY_IMPORT.items():
        assert set(others.split()) <= below
        assert any(room_of(module) == room for module in MODULES)
        below.add(room)


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_the_top(module: str) -> None:
    rooms = {room_of(name) for name in imported_by(module, whole=True) if name.split(".")[0] == "autosp"}
    assert rooms & TOP <= {room_of(module)}


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in NO_TORCH])
def test_no_torch(module: str) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imported_by(module, whole=True))
    assert way_to_torch(module, set()) is None


def test_no_torch_in_fact() -> None:
    """They import where there is no torch at all; a package without contents stands for autosp/__init__.py."""
    names = [name for name in MODULES if room_of(name) in NO_TORCH]
    assert len(names) > 8
    code = f"""
import importlib, sys, types
package = types.ModuleType("autosp")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["autosp"], sys.modules["torch"] = package, None
for name in {names!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)


def test_public_names() -> None:
    assert set(autosp.__all__) == PUBLIC
    assert autosp.__all__ == sorted(autosp.__all__)
    for name in autosp.__all__:
        assert getattr(autosp, name).__doc__


def test_init_holds_the_public_names_and_nothing_else() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body[1:]
    assert all(isinstance(node, ast.ImportFrom) for node in body[:-1])
    assert {alias.asname or alias.name for node in body[:-1] for alias in node.names} == PUBLIC  # type: ignore[attr-defined]
    assert ast.unparse(body[-1]).startswith("__all__ =")


@pytest.mark.parametrize("module", MODULES)
def test_docstring(module: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", MODULES)
def test_length(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 350


def test_alembic_is_no_package() -> None:
    """It would shadow the library of that name."""
    assert (ROOT / "alembic" / "env.py").exists()
    assert not list((ROOT / "alembic").rglob("__init__.py"))
