"""Host pages: parts with lives of their own, and pinning that is undone before the pages go."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from autosp.devices import memory as pages
from autosp.devices.memory import anonymous, anonymous_bytes, is_pinned, part, pin, unpin

MIB = 2**20


class Runtime:
    """The part of the CUDA runtime that pins; `fails` makes it refuse."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.current = torch.device("cuda:0")
        self.registered_with: list[torch.device] = []
        self._fails = fails

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        """The current one, as long as this is open."""
        before, self.current = self.current, device
        yield
        self.current = before

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # noqa: N802 - the runtime's name
        self.calls.append(("register", address, n_bytes, flags))
        self.registered_with.append(self.current)
        return 1 if self._fails else 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address))
        return 0


def _check(code: int) -> None:
    if code:
        raise RuntimeError("out of memory")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    monkeypatch.setattr(
        pages.torch, "cuda", SimpleNamespace(cudart=lambda: fake, check_error=_check, device=fake.device)
    )
    return fake


def test_a_part_has_its_own_storage_over_the_same_bytes() -> None:
    memory = anonymous(16 * MIB)
    run = part(memory, 4 * MIB, 4 * MIB)
    run.fill_(7)
    assert run.untyped_storage().nbytes() == 4 * MIB
    assert int(memory[4 * MIB]) == int(memory[8 * MIB - 1]) == 7
    assert int(memory[4 * MIB - 1]) == int(memory[8 * MIB]) == 0


def test_a_part_s_pages_go_with_its_last_view_and_no_sooner() -> None:
    memory = anonymous(64 * MIB)
    run = part(memory, 0, 32 * MIB)
    memory.fill_(1)
    before = anonymous_bytes()
    view = run[100:200].view(10, 10)
    del run
    gc.collect()
    assert int(view.sum()) == 100
    assert anonymous_bytes() > before - 4 * MIB
    del view
    gc.collect()
    assert anonymous_bytes() < before - 28 * MIB
    assert int(memory[32 * MIB :].sum()) == 32 * MIB  # the rest is untouched


def test_the_buffer_lives_as_long_as_a_part() -> None:
    memory = anonymous(MIB)
    run = part(memory, 4096, 4096)
    run.fill_(3)
    del memory
    gc.collect()
    assert int(run.sum()) == 3 * 4096


def test_nothing_is_nothing() -> None:
    assert anonymous(0).numel() == part(anonymous(4096), 0, 0).numel() == 0


def test_pinned_pages_are_unpinned_once_and_before_they_go(runtime: Runtime) -> None:
    memory = anonymous(2 * MIB)
    address = memory.data_ptr()
    assert pin(memory, torch.device("cuda"))
    assert runtime.calls == [("register", address, 2 * MIB, 3)]
    unpin(memory)
    unpin(memory)
    assert runtime.calls[1:] == [("unregister", address)]
    assert pin(memory, torch.device("cuda"))
    del memory
    gc.collect()
    assert runtime.calls[3:] == [("unregister", address)]


def test_pages_are_pinned_for_their_device_whichever_is_current(runtime: Runtime) -> None:
    assert pin(anonymous(MIB), torch.device("cuda:1"))
    assert runtime.registered_with == [torch.device("cuda:1")]
    assert runtime.current == torch.device("cuda:0")


def test_runs_of_pinned_pages_are_pinned(runtime: Runtime) -> None:
    memory, other = anonymous(2 * MIB), anonymous(MIB)
    assert not is_pinned(memory)
    assert pin(memory, torch.device("cuda"))
    for run in (memory, memory[4096:8192], part(memory, MIB, MIB)):
        assert is_pinned(run)
    assert not is_pinned(other) and not is_pinned(torch.empty(100))
    unpin(memory)
    assert not is_pinned(memory[4096:])


def test_pinning_that_fails_is_announced_and_memory_stays_usable(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[torch.device] = []
    monkeypatch.setattr(pages, "_clear_error", cleared.append)
    runtime._fails = True
    memory = anonymous(MIB)
    with pytest.warns(UserWarning, match=r"could not pin 0\.00 GB of host memory .* slower"):
        assert not pin(memory, torch.device("cuda"))
    assert cleared == [torch.device("cuda")]
    memory.fill_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpin(memory)
    del memory
    gc.collect()
    assert [call[0] for call in runtime.calls] == ["register"]
