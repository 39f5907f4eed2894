"""What reading costs compute: passes with everything resident, alone and while autosp's readers stream beside them.

One reader is one `CpuDevice` with its thread, as a streamed model has; two are two of them that take turns. Each fills
two places of a ring, again and again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from peer_models import PeerModel

import autosp
from autosp.devices import Copied, CpuDevice
from autosp.runtime.bench import Bench
from autosp.spec import Candidate
from autosp.tiers import reader
from autosp.workload import Workload

ALONE = "alone"
ONE_MODEL = "one model's bytes per pass"
WITHOUT_PAUSE = "without a pause"

ROUNDS = 3
"""In which a pass alone and one beside each way of streaming follow one another."""

PLACES = 2
BEYOND_PASS = 1.3
"""How much more than a pass's length is queued where reads are not to pause: what is left over is waited for."""


class Readers:
    """Streams a store's bytes, whatever they are, with `count` reader threads."""

    def __init__(self, bench: Bench, count: int, place_bytes: int) -> None:
        self._store = bench.store
        self._store_bytes = bench.partition.streamable_bytes
        self._devices = [CpuDevice() for _ in range(count)]
        self._places = [device.allocate(PLACES * place_bytes) for device in self._devices]
        self._place_bytes = place_bytes
        self._next = 0
        self._turn = 0

    def start(self, n_bytes: int) -> list[Copied]:
        """Queue reads of that many bytes, a place's at a time."""
        return [self._start_one() for _ in range(math.ceil(n_bytes / self._place_bytes))]

    def _start_one(self) -> Copied:
        index, round_ = self._turn % len(self._devices), self._turn // len(self._devices)
        self._turn += 1
        if self._next + self._place_bytes > self._store_bytes:
            self._next = 0
        region = self._store.window(self._next, self._place_bytes)
        self._next += self._place_bytes
        begin = round_ % PLACES * self._place_bytes
        return self._devices[index].copy([region], self._places[index][begin : begin + self._place_bytes])

    def wait(self, copies: Sequence[Copied]) -> None:
        """Until they are over. Raises: ReadError."""
        for copy in copies:
            self._devices[0].wait(copy)

    def bytes_until(self, copies: Sequence[Copied], moment_s: float) -> int:
        """What had been read at a moment of `time.perf_counter`."""
        return sum(self._place_bytes for copy in copies if copy.times.ended <= moment_s)

    def rate(self, n_bytes: int) -> float:
        """Bytes per second with nothing beside."""
        begin = time.perf_counter()
        copies = self.start(n_bytes)
        self.wait(copies)
        return len(copies) * self._place_bytes / (time.perf_counter() - begin)

    def close(self) -> None:
        """End the threads."""
        for device in self._devices:
            device.close()


def measure_readers(
    example: PeerModel,
    folder: Path,
    *,
    block_bytes: int,
    readers: int,
    place_bytes: Sequence[int],
    beside_bytes: int,
    rate_bytes: int,
) -> dict[str, Any]:
    """Rates of reading `rate_bytes` into places of each size, then passes alone and beside, with one size of place.

    The product's own block size is replaced for the life of this process.
    """
    assert reader.CHUNK_BYTES, "the product's size of one read"
    reader.CHUNK_BYTES = block_bytes
    device = CpuDevice()
    made = autosp.plan(example.model, example.batch, k=1, k_prime=1, step=example.step, device=device)
    visited = tuple(sorted(set(made.partition.visits)))
    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    with Bench(example.model, made.partition, device, folder) as bench:
        rates = {n_bytes: _rate(bench, readers, n_bytes, rate_bytes) for n_bytes in place_bytes}
        streamed = bench.apply(Candidate(k=len(visited), k_prime=1, residents=visited))
        streams = Readers(bench, readers, beside_bytes)
        try:
            bytes_per_s = _rate(bench, readers, beside_bytes, rate_bytes)
            passes = _beside(workload, streams, made.partition.streamable_bytes, bytes_per_s)
        finally:
            streams.close()
            streamed.remove()
    return {"rates": list(rates.items()), **passes}


def _rate(bench: Bench, count: int, place_bytes: int, n_bytes: int) -> float:
    readers = Readers(bench, count, place_bytes)
    try:
        return readers.rate(n_bytes)
    finally:
        readers.close()


def _beside(workload: Workload, readers: Readers, model_bytes: int, bytes_per_s: float) -> dict[str, Any]:
    workload.run()
    samples: dict[str, list[float]] = {ALONE: [], ONE_MODEL: [], WITHOUT_PAUSE: []}
    read: dict[str, list[int]] = {name: [] for name in samples}
    for _ in range(ROUNDS):
        for name in samples:
            pass_s = median(samples[ALONE]) if samples[ALONE] else 0.0
            wanted = {ALONE: 0, ONE_MODEL: model_bytes, WITHOUT_PAUSE: round(BEYOND_PASS * pass_s * bytes_per_s)}
            copies = readers.start(wanted[name])
            begin = time.perf_counter()
            workload.run()
            end = time.perf_counter()
            readers.wait(copies)
            samples[name].append(end - begin)
            read[name].append(readers.bytes_until(copies, end))
    return {"samples_s": samples, "read_bytes": read}
