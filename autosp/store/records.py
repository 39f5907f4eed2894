"""Records as JSON and back, and what is said of rows that another version of autosp wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError

from autosp.errors import StoreError, StudyMismatchError
from autosp.spec import Measurement, Outcome, Record, StudyKey, StudySummary
from autosp.store.models import StudyRow

RecordT = TypeVar("RecordT", bound=Record)


def encode(record: Record) -> str:
    """JSON that gives an equal record back: a record that JSON cannot hold (inf, nan) is refused, not stored."""
    stored = record.model_dump_json()
    try:
        if type(record).model_validate_json(stored) == record:
            return stored
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StoreError(f"a {type(record).__name__} cannot be stored: {where} is not a finite number") from error
    raise StoreError(f"a {type(record).__name__} cannot be stored: it does not survive JSON")


def decode(record: type[RecordT], stored: str, study: str) -> RecordT:
    """The record that a study's row holds.

    Raises: StoreError if this version cannot read it.
    """
    try:
        return record.model_validate_json(stored)
    except ValidationError as error:
        raise StoreError(
            f"the {record.__name__} of study {study!r} cannot be read ({error.error_count()} errors); another version "
            "of autosp wrote it: use that version, or delete the study (`autosp delete`, autosp.delete_study)"
        ) from error


def readable(record: type[RecordT], stored: str) -> RecordT | None:
    """The record that a row holds; None if this version cannot read it."""
    try:
        return record.model_validate_json(stored)
    except ValidationError:
        return None


def refuse_another(name: str, key: StudyKey, entered: StudyKey) -> None:
    """Raises: StudyMismatchError naming what differs, if a study of that name was entered with another key."""
    differences = key.differences(entered)
    if differences:
        told = "; ".join(f"{field}: {theirs} there, {mine} here" for field, (mine, theirs) in differences.items())
        what = ". Behaviour is what modules' code, plain attributes and configs say, and eval() or train()"
        hint = what if "behaviour" in differences else ""
        raise StudyMismatchError(f"study {name!r} was made for something else ({told}); choose another name{hint}")


def summary(row: StudyRow, stored: Sequence[str]) -> StudySummary:
    """Of a study with these measurements.

    Raises: StoreError if this version cannot read one, or the key.
    """
    measured = [decode(Measurement, one, row.name) for one in stored]
    fitting = [measurement for measurement in measured if measurement.outcome is Outcome.FITS]
    best = min(fitting, key=lambda measurement: measurement.latency_s, default=None)
    return StudySummary(
        name=row.name,
        key=decode(StudyKey, row.key, row.name),
        created_at=row.created_at,
        trials=len(measured),
        best_latency_s=None if best is None else best.latency_s,
        peak_bytes=None if best is None else best.peak_bytes,
        finished=row.finished,
    )
