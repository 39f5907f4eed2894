"""The records, and the plan file."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import autosp.spec
from autosp.errors import AutospError, PlanFormatError
from autosp.spec import PLAN_SCHEMA_VERSION, Candidate, Outcome, Plan, Reading, Record, StudyKey, Tier
from builders import device, measurement, partition, prediction, profile, study_key


def a_plan(**changes: Any) -> Plan:
    """A plan with every field in use."""
    candidate = Candidate(k=3, k_prime=1, residents=(1,))
    fields: dict[str, Any] = {
        "autosp_version": "0.1.0",
        "torch_version": "2.13.0",
        "created_at": "2025-01-01T00:00:00+00:00",
        "study_name": "tiny",
        "mode": "inference",
        "model_name": "Tiny",
        "model_fingerprint": "m" * 32,
        "batch_signature": "float32[1,8]",
        "device": device("cpu"),
        "budget_bytes": 5_000_000_000,
        "partition": partition((100, 2**40, 7), (0, 2, 1, 0), repeats=2, resident_bytes=30),
        "candidate": candidate,
        "prediction": prediction(candidate, latency_s=0.1 + 0.2, stall_s=1e-9, peak_bytes=2**40),
        "measurement": measurement(latency_s=1 / 3, peak_bytes=2**40 + 1),
        "floor_s": 0.1,
        "why": "für Zoë: ≤ 5 GB ✓",
    }
    return Plan(**(fields | changes))


PLAN = a_plan()


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond that size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_round_trip_of_a_plan_that_was_never_searched(tmp_path: Path) -> None:
    plain = a_plan(study_name=None, budget_bytes=None, prediction=None, measurement=None, floor_s=None, why="")
    plain.save(str(tmp_path / "plan.json"))
    assert Plan.load(str(tmp_path / "plan.json")) == plain


def test_file_is_readable_json(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    data = json.loads(text)
    assert data["schema_version"] == PLAN_SCHEMA_VERSION == 7
    assert data["candidate"] == {
        "k": 3,
        "k_prime": 1,
        "residents": [1],
        "on_disk": [],
        "read_ahead": 0,
        "recompute": [],
        "offload": [],
        "group": 1,
    }
    assert data["device"]["slow_tier"] == "disk"
    assert data["why"] == "für Zoë: ≤ 5 GB ✓"


def test_save_replaces(tmp_path: Path) -> None:
    a_plan(why="old").save(tmp_path / "plan.json")
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    old = a_plan(why="old")
    old.save(tmp_path / "plan.json")
    with full_disk(1000), pytest.raises(OSError):
        PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == old
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_failing_write_leaves_nothing(tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(OSError):
        PLAN.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_failing_replacement_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError):
        PLAN.save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_save_into_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PLAN.save(tmp_path / "missing" / "plan.json")


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    PLAN.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def changed(change: Callable[[dict[str, Any]], Any]) -> str:
    """A saved plan's text after a change of its data."""
    data = json.loads(PLAN.model_dump_json())
    change(data)
    return json.dumps(data)


SAVED = PLAN.model_dump_json(indent=2)


