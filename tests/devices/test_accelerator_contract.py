"""The accelerator's calls of torch, checked where there is no accelerator: that torch has them, and in which order.

Whether the hardware then does what it is told is for the tests that need one.
"""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import torch
from torch.overrides import TorchFunctionMode

import autosp
from autosp.devices import AcceleratorDevice, Piece, accelerator
from autosp.errors import ReadError
from autosp.profiler.host import whole_device

BACKENDS = [pytest.param(torch.cuda, id="cuda"), pytest.param(torch.xpu, id="xpu")]
TOTAL_BYTES = 16 * 2**30
PACKAGE = Path(autosp.__file__).parent


class Region:
    """Bytes in host memory."""

    def __init__(self, *values: int) -> None:
        self.host = torch.tensor(values, dtype=torch.uint8)
        self.n_bytes = len(values)

    def read_into(self, target: memoryview) -> None:
        raise AssertionError("an accelerator copies from host memory")


class OnDisk:
    """Bytes that are read once `there` is set."""

    host = None

    def __init__(self, *values: int, error: ReadError | None = None) -> None:
        self.n_bytes = len(values)
        self.there = threading.Event()
        self._values = values
        self._error = error
        self.there.set()

    def read_into(self, target: memoryview) -> None:
        self.there.wait()
        if self._error is not None:
            raise self._error
        target[:] = bytes(self._values)


def device_of(module: Any, monkeypatch: pytest.MonkeyPatch, kind: str = "cuda") -> AcceleratorDevice:
    """An AcceleratorDevice whose torch module is `module`; what it allocates is ordinary memory."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    made = AcceleratorDevice(f"{kind}:0")
    assert made.torch_device == torch.device(f"{kind}:0")
    made.torch_device = torch.device("cpu")
    return made


# That torch has what is called


def strict(backend: ModuleType) -> Any:
    """A stand-in for torch.cuda or torch.xpu that refuses names and arguments that the real one does not have."""
    stream, event = (create_autospec(kind, instance=True) for kind in (backend.Stream, backend.Event))
    stream.record_event.return_value = event
    event.elapsed_time.return_value = 1500.0
    module = create_autospec(backend)
    module.Stream.side_effect = checked(backend.Stream, stream)
    module.Event.side_effect = checked(backend.Event, event)
    module.current_stream.return_value = stream
    module.memory_reserved.return_value = 2**20
    module.max_memory_reserved.return_value = 3 * 2**20
    module.get_device_properties.return_value = SimpleNamespace(name="a device", total_memory=TOTAL_BYTES)
    module.mem_get_info.return_value = (TOTAL_BYTES // 2 + 5, TOTAL_BYTES)
    module.stream.return_value = MagicMock()
    return module


def checked(kind: type, answer: Any) -> Callable[..., Any]:
    """A constructor that takes what the real one takes. (An autospec looks at `__init__`, these have `__new__`.)"""

    def construct(*arguments: Any, **options: Any) -> Any:
        inspect.signature(kind).bind(*arguments, **options)
        return answer

    return construct


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_call_is_one_that_torch_takes(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module = strict(backend)
    device = device_of(module, monkeypatch, backend.__name__.removeprefix("torch."))
    assert (device.info.name, device.info.memory_bytes) == ("a device", TOTAL_BYTES)
    copied = device.copy([Region(1, 2)], torch.empty(2, dtype=torch.uint8), device.record())
    device.wait(copied)
    device.finished(copied)
    staging = torch.empty(2, dtype=torch.uint8)
    device.settle(device.send(torch.empty(2, dtype=torch.uint8), torch.empty(2, dtype=torch.uint8), device.record()))
    read = device.read([OnDisk(3, 4)], staging, [copied])
    device.wait(device.copy_staged(read, staging, [Piece(0, 0, 2)], torch.empty(2, dtype=torch.uint8), device.record()))
    assert device.seconds(device.stamp(), device.stamp()) == 1.5
    device.start_measuring()
    assert device.peak_bytes() == 2 * 2**20
    device.originals_freed(10)
    device.restart_peak()
    device.finish_compute()
    device.synchronize()
    assert device.free_bytes() == TOTAL_BYTES // 2 + 5 + 2**20
    assert whole_device(device) == f"{TOTAL_BYTES // 2}B"
    device.join()
    with device.limit(2**20):
        pass
    device.close()


def test_the_strict_stand_in_is_strict() -> None:
    module = strict(torch.cuda)
    with pytest.raises(AttributeError):
        module.no_such_function()
    with pytest.raises(TypeError):
        module.Event(no_such_option=True)
    with pytest.raises(TypeError):
        module.current_stream().wait_event()
    with pytest.raises(AttributeError):
        module.current_stream().no_such_method()


def names_of_the_module(source: str) -> set[str]:
    """Every name that is taken from `self._module`, also through `getattr`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._module":
            names.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith("getattr(self._module, "):
            names.add(ast.literal_eval(node.args[1]))
    return names


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_has_every_name_that_is_used(backend: ModuleType) -> None:
    names = names_of_the_module(inspect.getsource(accelerator))
    assert {"Stream", "Event", "stream", "current_stream", "set_per_process_memory_fraction"} <= names
    assert not [name for name in names if not hasattr(backend, name)]


