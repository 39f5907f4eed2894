"""The invariants of a model under a plan: same output, a hint is a hint, at rest it is ordinary, remove() restores."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal, map_tensors
from autosp.devices import CpuDevice, Device, VirtualDevice
from autosp.errors import ModelChangedError, ReadError
from autosp.intercept import Intercepted
from autosp.partition import bind, partition
from autosp.runtime.recorder import KEPT_PASSES
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.actions import Kind
from autosp.schedule.streaming import lower
from autosp.schedule.timeline import Timeline
from autosp.spec import Candidate, Tier
from autosp.tiers import Originals, open_store
from models import MAKERS, EarlyExit, Stack, Written, make, tokens, vectors

ON_CPU = pytest.mark.parametrize("device", ["cpu-disk", "cpu-host"], indirect=True)

Apply = Callable[..., StreamedModel[nn.Module]]


@pytest.fixture
def apply(device: Device, tmp_path: Path) -> Any:
    """Streams a model under a candidate on the device under test; everything is removed at the end."""
    applied: list[StreamedModel[nn.Module]] = []

    def make_it(
        model: nn.Module, batch: Any, candidate: Candidate, originals: Originals = Originals.FREED
    ) -> StreamedModel[nn.Module]:
        parts = partition(model, lambda: call(model, on(device, batch)), device.torch_device)
        bound = bind(model, parts)
        layer_bytes = [layer.n_bytes for layer in parts.layers]
        residents = tuple(index for index in candidate.residents if index < len(parts.layers))
        candidate = candidate.model_copy(update={"residents": residents})
        schedule = lower(candidate, layer_bytes, parts.visits)
        store = open_store(device, bound.layers, tmp_path, originals)
        streamed = StreamedModel(bound, schedule, device, store, originals, store.close)
        applied.append(streamed)
        return streamed

    yield make_it
    for streamed in applied:
        streamed.remove()


def on(device: Device, batch: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(device.torch_device), batch)


def plain(model: nn.Module, batch: Any, device: Device) -> Any:
    """The unstreamed model's output on the same device."""
    twin = copy.deepcopy(model).to(device.torch_device)
    with torch.no_grad():
        return call(twin, on(device, batch))


PLANS = {
    "k=1 k'=1": Candidate(k=1, k_prime=1),
    "k=2 k'=1": Candidate(k=2, k_prime=1),
    "k=4 k'=2": Candidate(k=4, k_prime=2),
    "residents": Candidate(k=4, k_prime=1, residents=(1, 3)),
    "all resident": Candidate(k=50, k_prime=1, residents=tuple(range(50))),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MAKERS)
