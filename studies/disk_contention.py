"""What reading costs compute: passes with everything resident, alone and while autosp's readers stream beside them.

Transfers fill two places of a ring, again and again, one after the other, as those of a streamed model do; the blocks
of each are spread over the readers.
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
from autosp.devices import CpuDevice
from autosp.devices.worker import CopyEvent
from autosp.runtime.bench import Bench
from autosp.spec import Candidate, Reading
from autosp.workload import Workload

ALONE = "alone"
ONE_MODEL = "one model's bytes per pass"
WITHOUT_PAUSE = "without a pause"

ROUNDS = 3
"""In which a pass alone and one beside each way of streaming follow one another."""

PLACES = 2
BEYOND_PASS = 1.3
"""How much more than a pass's length is queued where reads are not to pause: what is left over is waited for."""


class Stream:
    """Reads a store's bytes, whatever they are, with the readers that it has."""

    def __init__(self, bench: Bench, place_bytes: int) -> None:
        self._store = bench.store
        self._store_bytes = bench.partition.streamable_bytes
        self._device = CpuDevice()
        self._ring = self._device.allocate(PLACES * place_bytes)
        self._place_bytes = place_bytes
        self._next = 0
        self._turn = 0

    def start(self, n_bytes: int) -> list[CopyEvent]:
        """Queue reads of that many bytes, a place's at a time."""
        return [self._start_one() for _ in range(math.ceil(n_bytes / self._place_bytes))]

    def _start_one(self) -> CopyEvent:
        if self._next + self._place_bytes > self._store_bytes:
            self._next = 0
        region = self._store.window(self._next, self._place_bytes)
        self._next += self._place_bytes
        begin = self._turn % PLACES * self._place_bytes
        self._turn += 1
        return self._device.copy([region], self._ring[begin : begin + self._place_bytes])

    def wait(self, copies: Sequence[CopyEvent]) -> None:
        """Until they are over. Raises: ReadError."""
        for copy in copies:
            self._device.wait(copy)

    def bytes_until(self, copies: Sequence[CopyEvent], moment_s: float) -> int:
        """What had been read at a moment of `time.perf_counter`."""
        return sum(self._place_bytes for copy in copies if copy.times.ended <= moment_s)

    def rate(self, n_bytes: int) -> float:
        """Bytes per second with nothing beside."""
        begin = time.perf_counter()
        copies = self.start(n_bytes)
        self.wait(copies)
        return len(copies) * self._place_bytes / (time.perf_counter() - begin)

    def close(self) -> None:
        """End the thread that asks."""
        self._device.close()


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
    """Rates of reading `rate_bytes` into places of each size, then passes alone and beside, with one size of place."""
    device = CpuDevice()
    made = autosp.plan(example.model, example.batch, k=1, k_prime=1, step=example.step, device=device)
    visited = tuple(sorted(set(made.partition.visits)))
    workload = Workload.of(example.model, example.batch, example.step, "inference", device)
    with Bench(example.model, made.partition, device, folder) as bench:
        bench.readers.use(Reading(readers=readers, block_bytes=block_bytes))
        rates = {n_bytes: _rate(bench, n_bytes, rate_bytes) for n_bytes in place_bytes}
        streamed = bench.apply(Candidate(k=len(visited), k_prime=1, residents=visited))
        stream = Stream(bench, beside_bytes)
        try:
            bytes_per_s = _rate(bench, beside_bytes, rate_bytes)
            passes = _beside(workload, stream, made.partition.streamable_bytes, bytes_per_s)
        finally:
            stream.close()
            streamed.remove()
    return {"rates": list(rates.items()), **passes}


def _rate(bench: Bench, place_bytes: int, n_bytes: int) -> float:
    stream = Stream(bench, place_bytes)
    try:
        return stream.rate(n_bytes)
    finally:
        stream.close()


def _beside(workload: Workload, stream: Stream, model_bytes: int, bytes_per_s: float) -> dict[str, Any]:
    workload.run()
    samples: dict[str, list[float]] = {ALONE: [], ONE_MODEL: [], WITHOUT_PAUSE: []}
    read: dict[str, list[int]] = {name: [] for name in samples}
    for _ in range(ROUNDS):
        for name in samples:
            pass_s = median(samples[ALONE]) if samples[ALONE] else 0.0
            wanted = {ALONE: 0, ONE_MODEL: model_bytes, WITHOUT_PAUSE: round(BEYOND_PASS * pass_s * bytes_per_s)}
            copies = stream.start(wanted[name])
            begin = time.perf_counter()
            workload.run()
            end = time.perf_counter()
            stream.wait(copies)
            samples[name].append(end - begin)
            read[name].append(stream.bytes_until(copies, end))
    return {"samples_s": samples, "read_bytes": read}
