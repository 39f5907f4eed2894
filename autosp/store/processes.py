"""Which process runs a trial, in a form that others can read; and whether it still does."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

STATE, START_TIME = 0, 19
"""Fields of /proc/<pid>/stat after the command's name: proc_pid_stat(5), 3 and 22."""


def this_process() -> str:
    """Machine, process and the time it started: no other process has ever had all three."""
    return f"{_machine()}/{os.getpid()}/{_stat(os.getpid())[1]}"


def is_dead(process: str) -> bool:
    """Whether a process ran on this machine and does not any more. One that ran elsewhere is not known to be dead."""
    machine, pid, started = process.rsplit("/", 2)
    if machine != _machine() or not started:
        return False
    state, since = _stat(int(pid))
    return since != started or state in ("Z", "X")


@cache
def _machine() -> str:
    """A boot of a machine, and what its process numbers mean in this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return platform.node()


def _stat(pid: int) -> tuple[str, str]:
    """State and time of start; empty if there is no such process, or the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[STATE], fields[START_TIME]
