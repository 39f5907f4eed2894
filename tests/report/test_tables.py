from __future__ import annotations

import re

import pytest

import report_samples as samples
from autosp.cost_model.floor import floor_s
from autosp.cost_model.predict import predict
from autosp.report import tables, units
from autosp.spec import BackwardProfile, Candidate, Outcome, Partition, Reading, Tier
from report_samples import line_with, lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0 s"),
        (1.2345, "1.23 s"),
        (0.0456, "45.6 ms"),
        (0.99999, "1.00 s"),
        (7e-6, "7.00 µs"),
        (3e-9, "0.00300 µs"),
        (1234.5, "1234 s"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (7.98e9, "7.98 GB"),
        (999_999, "1.00 MB"),
        (2.5e12, "2.50 TB"),
    ],
)
def test_sizes(value: float | None, text: str) -> None:
    assert units.size(value) == text


def test_ratios_of_nothing() -> None:
    assert units.ratio(1.0, None) == units.ratio(None, 1.0) == units.ratio(1.0, 0.0) == units.percent(1, 0) == "–"
    assert units.error(1.0, 0.0) == "–"
    assert units.error(1.1, 1.0) == "+10.0%"


def test_ranges() -> None:
    assert units.ranges([]) == "none"
    assert units.ranges([9, 0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–9"


def test_trials_put_the_fastest_first_and_mark_the_trivial_plans() -> None:
    floor = floor_s(samples.profile(), samples.BUDGET_BYTES)
    table = tables.trials_table(samples.trials(), samples.BUDGET_BYTES, floor, samples.MIXED)
    body = [line for line in lines(table) if re.match(r"\d+ \d+ \d+ ", line)]
    assert [line[0] for line in body] == ["2", "1", "3", "0"]
    assert body[0].endswith("chosen")
    assert " 400 ms " in body[0]
    assert " 1.56 " in body[0]
    assert body[1].endswith("fits sliding window")
    assert body[2].endswith("over budget")
    assert body[3].endswith("– – – 5.54 GB > 4.00 GB out of memory everything resident")


def test_what_profiling_timed_stands_among_the_trials_and_wins_nothing() -> None:
    trials = samples.trials()
    profile = samples.profile().model_copy(update={"overlapped": trials[1].model_copy(update={"number": 0})})
    table = tables.trials_table(trials[2:], samples.BUDGET_BYTES, None, trials[1].prediction.candidate, profile)
    (row,) = [line for line in lines(table) if "profiled" in line]
    assert row.startswith("– ") and row.endswith("profiled sliding window")
    said = trials[2].prediction
    of_group = said.model_copy(update={"candidate": said.candidate.model_copy(update={"group": 2})})
    grouped = trials[2].model_copy(update={"prediction": of_group})
    table = tables.trials_table([grouped], samples.BUDGET_BYTES, None, None, profile)
    assert not any("profiled" in line for line in lines(table)), "it ran one microbatch"


def test_trials_without_a_winner_or_a_floor() -> None:
    table = tables.trials_table(samples.trials(), samples.BUDGET_BYTES, None)
    assert lines(table)[0] == "Trials under 4.00 GB"
    assert not any("chosen" in line for line in lines(table))


def test_a_trial_that_was_cut_short_has_no_peak() -> None:
    killed = samples.measurement(0.0, 0, Outcome.KILLED)
    trial = samples.trials()[1].model_copy(update={"measurement": killed})
    (row,) = [line for line in lines(tables.trials_table([trial], samples.BUDGET_BYTES, None)) if "killed" in line]
    assert row.endswith(" – killed sliding window")


def test_trials_fit_120_columns() -> None:
    table = tables.trials_table(samples.trials()[1:], samples.BUDGET_BYTES, 0.3, samples.MIXED)
    assert lines(table, 120) == lines(table, 200)


def test_predictions_stop_at_the_limit() -> None:
    ranked = predict(samples.profile(), [samples.EVERYTHING, samples.MIXED, samples.WINDOW])
    table = tables.predictions_table(ranked, 0.3, 2)
    assert lines(table)[0] == "Predictions, the best 2 of 3; floor 300 ms"
    assert line_with(table, "1 12 1 12").endswith("everything resident")
    assert not any(line.startswith("3 ") for line in lines(table))


def test_studies() -> None:
    table = tables.studies_table([samples.summary(), samples.summary("other", best_latency_s=None)])
    assert lines(table)[0] == "2 studies"
    assert line_with(table, "net ") == "net Net float32[1,8] 4.00 GB 4 400 ms 3.20 GB finished 2026-01-02 03:04"
    assert line_with(table, "other ").endswith("– – unfinished 2026-01-02 03:04")


def test_a_plan_with_everything_measured() -> None:
    text = "\n".join(lines(tables.plan_table(samples.plan())))
    for part in (
        "Plan of study net",
        "12 layers of 5.40 GB in all, the largest 1.00 GB; 50.0 MB beside them never move",
        "4 layers, 1.60 GB: 0, 3, 6, 9",
        "T / floor 1.25, floor 320 ms (no schedule can take less)",
        "3.20 GB, 80.0% of the budget",
        "why it was the fastest",
    ):
        assert part in text


def test_a_plan_that_the_user_set() -> None:
    bare = {
        "prediction": None,
        "measurement": None,
        "floor_s": None,
        "budget_bytes": None,
        "study_name": None,
        "why": "",
    }
    text = "\n".join(lines(tables.plan_table(samples.plan().model_copy(update={**bare, "candidate": samples.WINDOW}))))
    assert "none: a sliding window" in text
    assert not any(word in text for word in ("measured", "predicted", "floor", "budget"))


def test_a_plan_measured_without_a_budget_or_a_transfer() -> None:
    found = samples.measurement(0.4, 10**9).model_copy(update={"moved_bytes": 0})
    text = "\n".join(
        lines(tables.plan_table(samples.plan().model_copy(update={"budget_bytes": None, "measurement": found})))
    )
    assert "nothing moved" in text
    assert "of the budget" not in text


def test_layers_have_a_line_each_and_a_sum() -> None:
    table = tables.layers_table(samples.profile())
    assert line_with(table, "3 blocks.3") == "3 blocks.3 1 2 400 MB 20.0 ms 32.0 ms 1.60 4.10 kB 90.0 MB"
    assert line_with(table, "all layers") == "all layers 5.40 GB 240 ms 432 ms"
    assert lines(tables.layers_table(samples.profile(repeats=4)))[0].endswith("4 periods a pass")


def test_a_layer_that_is_visited_twice_and_one_that_never_is() -> None:
    profile = samples.profile(3)
    visits = (0, 1, 0)
    partition = Partition(**{**profile.partition.model_dump(), "visits": visits})
    seen = tuple(profile.visits[0].model_copy(update={"layer": layer}) for layer in visits)
    table = tables.layers_table(profile.model_copy(update={"partition": partition, "visits": seen}))
    assert line_with(table, "0 blocks.0").startswith("0 blocks.0 2 2 400 MB 40.0 ms")
    assert line_with(table, "2 blocks.2") == "2 blocks.2 0 2 1.00 GB – 80.0 ms – – –"


def test_layers_count_their_backward() -> None:
    """That of one, too, which only a pass with autograd visits."""
    times = {"before_s": 0.0, "recompute_s": 0.0}
    backward = tuple(BackwardProfile(layer=layer, backward_s=0.030, **times) for layer in (2, 0))
    profile = samples.profile(3)
    visits = profile.visits[:2]
    table = tables.layers_table(profile.model_copy(update={"visits": visits, "backward": backward}))
    assert "400 MB 50.0 ms" in line_with(table, "0 blocks.0")
    assert "1.00 GB 30.0 ms" in line_with(table, "2 blocks.2")


def test_a_link() -> None:
    table = tables.link_table(samples.profile().link)
    assert lines(table)[0] == "Link host → device"
    assert line_with(table, "1.00 GB") == "1.00 GB 80.0 ms 12.5 GB/s"
    assert line_with(table, "under compute") == "under compute × 1.05 11.9 GB/s"


def test_a_link_from_disk_says_how_it_is_read() -> None:
    how = {"source": Tier.DISK, "reading": Reading(readers=2, block_bytes=8 * 2**20), "cached_bytes_per_s": 15e9}
    table = tables.link_table(samples.profile().link.model_copy(update=how))
    assert line_with(table, "read by") == "read by 2 readers, blocks of 8 MiB"
    assert line_with(table, "from the page cache") == "from the page cache 15.0 GB/s"


def test_a_plan_that_reads_files_says_how() -> None:
    on_host = samples.plan()
    assert "blocks of" not in "\n".join(lines(tables.plan_table(on_host)))
    device = on_host.device.model_copy(update={"slow_tier": Tier.DISK})
    from_disk = on_host.model_copy(update={"device": device})
    assert line_with(tables.plan_table(from_disk), "reading") == "reading 1 reader, blocks of 32 MiB"
    cached = from_disk.model_copy(update={"reading": Reading(readers=4, from_cache=True)})
    expected = "reading 4 readers, blocks of 32 MiB; what the page cache has is copied from it"
    assert line_with(tables.plan_table(cached), "reading") == expected


def test_markup_in_names_is_plain_text() -> None:
    name = "[red]x[/red]"
    table = tables.studies_table([samples.summary(name)])
    assert any(name in line for line in lines(table))
    assert name in "\n".join(lines(tables.plan_table(samples.plan().model_copy(update={"why": name}))))


def test_a_candidate_with_one_streamed_layer_is_no_baseline() -> None:
    (prediction,) = predict(samples.profile(), [Candidate(k=12, k_prime=1, residents=tuple(range(11)))])
    assert line_with(tables.predictions_table([prediction], 0.3, 1), "1 12 1 11").endswith("GB")
