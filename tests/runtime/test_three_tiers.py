"""Layers that rest on disk behind the host: the same outputs, and no more traffic than the plan says."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autosp.batch import call, equal, map_tensors
from autosp.cost_model.simulate import Costs, simulate
from autosp.devices import CpuDevice, Device, VirtualDevice
from autosp.errors import ReadError
from autosp.intercept import Intercepted
from autosp.partition import bind, partition
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.actions import Kind
from autosp.schedule.lowering import lower_for
from autosp.schedule.streaming import lower
from autosp.schedule.validate import validate
from autosp.spec import Candidate, Partition, Tier
from autosp.tiers import Originals, open_store
from builders import on_disk as some_on_disk
from builders import quick, thorough
from models import EarlyExit, Written, make, tokens, vectors

Apply = Callable[..., StreamedModel[nn.Module]]


def on(device: Device, batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(device.torch_device), batch)


def plain(model: nn.Module, batch: Any, device: Device) -> Any:
    """The unstreamed model's output on the same device."""
    twin = copy.deepcopy(model).to(device.torch_device)
    with torch.no_grad():
        return call(twin, on(device, batch))


def partly_on_disk(candidate: Candidate, parts: Partition, every: int, read_ahead: int) -> Candidate:
    """Of its groups every second, or each, and all that is never visited."""
    residents = tuple(index for index in candidate.residents if index < len(parts.layers))
    candidate = candidate.model_copy(update={"residents": residents})
    chosen = [*candidate.groups(parts.visits)[::every]]
    chosen += [(layer.index,) for layer in parts.layers if layer.index not in parts.visits]
    resting = tuple(sorted(layer for group in chosen for layer in group))
    return candidate.model_copy(update={"on_disk": resting, "read_ahead": read_ahead if resting else 0})


def streamed_on(
    device: Device,
    model: nn.Module,
    parts: Partition,
    candidate: Candidate,
    folder: Path,
    originals: Originals = Originals.FREED,
) -> StreamedModel[nn.Module]:
    bound = bind(model, parts, device.info.slow_tier)
    layers = bound.partition.layers
    schedule = lower_for("inference", candidate, bound.partition)
    validate(schedule, tuple(layer.n_bytes for layer in layers), tuple(layer.read_bytes for layer in layers))
    store = open_store(device, bound.stored(), folder, originals, candidate.on_disk)
    return StreamedModel(bound, schedule, device, store, originals, store.close)


@pytest.fixture
def apply(any_device: Device, tmp_path: Path) -> Any:
    """Streams a model on the device under test; everything is removed at the end."""
    applied: list[StreamedModel[nn.Module]] = []

    def make_it(
        model: nn.Module,
        batch: Any,
        candidate: Candidate,
        every: int = 1,
        read_ahead: int = 1,
        originals: Originals = Originals.FREED,
    ) -> StreamedModel[nn.Module]:
        parts = partition(
            model,
            lambda: call(model, on(any_device, batch)),
            any_device.torch_device,
            slow_tier=any_device.info.slow_tier,
        )
        placed = partly_on_disk(candidate, parts, every, read_ahead)
        applied.append(streamed_on(any_device, model, parts, placed, tmp_path, originals))
        return applied[-1]

    yield make_it
    for streamed in applied:
        streamed.remove()


PLANS = {
    "k=1 k'=1": Candidate(k=1, k_prime=1),
    "k=2 k'=1": Candidate(k=2, k_prime=1),
    "k=4 k'=2": Candidate(k=4, k_prime=2),
    "residents": Candidate(k=4, k_prime=1, residents=(1, 3)),
    "all but one stay": Candidate(k=7, k_prime=1),
}
RINGS = [pytest.param(1, 1, id="all, one ahead"), pytest.param(1, 3, id="all, three"), pytest.param(2, 2, id="half")]