def test_nothing_calls_record_stream() -> None:
    """Fixed addresses need no help of the allocator, whose help costs memory."""
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert "wait_event" in used
    assert "record_stream" not in used


# In which order


class FakeEvent:
    """A point in a stream. Asking it, or waiting for it on the host, is noted."""

    def __init__(self, module: FakeModule, **_options: Any) -> None:
        self._module = module

    def record(self, stream: FakeStream | None = None) -> None:
        self._module.log.append(("record", (stream or self._module.current_stream()).name, self))

    def query(self) -> bool:
        self._module.log.append(("query", "host", self))
        return True

    def synchronize(self) -> None:
        self._module.log.append(("synchronize", "host", self))


class FakeStream:
    """Notes what is put on it."""

    def __init__(self, module: FakeModule, name: str) -> None:
        self._module = module
        self.name = name

    def wait_event(self, event: FakeEvent) -> None:
        self._module.log.append(("wait", self.name, event))

    def wait_stream(self, stream: FakeStream) -> None:
        self._module.log.append(("wait for", self.name, stream.name))

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self._module)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._module.log.append(("synchronize", "host", self))


class FakeModule:
    """torch.cuda as a list of what was asked of it: (verb, stream, object)."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.fractions: list[float] = []
        self.users_fraction = 1.0
        self.reserved_bytes = 2**30
        self.cached_bytes = 0
        self._compute = FakeStream(self, "compute")
        self._streams = iter(["copies", "sends"])
        self._current = [self._compute]

    def Stream(self, _device: Any) -> FakeStream:  # noqa: N802
        return FakeStream(self, next(self._streams))

    def Event(self, **options: Any) -> FakeEvent:  # noqa: N802
        return FakeEvent(self, **options)

    def current_stream(self, _device: Any = None) -> FakeStream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._current.append(stream)
        yield
        self._current.pop()

    def synchronize(self, _device: Any = None) -> None:
        self.log.append(("synchronize", "host", None))

    def get_device_properties(self, _device: Any) -> SimpleNamespace:
        return SimpleNamespace(name="a device", total_memory=TOTAL_BYTES)

    def memory_reserved(self, _device: Any = None) -> int:
        return self.reserved_bytes

    def set_per_process_memory_fraction(self, fraction: float, _device: Any = None) -> None:
        self.fractions.append(fraction)

    def get_per_process_memory_fraction(self, _device: Any = None) -> float:
        return self.fractions[-1] if self.fractions else self.users_fraction

    def empty_cache(self) -> None:
        self.reserved_bytes -= self.cached_bytes
        self.cached_bytes = 0


class Copies(TorchFunctionMode):
    """Notes every tensor copy with the stream that was current."""

    def __init__(self, module: FakeModule) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.record_stream):
            assert (kwargs or {}).get("non_blocking"), "a copy that blocks the host"
            self._module.log.append((func.__name__, self._module.current_stream().name, None))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[AcceleratorDevice, FakeModule]:
    module = FakeModule()
    return device_of(module, monkeypatch), module


def verbs(module: FakeModule) -> list[tuple[str, str]]:
    return [(verb, stream) for verb, stream, _ in module.log]


Fake = tuple[AcceleratorDevice, FakeModule]


def test_a_copy_waits_on_the_copy_stream_and_is_issued_there(fake: Fake) -> None:
    device, module = fake
    target = torch.zeros(5, dtype=torch.uint8)
    after = device.record()
    assert module.log.pop() == ("record", "compute", after)
    with Copies(module):
        device.copy([Region(1, 2, 3), Region(4, 5)], target, after)
    assert module.log[0] == ("wait", "copies", after)
    assert [verb for verb, _ in verbs(module) if verb != "record"] == ["wait", "copy_", "copy_"]
    assert {stream for _, stream in verbs(module)} == {"copies"}
    assert verbs(module)[-1] == ("record", "copies")
    assert target.tolist() == [1, 2, 3, 4, 5]
    assert module.current_stream().name == "compute"


def test_a_copy_to_the_host_has_a_stream_of_its_own_and_settling_it_blocks_the_host(fake: Fake) -> None:
    device, module = fake
    target = torch.zeros(3, dtype=torch.uint8)
    after = device.record()
    module.log.clear()
    with Copies(module):
        sent = device.send(torch.tensor([1, 2, 3], dtype=torch.uint8), target, after)
    assert module.log[0] == ("wait", "sends", after)
    assert verbs(module)[1:] == [("record", "sends"), ("copy_", "sends"), ("record", "sends")]
    assert target.tolist() == [1, 2, 3]
    end = module.log[-1][2]
    module.log.clear()
    device.settle(sent)
    assert module.log == [("synchronize", "host", end)]


def test_a_copy_to_the_host_that_fails_says_so_to_who_settles_it(fake: Fake) -> None:
    device, _ = fake
    sent = device.send(torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), None)
    with pytest.raises(RuntimeError, match="size"):
        device.settle(sent)


def test_a_copy_after_nothing_waits_for_nothing(fake: Fake) -> None:
    device, module = fake
    device.copy([], torch.zeros(0, dtype=torch.uint8), None)
    assert ("wait", "copies") not in verbs(module)
    assert verbs(module)[-1] == ("record", "copies")


def test_waiting_orders_the_compute_stream_after_the_end_of_the_copy_and_not_the_host(fake: Fake) -> None:
    device, module = fake
    copied = device.copy([Region(1)], torch.zeros(1, dtype=torch.uint8), device.record())
    *_, (_, _, end) = module.log
    module.log.clear()
    device.wait(copied)
    assert module.log == [("wait", "compute", end)]
    module.log.clear()
    assert device.finished(copied)
    assert module.log == [("query", "host", end)]
    module.log.clear()
    device.wait(None)
    assert device.finished(None)
    assert not module.log


def test_waiting_on_a_stream_of_the_user_orders_that_stream(fake: Fake) -> None:
    device, module = fake
    copied = device.copy([Region(1)], torch.zeros(1, dtype=torch.uint8), device.record())
    module.log.clear()
    with module.stream(FakeStream(module, "the user's")):
        device.wait(copied)
    assert verbs(module) == [("wait", "the user's")]


def test_a_pass_of_copies_never_blocks_the_host(fake: Fake) -> None:
    device, module = fake
    target = torch.zeros(1, dtype=torch.uint8)
    for _ in range(3):
        copied = device.copy([Region(1)], target, device.record())
        device.stamp()
        device.wait(copied)
    assert "host" not in {stream for _, stream in verbs(module)}


PIECES = [Piece(0, 0, 2)]


def staged(device: AcceleratorDevice, region: OnDisk, target: torch.Tensor, after: Any = None) -> tuple[Any, Any]:
    """A read that goes on until the region is there, and the copy of what it brings."""
    region.there.clear()
    staging = torch.zeros(2, dtype=torch.uint8)
    read = device.read([region], staging, [])
    return read, device.copy_staged(read, staging, PIECES, target, after)


def test_a_copy_of_what_is_still_read_is_issued_when_it_is_there_and_in_its_turn(fake: Fake) -> None:
    device, module = fake
    region, target, other = OnDisk(1, 2), torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    first, second = device.record(), device.record()
    module.log.clear()
    read, copied = staged(device, region, target, first)
    later = device.copy([Region(9)], other, second)
    assert module.log == []  # neither may overtake
    assert not device.finished(copied) and not device.finished(later)
    region.there.set()
    device.wait(later)
    waits = [(stream, event) for verb, stream, event in module.log if verb == "wait"]
    assert waits == [("copies", first), ("copies", second), ("compute", later.times.ended)]
    assert read.over()
    assert (target.tolist(), other.tolist()) == ([1, 2], [9])
    device.close()


def test_a_copy_of_what_a_job_still_writes_is_issued_when_it_is_over_and_in_its_turn(fake: Fake) -> None:
    """By the job's own thread: nobody needs to wait for it."""
    device, module = fake
    target, other = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    first, second = device.record(), device.record()
    free = threading.Event()
    module.log.clear()
    job = device.work(free.wait)
    copied = device.copy([Region(7)], target, first, job)
    later = device.copy([Region(9)], other, second)
    assert module.log == []  # neither may overtake
    assert not device.finished(copied) and not device.finished(later)
    free.set()
    later.wait_issued()
    waits = [(stream, event) for verb, stream, event in module.log if verb == "wait"]
    assert waits == [("copies", first), ("copies", second)]
    assert job.over()
    assert (target.tolist(), other.tolist()) == ([7], [9])
    device.close()


