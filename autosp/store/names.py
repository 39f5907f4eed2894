"""How a study gets its name: from the user, or, once there is something to enter, from what is free then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import inspect, select, text
from sqlalchemy.orm import Session

from autosp.spec import StudyKey
from autosp.store.models import StudyRow

if TYPE_CHECKING:
    from autosp.store.repository import Repository


@dataclass(frozen=True)
class StudyName:
    """The name that the user gave a study, or what it is made from while a study is being entered.

    A name that nobody gave is not chosen before: another process may take it in between.
    """

    base: str
    """What names of studies that belong to this one begin with, too."""
    given: str | None = None

    def find(self, repository: Repository, key: StudyKey) -> str | None:
        """The study's name, if it was entered.

        Raises: StudyMismatchError if the name that the user gave is that of a study with another key.
        """
        if self.given is None:
            return repository.find_study(key)
        return self.given if repository.has_study(self.given, key) else None

    def enter(self, repository: Repository, key: StudyKey) -> str:
        """The study's name, from now on in the database.

        Raises: StudyMismatchError if the name that the user gave is that of a study with another key.
        """
        if self.given is None:
            return repository.enter_study(self.base, key)
        repository.create_study(self.given, key)
        return self.given


def free_name(session: Session, base: str) -> str:
    """`base`, or `base-2`, `base-3` … : a name that neither we nor Optuna use in this database."""
    names = {*session.scalars(select(StudyRow.name)), *names_of_optuna(session)}
    name, number = base, 1
    while name in names:
        number += 1
        name = f"{base}-{number}"
    return name


def names_of_optuna(session: Session) -> set[str]:
    """Of the studies that Optuna has in this database."""
    if not inspect(session.connection()).has_table("studies"):
        return set()
    return set(session.scalars(text("SELECT study_name FROM studies")))
