from __future__ import annotations

import re

import report_samples as samples
from autosp.report import run_tables
from autosp.report.traffic import Traffic
from report_samples import line_with, lines


def test_passes_and_what_was_promised_of_them() -> None:
    passes = [run_tables.Pass(0.8, 10**9, 0), run_tables.Pass(0.4, 10**9, 1), run_tables.Pass(0.5, 10**9, 0)]
    assert line_with(run_tables.passes_table(passes, 0.4), "2 ") == "2 400 ms 1.00 1.00 GB 1"
    text = "\n".join(lines(run_tables.run_table(samples.plan(), passes, 3_000_000_000)))
    assert "450 ms, median of passes 2 to 3" in text
    assert "3.00 GB, 75.0% of the budget of 4.00 GB" in text
    assert "misses 1" in text
    one = "\n".join(
        lines(run_tables.run_table(samples.plan().model_copy(update={"budget_bytes": None}), passes[:1], 1))
    )
    assert "one pass, with empty buffers" in one
    assert "of the budget" not in one


def test_a_broken_promise_is_told() -> None:
    text = "\n".join(lines(run_tables.run_table(samples.plan(), [run_tables.Pass(0.2, 10**9, 0)], 5_000_000_000)))
    assert "125.0% of the budget of 4.00 GB: OVER IT" in text
    assert "0.62, floor 320 ms (beaten: its profile measured compute too slow)" in text


def found(stalls_s: dict[int, float]) -> Traffic:
    return Traffic(
        pass_s=0.4,
        moved_bytes=3e9,
        link_busy_s=0.3,
        stall_s=sum(stalls_s.values()),
        layer_stalls_s=stalls_s,
    )


def test_traffic_predicted_beside_measured() -> None:
    said = Traffic(pass_s=0.36, moved_bytes=3e9, link_busy_s=0.24, stall_s=0.1, layer_stalls_s={})
    table = run_tables.traffic_table(samples.plan(), said, found({1: 0.125}))
    assert line_with(table, "latency") == "latency 360 ms 400 ms -10.0%"
    assert line_with(table, "of it stalled") == "of it stalled 100 ms 125 ms -20.0%"
    assert line_with(table, "host → device, moved") == "host → device, moved 3.00 GB 3.00 GB +0.0%"
    assert line_with(table, "host → device, busy") == "host → device, busy 240 ms 300 ms -20.0%"
    assert line_with(table, "host → device, while busy") == "host → device, while busy 12.5 GB/s 10.0 GB/s +25.0%"
    assert line_with(table, "T / floor") == "T / floor of 320 ms 1.12 1.25"


def test_traffic_without_a_prediction_a_floor_or_a_transfer() -> None:
    still = Traffic(pass_s=0.4, moved_bytes=0, link_busy_s=0, stall_s=0, layer_stalls_s={})
    table = run_tables.traffic_table(samples.plan().model_copy(update={"floor_s": None}), None, still)
    assert line_with(table, "latency") == "latency – 400 ms –"
    assert line_with(table, "host → device, while busy").endswith("while busy – – –")
    assert not any("floor" in line for line in lines(table))


def test_the_longest_stalls_come_first() -> None:
    measured = found({layer: layer / 500 for layer in range(12)})
    said = Traffic(pass_s=0.4, moved_bytes=0, link_busy_s=0, stall_s=0.5, layer_stalls_s={11: 0.5})
    table = run_tables.stalls_table(samples.plan(), said, measured)
    assert lines(table)[0] == "Stalls, the longest 8 of 12 streamed layers"
    body = [line for line in lines(table) if re.match(r"\d+ blocks", line)]
    assert [line.split()[0] for line in body] == ["11", "10", "9", "8", "7", "6", "5", "4"]
    assert body[0] == "11 blocks.11 1.00 GB 500 ms 22.0 ms 5.5%"
    assert body[1] == "10 blocks.10 400 MB 0 s 20.0 ms 5.0%"
    unpredicted = run_tables.stalls_table(samples.plan(), None, measured)
    assert line_with(unpredicted, "11 ") == "11 blocks.11 1.00 GB – 22.0 ms 5.5%"
