from __future__ import annotations

from pathlib import Path

import pytest

from autosp.settings import settings


def test_defaults_are_the_users_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUTOSP_STORAGE", "AUTOSP_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert Path(settings().storage).name == "autosp.db"
    assert "autosp" in settings().cache_dir.parts


def test_the_environment_is_read_at_each_call_and_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSP_STORAGE", "one.db")
    monkeypatch.setenv("AUTOSP_CACHE_DIR", "/cache")
    assert (settings().storage, settings().cache_dir) == ("one.db", Path("/cache"))
    monkeypatch.setenv("AUTOSP_STORAGE", "")
    assert Path(settings().storage).name == "autosp.db"
