"""A linear module whose weight's rows are layers of their own gives the output that it always gave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autosp
from autosp.batch import equal, map_tensors
from autosp.devices import CpuDevice, Device
from autosp.errors import ModelChangedError, ReadError
from autosp.partition import bind, partition
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.streaming import lower
from autosp.settings import settings
from autosp.spec import Candidate, Plan, Tier
from autosp.tiers import Originals, open_store
from autosp.tiers.packed import PackedFile
from mapped_models import map_weights, mapped_bytes
from models import Headed, RunsDiffer, TiedHead, tokens

Apply = Callable[..., StreamedModel[nn.Module]]

BATCH = tokens(2, 5)
HEAD = (2, 3, 4)
"""Its runs among the layers; 0 and 1 are the blocks."""

ROWS, WIDTH, CUT_ABOVE_BYTES = 44_000, 128, 8 * 2**20
RUNS = ((0, 14592), (14592, 29184), (29184, ROWS))
"""A head of 22 MB is enough, if it is cut into runs of 8 MB."""


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosp.partition.rows.CUT_ABOVE_BYTES", CUT_ABOVE_BYTES)


def headed() -> nn.Module:
    return copy.deepcopy(_headed())


@cache
def _headed() -> nn.Module:
    """To be copied: random numbers for 22 MB take far longer."""
    torch.manual_seed(0)
    return Headed(rows=ROWS, width=WIDTH).eval()


def on(device: Device, batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(device.torch_device), batch)


def plain(model: nn.Module, batch: torch.Tensor, device: Device) -> torch.Tensor:
    """The unstreamed model's output on the same device."""
    there = model if device.torch_device.type == "cpu" else copy.deepcopy(model).to(device.torch_device)
    with torch.no_grad():
        output: torch.Tensor = there(on(device, batch))
    return output


@pytest.fixture
def apply(any_device: Device, tmp_path: Path) -> Any:
    """Streams a model under a candidate on the device under test; everything is removed at the end."""
    applied: list[StreamedModel[nn.Module]] = []

    def make_it(
        model: nn.Module, candidate: Candidate, originals: Originals = Originals.FREED
    ) -> StreamedModel[nn.Module]:
        slow_tier = any_device.info.slow_tier
        parts = partition(
            model, lambda: model(on(any_device, BATCH)), any_device.torch_device, lookups=True, slow_tier=slow_tier
        )
        assert tuple(layer.index for layer in parts.layers if layer.rows) == HEAD
        bound = bind(model, parts, slow_tier)
        schedule = lower(candidate, [layer.n_bytes for layer in bound.partition.layers], parts.visits)
        store = open_store(any_device, bound.stored(candidate.residents), tmp_path, originals, candidate.on_disk)
        applied.append(StreamedModel(bound, schedule, any_device, store, originals, store.close))
        return applied[-1]

    yield make_it
    for streamed in applied:
        streamed.remove()


PLANS = {
    "k=1 k'=1": Candidate(k=1, k_prime=1),
    "k=2 k'=1": Candidate(k=2, k_prime=1),
    "k=4 k'=2": Candidate(k=4, k_prime=2),
    "a run stays": Candidate(k=2, k_prime=1, residents=(3,)),
    "all but a run stay": Candidate(k=5, k_prime=1, residents=(0, 1, 2, 4)),
    "the head stays": Candidate(k=4, k_prime=1, residents=HEAD),
    "the head rests on disk": Candidate(k=2, k_prime=1, on_disk=HEAD, read_ahead=2),
    "its streamed runs rest on disk": Candidate(k=3, k_prime=1, residents=(1, 2), on_disk=(3, 4), read_ahead=1),
}


