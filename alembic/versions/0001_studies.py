"""Studies, their trials and their plans."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forward."""
    op.create_table(
        "autosp_study",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("fingerprint", sa.String(32), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.Column("profile", sa.Text(), nullable=True),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_autosp_study"),
        sa.UniqueConstraint("name", name="uq_autosp_study_name"),
    )
    op.create_index("ix_autosp_study_fingerprint", "autosp_study", ["fingerprint"])
    op.create_table(
        "autosp_trial",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("prediction", sa.Text(), nullable=False),
        sa.Column("measurement", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_autosp_trial"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["autosp_study.id"], name="fk_autosp_trial_study_id_autosp_study", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("study_id", "number", name="uq_autosp_trial_study_id_number"),
    )
    op.create_table(
        "autosp_plan",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("study_id", sa.Integer(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("created_at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_autosp_plan"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["autosp_study.id"], name="fk_autosp_plan_study_id_autosp_study", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_autosp_plan_study_id", "autosp_plan", ["study_id"])


def downgrade() -> None:
    """Back."""
    op.drop_table("autosp_plan")
    op.drop_table("autosp_trial")
    op.drop_table("autosp_study")
