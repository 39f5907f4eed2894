"""Engines, and the one boundary where database errors become autosp's.

[Note: BEGIN IMMEDIATE]
SQLite's own deferred transactions let two processes read the same row and then both write it: 8 processes claiming
200 enqueued Optuna trials did 23 of them twice. Here every SQLite transaction that may write takes the write lock at
its BEGIN and waits for it up to BUSY_TIMEOUT_MS, so what it reads stays true until it commits. Transactions marked
READ_ONLY are deferred: they need no lock that a read-only database could not give. Other databases are left alone.

[Note: Optuna's constructor]
RDBStorage makes its engine and runs its first transactions in its constructor, too early for event listeners on
`RDBStorage.engine`; a SQLAlchemy engine plugin is there from the first connection. The constructor also opens a second
connection, only to read, while the first is in a transaction: with BEGIN IMMEDIATE on both it would wait for itself.
Inside `nested_reads` a transaction begun while its engine has another one open is deferred; the outer one holds the
write lock, so processes that create Optuna's tables at once still take turns.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.dialects import plugins
from sqlalchemy.engine import CreateEnginePlugin
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

from autosp.errors import SettingError, StoreError, StoreReadOnlyError
from autosp.settings import default_storage, settings

PLUGIN = "autosp_sqlite"
BUSY_TIMEOUT_MS = 60_000
READ_ONLY = {"autosp_read_only": True}  # execution options of an engine or connection that never writes

_nested_reads: ContextVar[bool] = ContextVar("_nested_reads", default=False)


class SqlitePlugin(CreateEnginePlugin):
    """Puts the rules of [Note: BEGIN IMMEDIATE] on an engine; does nothing to databases other than SQLite."""

    def update_url(self, url: URL) -> URL:
        """Leave the URL as it is (the base class has no default)."""
        return url

    def engine_created(self, engine: Engine) -> None:
        """Attach the listeners before the first connection."""
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _configure)
            event.listen(engine, "begin", _begin)


plugins.register(PLUGIN, __name__, SqlitePlugin.__name__)


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # BEGIN is ours; the driver emits none of its own
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin(connection: Connection) -> None:
    pool = connection.engine.pool
    nested = _nested_reads.get() and isinstance(pool, QueuePool) and pool.checkedout() > 1
    deferred = nested or connection.get_execution_options().get("autosp_read_only", False)
    connection.exec_driver_sql("BEGIN" if deferred else "BEGIN IMMEDIATE")


@contextmanager
def nested_reads() -> Iterator[None]:
    """See [Note: Optuna's constructor]. For engines that no other thread knows yet."""
    token = _nested_reads.set(True)
    try:
        yield
    finally:
        _nested_reads.reset(token)


def storage_url(storage: str | os.PathLike[str] | None) -> URL:
    """The database that a storage argument names: a path, a SQLAlchemy URL, or None for the setting.

    A path becomes absolute, so a later change of directory does not move the database.

    Raises: SettingError for a malformed URL, an in-memory database (nothing could share it) or an unusable path.
    """
    if storage is not None and not isinstance(storage, str | os.PathLike):
        raise SettingError(f"storage is a {type(storage).__name__}; pass a path or a database URL")
    text = str(os.fspath(settings().storage if storage is None else storage))
    try:
        url = make_url(text) if "://" in text else URL.create("sqlite", database=text)
    except ArgumentError as error:
        raise SettingError(f"storage={text!r} is neither a path nor a database URL") from error
    if url.drivername == "postgresql":
        return url.set(drivername="postgresql+psycopg")  # the driver that the extra `postgres` installs
    if url.get_backend_name() != "sqlite":
        return url
    database = url.database or ""
    if database in ("", ":memory:") or database.startswith("file::memory:") or url.query.get("mode") == "memory":
        raise SettingError(f"storage={text!r} is an in-memory database, which nothing else can read; name a file")
    if not database.startswith("file:"):
        url = url.set(database=str(Path(database).expanduser().absolute()))
    if make_url(url.render_as_string(hide_password=False)) != url:  # SQLAlchemy 2.0 quotes no "?"
        raise SettingError(f"storage={text!r} cannot be written as a URL; use a path without '?'")
    return url


def database_path(url: URL) -> Path | None:
    """The file of a SQLite database; None for a server."""
    if url.get_backend_name() != "sqlite" or not url.database:
        return None
    if url.database.startswith("file:"):
        return Path(unquote(url.database.removeprefix("file:").partition("?")[0]))
    return Path(url.database)


def open_engine(url: URL) -> Engine:
    """An engine with our rules. Makes the folder of the default database; connects to nothing yet.

    Raises: SettingError if the folder of another SQLite file is not there, StoreReadOnlyError if the default one's
    cannot be made, StoreError if the driver is missing.
    """
    path = database_path(url)
    if path is not None:
        _provide_folder(path)
    try:
        with translated(url):
            return create_engine(url, plugins=[PLUGIN])
    except ImportError as error:
        raise StoreError(
            f"the driver for {shown(url)} is not installed ({error}); install it (PostgreSQL: pip install "
            "'autosp[postgres]'), or name a file"
        ) from error


def require_database(storage: str | os.PathLike[str] | None) -> None:
    """Raises: SettingError if `storage` names a SQLite file that is not there, for who only asks what it knows."""
    path = None if storage is None else database_path(storage_url(storage))
    if path is not None and not path.exists():
        raise SettingError(f"there is no database {path}: nothing was made; correct storage=; autosp.tune makes one")


def _provide_folder(path: Path) -> None:
    """A folder that a user named and that is not there is a slip of the keyboard: it is not made."""
    if path.parent.is_dir():
        return
    if path != Path(default_storage()):
        raise SettingError(
            f"there is no folder {path.parent} for the database {path}: nothing was made; correct storage= or "
            "AUTOSP_STORAGE, or make the folder first"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreReadOnlyError(
            f"the folder of {path} cannot be made ({error.strerror}); name another one with storage= or AUTOSP_STORAGE"
        ) from error


def shown(url: URL) -> str:
    """How messages name a database: a path, or a URL without its password."""
    path = database_path(url)
    return str(path) if path is not None else url.render_as_string(hide_password=True)


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn whatever the database raises inside into a StoreError that names it.

    Raises: StoreReadOnlyError if it cannot be opened or written, StoreError for the rest.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise store_error(error, url) from error


def store_error(error: BaseException, url: URL) -> StoreError:
    """The StoreError for an error of SQLAlchemy or of the driver."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name, where = shown(url), "name another one with storage= or AUTOSP_STORAGE"
    # The names are SQLite's own and stable; an extended code starts with the name of its primary one.
    code = str(getattr(cause, "sqlite_errorname", ""))
    if code.startswith("SQLITE_READONLY"):
        return StoreReadOnlyError(f"{name} cannot be written: it, or its folder, is read-only; {where}")
    if code.startswith("SQLITE_CANTOPEN"):
        return StoreReadOnlyError(f"{name} cannot be opened for writing; check the folder's permissions or {where}")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(f"{name} stayed locked by another process for {BUSY_TIMEOUT_MS // 1000} s; try again")
    if code.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        return StoreError(f"{name} cannot be written or read: {cause}; make room on its disk, or {where}")
    if code.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return StoreError(f"{name} is damaged or not an SQLite database ({cause}); restore a copy, or {where}")
    return StoreError(f"{name} failed: {cause}")