@pytest.mark.parametrize("plan", PLANS)
def test_same_output_one_tensor_at_rest_and_everything_restored(plan: str, apply: Apply, any_device: Device) -> None:
    """Each plan on each device; the originals are kept under every second plan."""
    candidate, originals = PLANS[plan], [*Originals][[*PLANS].index(plan) % len(Originals)]
    model = headed()
    expected = plain(model, BATCH, any_device)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    identities = {key: id(tensor) for key, tensor in model.named_parameters()}
    streamed = apply(model, candidate, originals)
    for _ in range(3):
        assert equal(model(on(any_device, BATCH)), expected)
        assert all(equal(tensor.cpu(), before[key]) for key, tensor in model.state_dict().items())
    stats = streamed.stats()
    assert (stats.misses, stats.temporary_loads, stats.passes) == (0, 0, 3)
    assert stats.visits == 3 * (5 - len(candidate.residents))
    streamed.remove()
    assert {key: id(tensor) for key, tensor in model.named_parameters()} == identities
    assert all(tensor.device.type == "cpu" and equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert equal(plain(model, BATCH, any_device), expected)


STREAMED = {name: PLANS[name] for name in ("k=1 k'=1", "a run stays", "its streamed runs rest on disk")}


@pytest.mark.parametrize("candidate", STREAMED.values(), ids=STREAMED)
def test_other_shapes_are_tried_once_and_right(candidate: Candidate, apply: Apply, any_device: Device) -> None:
    model = headed()
    batches = [on(any_device, tokens(*shape)) for shape in ((1, 1), (3, 40), (1, 1), (2, 5), (3, 40))]
    expected = [plain(model, batch, any_device) for batch in batches]
    apply(model, candidate)
    multiplied: list[tuple[int, ...]] = []
    for batch, output in zip(batches, expected, strict=True):
        with Multiplications() as seen:
            assert equal(model(batch), output)
        multiplied.append(tuple(rows for rows in seen.rows if rows > 1024))
    by_runs = tuple(end - begin for begin, end in RUNS)
    assert multiplied == [(ROWS, *by_runs), (ROWS, *by_runs), by_runs, by_runs, by_runs]


class Multiplications(torch.overrides.TorchFunctionMode):
    """Notes how many rows each weight has that an input is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.rows.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def test_a_shape_for_which_kernels_disagree_is_computed_whole(apply: Apply, any_device: Device) -> None:
    model = headed()
    batch = on(any_device, tokens(1, 7))
    expected = plain(model, batch, any_device)
    apply(model, PLANS["k=2 k'=1"])
    with RunsDiffer(ROWS):
        for _ in range(3):
            assert equal(model(batch), expected)
    assert equal(model(on(any_device, BATCH)), plain(headed(), BATCH, any_device))


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "through .data"])
@pytest.mark.parametrize("candidate", STREAMED.values(), ids=STREAMED)
def test_writes_at_rest_reach_every_run(
    candidate: Candidate, through_data: bool, apply: Apply, any_device: Device
) -> None:
    model = headed()
    apply(model, candidate)
    model(on(any_device, BATCH))
    for begin, _ in RUNS:
        twin = headed()
        for written in (model, twin):
            weight = written.head.weight
            with torch.no_grad():
                (weight.data if through_data else weight)[begin].mul_(3)
        expected = plain(twin, BATCH, any_device)
        assert equal(model(on(any_device, BATCH)), expected)
        with torch.no_grad():
            model.head.weight[begin].copy_(headed().head.weight[begin])
    assert equal(model(on(any_device, BATCH)), plain(headed(), BATCH, any_device))


def test_the_weight_is_used_without_the_forward_and_the_head_without_the_model(
    apply: Apply, any_device: Device
) -> None:
    model, twin = headed(), headed()
    x = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
    apply(model, PLANS["a run stays"])
    with torch.no_grad():
        expected = twin.to(any_device.torch_device).head(on(any_device, x))
        for _ in range(2):
            assert equal(on(any_device, model.head(x)), expected)
            assert equal(model.head(input=on(any_device, x)), expected)
        assert equal(F.linear(x, model.head.weight), F.linear(x, headed().head.weight))


@pytest.mark.parametrize("originals", Originals)
def test_runs_that_stay_are_read_as_the_others_are(originals: Originals, apply: Apply, any_device: Device) -> None:
    """Not through the map, whose pages would be the process's, and are not verified."""
    model = headed()
    expected = plain(model, BATCH, any_device)
    apply(model, PLANS["a run stays"], originals)
    assert mapped_bytes("/packed-") < 2**20
    assert equal(model(on(any_device, BATCH)), expected)


def test_a_run_that_stays_and_is_not_what_was_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = headed()
    plan = autosp.plan(model, BATCH, k=3, k_prime=1, residents=2, device="cpu")
    (resident,) = (index for index in plan.candidate.residents if index in HEAD)
    verify = PackedFile.verify

    def misread(pack: PackedFile, layer: Any, data: memoryview) -> None:
        if layer.name.endswith(f"[{RUNS[HEAD.index(resident)][0]}:{RUNS[HEAD.index(resident)][1]}]"):
            data[0] ^= 1
        verify(pack, layer, data)

    monkeypatch.setattr(PackedFile, "verify", misread)
    with pytest.raises(ReadError, match=r"checksum of layer head\["):
        autosp.apply(model, plan, device="cpu")
    with torch.no_grad():
        assert equal(model(BATCH), headed()(BATCH))


def test_another_parameter_in_its_place_is_used(apply: Apply, any_device: Device) -> None:
    model = headed()
    apply(model, PLANS["k=2 k'=1"])
    model.head.weight = nn.Parameter(model.head.weight.detach().clone() * 2)
    twin = headed()
    with torch.no_grad():
        twin.head.weight.mul_(2)
    assert equal(model(on(any_device, BATCH)), plain(twin, BATCH, any_device))


def test_other_data_in_its_place_is_refused(apply: Apply, any_device: Device) -> None:
    model = headed()
    streamed = apply(model, PLANS["k=2 k'=1"])
    kept = model.head.weight.data
    model.head.weight.data = kept.clone()
    with pytest.raises(ModelChangedError, match=r"the data of head\.weight was replaced"):
        model(on(any_device, BATCH))
    model.head.weight.data = kept
    assert equal(model(on(any_device, BATCH)), plain(headed(), BATCH, any_device))
    streamed.remove()


@pytest.mark.parametrize("residents", [0, 1, 2])
def test_where_the_host_has_no_room_for_the_head(residents: int, tmp_path: Path) -> None:
    model = headed()
    with torch.no_grad():
        expected = model(BATCH)
    device = CpuDevice(slow_tier=Tier.HOST)
    plan = autosp.plan(model, BATCH, k=2 + residents, k_prime=1, residents=residents, max_cpu_gb="19MB", device=device)
    candidate = plan.candidate
    assert not set(HEAD).isdisjoint(candidate.on_disk)
    assert set(HEAD) <= {*candidate.on_disk, *candidate.residents}
    bound = bind(model, plan.partition)
    schedule = lower(candidate, [layer.n_bytes for layer in plan.partition.layers], plan.partition.visits)
    store = open_store(device, bound.stored(candidate.residents), tmp_path, Originals.FREED, candidate.on_disk)
    with StreamedModel(bound, schedule, device, store, Originals.FREED, store.close) as streamed:
        for _ in range(2):
            assert equal(streamed(BATCH), expected)
    with torch.no_grad():
        assert equal(model(BATCH), expected)
    device.close()


@pytest.mark.parametrize(("k", "residents"), [(1, 0), (3, 1), (5, 5)])
@pytest.mark.parametrize("mapped", [True, False], ids=["in a file", "in RAM"])
def test_a_tied_head_streams_while_its_table_is_looked_up(k: int, residents: int, mapped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TiedHead(ROWS, WIDTH).eval()
    batches = [BATCH, tokens(1, 9) + 40_000]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    if mapped:
        pytest.importorskip("safetensors")
        map_weights(model, tmp_path / "weights")
    plan = autosp.plan(model, BATCH, k=k, k_prime=1, residents=residents, device="cpu")
    assert [layer.rows for layer in plan.partition.layers[2:]] == list(RUNS)
    streamed = autosp.apply(model, plan)
    assert model.head.weight is model.embed.weight
    for _ in range(2):
        for batch, output in zip(batches, expected, strict=True):
            assert equal(model(batch), output)
    with torch.no_grad():
        model.embed.weight[40_003].zero_()
    output = model(batches[1])
    assert not equal(output, expected[1])
    assert equal(output[..., 40_003], model.head.bias[40_003].expand(1, 9))
    streamed.remove()
    with torch.no_grad():
        assert equal(model(batches[1]), output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype, apply: Apply, any_device: Device) -> None:
    model = headed()
    kind = any_device.torch_device.type
    with torch.autocast(kind, dtype):
        expected = plain(model, BATCH, any_device)
    apply(model, PLANS["k=2 k'=1"])
    for _ in range(2):
        with torch.autocast(kind, dtype):
            assert equal(model(on(any_device, BATCH)), expected)
        assert equal(model(on(any_device, BATCH)), plain(headed(), BATCH, any_device))


@pytest.mark.parametrize(("k", "residents"), [(1, 0), (3, 1), (5, 3), (5, 5)])
def test_rows_are_read_where_they_lie_in_a_file(k: int, residents: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = headed()
    with torch.no_grad():
        expected = model(BATCH)
    map_weights(model, tmp_path / "weights")
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    autosp.plan(model, BATCH, k=k, k_prime=1, residents=residents, device="cpu").save(tmp_path / "plan.json")
    streamed = autosp.apply(model, Plan.load(tmp_path / "plan.json"))
    for _ in range(2):
        assert equal(model(BATCH), expected)
    if residents < 5:
        assert model.head.weight.data_ptr() == addresses["head.weight"]
        with torch.no_grad():
            model.head.weight[40_000] = 0
        assert not model(BATCH)[..., 40_000].sub(model.head.bias[40_000]).any()
    streamed.remove()
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert not settings().cache_dir.exists()


def test_the_plan_of_a_model_in_ram_holds_for_it_in_a_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = headed()
    plan = autosp.plan(model, BATCH, k=2, k_prime=1, residents=1, device="cpu")
    with torch.no_grad():
        expected = model(BATCH)
    map_weights(model, tmp_path / "weights")
    with autosp.apply(model, plan) as streamed:
        assert equal(streamed(BATCH), expected)
