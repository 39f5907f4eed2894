"""Rows of a study: measured once, kept one by one in a file, never measured again unless asked; and their report."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

from isolation import NoAnswerError, answer_of
from record import RESULTS, environment

from autosp.devices import Device


class Job(Protocol):
    """What a process is given: a frozen dataclass. Of rows with the same case the last one counts."""

    @property
    def case(self) -> Any:
        """A frozen dataclass that names what is measured."""

    @property
    def scratch(self) -> str:
        """A folder on a real disk."""


@dataclass(frozen=True)
class Row:
    """One line of the raw results. `outcome` is "ok", or says why there are no figures."""

    case: Any
    outcome: str = "ok"
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    case_type: ClassVar[type]

    @property
    def ok(self) -> bool:
        """Whether there are figures."""
        return self.outcome == "ok"

    @classmethod
    def of_line(cls, line: str) -> Self:
        """As `Results.keep` wrote it."""
        fields = json.loads(line)
        return cls(**{**fields, "case": cls.case_type(**fields["case"])})

    def said(self) -> str:
        """What came of it, in a line."""
        return f"{self.outcome} {self.note}".strip()


RowT = TypeVar("RowT", bound=Row)

Measure = Callable[[Any, str], None]
"""Runs a job in its process, and writes `outcome`, `note` and `figures` to a JSON file."""

Answer = Callable[[Measure, Any, Path, float], dict[str, Any]]
"""Runs a measure on a job with a folder for its file and a limit in seconds, and returns what it wrote."""


class Results(Generic[RowT]):
    """The rows of one study so far, in memory and in its file."""

    def __init__(
        self,
        raw: Path,
        row_type: type[RowT],
        device: Device,
        measure: Measure,
        *,
        again: bool = False,
        timeout_s: float = 3600.0,
        answer: Answer = answer_of,
    ) -> None:
        """`device`: where it is measured."""
        self.raw = raw
        self.rows: dict[Any, RowT] = {} if again else {row.case: row for row in rows_in(raw, row_type)}
        self._row_type = row_type
        self._device = device
        self._measure = measure
        self._answer = answer
        self._timeout_s = timeout_s
        self._begin_s = time.monotonic()

    def measured(self, job: Job) -> RowT:
        """The job's row, measured now if it is not there."""
        return self.rows.get(job.case) or self.fresh(job)

    def fresh(self, job: Job) -> RowT:
        """The job's row, measured now; a line says when it began and what came of it."""
        minutes, seconds = divmod(int(time.monotonic() - self._begin_s), 60)
        print(f"[{minutes}:{seconds:02}] {job.case} …", end=" ", flush=True)
        row = self._answered(job)
        print(row.said(), flush=True)
        return self.keep(row)

    def keep(self, row: RowT) -> RowT:
        """Add a row, with where and when it was measured."""
        row = replace(row, environment=row.environment or environment(self._device))
        self.rows[row.case] = row
        self.raw.parent.mkdir(parents=True, exist_ok=True)
        with self.raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        return row

    def _answered(self, job: Job) -> RowT:
        try:
            return self._row_type(job.case, **self._answer(self._measure, job, Path(job.scratch), self._timeout_s))
        except NoAnswerError as error:
            return self._row_type(job.case, error.outcome, str(error))


def rows_in(raw: Path, row_type: type[RowT]) -> list[RowT]:
    """The rows of a raw file in their order; none if it is not there."""
    if not raw.exists():
        return []
    return [row_type.of_line(line) for line in raw.read_text(encoding="utf-8").splitlines()]


def answering(work: Callable[[Any], dict[str, Any]], job: Any, answer: str) -> None:
    """Do the work, and write its answer to a file. What it raises is its answer too."""
    try:
        said = work(job)
    except Exception as error:  # noqa: BLE001 - it becomes the row's note
        said = {"outcome": "failed", "note": " ".join(f"{type(error).__name__}: {error}".split())}
    Path(answer).write_text(json.dumps(said), encoding="utf-8")


def having(rows: Iterable[RowT], **wanted: Any) -> list[RowT]:
    """The rows with figures whose cases have these values."""
    return [row for row in rows if row.ok and all(getattr(row.case, name) == value for name, value in wanted.items())]


class Study(NamedTuple):
    """One table: `run` measures what is missing, `table` and `picture` read the rows."""

    title: str
    run: Callable[[Any], None]
    table: Callable[[list[Any]], str]
    picture: Callable[[list[Any], Path], None]


def write_report(study: Study, raw: Path, row_type: type[Row]) -> None:
    """The table as markdown and the picture, beside the rows."""
    rows = list({row.case: row for row in rows_in(raw, row_type)}.values())
    if not any(row.ok for row in rows):
        print(f"no figures in {raw}")
        return
    text = study.table(rows)
    raw.with_suffix(".md").write_text(f"# {study.title}\n\n{head_of(rows)}\n\n{text}\n", encoding="utf-8")
    study.picture(rows, raw.with_suffix(".png"))
    print(text)


def head_of(rows: list[Any]) -> str:
    """Where, when and with what the rows were measured."""
    head = ", ".join(f"{key} {value}" for key, value in rows[-1].environment.items())
    commits = {row.environment["commit"] for row in rows}
    return head if len(commits) == 1 else f"{head} (the rows are of {len(commits)} commits)"


def add_arguments(parser: ArgumentParser) -> None:
    """What every command that keeps rows understands."""
    parser.add_argument("--timeout-s", type=float, default=3600.0, help="of one measurement")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--report", action="store_true", help="only make the table and the picture")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to be measured; default: the cache")
