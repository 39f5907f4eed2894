"""Writes a study's raw results with what they depend on: date, device, versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from autosp.devices import Device, choose_device

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("autosp", "torch", "optuna", "numpy", "transformers", "accelerate", "safetensors")


def environment(device: Device | None = None) -> dict[str, Any]:
    """Where and with what a figure was measured; on the default device unless one is given."""
    info = (device or choose_device(None)).info
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": info.name,
        "kind": info.kind,
        "slow_tier": info.slow_tier.value,
        "memory_gb": round(info.memory_bytes / 1e9, 1),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def commit() -> str:
    """The repository's commit, with a "+" if files that it tracks were changed since; "unknown" outside of one."""
    say = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(say, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(name: str, figures: Any, table: str) -> None:
    """`results/<name>.json` with the raw figures, `results/<name>.md` with the table a person reads."""
    RESULTS.mkdir(exist_ok=True)
    around = environment()
    (RESULTS / f"{name}.json").write_text(json.dumps({"environment": around, "figures": figures}, indent=1) + "\n")
    head = ", ".join(f"{key} {value}" for key, value in around.items())
    (RESULTS / f"{name}.md").write_text(f"{head}\n\n{table}\n")
    print(f"{head}\n\n{table}")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
