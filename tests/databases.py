"""Databases of the tests' own: a PostgreSQL server on a unix socket, and a folder for SQLite files."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NEEDED = "AUTOSP_NEED_POSTGRES"
"""Where this is set, as in CI, the tests fail instead of being skipped if there is no server to start."""

SETTINGS = "-c listen_addresses= -c fsync=off -c max_connections=200"


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl: on the path, or where Debian puts them."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    server = max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    return server and server.parent


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a new server's first database, without its name: "postgresql://…/{name}?host=…"."""
    found = binaries()
    if found is None:
        reason = "no PostgreSQL server is installed (Debian: apt-get install postgresql)"
        if os.environ.get(NEEDED):
            pytest.fail(f"{reason}, and {NEEDED} is set")
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="autosp-postgres-"))
    # A server refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user, user)

    def run(*command: str) -> None:
        with (folder / "said").open("w") as said:  # not a pipe: the server would hold it open
            done = subprocess.run(
                [str(found / command[0]), *command[1:]], user=user, group=user, cwd=folder, stdout=said, stderr=said
            )
        assert done.returncode == 0, (folder / "said").read_text()

    data = str(folder / "data")
    try:
        run("initdb", "--auth=trust", "--username=autosp", "--no-sync", "--encoding=UTF8", "-D", data)
        run("pg_ctl", "-D", data, "-w", "-l", str(folder / "log"), "-o", f"-k {folder} {SETTINGS}", "start")
        try:
            yield f"postgresql://autosp@/{{name}}?host={folder}"
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_database(url: str, name: str) -> str:
    """A new, empty database of a server; its URL."""
    import psycopg

    with psycopg.connect(url.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return url.format(name=name)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A temporary folder without a disk to wait for, where there is RAM for files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)
