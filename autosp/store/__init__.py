"""The database. Records in, records out; importing this loads neither optuna nor alembic."""

from autosp.store.names import StudyName
from autosp.store.repository import Repository

__all__ = ["Repository", "StudyName"]
