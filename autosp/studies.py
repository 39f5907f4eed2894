"""What the database knows."""

from __future__ import annotations

import os

from autosp.errors import StudyNotFoundError
from autosp.spec import Plan, StudySummary
from autosp.store import Repository


def list_studies(storage: str | os.PathLike[str] | None = None) -> list[StudySummary]:
    """All studies in the database (a path or URL; default `AUTOSP_STORAGE`), newest first."""
    with Repository.existing(storage) as repository:
        return repository.summaries()


def load_plan(study_name: str, storage: str | os.PathLike[str] | None = None) -> Plan:
    """The plan of a study.

    Raises: StudyNotFoundError if there is no such study (naming the close names), or it has no plan yet.
    """
    with Repository.existing(storage) as repository:
        plan = repository.plan(study_name)
        if plan is None:
            raise StudyNotFoundError(f"study {study_name!r} has no plan yet: continue it with autosp.resume")
        return plan


def delete_study(study_name: str, storage: str | os.PathLike[str] | None = None) -> int:
    """Delete a study with its trials and plans, and Optuna's study of that name; gives the number of its trials.

    A study of that name begins afresh then. Nobody may be working on it.

    Raises: StudyNotFoundError naming the close names; StoreReadOnlyError if the database cannot be written.
    """
    with Repository.existing(storage) as repository:
        return repository.delete_study(study_name)
