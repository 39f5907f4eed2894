"""`autosp db`: the commands of the database itself."""

from __future__ import annotations

import typer

from autosp.errors import SettingError
from autosp.options import Storage

database = typer.Typer(no_args_is_help=True, help="The database of studies.")


@database.callback()
def _root() -> None:
    """The database of studies."""


@database.command()
def upgrade(storage: Storage = None) -> None:
    """Bring the database to this version's schema; an SQLite file is copied first."""
    from autosp.store.engine import database_path, open_engine, shown, storage_url
    from autosp.store.migrate import upgrade as bring_up

    url = storage_url(storage)
    path = database_path(url)
    if storage is not None and path is not None and not path.parent.is_dir():
        raise SettingError(
            f"there is no folder {path.parent} for the database {path}: nothing was made; correct --storage, or make "
            "the folder first"
        )
    engine = open_engine(url)
    try:
        done = bring_up(engine)
    finally:
        engine.dispose()
    change = f"already at {done.new}" if done.old == done.new else f"{done.old or 'no schema'} -> {done.new}"
    typer.echo(f"{shown(engine.url)}: {change}")
    if done.backup is not None:
        typer.echo(f"the database as it was: {done.backup}")
