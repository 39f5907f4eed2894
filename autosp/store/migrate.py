"""Brings a database to the schema of this version: a look when nothing is to do, a copy first when something is.

alembic is imported only when there is something to do: opening an up-to-date database costs two queries.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Connection, Engine, inspect

from autosp.errors import StoreError, StoreVersionError
from autosp.store.engine import READ_ONLY, database_path, shown, translated
from autosp.store.turns import turn_where_shared

if TYPE_CHECKING:
    from alembic.config import Config

HEAD_REVISION = "0001"
VERSION_TABLE = "autosp_alembic_version"  # Optuna owns `alembic_version` in the same database


@dataclass(frozen=True, kw_only=True)
class Migrations:
    """A folder of migrations and its newest revision. The folder None is the one that belongs to this code."""

    head: str
    folder: Path | None = None


OURS = Migrations(head=HEAD_REVISION)


class Upgrade(NamedTuple):
    """What `upgrade` did. `old` is None where there was no schema of ours; `backup` where nothing was copied."""

    old: str | None
    new: str
    backup: Path | None


def migrations_folder() -> Path:
    """The folder of alembic's env.py.

    Raises: StoreError if the installation lacks it.
    """
    # The rule: a checkout uses its own `alembic/`, known by the alembic.ini beside it; everything else uses the
    # `_migrations` packed beside this very file. Both are looked up from __file__, never through the import system,
    # so the copy that an editable install leaves in site-packages, and that goes stale, is never seen; nor is one
    # left in a checkout. In a wheel's site-packages `alembic/` is the library, and there is no alembic.ini.
    package = Path(__file__).resolve().parents[1]
    checkout, packed = package.parent / "alembic", package / "_migrations"
    folder = checkout if (package.parent / "alembic.ini").is_file() else packed
    if not (folder / "env.py").is_file():
        raise StoreError(f"{folder} has no migrations: the installation is incomplete; install autosp again")
    return folder


def alembic_config(connection: Connection | None = None, migrations: Migrations = OURS) -> Config:
    """alembic's configuration without a file; its commands run on `connection`, inside its transaction."""
    from alembic.config import Config

    config = Config()
    folder = migrations.folder or migrations_folder()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(engine: Engine, migrations: Migrations = OURS) -> Upgrade:
    """Bring the database to the newest schema, all or nothing. Processes that do so at once take turns.

    An SQLite database that holds anything is first copied to `<file>.<old revision>.bak` (`base` where it had no
    schema of ours); an existing copy is never overwritten.

    Raises: StoreVersionError if a newer autosp wrote it, StoreReadOnlyError if it needs an upgrade and cannot be
    written, StoreError for the rest.
    """
    with translated(engine.url):
        with engine.connect().execution_options(**READ_ONLY) as connection:
            revision = current_revision(connection)
        if revision == migrations.head:
            return Upgrade(revision, revision, None)
        with turn_where_shared(engine, "schema"), migrating(engine) as connection:
            return _upgrade_locked(connection, migrations)


def current_revision(connection: Connection) -> str | None:
    """The revision of our schema in a database; None if it has none."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()
    return None if revision is None else str(revision)


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction in which tables may be rebuilt.

    Guarantee: foreign keys are not enforced inside (on SQLite dropping a table would delete the rows that refer to it,
    and a batch migration drops and renames), but hold at the end, or the transaction is rolled back.

    Raises: StoreError if a reference dangles.
    """
    with engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            with connection.begin():
                yield connection
            return
        # Straight at the driver: the pragma is without effect inside a transaction, which SQLAlchemy would begin.
        connection.connection.cursor().execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                yield connection
                dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
                if dangling is not None:
                    raise StoreError(f"{shown(engine.url)}: a row of {dangling[0]} refers to a missing row")
        finally:
            connection.connection.cursor().execute("PRAGMA foreign_keys = ON")


def _upgrade_locked(connection: Connection, migrations: Migrations) -> Upgrade:
    from alembic import command
    from alembic.script import ScriptDirectory

    old = current_revision(connection)  # again: another process may have upgraded while this one waited for the lock
    if old == migrations.head:
        return Upgrade(old, old, None)
    config = alembic_config(connection, migrations)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if old is not None and old not in known:
        raise StoreVersionError(
            f"{shown(connection.engine.url)} has schema revision {old!r}, written by a newer autosp; this one knows "
            f"revisions up to {migrations.head!r}. Upgrade autosp, or name another storage"
        )
    backup = _back_up(connection, old or "base")
    command.upgrade(config, migrations.head)
    return Upgrade(old, migrations.head, backup)


def _back_up(connection: Connection, revision: str) -> Path | None:
    path = database_path(connection.engine.url)
    if path is None or not inspect(connection).get_table_names():
        return None
    # SQLite grants BEGIN IMMEDIATE on a read-only database too: a write that changes nothing fails before the copy.
    version = connection.exec_driver_sql("PRAGMA user_version").scalar()
    connection.exec_driver_sql(f"PRAGMA user_version = {version}")
    target, number = path.with_name(f"{path.name}.{revision}.bak"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{revision}.{number}.bak")
    partial = target.with_name(f"{target.name}.partial")
    try:
        # Our transaction holds the write lock and has changed nothing, so the copy is what the upgrade starts from.
        with (
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(partial)) as copy,
        ):
            source.backup(copy)
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    return target