@pytest.mark.parametrize(("every", "read_ahead"), RINGS)
@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["stack", "shared", "fused_views"])
def test_same_output_and_no_more_reads_than_loads(
    name: str, candidate: Candidate, every: int, read_ahead: int, apply: Apply, any_device: Device
) -> None:
    model, batch = make(name)
    expected = plain(model, batch, any_device)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    streamed = apply(model, batch, candidate, every, read_ahead)
    for _ in range(4):
        assert equal(call(model, on(any_device, batch)), expected)
    stats = streamed.stats()
    assert (stats.misses, stats.temporary_loads, stats.passes) == (0, 0, 4)
    ahead = len(streamed._executor.loader.staging.ahead())
    loads_of_disk = [
        one
        for span in [streamed.timeline()]
        for one in span.of_kind(Kind.LOAD)
        if set(one.action.layers) <= set(streamed._disk_layers)
    ]
    assert stats.reads == len(loads_of_disk) + ahead
    assert stats.link_bytes.get("disk->host", 0) == stats.read_bytes
    streamed.remove()
    assert all(equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert equal(call(model, batch), call(make(name)[0], batch))


def test_a_steady_pass_reads_the_planned_bytes_once(apply: Apply, any_device: Device) -> None:
    model, batch = make("stack")
    batch = on(any_device, batch)
    streamed = apply(model, batch, Candidate(k=3, k_prime=1, residents=(2,)), every=2, read_ahead=2)
    model(batch)
    before = streamed.stats()
    for _ in range(3):
        model(batch)
    after = streamed.stats()
    layers = [layer.layer for layer in streamed._bound.layers]
    resting = streamed._disk_layers
    assert 0 < len(resting) < len(layers)
    assert after.reads - before.reads == 3 * len(resting)
    assert after.read_bytes - before.read_bytes == 3 * sum(layers[index].n_bytes for index in resting)
    assert after.moved_bytes - before.moved_bytes == 3 * sum(one.n_bytes for one in layers if one.index != 2)


ORDERS = [[5, 4, 3, 2, 1, 0], [0, 0, 0], [2], [], [0, 1, 2], [3, 1, 4, 1, 5, 0, 2], [0, 1, 2, 3, 4, 5], [1, 3, 5]]


@pytest.mark.parametrize(("every", "read_ahead"), RINGS)
@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
def test_other_orders_skips_and_repeats_are_right(
    candidate: Candidate, every: int, read_ahead: int, apply: Apply, any_device: Device
) -> None:
    model, batch = make("early_exit")
    twin = copy.deepcopy(model)
    streamed = apply(model, batch, candidate, every, read_ahead)
    expected = [plain(twin, (vectors(), order), any_device) for order in ORDERS]
    for order, output in [*zip(ORDERS, expected, strict=True)] * 2:
        assert equal(model(on(any_device, vectors()), order), output)
    assert streamed.stats().misses > 0


def test_layers_that_were_never_profiled_are_read_and_loaded_on_demand(apply: Apply, any_device: Device) -> None:
    model, _ = make("early_exit")
    twin = copy.deepcopy(model)
    streamed = apply(model, (vectors(), [0, 1]), Candidate(k=2, k_prime=1))
    assert equal(model(on(any_device, vectors())), plain(twin, vectors(), any_device))
    assert streamed.stats().misses >= 4


class Caller(nn.Module):
    """A layer whose forward calls its neighbour, and itself."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.__dict__["other"] = other  # a reference, not a child

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = self.other(x @ self.weight)
        return (self(x, depth - 1) if depth else x) @ self.weight


def test_calls_inside_calls(apply: Apply, any_device: Device) -> None:
    torch.manual_seed(0)
    inner = nn.Linear(64, 64)
    model = nn.Sequential(Caller(inner), inner, nn.Linear(64, 64))
    expected = plain(model, vectors(), any_device)  # a copy, whose references are to its own modules
    streamed = apply(model, vectors(), Candidate(k=1, k_prime=1))
    for _ in range(3):
        assert equal(model(on(any_device, vectors())), expected)
    assert streamed.stats().temporary_loads > 0


def test_writes_at_rest_are_seen_by_the_next_pass(apply: Apply, any_device: Device) -> None:
    """What was read ahead before the write is read again."""
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1), read_ahead=3)
    for _ in range(3):
        model(on(any_device, batch))
        assert streamed._executor.loader.staging.ahead()
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                mine.mul_(1.25)
                theirs.mul_(1.25)
        assert equal(model(on(any_device, batch)), plain(twin, batch, any_device))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        mine.data.add_(0.5)  # no version counter sees it
        theirs.data.add_(0.5)
    assert equal(model(on(any_device, batch)), plain(twin, batch, any_device))


def test_buffers_written_by_a_layer_that_was_read_ahead(apply: Apply, any_device: Device) -> None:
    torch.manual_seed(0)
    model = Written()
    twin = copy.deepcopy(model).to(any_device.torch_device)
    streamed = apply(model, vectors(), Candidate(k=2, k_prime=1), read_ahead=4)
    with torch.no_grad():
        for write in (False, True, True, False, False):
            assert equal(model(on(any_device, vectors()), write), twin(on(any_device, vectors()), write))
    streamed.remove()
    assert equal(model.state_dict(), {key: tensor.cpu() for key, tensor in twin.state_dict().items()})


class Bomb(Exception):
    """Raised in the middle of a pass."""


@pytest.mark.parametrize("error", [Bomb, KeyboardInterrupt])
@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
def test_an_exception_in_a_pass_leaves_the_next_pass_right(
    candidate: Candidate, error: type[BaseException], apply: Apply, any_device: Device
) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, any_device)
    streamed = apply(model, batch, candidate, read_ahead=2)
    model(on(any_device, batch))

    def explode(*_: Any) -> None:
        raise error

    handle = model.blocks[2].up.register_forward_hook(explode)
    for _ in range(2):
        with pytest.raises(error):
            model(on(any_device, batch))
    handle.remove()
    for _ in range(2):
        assert equal(model(on(any_device, batch)), expected)
    streamed.remove()


class Broken:
    """A region that cannot be read while it is told so."""

    host = None

    def __init__(self, region: Any) -> None:
        self._region = region
        self.n_bytes = region.n_bytes
        self.fails = True

    def read_into(self, target: memoryview) -> None:
        if self.fails:
            raise ReadError("no such layer")
        self._region.read_into(target)


@pytest.mark.parametrize("read_ahead", [1, 3])
@pytest.mark.parametrize("index", [0, 4, 7])
def test_a_failed_read_is_raised_and_the_next_pass_is_right(
    index: int, read_ahead: int, apply: Apply, any_device: Device
) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, any_device)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1), read_ahead=read_ahead)
    model(on(any_device, batch))
    group = streamed._executor.loader.group_of[index]
    broken = Broken(group.regions[0])
    group.regions = (broken,)
    with pytest.raises(ReadError, match="no such layer"):
        for _ in range(4):
            assert equal(model(on(any_device, batch)), expected)
    with pytest.raises(ReadError, match="no such layer"):
        for _ in range(4):
            assert equal(model(on(any_device, batch)), expected)
    broken.fails = False
    failures = 0
    for _ in range(5):  # a read that failed ahead of its load is still there to be waited for
        try:
            assert equal(model(on(any_device, batch)), expected)
        except ReadError:
            failures += 1
    assert failures <= 1
    streamed.remove()


class Late(CpuDevice):
    """Bytes arrive long after they were asked for, so that using them without waiting is seen."""

    def _read(self, regions: Any, staging: torch.Tensor) -> None:
        staging.fill_(0xFF)  # not a number, in every floating-point type
        time.sleep(0.002)
        super()._read(regions, staging)

    def _upload(self, read: Any, staging: torch.Tensor, pieces: Any, target: torch.Tensor) -> None:
        target.fill_(0xFF)
        time.sleep(0.001)
        super()._upload(read, staging, pieces, target)


@pytest.mark.parametrize(("every", "read_ahead"), RINGS)
@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
def test_everything_waits_for_late_bytes(candidate: Candidate, every: int, read_ahead: int, tmp_path: Path) -> None:
    model, batch = make("stack")
    device = Late(slow_tier=Tier.HOST)
    expected = plain(model, batch, device)
    parts = partition(model, lambda: call(model, batch), device.torch_device)
    placed = partly_on_disk(candidate, parts, every, read_ahead)
    with streamed_on(device, model, parts, placed, tmp_path):
        for _ in range(3):
            assert equal(call(model, batch), expected)
    device.close()


def test_remove_waits_for_what_is_under_way(tmp_path: Path) -> None:
    model, batch = make("stack")
    others = set(threading.enumerate())
    device = Late(slow_tier=Tier.HOST)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parts = partition(model, lambda: call(model, batch), device.torch_device)
    placed = partly_on_disk(Candidate(k=2, k_prime=1), parts, 1, 4)
    streamed = streamed_on(device, model, parts, placed, tmp_path)
    call(model, batch)  # reads and loads of the next pass are under way
    streamed.remove()
    device.close()
    assert not [thread for thread in threading.enumerate() if thread not in others and "autosp-" in thread.name]
    assert all(equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@quick
@given(data=st.data())
def test_any_setting_of_any_small_model(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any order of visits when profiled, any other when run."""
    count = data.draw(st.integers(1, 5))
    torch.manual_seed(0)
    model = EarlyExit(blocks=count, width=16)
    orders = st.lists(st.integers(0, count - 1), max_size=7)
    profiled = data.draw(orders.filter(bool))
    batch = (vectors(3, 16), profiled)
    parts = partition(model, lambda: call(model, batch), torch.device("cpu"))
    layers = len(parts.layers)
    residents = data.draw(st.lists(st.sampled_from(sorted(set(parts.visits))), unique=True))
    ring = data.draw(st.integers(1, max(1, len(set(parts.visits)) - len(residents))))
    candidate = Candidate(
        k=len(residents) + ring, k_prime=data.draw(st.integers(1, ring)), residents=tuple(sorted(residents))
    )
    candidate = data.draw(some_on_disk(candidate, parts.visits, layers))
    device = data.draw(
        st.sampled_from([lambda: CpuDevice(slow_tier=Tier.HOST), lambda: VirtualDevice(bytes_per_s=1e6)])
    )()
    twin = copy.deepcopy(model)
    streamed = streamed_on(device, model, parts, candidate, tmp_path_factory.mktemp("packed"))
    for order in [profiled, *data.draw(st.lists(orders, max_size=3)), profiled]:
        with torch.no_grad():
            assert equal(model(vectors(3, 16), order), twin(vectors(3, 16), order))
    streamed.remove()
    device.close()


@thorough
@given(data=st.data())
def test_the_executor_keeps_the_simulated_time_exactly(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On the virtual clock, prediction and execution are the same numbers, span by span."""
    count = data.draw(st.integers(1, 6))
    model = EarlyExit(blocks=count, width=8)
    order = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8))
    batch = (vectors(3, 8), order)
    parts = partition(model, lambda: call(model, batch), torch.device("cpu"))
    if parts.repeats > 1:
        return
    ring = data.draw(st.integers(1, len(set(parts.visits))))
    candidate = Candidate(k=ring, k_prime=data.draw(st.integers(1, ring)))
    candidate = data.draw(some_on_disk(candidate, parts.visits, len(parts.layers)))
    rates, latencies = st.sampled_from([1e4, 1e5, 1e6]), st.sampled_from([0.0, 0.125])
    bytes_per_s, disk_bytes_per_s, latency_s, disk_latency_s = (
        data.draw(one) for one in (rates, rates, latencies, latencies)
    )
    device = VirtualDevice(
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        disk_bytes_per_s=disk_bytes_per_s,
        disk_latency_s=disk_latency_s,
    )
    compute_s = data.draw(
        st.lists(st.sampled_from([0.0, 0.05, 0.35, 1.0]), min_size=len(parts.layers), max_size=len(parts.layers))
    )
    for layer in bind(model, parts).layers:
        Intercepted(layer.module, spender(device, compute_s[layer.layer.index]))
    streamed = streamed_on(device, model, parts, candidate, tmp_path_factory.mktemp("packed"), Originals.KEPT)
    for _ in range(4):
        call(model, batch)
    measured = streamed.timeline()
    streamed.remove()
    layer_bytes = [layer.n_bytes for layer in parts.layers]
    costs = Costs(
        before_s=[0.0] * len(parts.visits),
        forward_s=[compute_s[index] for index in parts.visits],
        tail_s=0.0,
        layer_bytes=layer_bytes,
        link_latency_s=latency_s,
        link_bytes_per_s=bytes_per_s,
        disk_latency_s=disk_latency_s,
        disk_bytes_per_s=disk_bytes_per_s,
    )
    predicted = simulate(lower(candidate, layer_bytes, parts.visits), costs, 4)
    assert measured.period_ends_s == pytest.approx(predicted.period_ends_s, rel=1e-9)
    for kind in (Kind.READ, Kind.LOAD, Kind.FORWARD):
        seen, expected = measured.of_kind(kind), predicted.of_kind(kind)
        assert len(seen) >= len(expected)
        for left, right in zip(seen, expected, strict=False):  # what is ahead of a fifth pass has begun
            assert (left.action.layers, left.action.offset) == (right.action.layers, right.action.offset)
            assert (left.start_s, left.end_s) == pytest.approx((right.start_s, right.end_s), rel=1e-9, abs=1e-12)
            assert left.stall_s == pytest.approx(right.stall_s, abs=1e-9)


def spender(device: VirtualDevice, seconds: float) -> Any:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device.spend(seconds)
        return forward(*args, **kwargs)

    return around


def test_inputs_of_other_shapes(apply: Apply, any_device: Device) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    apply(model, batch, Candidate(k=2, k_prime=1), read_ahead=2)
    for shape in ((1, 1), (5, 40), (3, 11)):
        assert equal(model(on(any_device, tokens(*shape))), plain(twin, tokens(*shape), any_device))