def test_a_copy_of_what_was_read_is_issued_at_once(fake: Fake) -> None:
    device, module = fake
    target = torch.zeros(2, dtype=torch.uint8)
    staging = torch.zeros(2, dtype=torch.uint8)
    read = device.read([OnDisk(1, 2)], staging, [])
    read.settle()
    with Copies(module):
        device.copy_staged(read, staging, [Piece(1, 0, 1), Piece(0, 1, 1)], target, None)
        assert [verb for verb, _ in verbs(module) if verb != "record"] == ["copy_", "copy_"]
    assert target.tolist() == [2, 1]
    device.close()


def test_a_read_waits_on_the_host_for_the_copies_that_empty_its_memory(fake: Fake) -> None:
    device, module = fake
    copied = device.copy([Region(1)], torch.zeros(1, dtype=torch.uint8), None)
    module.log.clear()
    device.read([OnDisk(5)], torch.zeros(1, dtype=torch.uint8), [copied]).settle()
    assert module.log == [("synchronize", "host", copied.times.ended)]
    device.close()


def test_a_failed_read_fails_its_copy_and_no_other(fake: Fake) -> None:
    device, _ = fake
    region, other = OnDisk(1, 2, error=ReadError("layer 3 is gone")), torch.zeros(1, dtype=torch.uint8)
    _, copied = staged(device, region, torch.zeros(2, dtype=torch.uint8))
    later = device.copy([Region(9)], other, None)
    region.there.set()
    device.wait(later)
    assert other.tolist() == [9]
    with pytest.raises(ReadError, match="layer 3 is gone"):
        device.wait(copied)
    assert device.finished(copied)
    device.read([OnDisk(5)], torch.zeros(1, dtype=torch.uint8), [copied]).wait()  # its memory is free all the same
    device.close()


def test_what_goes_wrong_on_the_stream_is_raised_where_it_is_waited_for(fake: Fake) -> None:
    device, _ = fake
    copied = device.copy([Region(1, 2, 3)], torch.zeros(2, dtype=torch.uint8), None)  # too much for its target
    with pytest.raises(RuntimeError, match="size"):
        device.wait(copied)


def test_synchronize_waits_for_reads_and_for_what_they_bring(fake: Fake) -> None:
    device, _ = fake
    region, target = OnDisk(1, 2), torch.zeros(2, dtype=torch.uint8)
    _, copied = staged(device, region, target)
    threading.Timer(0.02, region.there.set).start()
    device.synchronize()
    assert copied.is_issued()
    assert target.tolist() == [1, 2]
    device.close()


def test_the_limit_is_what_is_held_and_the_budget_and_ends_with_an_error(fake: Fake) -> None:
    device, module = fake
    with pytest.raises(ValueError, match="theirs"), device.limit(3 * 2**30):
        assert module.fractions == [4 * 2**30 / TOTAL_BYTES]
        raise ValueError("theirs")
    assert module.fractions[1:] == [1.0]


def test_what_is_only_cached_is_no_part_of_the_limit(fake: Fake) -> None:
    device, module = fake
    module.reserved_bytes += 5 * 2**30
    module.cached_bytes = 5 * 2**30
    with device.limit(3 * 2**30):
        assert module.fractions == [4 * 2**30 / TOTAL_BYTES]


def test_a_limit_of_the_user_s_holds_and_stays(fake: Fake) -> None:
    device, module = fake
    module.users_fraction = 0.125
    with device.limit(3 * 2**30):
        assert module.fractions == [0.125]
    assert module.fractions[1:] == [0.125]


def test_no_limit_beyond_the_device_and_none_without_a_budget(fake: Fake) -> None:
    device, module = fake
    with device.limit(2 * TOTAL_BYTES):
        assert module.fractions == [1.0]
    module.fractions.clear()
    with device.limit(None):
        pass
    assert not module.fractions


def test_passes_on_other_streams_come_after_those_before(fake: Fake) -> None:
    device, module = fake
    for _ in range(2):
        device.join()
    assert not module.log
    module._current.append(FakeStream(module, "theirs"))
    for _ in range(2):
        device.join()
    module._current.pop()
    device.join()
    assert module.log == [("wait for", "theirs", "compute"), ("wait for", "compute", "theirs")]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
    ],
)
def test_out_of_memory_has_many_names(fake: Fake, error: RuntimeError) -> None:
    device, _ = fake
    assert device.is_out_of_memory(error)
    assert not device.is_fatal(error)


def test_what_ends_the_device_and_what_a_call(fake: Fake) -> None:
    device, _ = fake
    fatal = RuntimeError("CUDA error: an illegal memory access was encountered")
    refused = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`")
    assert device.is_fatal(fatal) and not device.is_out_of_memory(fatal)
    assert not device.is_fatal(refused) and not device.is_out_of_memory(refused)
    assert not device.is_fatal(ValueError("CUDA error")) and not device.is_out_of_memory(ValueError("out of memory"))