def test_same_output_for_several_passes_and_everything_restored(
    name: str, plan: str, apply: Apply, device: Device
) -> None:
    """Of the originals every second is freed: each model's and each plan's on each device both ways."""
    candidate = PLANS[plan]
    originals = [*Originals][([*MAKERS].index(name) + [*PLANS].index(plan)) % len(Originals)]
    model, batch = make(name)
    expected = plain(model, batch, device)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    identities = {key: id(tensor) for key, tensor in model.named_parameters(remove_duplicate=False)}
    streamed = apply(model, batch, candidate, originals)
    for _ in range(4):
        assert equal(call(model, on(device, batch)), expected)
    stats = streamed.stats()
    assert (stats.misses, stats.temporary_loads, stats.passes) == (0, 0, 4)
    streamed.remove()
    streamed.remove()
    assert identities == {key: id(tensor) for key, tensor in model.named_parameters(remove_duplicate=False)}
    for key, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert tensor.stride() == before[key].stride()
        assert equal(tensor, before[key])
    assert all("forward" not in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert equal(call(model, batch), call(make(name)[0], batch))


def test_memory_is_looked_at_before_each_pass_and_each_streamed_layer(
    apply: Apply, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make("stack")
    streamed = apply(model, batch, PLANS["residents"])
    asked: list[int] = []
    looks = count()
    monkeypatch.setattr(device, "keep_within", lambda n_bytes: asked.append(n_bytes) or (lambda: next(looks)))
    streamed.keep_within(123)
    for _ in range(2):
        call(model, on(device, batch))
    assert asked == [123]
    assert next(looks) == streamed.stats().visits + 2


class LateDevice(CpuDevice):
    """Bytes arrive long after their copy was started, so that computing without waiting for them is seen."""

    def _fill(self, regions: Any, target: torch.Tensor) -> None:
        target.fill_(0xFF)  # not a number, in every floating-point type
        time.sleep(0.002)
        super()._fill(regions, target)


@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["stack", "shared", "two_towers", "convolutions"])
def test_compute_waits_for_late_weights(name: str, candidate: Candidate, tmp_path: Path) -> None:
    model, batch = make(name)
    device = LateDevice(slow_tier=Tier.HOST)
    expected = plain(model, batch, device)
    parts = partition(model, lambda: call(model, batch), device.torch_device)
    bound = bind(model, parts)
    residents = tuple(index for index in candidate.residents if index < len(parts.layers))
    candidate = candidate.model_copy(update={"residents": residents})
    schedule = lower(candidate, [layer.n_bytes for layer in parts.layers], parts.visits)
    store = open_store(device, bound.layers, tmp_path, Originals.KEPT)
    with StreamedModel(bound, schedule, device, store, Originals.KEPT):
        for _ in range(3):
            assert equal(call(model, batch), expected)
    device.close()


def test_tied_weights_stay_tied(apply: Apply) -> None:
    model, batch = make("tied")
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    call(model, batch)
    streamed.remove()
    assert model.head.weight is model.embed.weight


def test_steady_passes_move_the_planned_bytes_and_allocate_nothing(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    batch = on(device, batch)
    streamed = apply(model, batch, Candidate(k=3, k_prime=1, residents=(2,)))
    model(batch)
    before = streamed.stats()
    allocated: list[int] = []
    allocate = device.allocate
    device.allocate = lambda n_bytes: allocated.append(n_bytes) or allocate(n_bytes)  # type: ignore[method-assign]
    for _ in range(3):
        model(batch)
    after = streamed.stats()
    moving = [layer.layer.n_bytes for layer in streamed._bound.layers if layer.layer.index != 2]
    assert after.moved_bytes - before.moved_bytes == 3 * sum(moving)
    assert after.loads - before.loads == 3 * len(moving)
    assert after.misses == 0
    assert allocated == []


def test_one_copy_per_group(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    batch = on(device, batch)
    streamed = apply(model, batch, Candidate(k=6, k_prime=3))
    model(batch)
    before = streamed.stats().loads
    model(batch)
    count = len(streamed._bound.layers)
    assert streamed.stats().loads - before == -(-count // 3)
    assert all(len(group.regions) == 1 for group in streamed._executor.loader.group_of.values())


def test_at_rest_it_is_an_ordinary_cpu_model(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    reference = copy.deepcopy(model)
    text = str(model)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    model(on(device, batch))
    assert str(model) == text
    assert isinstance(model.blocks, nn.ModuleList)
    for name, tensor in model.state_dict().items():
        if name in streamed._bound.layers[0].layer.tensors:
            assert tensor.device.type == "cpu"
        assert equal(tensor, reference.state_dict()[name])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert all(equal(v, reference.state_dict()[k]) for k, v in torch.load(file, weights_only=True).items())


@ON_CPU  # elsewhere the residents of a copy are device tensors: an ordinary model of mixed devices
def test_copies_and_pickles_are_plain_models(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, device)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    visits = streamed.stats().visits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert equal(twin(batch), expected)
    assert streamed.stats().visits == visits


def test_writes_at_rest_are_seen_by_the_next_pass(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    apply(model, batch, Candidate(k=4, k_prime=1))
    for _ in range(3):
        model(on(device, batch))
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                mine.mul_(1.25)
                theirs.mul_(1.25)
        assert equal(model(on(device, batch)), plain(twin, batch, device))
    state = {key: tensor * 0.5 for key, tensor in twin.state_dict().items()}
    model.load_state_dict(state)
    twin.load_state_dict(state)
    assert equal(model(on(device, batch)), plain(twin, batch, device))


def test_remove_keeps_what_was_written(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    streamed = apply(model, batch, Candidate(k=4, k_prime=1, residents=(3,)))
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            mine.add_(0.125)
            theirs.add_(0.125)
    streamed.remove()
    assert all(equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_replaced_data_is_refused_not_overwritten(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    apply(model, batch, Candidate(k=2, k_prime=1))
    model(on(device, batch))
    model.head.weight.data = torch.zeros_like(model.head.weight)
    with pytest.raises(ModelChangedError, match=r"head\.weight was replaced .* remove\(\)"):
        model(on(device, batch))


def test_inputs_of_other_shapes(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    apply(model, batch, Candidate(k=2, k_prime=1))
    for shape in ((1, 1), (5, 40), (3, 11), (2, 7)):
        assert equal(model(on(device, tokens(*shape))), plain(twin, tokens(*shape), device))


ORDERS = [[5, 4, 3, 2, 1, 0], [0, 0, 0], [2], [], [0, 1, 2], [3, 1, 4, 1, 5, 0, 2], [0, 1, 2, 3, 4, 5], [1, 3, 5]]


@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
def test_other_orders_skips_and_repeats_are_right(candidate: Candidate, apply: Apply, device: Device) -> None:
    model, batch = make("early_exit")
    twin = copy.deepcopy(model)
    streamed = apply(model, batch, candidate)
    expected = [plain(twin, (vectors(), order), device) for order in ORDERS]
    for order, output in [*zip(ORDERS, expected, strict=True)] * 2:
        assert equal(model(on(device, vectors()), order), output)
    if candidate.k < 50:
        assert streamed.stats().misses > 0


def test_layers_that_were_never_profiled_are_loaded_on_demand(apply: Apply, device: Device) -> None:
    model, _ = make("early_exit")
    twin = copy.deepcopy(model)
    streamed = apply(model, (vectors(), [0, 1]), Candidate(k=2, k_prime=1))
    assert equal(model(on(device, vectors())), plain(twin, vectors(), device))
    assert streamed.stats().misses >= 4


def test_a_layer_called_from_outside_is_a_pass_of_its_own(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    twin = copy.deepcopy(model)
    apply(model, batch, Candidate(k=2, k_prime=1))
    x = on(device, vectors())
    assert equal(model.blocks[3](x), plain(twin.blocks[3], vectors(), device))
    assert equal(model(on(device, batch)), plain(twin, batch, device))


class Recursive(nn.Module):
    """A layer whose forward calls its neighbour, and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = _Caller()
        self.b = nn.Linear(64, 64)
        self.c = nn.Linear(64, 64)
        self.a.__dict__["other"] = self.b  # a reference, not a child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.a(x, 2))


class _Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        x = self.other(x @ self.weight)
        if depth:
            x = self(x, depth - 1)
        return x @ self.weight


def test_calls_inside_calls(apply: Apply, device: Device) -> None:
    torch.manual_seed(0)
    model = Recursive()
    twin = Recursive()
    twin.load_state_dict(model.state_dict())
    twin.to(device.torch_device)
    with torch.no_grad():
        expected = twin(on(device, vectors()))
    streamed = apply(model, vectors(), Candidate(k=1, k_prime=1))
    for _ in range(3):
        assert equal(model(on(device, vectors())), expected)
    assert streamed.stats().temporary_loads > 0


class Bomb(Exception):
    """Raised in the middle of a pass."""


@pytest.mark.parametrize("error", [Bomb, KeyboardInterrupt])
@pytest.mark.parametrize("candidate", PLANS.values(), ids=PLANS)
def test_an_exception_in_a_pass_leaves_the_next_pass_right(
    candidate: Candidate, error: type[BaseException], apply: Apply, device: Device
) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, device)
    streamed = apply(model, batch, candidate)
    model(on(device, batch))

    def explode(*_: Any) -> None:
        raise error

    handle = model.blocks[2].up.register_forward_hook(explode)
    for _ in range(2):
        with pytest.raises(error):
            model(on(device, batch))
        assert torch.is_grad_enabled()
        if candidate.k < 50:
            assert all(t.device.type == "cpu" for n, t in model.named_parameters() if n.startswith("blocks.2.up"))
    handle.remove()
    assert equal(model(on(device, batch)), expected)
    streamed.remove()
    with torch.no_grad():
        assert equal(plain(model, batch, device), expected)


@ON_CPU  # a copy to an accelerator has no reader that could fail
def test_a_failed_load_is_raised_and_the_next_pass_is_right(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, device)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    model(batch)
    group = streamed._executor.loader.group_of[4]
    regions, group.regions = group.regions, (_Broken(group.end - group.begin),)
    with pytest.raises(ReadError, match="no such layer"):
        for _ in range(2):
            model(batch)
    group.regions = regions
    for _ in range(3):
        assert equal(model(batch), expected)


class _Broken:
    host = None

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes

    def read_into(self, target: memoryview) -> None:
        raise ReadError("no such layer")


def test_buffers_written_by_a_streamed_layer_are_written_back(apply: Apply, device: Device) -> None:
    torch.manual_seed(0)
    model = Written()
    twin = copy.deepcopy(model).to(device.torch_device)
    streamed = apply(model, vectors(), Candidate(k=2, k_prime=1))
    assert "layers.0.history" in {name for layer in streamed._bound.layers for name in layer.layer.tensors}
    with torch.no_grad():
        for write in (False, True, True, False):
            assert equal(model(on(device, vectors()), write), twin(on(device, vectors()), write))
    streamed.remove()
    assert equal(model.state_dict(), {key: tensor.cpu() for key, tensor in twin.state_dict().items()})


def test_passes_run_without_autograd_and_inference_mode_works(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, device)
    apply(model, batch, Candidate(k=2, k_prime=1))
    out = model(on(device, batch))
    assert not out.requires_grad
    with torch.inference_mode():
        assert equal(model(on(device, batch)), expected)
    assert equal(model(on(device, batch)), expected)


def test_threads_take_turns(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    expected = plain(model, batch, device)
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    wrong: list[object] = []

    def work() -> None:
        for _ in range(10):
            if not equal(model(on(device, batch)), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (streamed.stats().passes, streamed.stats().misses) == (40, 0)


def test_a_context_gives_the_model_and_removes_the_plan(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    with pytest.raises(Bomb), streamed as inner:
        assert inner is model
        raise Bomb
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert streamed.stats().passes == 0


def test_peak_counts_arena_and_residents_but_not_freed_weights(device: Device, apply: Apply) -> None:
    torch.manual_seed(0)
    model = EarlyExit(blocks=8, width=512)  # 8 blocks of 8.4 MB
    streamed = apply(model, (vectors(2, 512),), Candidate(k=3, k_prime=1, residents=(0,)))
    for _ in range(3):
        model(on(device, vectors(2, 512)))
    plan_bytes = streamed._residents.n_bytes + streamed._executor.loader.arena.numel()
    assert plan_bytes > 8e6
    assert plan_bytes * 0.9 <= streamed.stats().peak_bytes <= plan_bytes + 30e6


def test_what_autosp_imports_is_not_in_the_peak(tmp_path: Path) -> None:
    """In a process that applies a plan made elsewhere, the compiler is imported (70 MB) to be told to look away."""
    model = EarlyExit(blocks=8, width=128)
    autosp.plan(model, vectors(2, 128), k=2, k_prime=1, device="cpu").save(tmp_path / "plan.json")
    code = """if True:
        import sys
        import autosp
        from models import EarlyExit, vectors

        model = EarlyExit(blocks=8, width=128)
        assert "torch._dynamo" not in sys.modules
        streamed = autosp.apply(model, autosp.Plan.load(sys.argv[1]))
        model(vectors(2, 128))
        assert "torch._dynamo" in sys.modules
        print(streamed.stats().peak_bytes)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "plan.json")]
    assert int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout) < 40e6


def test_the_executor_keeps_the_simulated_time_exactly(tmp_path: Path) -> None:
    """On the virtual clock, prediction and execution are the same numbers."""
    from autosp.cost_model.simulate import Costs, simulate

    for candidate in (*PLANS.values(), Candidate(k=6, k_prime=3)):
        model, batch = make("stack")
        parts = partition(model, lambda: model(batch), torch.device("cpu"))
        device = VirtualDevice(bytes_per_s=1e5, latency_s=0.01)
        residents = tuple(index for index in candidate.residents if index < len(parts.layers))
        layer_bytes = [layer.n_bytes for layer in parts.layers]
        schedule = lower(candidate.model_copy(update={"residents": residents}), layer_bytes, parts.visits)
        bound = bind(model, parts)
        compute = [0.05 + 0.3 * (index % 3) for index in range(len(parts.layers))]
        for layer in bound.layers:
            Intercepted(layer.module, _spender(device, compute[layer.layer.index]))
        store = open_store(device, bound.layers, tmp_path, Originals.KEPT)
        streamed = StreamedModel(bound, schedule, device, store, Originals.KEPT)
        ends = []
        for _ in range(4):
            model(batch)
            ends.append(device.now_s)
        measured = streamed.timeline()
        streamed.remove()
        costs = Costs(
            before_s=[0.0] * len(compute),
            forward_s=[compute[index] for index in parts.visits],
            tail_s=0.0,
            layer_bytes=layer_bytes,
            link_latency_s=0.01,
            link_bytes_per_s=1e5,
        )
        predicted = simulate(schedule, costs, 4)
        assert ends == pytest.approx(list(predicted.period_ends_s), rel=1e-9), candidate.label()
        assert measured.period_ends_s == pytest.approx(predicted.period_ends_s, rel=1e-9)
        for kind in (Kind.FORWARD, Kind.LOAD):
            seen = sorted(measured.of_kind(kind), key=lambda span: span.end_s)
            expected = sorted(predicted.of_kind(kind), key=lambda span: span.end_s)
            expected = [span for span in expected if not set(span.action.layers) & set(residents)]
            assert len(seen) >= len(expected)
            for left, right in zip(seen, expected, strict=False):  # the executor has begun to load for a fifth pass
                assert left.action.layers == right.action.layers
                assert left.action.offset == right.action.offset
                assert (left.start_s, left.end_s) == pytest.approx((right.start_s, right.end_s), rel=1e-9)
                assert left.stall_s == pytest.approx(right.stall_s, abs=1e-9)


def test_stats_say_what_moved_where_compute_stood_still_and_how_far_the_floor_is(tmp_path: Path) -> None:
    model, batch = make("stack")
    parts = partition(model, lambda: model(batch), torch.device("cpu"))
    device = VirtualDevice(bytes_per_s=1e5)
    bound = bind(model, parts)
    schedule = lower(Candidate(k=1, k_prime=1), [layer.n_bytes for layer in parts.layers], parts.visits)
    store = open_store(device, bound.layers, tmp_path, Originals.KEPT)
    streamed = StreamedModel(bound, schedule, device, store, Originals.KEPT, floor_s=2.0)
    assert (streamed.stats().pass_s, streamed.stats().over_floor) == ((), None)
    for _ in range(3):
        model(batch)
    stats = streamed.stats()
    moving_s = [layer.n_bytes / 1e5 for layer in parts.layers]
    prefetched = parts.layers[0].n_bytes  # for a fourth pass
    assert stats.link_bytes == {"host->device": 3 * sum(layer.n_bytes for layer in parts.layers) + prefetched}
    assert stats.pass_s == pytest.approx([sum(moving_s)] * 3)
    assert stats.stall_s == pytest.approx(
        {layer.name: seconds for layer, seconds in zip(parts.layers, moving_s, strict=True)}
    )
    assert stats.over_floor == pytest.approx(sum(moving_s) / 2.0)
    usage = streamed.usage(2)
    assert (usage.stall_s, usage.link_s) == (pytest.approx(sum(moving_s)), pytest.approx(sum(moving_s)))
    assert (usage.stalls, usage.loads, usage.reads) == (len(moving_s), len(moving_s), 0)
    streamed.remove()
    assert streamed.stats() == stats


def test_only_whole_passes_are_in_the_timeline(apply: Apply, device: Device) -> None:
    model, batch = make("stack")
    streamed = apply(model, batch, Candidate(k=2, k_prime=1))
    assert streamed.timeline() == Timeline((), ())
    broken = streamed._bound.layers[3].module
    wrapper = Intercepted(broken, _raise)
    with pytest.raises(Bomb):
        model(on(device, batch))
    wrapper.remove()
    assert streamed.timeline() == Timeline((), ())
    for _ in range(KEPT_PASSES + 2):
        model(on(device, batch))
    measured = streamed.timeline()
    assert len(measured.period_ends_s) == len(streamed.stats().pass_s) == KEPT_PASSES
    assert all(span.end_s >= span.start_s for span in measured.spans)
    loads, forwards = measured.of_kind(Kind.LOAD), measured.of_kind(Kind.FORWARD)
    for span in forwards[len(forwards) // 2 :]:  # the weights that a layer runs with had arrived when it started
        before = [load.end_s for load in loads if load.action.layers == span.action.layers]
        assert min(before) <= span.start_s + 1e-9


def _raise(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise Bomb


@pytest.mark.parametrize("originals", Originals)
def test_lookup_tables_rest_on_the_slow_tier_and_are_read_there(
    device: Device, originals: Originals, tmp_path: Path
) -> None:
    if not device.reads_host:
        pytest.skip(f"{device.info.name} does not read host memory: it has no lookup tables")
    torch.manual_seed(0)
    model = Stack(vocabulary=20_000)
    model.head = nn.Linear(64, 10)
    few, many = torch.randint(0, 20_000, (2, 5)), torch.randint(0, 20_000, (4, 6000))
    expected = [plain(model, batch, device) for batch in (few, many)]
    address = model.embed.weight.data_ptr()
    parts = partition(model, lambda: model(on(device, few)), device.torch_device, lookups=True)
    assert parts.lookups is not None
    schedule = lower(Candidate(k=2, k_prime=1), [layer.n_bytes for layer in parts.layers], parts.visits)
    bound = bind(model, parts)
    store = open_store(device, bound.stored(), tmp_path, originals)
    streamed = StreamedModel(bound, schedule, device, store, originals, store.close)
    for batch, output in zip((few, many, few), (*expected, expected[0]), strict=True):
        assert equal(model(on(device, batch)), output)
    assert model.embed.weight.device == device.torch_device or device.torch_device.type == "cpu"
    moved = 3 * sum(layer.n_bytes for layer in parts.layers)
    assert streamed.stats().moved_bytes <= moved + 2 * max(layer.n_bytes for layer in parts.layers)
    streamed.remove()
    assert model.embed.weight.device.type == "cpu"
    if originals is Originals.KEPT and device.info.slow_tier is Tier.DISK:
        assert model.embed.weight.data_ptr() == address
    with torch.no_grad():
        assert equal(model(few), plain(model, few, CpuDevice()))


def _spender(device: VirtualDevice, seconds: float) -> Any:
    def around(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device.spend(seconds)
        return forward(*args, **kwargs)

    return around
