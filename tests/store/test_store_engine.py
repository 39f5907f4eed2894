from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
import store_samples
import store_workers
from autosp.errors import SettingError, StoreError, StoreReadOnlyError
from autosp.store import Repository, engine


def test_the_default_storage_is_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSP_STORAGE", str(tmp_path / "there.db"))
    with Repository() as repository:
        assert repository.url == f"sqlite:///{tmp_path}/there.db"
    assert (tmp_path / "there.db").is_file()


def test_the_folder_of_the_default_database_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOSP_STORAGE")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home" / "share"))
    Repository().close()
    assert (tmp_path / "home" / "share" / "autosp" / "autosp.db").is_file()


@pytest.mark.parametrize("name", ["studys/autosp.db", "sqlite:/autosp.db", "postgres:/me@host/db"])
def test_a_mistyped_path_makes_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOSP_STORAGE", name)
    for storage in (None, name):
        with pytest.raises(SettingError, match=f"there is no folder {tmp_path / name.rpartition('/')[0]} for the"):
            Repository(storage)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "ask",
    [
        autosp.list_studies,
        partial(autosp.load_plan, "tiny"),
        partial(autosp.delete_study, "tiny"),
        partial(autosp.resume, "tiny", nn.Linear(1, 1), torch.ones(1, 1)),
    ],
)
def test_whoever_asks_a_mistyped_database_makes_none(ask: Callable[..., Any], tmp_path: Path) -> None:
    for storage in (tmp_path / "studys.db", f"sqlite:///{tmp_path / 'studys.db'}"):
        with pytest.raises(SettingError, match=f"there is no database {tmp_path / 'studys.db'}: nothing was made"):
            ask(storage=storage)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "name", ["plain.db", "with space.db", "{braces}.db", "100%.db", "ünï.db", "a#b.db", "a&b=c.db", "what?.db"]
)
def test_path_and_url_name_the_same_file_for_us_and_for_optuna(tmp_path: Path, name: str) -> None:
    import optuna

    with Repository(tmp_path / name) as repository:
        repository.create_study("tiny", store_samples.study_key())
        optuna.create_study(study_name="theirs", storage=repository.optuna_storage())
        url = repository.url
    with Repository(url) as repository:
        assert repository.study_key("tiny") == store_samples.study_key()
        assert repository.enter_study("theirs", store_samples.study_key(1)) == "theirs-2"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Repository("here.db") as repository:
        monkeypatch.chdir("elsewhere")
        assert repository.url == f"sqlite:///{tmp_path}/here.db"
        repository.optuna_storage()
    assert (tmp_path / "here.db").is_file()


@pytest.mark.parametrize(
    "storage", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true", "://x", ""]
)
def test_a_storage_that_names_no_database_is_a_setting_error(storage: str) -> None:
    with pytest.raises(SettingError):
        Repository(storage)


def test_a_server_is_left_as_it_is_and_its_password_is_not_shown() -> None:
    url = engine.storage_url("postgresql+psycopg://me:secret@host/db")
    assert engine.database_path(url) is None
    assert "secret" not in engine.shown(url)
    assert "secret" in url.render_as_string(hide_password=False)


def test_an_unknown_kind_of_database_is_a_store_error() -> None:
    with pytest.raises(StoreError, match="nosuch"):
        Repository("nosuch://host/db")


def test_what_can_only_be_read_is_read_and_says_so_when_written(repository: Repository, storage: Path) -> None:
    repository.save_plan("tiny", store_samples.plan())
    with Repository(f"sqlite:///file:{storage}?mode=ro&uri=true") as read_only:
        assert read_only.plan("tiny") == store_samples.plan()
        assert read_only.find_plan(store_samples.study_key()) == store_samples.plan()
        assert len(read_only.summaries()) == 1
        with pytest.raises(StoreReadOnlyError, match=str(storage)):
            read_only.create_study("another", store_samples.study_key())
        with pytest.raises(StoreReadOnlyError, match=str(storage)):
            read_only.optuna_storage()


def test_a_read_only_database_that_needs_an_upgrade_says_so(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE theirs (x)")
    for name in (path, tmp_path / "absent.db"):
        with pytest.raises(StoreReadOnlyError, match=str(name)):
            Repository(f"sqlite:///file:{name}?mode=ro&uri=true")
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty.db"]


def test_a_user_without_permission_gets_a_read_only_error_that_names_the_path() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Repository(folder / "there.db") as repository:
            repository.create_study("tiny", store_samples.study_key())
            repository.save_plan("tiny", store_samples.plan())
        (folder / "there.db").chmod(0o444)
        folder.chmod(0o555)
        [happened] = store_workers.at_once(store_workers.as_nobody, [(folder,)])
        folder.chmod(0o755)
    assert happened.pop("there.db read") == "True"
    assert set(happened) == {"there.db", "absent.db"}
    for path, message in happened.items():
        assert str(folder / path) in message
        assert "another error" not in message


def test_a_folder_or_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreReadOnlyError, match=str(tmp_path)):
        Repository(tmp_path)
    with pytest.raises(SettingError, match=f"no folder {tmp_path / 'file'}"):
        Repository(tmp_path / "file" / "autosp.db")


def test_a_full_disk_is_a_store_error_that_says_what_to_do(tmp_path: Path) -> None:
    url = engine.storage_url(tmp_path / "full.db")
    with (
        closing(sqlite3.connect(tmp_path / "full.db")) as database,
        pytest.raises(StoreError, match=r"full\.db cannot be written or read: database or disk is full; make room"),
        engine.translated(url),
    ):
        database.execute("PRAGMA max_page_count = 1")
        database.execute("CREATE TABLE theirs (x)")


def test_a_file_that_is_no_database_is_a_store_error_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but quite long enough to be taken for one: " * 40)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"notes.txt is damaged or not an SQLite database"):
        Repository(path)
    assert path.read_bytes() == before


def test_a_lock_that_never_ends_is_a_store_error(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Repository(storage).close()
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 50)
    with Repository(storage) as repository, closing(sqlite3.connect(storage, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert repository.summaries() == []
        with pytest.raises(StoreError, match="stayed locked by another process"):
            repository.create_study("tiny", store_samples.study_key())
        other.execute("ROLLBACK")
        repository.create_study("tiny", store_samples.study_key())
