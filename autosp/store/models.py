"""The tables. Rows never leave `store/`; the repository turns them into records.

A record is kept as its pydantic JSON, beside the few columns that queries need. Every change here needs a migration
in `alembic/versions/` and a new `HEAD_REVISION` (a test compares the three).
"""

from __future__ import annotations

from sqlalchemy import ForeignKey, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Every constraint has a name, so that batch migrations can address it on SQLite."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)


class StudyRow(Base):
    """One search: what it was made for, and the profile it rests on. A higher `id` is a newer study."""

    __tablename__ = "autosp_study"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(512), unique=True)  # as long as Optuna's study_name
    fingerprint: Mapped[str] = mapped_column(String(32), index=True)  # StudyKey.fingerprint
    key: Mapped[str] = mapped_column(Text)  # StudyKey
    created_at: Mapped[str] = mapped_column(String(32))  # UTC, ISO 8601
    profile: Mapped[str | None] = mapped_column(Text)  # Profile
    finished: Mapped[bool] = mapped_column(default=False)

    trials: Mapped[list[TrialRow]] = relationship(
        order_by="TrialRow.number", cascade="all, delete-orphan", passive_deletes=True
    )
    plans: Mapped[list[PlanRow]] = relationship(cascade="all, delete-orphan", passive_deletes=True)


class TrialRow(Base):
    """One validated candidate of a study."""

    __tablename__ = "autosp_trial"
    __table_args__ = (UniqueConstraint("study_id", "number"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"))
    number: Mapped[int]
    prediction: Mapped[str] = mapped_column(Text)  # Prediction
    measurement: Mapped[str] = mapped_column(Text)  # Measurement


class PlanRow(Base):
    """An answer of a study. A resumed study gives another one; a higher `id` is a newer plan."""

    __tablename__ = "autosp_plan"

    id: Mapped[int] = mapped_column(primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey(StudyRow.id, ondelete="CASCADE"), index=True)
    plan: Mapped[str] = mapped_column(Text)  # Plan
    created_at: Mapped[str] = mapped_column(String(32))  # UTC, ISO 8601
