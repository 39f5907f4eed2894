from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine

import store_samples
from autosp.errors import StoreError, StoreReadOnlyError, StoreVersionError
from autosp.store import Repository
from autosp.store.engine import open_engine, storage_url
from autosp.store.migrate import (
    HEAD_REVISION,
    Migrations,
    Upgrade,
    alembic_config,
    current_revision,
    migrating,
    migrations_folder,
    upgrade,
)
from processes import run

ASSETS = Path(__file__).parent / "assets"
ROOT = Path(__file__).parents[2]
OURS = {"autosp_study", "autosp_trial", "autosp_plan", "autosp_alembic_version"}

REBUILD_STUDIES = """
import sqlalchemy as sa
from alembic import op
revision = "0002"
down_revision = "0001"

def upgrade():
    with op.batch_alter_table("autosp_study", recreate="always") as batch:
        batch.add_column(sa.Column("note", sa.Text(), nullable=True))
"""


@contextmanager
def opened(path: Path) -> Iterator[Engine]:
    engine = open_engine(storage_url(path))
    try:
        yield engine
    finally:
        engine.dispose()


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as database:
        return database.execute(query).fetchall()


def tables(path: Path) -> set[object]:
    return {name for (name,) in rows(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}


def next_migrations(folder: Path, source: str) -> Migrations:
    """Our migrations and one more, as a later version of autosp would have."""
    shutil.copytree(migrations_folder(), folder)
    (folder / "versions" / "0002_next.py").write_text(source)
    return Migrations(head="0002", folder=folder)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A user's database of revision 0001, with Optuna's tables in it."""
    return Path(shutil.copy(ASSETS / "revision_0001.db", tmp_path / "autosp.db"))


def test_the_head_is_that_of_the_migrations() -> None:
    from alembic.script import ScriptDirectory

    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD_REVISION]


def test_there_is_a_database_of_every_revision_to_upgrade() -> None:
    from alembic.script import ScriptDirectory

    revisions = {script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()}
    assert {path.stem.removeprefix("revision_") for path in ASSETS.glob("*.db")} == revisions


@pytest.mark.parametrize("asset", sorted(ASSETS.glob("*.db")), ids=lambda path: path.stem)
def test_an_old_database_is_upgraded_and_read(asset: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(asset, tmp_path / "autosp.db"))
    optunas = tables(path) - OURS
    with Repository(path) as repository:
        finished, unfinished = sorted(repository.summaries(), key=lambda summary: summary.name)
        assert (finished.name, finished.trials, finished.finished) == ("finished", 2, True)
        assert (finished.best_latency_s, finished.peak_bytes) == (0.25, 5_000_006_000)
        assert (unfinished.name, unfinished.trials, unfinished.finished) == ("unfinished", 0, False)
        assert [trial.number for trial in repository.trials("finished")] == [0, 1]
        plan = repository.find_plan(repository.study_key("finished"))
        assert plan is not None
        assert (plan.why, plan.candidate.residents) == ("written by revision 0001", (1,))
        profile = repository.profile("finished")
        assert profile is not None
        assert [layer.name for layer in profile.partition.layers] == ["blocks.0", "blocks.1"]
        assert repository.profile("unfinished") is None
        repository.add_trial("unfinished", store_samples.trial())
    assert tables(path) == optunas | OURS
    assert rows(path, "SELECT study_name FROM studies") == [("finished",)]


def test_an_upgrade_copies_first_and_keeps_rows_that_refer_to_a_rebuilt_table(old: Path, tmp_path: Path) -> None:
    before = rows(old, "SELECT * FROM autosp_trial"), rows(old, "SELECT * FROM autosp_plan"), tables(old)
    migrations = next_migrations(tmp_path / "migrations", REBUILD_STUDIES)
    with opened(old) as engine:
        done = upgrade(engine, migrations)
        backup = tmp_path / "autosp.db.0001.bak"
        assert done == Upgrade("0001", "0002", backup)
        assert upgrade(engine, migrations) == Upgrade("0002", "0002", None)
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    for path in (old, backup):
        assert (
            rows(path, "SELECT * FROM autosp_trial"),
            rows(path, "SELECT * FROM autosp_plan"),
            tables(path),
        ) == before
    assert rows(old, "SELECT name, note FROM autosp_study ORDER BY id") == [("finished", None), ("unfinished", None)]
    with Repository(backup) as repository:
        assert len(repository.summaries()) == 2


def test_a_copy_is_never_overwritten(old: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "autosp.db.0001.bak"
    earlier.write_text("kept")
    with opened(old) as engine:
        done = upgrade(engine, next_migrations(tmp_path / "migrations", REBUILD_STUDIES))
    assert done.backup == tmp_path / "autosp.db.0001.2.bak"
    assert earlier.read_text() == "kept"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("trouble", ["raise RuntimeError('half way')", "op.execute('DELETE FROM autosp_study')"])
def test_an_upgrade_that_fails_changes_nothing(old: Path, tmp_path: Path, trouble: str) -> None:
    before = rows(old, "SELECT * FROM autosp_study"), rows(old, "SELECT sql FROM sqlite_master")
    migrations = next_migrations(tmp_path / "migrations", f"{REBUILD_STUDIES}    {trouble}\n")
    with opened(old) as engine, pytest.raises((RuntimeError, StoreError), match=r"half way|missing row"):
        upgrade(engine, migrations)
    assert (rows(old, "SELECT * FROM autosp_study"), rows(old, "SELECT sql FROM sqlite_master")) == before
    with Repository(old) as repository:
        assert len(repository.summaries()) == 2


def test_a_newer_database_is_refused_and_left_alone(old: Path) -> None:
    with closing(sqlite3.connect(old)) as database, database:
        database.execute("UPDATE autosp_alembic_version SET version_num = '9999'")
    before = old.read_bytes()
    with pytest.raises(StoreVersionError) as caught:
        Repository(old)
    for part in ("'9999'", f"'{HEAD_REVISION}'", str(old)):
        assert part in str(caught.value)
    assert old.read_bytes() == before
    assert [path.name for path in old.parent.iterdir()] == ["autosp.db"]


def test_a_database_of_optuna_alone_is_copied_and_gets_our_tables(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "optuna.db"
    optuna.create_study(study_name="theirs", storage=f"sqlite:///{path}")
    theirs = tables(path)
    with opened(path) as engine:
        assert upgrade(engine) == Upgrade(None, HEAD_REVISION, tmp_path / "optuna.db.base.bak")
    assert tables(path) == theirs | OURS
    assert tables(tmp_path / "optuna.db.base.bak") == theirs
    assert [study.study_name for study in optuna.get_all_study_summaries(f"sqlite:///{path}")] == ["theirs"]


def test_a_new_database_is_not_copied(storage: Path) -> None:
    with opened(storage) as engine:
        assert upgrade(engine) == Upgrade(None, HEAD_REVISION, None)
    storage.with_name("zero.db").touch()
    with opened(storage.with_name("zero.db")) as engine:
        assert upgrade(engine) == Upgrade(None, HEAD_REVISION, None)


def test_a_copy_that_cannot_be_made_stops_the_upgrade(old: Path, tmp_path: Path) -> None:
    (tmp_path / "autosp.db.0001.bak.partial").mkdir()
    with opened(old) as engine:
        with pytest.raises(StoreReadOnlyError):
            upgrade(engine, next_migrations(tmp_path / "migrations", REBUILD_STUDIES))
        with engine.connect() as connection:
            assert current_revision(connection) == "0001"


def test_models_and_migrations_agree_and_optunas_tables_are_left_alone(storage: Path) -> None:
    from alembic import command
    from alembic.util.exc import AutogenerateDiffsDetected

    with Repository(storage) as repository:
        repository.optuna_storage()
    assert "trials" in tables(storage)
    with opened(storage) as engine, migrating(engine) as connection:
        command.check(alembic_config(connection))
        connection.exec_driver_sql("DROP INDEX ix_autosp_plan_study_id")
        with pytest.raises(AutogenerateDiffsDetected, match="ix_autosp_plan_study_id"):
            command.check(alembic_config(connection))


def test_downgrading_takes_our_tables_and_no_others(storage: Path) -> None:
    from alembic import command

    with Repository(storage) as repository:
        repository.optuna_storage()
    theirs = tables(storage) - OURS
    with opened(storage) as engine, migrating(engine) as connection:
        command.downgrade(alembic_config(connection), "base")
    assert tables(storage) == theirs | {"autosp_alembic_version"}


def test_the_alembic_command_works_in_a_checkout(storage: Path) -> None:
    def alembic(*arguments: str) -> str:
        """What `python -m alembic` does in the checkout's folder."""
        program = "import os, sys; from alembic.config import main; os.chdir(sys.argv.pop(1)); main(sys.argv[1:])"
        return run(program, ROOT, "-x", f"storage={storage}", *arguments)

    alembic("upgrade", "head")
    assert tables(storage) == OURS
    assert "No new upgrade operations detected" in alembic("check")
    assert "CREATE TABLE autosp_study" in alembic("upgrade", "head", "--sql")


@pytest.mark.parametrize("checkout", [True, False], ids=["checkout", "wheel"])
def test_the_folder_of_the_migrations(tmp_path: Path, checkout: bool) -> None:
    """A checkout uses its `alembic/`, whatever copy lies about; a wheel has only the packed one."""
    shutil.copytree(ROOT / "autosp", tmp_path / "autosp", ignore=shutil.ignore_patterns("__pycache__"))
    packed, own = tmp_path / "autosp" / "_migrations", tmp_path / "alembic"
    shutil.copytree(ROOT / "alembic", packed)
    if checkout:
        shutil.copytree(ROOT / "alembic", own)
        shutil.copy(ROOT / "alembic.ini", tmp_path)
        shutil.rmtree(packed / "versions")  # stale
    program = (
        "import sys; from autosp.store import Repository, migrate; Repository(sys.argv[1]).close();"
        "print(migrate.migrations_folder())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "autosp.db")]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout
    assert told.strip() == str(own if checkout else packed)
    assert tables(tmp_path / "autosp.db") == OURS