def assert_refused(path: Path, text: str | bytes, *parts: str) -> None:
    """Loading raises a PlanFormatError that names the file and all parts."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanFormatError) as caught:
        Plan.load(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert isinstance(caught.value, AutospError)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("plan", id="no JSON"),
        pytest.param(SAVED[:-3], id="last brace missing"),
        pytest.param(SAVED[: len(SAVED) // 2], id="truncated"),
        pytest.param(SAVED + "}", id="more behind it"),
        pytest.param(b"\x80\x02}q\x00.", id="a pickle"),
    ],
)
def test_not_json(tmp_path: Path, text: str | bytes) -> None:
    assert_refused(tmp_path / "plan.json", text, "is not JSON", "autosp export")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[" * 100_000, id="nested too deep"),
        pytest.param('{"schema_version": ' + "1" * 5000 + "}", id="too many digits"),
    ],
)
def test_hostile_json(tmp_path: Path, text: str) -> None:
    assert_refused(tmp_path / "plan.json", text)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"plan"', "{}", '{"schema_version": "1"}', '{"schema_version": null}']
)
def test_not_a_plan(tmp_path: Path, text: str) -> None:
    assert_refused(tmp_path / "plan.json", text, "has no schema_version: it is not an autosp plan")


@pytest.mark.parametrize("newer", [PLAN_SCHEMA_VERSION + 1, 99])
def test_newer_schema(tmp_path: Path, newer: int) -> None:
    text = changed(lambda data: data.update(schema_version=newer, invented_later=True))
    assert_refused(
        tmp_path / "plan.json", text, f"plan schema {newer}", f"reads up to {PLAN_SCHEMA_VERSION}", "upgrade autosp"
    )


@pytest.mark.parametrize("version", [0, -3, True])
def test_schema_that_never_was(tmp_path: Path, version: object) -> None:
    assert_refused(tmp_path / "plan.json", changed(lambda data: data.update(schema_version=version)))


@pytest.mark.parametrize(
    ("change", "place"),
    [
        pytest.param(lambda data: data.pop("candidate"), "candidate: Field required", id="field missing"),
        pytest.param(lambda data: data["partition"].pop("visits"), "partition.visits: Field", id="inner field missing"),
        pytest.param(
            lambda data: data["partition"]["layers"][1].pop("n_bytes"), "partition.layers.1.n_bytes", id="item"
        ),
        pytest.param(
            lambda data: data["partition"]["layers"][1].update(index=0),
            "at partition: Value error, layer 0 (blocks.1) is in place 1",
            id="a layer's index twice",
        ),
        pytest.param(
            lambda data: data["partition"].update(lookups=data["partition"]["layers"][1]),
            "at partition: Value error, layer 1 (blocks.1) is in place 3",
            id="lookup tables with a layer's index",
        ),
        pytest.param(
            lambda data: data["partition"]["layers"][1].update(rows=[0, 256]),
            "at partition.layers.1: Value error, layer 1 (blocks.1) has rows (0, 256)",
            id="rows of a whole layer",
        ),
        pytest.param(lambda data: data["candidate"].update(k=-1), "candidate.k:", id="k below 0"),
        pytest.param(lambda data: data["candidate"].update(k_prime=0), "candidate.k_prime:", id="k' below 1"),
        pytest.param(lambda data: data.update(floor_s="soon"), "floor_s:", id="wrong type"),
        pytest.param(lambda data: data["device"].update(slow_tier="tape"), "device.slow_tier:", id="no such tier"),
        pytest.param(
            lambda data: data["measurement"].update(outcome="so so"), "measurement.outcome:", id="no such outcome"
        ),
        pytest.param(lambda data: data.update(mode="tuning"), "mode:", id="no such mode"),
        pytest.param(lambda data: data.update(colour="red"), "colour: Extra", id="unknown field"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], place: str) -> None:
    assert_refused(tmp_path / "plan.json", changed(change), "is damaged at", place)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data["candidate"].update(residents=[99]), id="resident that is no layer"),
        pytest.param(lambda data: data["partition"].update(visits=[0, 99]), id="visit of no layer"),
    ],
)
def test_indices_of_no_layer(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    assert_refused(tmp_path / "plan.json", changed(change))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "plan.json")


def test_json_schema() -> None:
    schema = Plan.model_json_schema()
    assert set(schema["properties"]) == set(json.loads(SAVED))
    assert schema["additionalProperties"] is False
    assert {"mode", "model_fingerprint", "partition", "candidate", "device"} <= set(schema["required"])
    assert {"prediction", "measurement", "floor_s", "budget_bytes", "why"}.isdisjoint(schema["required"])
    assert {"Candidate", "Partition", "Layer", "DeviceInfo"} <= set(schema["$defs"])
    assert "minimum" in schema["$defs"]["Candidate"]["properties"]["k"]


RECORDS = [record for record in vars(autosp.spec).values() if isinstance(record, type) and issubclass(record, Record)]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_records_are_frozen_and_strict(record: type[Record]) -> None:
    assert record.model_config.get("frozen") is True
    assert record.model_config.get("extra") == "forbid"


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.why = "because"
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.candidate.k = 4
    with pytest.raises(ValidationError, match="colour"):
        Candidate(k=1, k_prime=1, colour="red")  # type: ignore[call-arg]


def test_records_are_values() -> None:
    assert Candidate(k=3, k_prime=1, residents=(1,)) == PLAN.candidate
    assert len({PLAN.candidate, Candidate(k=3, k_prime=1, residents=(1,)), Candidate(k=3, k_prime=1)}) == 2


def test_candidate() -> None:
    candidate = Candidate(k=5, k_prime=2, residents=(0, 3, 7))
    assert candidate.ring == 2
    assert candidate.label() == "k=5 k'=2 residents=3"


def test_partition_sums() -> None:
    assert PLAN.partition.streamable_bytes == 100 + 2**40 + 7
    assert PLAN.partition.total_bytes == 100 + 2**40 + 7 + 30


def test_profile_sums() -> None:
    measured = profile((10, 20), forward_s=[1.0, 2.0], before_s=[0.25, 0.5], tail_s=4.0, repeats=3, bytes_per_s=7.0)
    assert measured.compute_s == 3 * 3.75 + 4
    assert measured.link == measured.links[0]
    assert measured.link.bytes_per_s == 7


def test_enums_are_their_text() -> None:
    assert [tier.value for tier in Tier] == ["device", "host", "disk"]
    assert Outcome("out of memory") is Outcome.OUT_OF_MEMORY


def before_readers(data: dict[str, Any]) -> None:
    """As schema 3 had it."""
    data["schema_version"] = 3
    del data["reading"]


def test_a_plan_of_before_readers_means_one_and_the_blocks_of_then(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(changed(before_readers), encoding="utf-8")
    loaded = Plan.load(path)
    assert loaded == PLAN.model_copy(update={"schema_version": 3})
    assert loaded.reading == Reading(readers=1, block_bytes=32 * 2**20, from_cache=False)


def before_rows(data: dict[str, Any]) -> None:
    """As schema 3 had it."""
    data["schema_version"] = 3
    del data["partition"]["leaves"]
    for layer in data["partition"]["layers"]:
        del layer["rows"]


def test_a_plan_of_before_rows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(changed(before_rows), encoding="utf-8")
    assert Plan.load(path) == PLAN.model_copy(update={"schema_version": 3})


def test_a_plan_with_rows_is_read_as_it_was_saved(tmp_path: Path) -> None:
    plan = a_plan(partition=partition((100,) * 5, head=range(2, 5)))
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert [(layer.path, layer.rows) for layer in loaded.partition.layers[1:4]] == [
        ("blocks.1", None),
        ("head", (0, 256)),
        ("head", (256, 512)),
    ]


def test_a_plan_whose_weight_rests_on_two_tiers_is_refused() -> None:
    parts = partition((100,) * 5, head=range(2, 5))
    with pytest.raises(ValidationError, match="some rows of a weight rest on disk, and others do not"):
        a_plan(partition=parts, candidate=Candidate(k=1, k_prime=1, on_disk=(2, 3), read_ahead=1))
    a_plan(partition=parts, candidate=Candidate(k=2, k_prime=1, residents=(4,), on_disk=(2, 3), read_ahead=1))


def before_the_disk_tier(data: dict[str, Any]) -> None:
    """As schema 2 had it."""
    before_training(data)
    before_readers(data)
    before_rows(data)
    data["schema_version"] = 2
    del data["host_budget_bytes"], data["candidate"]["on_disk"], data["candidate"]["read_ahead"]
    if data["prediction"]:
        del data["prediction"]["read_bytes"], data["prediction"]["host_bytes"]


def test_a_plan_of_before_the_disk_tier_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(changed(before_the_disk_tier), encoding="utf-8")
    assert Plan.load(path) == PLAN.model_copy(update={"schema_version": 2})


def before_blocks(data: dict[str, Any]) -> None:
    """As schema 6 had it."""
    data["schema_version"] = 6
    del data["partition"]["blocks"], data["partition"]["activation_bytes"]
    del data["candidate"]["offload"], data["candidate"]["group"]
    if data["prediction"]:
        del data["prediction"]["candidate"]["offload"], data["prediction"]["candidate"]["group"]
        del data["prediction"]["offloaded_bytes"]


def test_a_plan_of_before_blocks_computes_each_layer_again_by_itself(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        before_blocks(data)
        data["partition"]["backward"], data["candidate"]["recompute"] = [1, 0], [1]

    path = tmp_path / "plan.json"
    path.write_text(changed(change), encoding="utf-8")
    loaded = Plan.load(path)
    assert loaded.schema_version == 6
    assert loaded.partition.recomputable == ((0,), (1,))


def test_a_plan_of_before_activations_were_offloaded_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(changed(before_blocks), encoding="utf-8")
    assert Plan.load(path) == PLAN.model_copy(update={"schema_version": 6})


def before_disk_bytes(data: dict[str, Any]) -> None:
    """As schema 5 had it."""
    before_blocks(data)
    data["schema_version"] = 5
    for layer in data["partition"]["layers"]:
        del layer["disk_bytes"]


def test_a_plan_of_before_disk_bytes_reads_what_it_moves(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(changed(before_disk_bytes), encoding="utf-8")
    loaded = Plan.load(path)
    assert loaded == PLAN.model_copy(update={"schema_version": 5})
    assert [layer.read_bytes for layer in loaded.partition.layers] == [layer.n_bytes for layer in PLAN.partition.layers]


def before_training(data: dict[str, Any]) -> None:
    """As schema 4 had it."""
    before_disk_bytes(data)
    data["schema_version"] = 4
    del data["partition"]["backward"], data["candidate"]["recompute"]
    for layer in data["partition"]["layers"]:
        del layer["gradient_bytes"]
    if data["prediction"]:
        del data["prediction"]["candidate"]["recompute"]


def test_a_plan_of_before_training_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(changed(before_training), encoding="utf-8")
    assert Plan.load(path) == PLAN.model_copy(update={"schema_version": 4})


@pytest.mark.parametrize(
    ("backward", "recompute", "message"),
    [
        pytest.param([9], [], "none of the", id="no such layer"),
        pytest.param([], [0], "only that is recomputed", id="recomputed without backward"),
        pytest.param([1, 0], [0], "as a whole or not at all", id="part of a block"),
        pytest.param([1], [], "as a whole or not at all", id="part of a block goes backward"),
    ],
)
def test_a_plan_whose_backward_is_of_no_layer_is_refused(
    tmp_path: Path, backward: list[int], recompute: list[int], message: str
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["partition"]["backward"], data["candidate"]["recompute"] = backward, recompute
        data["partition"]["blocks"] = [{"path": "blocks", "layers": [0, 1]}]

    assert_refused(tmp_path / "plan.json", changed(change), message)


@pytest.mark.parametrize(
    ("slow_tier", "changes"),
    [
        pytest.param("host", {"k": 1, "residents": [], "on_disk": [0], "read_ahead": 1}, id="some layers"),
        pytest.param("disk", {}, id="all layers"),
    ],
)
def test_a_plan_for_training_with_layers_on_disk_is_refused(
    tmp_path: Path, slow_tier: str, changes: dict[str, Any]
) -> None:
    def change(data: dict[str, Any]) -> None:
        data["mode"] = "training"
        data["device"]["slow_tier"] = slow_tier
        data["candidate"].update(changes)

    assert_refused(tmp_path / "plan.json", changed(change), "in training, weights rest in host memory")


def test_a_plan_for_training_with_rows_is_refused() -> None:
    parts, on_host = partition((100,) * 5, head=range(2, 5)), device("cuda")
    with pytest.raises(ValidationError, match="in training, it travels as a whole"):
        a_plan(partition=parts, device=on_host, mode="training")
    a_plan(device=on_host, mode="training")


def test_a_plan_whose_transfer_lies_on_two_tiers_is_refused(tmp_path: Path) -> None:
    count = len(PLAN.partition.layers)
    candidate = {"k": count, "k_prime": count, "residents": [], "on_disk": [0], "read_ahead": 1}
    text = changed(lambda data: data.update(candidate=candidate))
    assert_refused(tmp_path / "plan.json", text, "travel together, and only some of them rest on disk")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"on_disk": (1,)}, "1 layers rest on disk, and 0 groups are read ahead", id="no staging"),
        pytest.param({"read_ahead": 1}, "0 layers rest on disk, and 1 groups are read ahead", id="nothing to read"),
        pytest.param(
            {"on_disk": (1,), "read_ahead": 1, "residents": (1, 2)}, "a layer is resident and on disk", id="both"
        ),
    ],
)
def test_candidates_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Candidate(k=3, k_prime=1, **changes)


def test_groups_of_a_candidate() -> None:
    candidate = Candidate(k=3, k_prime=2, residents=(1,), on_disk=(0, 3, 5), read_ahead=1)
    assert candidate.groups((4, 2, 4, 1, 3, 0)) == [(4, 2), (3, 0)]
    assert candidate.split_groups((4, 2, 4, 1, 3, 0)) == []
    assert candidate.split_groups((4, 3, 2, 0)) == [(4, 3), (2, 0)]
    assert candidate.label() == "k=3 k'=2 residents=1 on disk=3 read-ahead=1"


def test_a_plan_of_before_groups_is_of_one_microbatch(tmp_path: Path) -> None:
    data = PLAN.model_dump(mode="json")
    data["schema_version"] = 6
    for candidate in (data["candidate"], data["prediction"]["candidate"]):
        del candidate["group"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Plan.load(path) == PLAN.model_copy(update={"schema_version": 6})
    assert Plan.load(path).candidate.group == 1


def test_key_fingerprint() -> None:
    assert study_key().fingerprint == study_key().fingerprint
    assert len(study_key().fingerprint) == 32
    numbers = {"group", "budget_bytes", "host_budget_bytes", "slack"}
    others = [study_key(**{name: "other"}).fingerprint for name in set(StudyKey.model_fields) - {"mode", *numbers}]
    others += [study_key(**{name: 5}).fingerprint for name in numbers]
    assert len({study_key().fingerprint, *others}) == len(others) + 1


def test_key_fingerprint_of_a_database_of_before_the_disk_tier() -> None:
    """A study without a budget of host memory is found where it was entered before there was one."""
    assert study_key().fingerprint == "fd465f50bcd1566694cc87ccc685816c"


def test_key_differences() -> None:
    assert study_key().differences(study_key()) == {}
    assert study_key().differences(study_key(step="other", budget_bytes=5)) == {
        "step": ("call", "other"),
        "budget_bytes": (10**9, 5),
    }
