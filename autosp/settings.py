"""What the environment decides: the `AUTOSP_*` variables. An empty variable counts as unset."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path, user_data_path
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def default_storage() -> str:
    """The database that nobody has to name: a SQLite file in the user's data folder."""
    return str(user_data_path("autosp") / "autosp.db")


class Settings(BaseSettings):
    """Defaults a user may change without touching code."""

    model_config = SettingsConfigDict(env_prefix="AUTOSP_", env_ignore_empty=True, frozen=True)

    storage: str = Field(
        default_factory=default_storage,
        description="path of a SQLite file, or a SQLAlchemy URL",
    )
    cache_dir: Path = Field(
        default_factory=lambda: user_cache_path("autosp"),
        description="packed weights and anything else that can be made again",
    )


def settings() -> Settings:
    """The settings as the environment stands now: read anew at each call."""
    return Settings()
