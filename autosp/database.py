"""`autosp db`: the commands of the database itself."""

from __future__ import annotations

import typer

from autosp.options import Storage

database = typer.Typer(no_args_is_help=True, help="The database of studies.")


@database.callback()
def _root() -> None:
    """The database of studies."""


@database.command()
def upgrade(storage: Storage = None) -> None:
    """Bring the database to this version's schema; an SQLite file is copied first."""
    from autosp.store.engine import open_engine, shown, storage_url
    from autosp.store.migrate import upgrade as bring_up

    engine = open_engine(storage_url(storage))
    try:
        done = bring_up(engine)
    finally:
        engine.dispose()
    change = f"already at {done.new}" if done.old == done.new else f"{done.old or 'no schema'} -> {done.new}"
    typer.echo(f"{shown(engine.url)}: {change}")
    if done.backup is not None:
        typer.echo(f"the database as it was: {done.backup}")
