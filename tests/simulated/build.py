"""Compiles `device.cpp` against the installed torch, where that was not done yet. It takes a minute, and a C++ compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "_simulated"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "autosp-tests"


def load() -> ModuleType:
    """The compiled module. Raises: CalledProcessError if it does not compile, OSError if there is no compiler."""
    digest = hashlib.sha256(SOURCE.read_bytes() + str(torch.__version__).encode()).hexdigest()[:16]
    library = CACHE / f"{NAME}-{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = library.with_name(f"{os.getpid()}-{library.name}")
        subprocess.run(_command(partial), check=True)
        partial.replace(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _command(library: Path) -> list[str]:
    include = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    found = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    defined = [f"-DTORCH_EXTENSION_NAME={NAME}", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    libraries = ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-pthread"]
    return [
        os.environ.get("CXX", "g++"),
        "-O1",
        "-fPIC",
        "-shared",
        "-std=c++20",
        *defined,
        *include,
        str(SOURCE),
        "-o",
        str(library),
        *found,
        *libraries,
    ]
