"""Records in, records out. Every method is one short transaction; no row leaves this file."""

from __future__ import annotations

import difflib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from autosp.errors import StoreError, StudyNotFoundError
from autosp.spec import Measurement, Plan, Prediction, Profile, StudyKey, StudySummary, Trial
from autosp.store.engine import READ_ONLY, open_engine, require_database, shown, storage_url, translated
from autosp.store.migrate import upgrade
from autosp.store.models import PlanRow, StudyRow, TrialRow
from autosp.store.names import free_name, names_of_optuna
from autosp.store.records import decode, encode, readable, refuse_another, summary
from autosp.store.trials import GRACE_PERIOD_S, HEARTBEAT_INTERVAL_S, delete_optuna_study, open_optuna_storage
from autosp.store.turns import turn, turn_where_shared

if TYPE_CHECKING:
    import optuna

ENTERING = "the names of studies"
"""The turn of who enters a study. SQLite's transactions need none."""


class Repository:
    """The studies, trials and plans of one database. A context manager; each process opens its own.

    Every method raises StoreReadOnlyError if it has to write and cannot, and StoreError if the database fails; a
    database at the present schema can be read where it cannot be written.
    """

    def __init__(self, storage: str | os.PathLike[str] | None = None) -> None:
        """Open a database, made or upgraded (after a copy) as needed. None stands for the setting AUTOSP_STORAGE.

        Raises: StoreVersionError if a newer autosp wrote it, StoreReadOnlyError if it must be made or upgraded and
        cannot be written, SettingError if `storage` names no database or a folder that is not there, StoreError for the
        rest.
        """
        self._url = storage_url(storage)
        with ExitStack() as opening:
            self._engine = open_engine(self._url)
            opening.callback(self._engine.dispose)
            upgrade(self._engine)
            self._closing = opening.pop_all()
        self._read_only_engine = self._engine.execution_options(**READ_ONLY)

    @classmethod
    def existing(cls, storage: str | os.PathLike[str] | None = None) -> Self:
        """To ask what it knows. Raises: SettingError if a file that `storage` names is not there; as for any."""
        require_database(storage)
        return cls(storage)

    @property
    def url(self) -> str:
        """The database's URL, password included: any `storage` argument accepts it."""
        return self._url.render_as_string(hide_password=False)

    def close(self) -> None:
        """Close all connections, those of Optuna's storages too. More than once is harmless."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # Studies

    def create_study(self, name: str, key: StudyKey) -> None:
        """Enter a study. One of that name with an equal key is left as it is, whoever entered it.

        Raises: StudyMismatchError if the name belongs to a study with another key.
        """
        with turn_where_shared(self._engine, ENTERING), self._writing() as session:
            row = session.scalar(select(StudyRow).where(StudyRow.name == name))
            if row is None:
                session.add(_new_row(name, key))
                return
            refuse_another(name, key, decode(StudyKey, row.key, name))

    def enter_study(self, base: str, key: StudyKey) -> str:
        """The newest study with this key, entered if there is none: as `base`, or `base-2`, `base-3` … , the first
        name that neither we nor Optuna use in this database, whoever else is entering studies.
        """
        with turn_where_shared(self._engine, ENTERING), self._writing() as session:
            known = _newest_name(session, key)
            if known is not None:
                return known
            name = free_name(session, base)
            session.add(_new_row(name, key))
            return name

    def has_study(self, name: str, key: StudyKey) -> bool:
        """Whether there is a study of that name.

        Raises: StudyMismatchError if it has another key.
        """
        with self._reading() as session:
            row = session.scalar(select(StudyRow).where(StudyRow.name == name))
            if row is not None:
                refuse_another(name, key, decode(StudyKey, row.key, name))
            return row is not None

    def study_key(self, name: str) -> StudyKey:
        """What a study was made for.

        Raises: StudyNotFoundError.
        """
        with self._reading() as session:
            return decode(StudyKey, self._study(session, name).key, name)

    def find_study(self, key: StudyKey) -> str | None:
        """The newest study with this key."""
        with self._reading() as session:
            return _newest_name(session, key)

    def siblings(self, key: StudyKey) -> list[str]:
        """Studies with a profile that are of the same work as `key`, under any budget, the newest first.

        Those that another version of autosp entered, for what this one does not know, are none.
        """
        with self._reading() as session:
            query = select(StudyRow.name, StudyRow.key).where(StudyRow.profile.is_not(None))
            query = query.where(StudyRow.key.contains(key.model_fingerprint, autoescape=True))
            rows = session.execute(query.order_by(StudyRow.id.desc()))
            known = ((name, readable(StudyKey, stored)) for name, stored in rows)
            return [name for name, other in known if other is not None and key.is_of_the_same_work(other)]

    def summaries(self) -> list[StudySummary]:
        """All studies, the newest first; the best latency and its peak are those of the fastest trial that fits.

        Those that this version cannot read are left out, each with a warning that names it.
        """
        found: list[StudySummary] = []
        with self._reading() as session:
            measured: defaultdict[int, list[str]] = defaultdict(list)
            for study_id, measurement in session.execute(select(TrialRow.study_id, TrialRow.measurement)):
                measured[study_id].append(measurement)
            for row in session.scalars(select(StudyRow).order_by(StudyRow.id.desc())):
                try:
                    found.append(summary(row, measured[row.id]))
                except StoreError as error:
                    warnings.warn(f"left out: {error}", stacklevel=2)
        return found

    def turn(self, name: str) -> AbstractContextManager[None]:
        """A turn at a study: one process at a time, of all that work on it, is inside. It ends with its process.

        All methods may be called inside, but for this one and those that agree on something.

        Raises: StoreReadOnlyError if the lock file beside an SQLite database cannot be made, StoreError for a server
        other than PostgreSQL.
        """
        return turn(self._engine, f"turn of {name}")

    def delete_study(self, name: str) -> int:
        """Delete a study, its trials and plans, and Optuna's study of that name: a new one begins afresh.

        Gives the number of its trials. Nobody may be working on it: what they measure next has no place.

        Raises: StudyNotFoundError; StoreReadOnlyError, StoreError as `turn`.
        """
        with self.turn(name):
            with self._reading() as session:
                trials = select(func.count()).where(TrialRow.study_id == self._study(session, name).id)
                count = session.scalar(trials) or 0
                known_to_optuna = name in names_of_optuna(session)
            if known_to_optuna:  # first: if this process dies here, the study is there to be deleted again
                delete_optuna_study(self.optuna_storage(), name)
            with self._writing() as session:
                session.delete(self._study(session, name))
        return count

    # Profiles, trials and plans of a study

    def save_profile(self, name: str, profile: Profile) -> None:
        """Keep the profile a study rests on, in place of an earlier one.

        Raises: StudyNotFoundError.
        """
        with self._writing() as session:
            self._study(session, name).profile = encode(profile)

    def agree_on_profile(self, name: str, profile: Profile) -> Profile:
        """Keep a profile unless another worker was faster; the one that counts. One that knows more links, or
        whose figures mean something else by now, replaces it.

        Raises: StudyNotFoundError.
        """
        with self.turn(name):
            known = self.profile(name)
            newer = known is None or known.schema_version != profile.schema_version
            if known is not None and not newer and len(known.links) >= len(profile.links):
                return known
            self.save_profile(name, profile)
        return profile

    def profile(self, name: str) -> Profile | None:
        """The profile a study rests on; None before it was measured.

        Raises: StudyNotFoundError.
        """
        with self._reading() as session:
            stored = self._study(session, name).profile
            return None if stored is None else decode(Profile, stored, name)

    def add_trial(self, name: str, trial: Trial) -> None:
        """Enter a trial, in place of one with its number.

        Raises: StudyNotFoundError.
        """
        with self._writing() as session:
            study = self._study(session, name)
            query = select(TrialRow).where(TrialRow.study_id == study.id, TrialRow.number == trial.number)
            row = session.scalar(query) or TrialRow(study_id=study.id, number=trial.number)
            row.prediction, row.measurement = encode(trial.prediction), encode(trial.measurement)
            session.add(row)

    def trials(self, name: str) -> list[Trial]:
        """A study's trials in the order of their numbers.

        Raises: StudyNotFoundError.
        """
        with self._reading() as session:
            return [
                Trial(
                    number=row.number,
                    prediction=decode(Prediction, row.prediction, name),
                    measurement=decode(Measurement, row.measurement, name),
                )
                for row in self._study(session, name).trials
            ]

    def save_plan(self, name: str, plan: Plan) -> None:
        """Enter a study's answer, which makes the study finished. Earlier answers are kept; the newest counts.

        Raises: StudyNotFoundError.
        """
        with self._writing() as session:
            study = self._study(session, name)
            study.finished = True
            session.add(PlanRow(study_id=study.id, plan=encode(plan), created_at=_now()))

    def agree_on_plan(self, name: str, plan: Plan) -> Plan:
        """Enter a study's answer unless its newest one says the same, as another worker's may; the one that counts.

        Raises: StudyNotFoundError.
        """
        with self.turn(name):
            known = self.plan(name)
            if known is not None and known.model_copy(update={"created_at": plan.created_at}) == plan:
                return known
            self.save_plan(name, plan)
        return plan

    def plan(self, name: str) -> Plan | None:
        """A study's newest answer; None if it has none yet.

        Raises: StudyNotFoundError.
        """
        with self._reading() as session:
            study = self._study(session, name)
            query = select(PlanRow.plan).where(PlanRow.study_id == study.id).order_by(PlanRow.id.desc())
            stored = session.scalar(query.limit(1))
            return None if stored is None else decode(Plan, stored, name)

    def find_plan(self, key: StudyKey) -> Plan | None:
        """The newest answer of any finished study with this key."""
        with self._reading() as session:
            query = select(PlanRow.plan, StudyRow.name).join(StudyRow, PlanRow.study_id == StudyRow.id)
            query = query.where(StudyRow.fingerprint == key.fingerprint, StudyRow.finished)
            found = session.execute(query.order_by(PlanRow.id.desc()).limit(1)).first()
            return None if found is None else decode(Plan, found[0], found[1])

    # Optuna

    def optuna_storage(
        self, *, heartbeat_interval_s: int = HEARTBEAT_INTERVAL_S, grace_period_s: int = GRACE_PERIOD_S
    ) -> optuna.storages.RDBStorage:
        """Optuna's storage in this database, closed with it. Under ask/tell use `autosp.store.trials`.

        Raises: StoreError if Optuna's tables here are of another version.
        """
        with turn_where_shared(self._engine, "optuna's tables"):
            storage = open_optuna_storage(
                self._url, heartbeat_interval_s=heartbeat_interval_s, grace_period_s=grace_period_s
            )
        self._closing.callback(storage.engine.dispose)
        self._closing.callback(storage.remove_session)
        return storage

    # Transactions

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with translated(self._url), Session(self._read_only_engine) as session, session.begin():
            yield session

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with translated(self._url), Session(self._engine) as session, session.begin():
            yield session

    def _study(self, session: Session, name: str) -> StudyRow:
        row = session.scalar(select(StudyRow).where(StudyRow.name == name))
        if row is not None:
            return row
        close = difflib.get_close_matches(str(name), session.scalars(select(StudyRow.name)).all())
        hint = f"; did you mean {' or '.join(repr(other) for other in close)}?" if close else "."
        count = session.scalar(select(func.count()).select_from(StudyRow))
        raise StudyNotFoundError(
            f"no study {name!r} among the {count} in {shown(self._url)}{hint} "
            "`autosp studies` or autosp.list_studies(storage) lists them"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _new_row(name: str, key: StudyKey) -> StudyRow:
    return StudyRow(name=name, fingerprint=key.fingerprint, key=encode(key), created_at=_now())


def _newest_name(session: Session, key: StudyKey) -> str | None:
    query = select(StudyRow.name).where(StudyRow.fingerprint == key.fingerprint)
    return session.scalar(query.order_by(StudyRow.id.desc()).limit(1))
