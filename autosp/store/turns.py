"""Sections that one process at a time is inside, of all that share a database. A turn ends with its process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sqlalchemy import Engine, text

from autosp.errors import StoreError, StoreReadOnlyError
from autosp.files import locked
from autosp.store.engine import database_path, shown, translated


@contextmanager
def turn(engine: Engine, name: str) -> Iterator[None]:
    """A turn at what `name` stands for: a lock file beside an SQLite database, an advisory lock on PostgreSQL.

    Other transactions on the database go on meanwhile, those of the process itself among them: they may not be inside
    a transaction that writes, for SQLite has one writer only. Not reentrant.

    Raises: StoreReadOnlyError if the lock file cannot be made, StoreError for another kind of database.
    """
    path = database_path(engine.url)
    if path is not None:
        lock = path.with_name(f"{path.name}.lock")
        with ExitStack() as held:
            try:
                held.enter_context(locked(lock))
            except OSError as error:
                raise StoreReadOnlyError(f"{lock} cannot be made ({error.strerror}): turns are taken by it") from error
            yield
    elif engine.dialect.name == "postgresql":
        with _advisory(engine, name):
            yield
    else:
        raise StoreError(f"{shown(engine.url)}: studies are kept in SQLite or PostgreSQL; name one of them")


@contextmanager
def turn_where_shared(engine: Engine, name: str) -> Iterator[None]:
    """A turn on a database server. On SQLite the transactions themselves exclude each other: nothing is to do."""
    if database_path(engine.url) is None:
        with turn(engine, name):
            yield
    else:
        yield


@contextmanager
def _advisory(engine: Engine, name: str) -> Iterator[None]:
    """The lock belongs to the session: it goes when its connection does."""
    key = int.from_bytes(hashlib.sha256(f"autosp:{name}".encode()).digest()[:8], "big", signed=True)
    with translated(engine.url):
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        with translated(engine.url):
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        yield
    finally:
        connection.invalidate()  # closes the session, whatever state it is in, and with it the lock
        connection.close()
