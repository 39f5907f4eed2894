"""What `autosp doctor` looks at: versions, the machine, the places on disk, and the link itself."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import psutil

from autosp.devices import Device
from autosp.errors import AutospError
from autosp.files import free_bytes
from autosp.report.units import NOTHING, size
from autosp.settings import settings
from autosp.spec import LinkProfile
from autosp.store.engine import READ_ONLY, database_path, open_engine, shown, storage_url, translated
from autosp.store.migrate import HEAD_REVISION, current_revision

PACKAGES = ("torch", "optuna", "sqlalchemy", "alembic", "pydantic", "numpy", "transformers", "matplotlib", "typer")

PROBE_LAYERS = 16


def facts(device: Device, storage: str | None) -> list[tuple[str, str]]:
    """Names and values, to be read from top to bottom. Nothing is made or changed; what is broken says so."""
    memory = psutil.virtual_memory()
    cache_dir = settings().cache_dir
    return [
        ("autosp", f"{_version('autosp')}, Python {platform.python_version()}, {platform.platform(terse=True)}"),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        ("device", f"{device.info.kind}: {device.info.name}"),
        ("device memory", size(device.info.memory_bytes)),
        ("slow tier", device.info.slow_tier.value),
        ("RAM", f"{size(memory.available)} available of {size(memory.total)}"),
        ("cache", f"{cache_dir}, {size(free_bytes(cache_dir))} free"),
        ("storage", schema_state(storage)),
    ]


def schema_state(storage: str | None) -> str:
    """Where the database is and whether its schema is this version's. Opens it for reading only, if it is there."""
    try:
        url = storage_url(storage)
        path = database_path(url)
        if path is not None and not path.exists():
            return f"{shown(url)}: not there yet, the first study makes it"
        engine = open_engine(url)
        try:
            with translated(url), engine.connect().execution_options(**READ_ONLY) as connection:
                revision = current_revision(connection)
        finally:
            engine.dispose()
    except AutospError as error:
        return f"unusable: {error}"
    if revision == HEAD_REVISION:
        return f"{shown(url)}: schema {revision}, up to date"
    found = "no schema of autosp" if revision is None else f"schema {revision}"
    return f"{shown(url)}: {found}, this version has {HEAD_REVISION}; `autosp db upgrade` brings it there"


def probe_link(device: Device, n_bytes: int, progress: Callable[[str], None] = lambda text: None) -> LinkProfile:
    """Measure the link with a throwaway model of about `n_bytes`, gone when this returns.

    Raises: DiskFullError, TierError if the slow tier has no place for it.
    """
    import torch
    from torch import nn

    from autosp.partition import partition
    from autosp.profiler.links import measure_link
    from autosp.profiler.reading import measure_reading
    from autosp.runtime.bench import Bench

    width = max(64, round((n_bytes / PROBE_LAYERS / 4) ** 0.5))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(PROBE_LAYERS)))
    batch = torch.zeros(1, width, device=device.torch_device)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(batch)

    parts = partition(model, run, device.torch_device, lookups=device.reads_host, slow_tier=device.info.slow_tier)
    total = parts.streamable_bytes
    with Bench(model, parts, device, settings().cache_dir) as bench:
        reads = measure_reading(bench, progress)
        link = measure_link(device, bench.store, total, total // 4, progress)
        return link if reads is None else link.model_copy(update=reads._asdict())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOTHING
