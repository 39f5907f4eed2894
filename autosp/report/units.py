"""Numbers as people read them: three significant digits and a unit."""

from __future__ import annotations

from collections.abc import Iterable

NOTHING = "–"
"""Shown where there is no figure."""

_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def seconds(value_s: float | None) -> str:
    """`1.23 s`, `45.6 ms`, `789 µs`."""
    return _scaled(value_s, _TIMES)


def size(n_bytes: float | None) -> str:
    """`7.98 GB`, `16.8 MB`; a GB is 10^9 bytes."""
    return _scaled(n_bytes, _SIZES)


def rate(bytes_per_s: float | None) -> str:
    """`2.61 GB/s`."""
    return NOTHING if bytes_per_s is None else f"{size(bytes_per_s)}/s"


def ratio(value: float | None, of: float | None) -> str:
    """`1.07`: how many times `of` the value is."""
    return f"{value / of:.2f}" if value is not None and of else NOTHING


def percent(value: float | None, of: float | None) -> str:
    """`94 %`: the value's share of `of`."""
    return f"{value / of:.1%}" if value is not None and of else NOTHING


def error(predicted: float, measured: float) -> str:
    """`+4.2%`: how far a prediction lies above (+) or below what was measured."""
    return f"{predicted / measured - 1:+.1%}" if measured else NOTHING


def significant(value: float) -> str:
    """Three digits that count, never in scientific notation."""
    magnitude = int(f"{value:.2e}".partition("e")[2])  # after rounding: 9.999 is 10.0, not 10.00
    return f"{value:.{max(0, 2 - magnitude)}f}"


def ranges(numbers: Iterable[int]) -> str:
    """`0–3, 5, 7–9`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("–".join(map(str, run)) for run in runs) or "none"


def _scaled(value: float | None, scales: tuple[tuple[float, str], ...]) -> str:
    if value is None:
        return NOTHING
    if not value:
        return f"0 {next(unit for factor, unit in scales if factor == 1)}"
    # 999.6 of one unit is 1.00 of the next.
    factor, unit = next((scale for scale in scales if abs(value) >= 0.9995 * scale[0]), scales[-1])
    return f"{value:.0f} {unit}" if unit == "B" else f"{significant(value / factor)} {unit}"
