"""How alembic meets the database. Run by `autosp.store.migrate` (which passes a connection) and by `alembic`."""

from __future__ import annotations

from collections.abc import Mapping
from logging.config import fileConfig

from alembic import context
from sqlalchemy import Connection

from autosp.store.engine import open_engine, storage_url
from autosp.store.migrate import VERSION_TABLE, migrating
from autosp.store.models import Base


def include_name(name: str | None, type_: str, _parent_names: Mapping[str, str | None]) -> bool:
    """Only our tables are looked at: Optuna's live in the same database and must never be proposed for dropping."""
    return type_ != "table" or name in Base.metadata.tables


def run(connection: Connection) -> None:
    """Run the command on a connection that is in a transaction."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        render_as_batch=True,
        include_name=include_name,
    )
    with context.begin_transaction():
        context.run_migrations()


def main() -> None:
    """On the connection given, or else on the storage named by `-x storage=` or the settings."""
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        run(given)
        return
    if context.config.config_file_name is not None:
        fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    url = storage_url(context.get_x_argument(as_dictionary=True).get("storage"))
    if context.is_offline_mode():
        context.configure(url=url, target_metadata=Base.metadata, version_table=VERSION_TABLE, literal_binds=True)
        with context.begin_transaction():
            context.run_migrations()
        return
    engine = open_engine(url)
    try:
        with migrating(engine) as connection:
            run(connection)
    finally:
        engine.dispose()


main()
