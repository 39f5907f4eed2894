"""What the reader costs compute where compute is the limit, and the disk's rate by block and by place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from disk_contention import ALONE, ONE_MODEL, WITHOUT_PAUSE
from disk_measure import READERS
from disk_models import MIB, SCALES
from disk_results import Row
from disk_study import Run
from kept_rows import Study, having
from record import markdown

from autosp.report.units import rate, seconds

READER_COUNTS = (1, 2)

WANTED_SLOWDOWN = 1.05

PREFACE = (
    "All layers resident, so that a pass computes only. Slow-down: the pass while autosp's readers stream from the "
    "disk into a ring, over the pass alone, in turns. *One model's bytes per pass* is what a plan without residents "
    "asks for in a pass that compute limits; *without a pause* the disk is read for the whole pass. The reads' rate "
    "is that during the pass. Block: the most bytes of one read; with two readers the blocks "
    "of each transfer are spread over two threads."
)


def run(asked: Run) -> None:
    """The longest batch, every block size, one reader and two."""
    scale = SCALES[asked.scale]
    for repeat in range(asked.repeats):
        for block_bytes in scale.block_bytes:
            for readers in READER_COUNTS:
                setting = f"{block_bytes // MIB} MiB, {readers} readers"
                numbers = {
                    "block_bytes": block_bytes,
                    "readers": readers,
                    "place_bytes": list(scale.place_bytes),
                    "beside_bytes": scale.beside_bytes,
                    "rate_bytes": scale.probe_bytes,
                }
                job = asked.job(READERS, asked.tokens[-1], repeat, setting=setting, numbers=numbers)
                asked.results.measured(job)


def slowdown(row: Row, name: str) -> float:
    """Of the passes beside, over those alone."""
    samples = row.figures["samples_s"]
    return median(samples[name]) / median(samples[ALONE])


def read_rate(row: Row, name: str) -> float:
    """Bytes per second during the passes."""
    pairs = zip(row.figures["read_bytes"][name], row.figures["samples_s"][name], strict=True)
    return median(n_bytes / pass_s for n_bytes, pass_s in pairs)


def settings_of(rows: list[Row]) -> Iterator[tuple[int, int, list[Row]]]:
    """Block size and count of readers, with their rows."""
    cases = dict.fromkeys((row.figures["block_bytes"], row.figures["readers"]) for row in having(rows, system=READERS))
    for block_bytes, readers in sorted(cases, key=lambda case: (case[1], case[0])):
        wanted = (block_bytes, readers)
        yield *wanted, [row for row in having(rows) if (row.figures["block_bytes"], row.figures["readers"]) == wanted]


def table(rows: list[Row]) -> str:
    """Slow-down by block size, then the disk's rate by block size and place."""
    found = list(settings_of(rows))
    lines = [_cells(*setting) for setting in found]
    columns = ["block", "readers", "pass alone", "one model: slow-down", "without a pause: slow-down", "reads' rate"]
    calm = [block for block, readers, mine in found if readers == 1 and _median(mine, ONE_MODEL) <= WANTED_SLOWDOWN]
    sizes = f"{', '.join(str(block // MIB) for block in calm)} MiB" if calm else "no size"
    said = f"At most {WANTED_SLOWDOWN:.2f} is wanted; one reader with one model's bytes per pass keeps that with "
    said += f"blocks of {sizes}."
    places = [n_bytes for n_bytes, _ in found[0][2][0].figures["rates"]]
    rates = [
        [f"{block // MIB} MiB", str(readers), *(rate(_rate_of(mine, place)) for place in places)]
        for block, readers, mine in found
    ]
    heads = ["block", "readers", *(f"place of {place // MIB} MiB" for place in places)]
    alone = "Reading alone; a block is never larger than the place that it is read to:"
    failed = [f"- {row.case}: {row.outcome}: {row.note}" for row in rows if not row.ok]
    parts = [PREFACE, said, markdown(columns, lines), alone, markdown(heads, rates)]
    return "\n\n".join([*parts, "\n".join(failed)] if failed else parts)


def _cells(block_bytes: int, readers: int, mine: list[Row]) -> list[str]:
    alone = median(sample for row in mine for sample in row.figures["samples_s"][ALONE])
    ratios = [_median(mine, name) for name in (ONE_MODEL, WITHOUT_PAUSE)]
    reads = rate(median(read_rate(row, WITHOUT_PAUSE) for row in mine))
    return [f"{block_bytes // MIB} MiB", str(readers), seconds(alone), *(f"{ratio:.3f}" for ratio in ratios), reads]


def _median(mine: list[Row], name: str) -> float:
    return median(slowdown(row, name) for row in mine)


def _rate_of(mine: list[Row], place_bytes: int) -> float:
    return median(dict(map(tuple, row.figures["rates"]))[place_bytes] for row in mine)


def picture(rows: list[Row], path: Path) -> None:
    """Slow-down over the block size, beside the disk's rate over the block size."""
    from panels import figure, finish

    canvas, (left, right) = figure(2, width=5.4)
    found = list(settings_of(rows))
    for readers in dict.fromkeys(count for _, count, _ in found):
        mine = [(block, some) for block, count, some in found if count == readers]
        blocks = [block / MIB for block, _ in mine]
        who = "one reader" if readers == 1 else f"{readers} readers"
        for name, line in ((ONE_MODEL, "-"), (WITHOUT_PAUSE, "--")):
            style: dict[str, Any] = {"color": f"C{readers - 1}", "ls": line, "marker": "o", "ms": 4}
            left.plot(blocks, [_median(some, name) for _, some in mine], **style, label=f"{who}, {name}")
        for index, (place, _) in enumerate(mine[0][1][0].figures["rates"]):
            style = {"color": f"C{index + 2}", "ls": "-" if readers == 1 else "--", "marker": "o", "ms": 4}
            label = f"{who}, places of {place // MIB} MiB"
            right.plot(blocks, [_rate_of(some, place) / 1e9 for _, some in mine], **style, label=label)
    left.axhline(WANTED_SLOWDOWN, color="grey", lw=1.2, ls=":", label=f"wanted: at most {WANTED_SLOWDOWN:.2f}")
    left.set_ylabel("pass beside reads ÷ pass alone")
    right.set_ylabel("disk, GB/s")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks([block / MIB for block in sorted({block for block, _, _ in found})])
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("block, MiB")
    finish(canvas, path, columns=2)


READING = Study("What reading costs compute, and the disk by block size", run, table, picture)
