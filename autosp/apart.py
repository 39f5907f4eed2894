"""Imports that keep nothing of their caller."""

from __future__ import annotations

import threading
from importlib import import_module


def import_apart(name: str) -> None:
    """Import a module in a thread of its own, so that a plain import of it finds it there.

    optuna keeps the exceptions of optional imports that failed, and those keep every frame that was below: imported in
    the middle of `tune`, it would keep the model alive as long as the process.
    """
    thread = threading.Thread(target=import_module, args=(name,), name=f"import {name}")
    thread.start()
    thread.join()
