"""The optimizer's state on disk: the bits of an ordinary loop, bounded memory, and a disk that fails."""

from __future__ import annotations

import copy
import errno
import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import equal
from autosp.devices import CpuDevice
from autosp.devices.cpu import resident_bytes
from autosp.devices.memory import anonymous_bytes
from autosp.errors import BudgetTooSmallError, DiskFullError, ReadError, SettingError
from autosp.partition import BoundLayer
from autosp.runtime.disk_state import DiskState
from autosp.runtime.state_plan import SMALL_BYTES, layer_states
from autosp.spec import Candidate, Tier
from autosp.tiers import Readers
from autosp.tiers.state_file import StateFile
from mapped_models import mapped_bytes
from models import make, vectors
from processes import run
from trained import PLANS, Apply, assert_same_gradients, assert_same_weights, backward, loss_of, twins
from updated import OPTIMIZERS, RESETS, Held, loop, scaled_loop

PLAN_NAMES = list(PLANS)
MB = 10**6


class Disk:
    """Puts the state of all streamed layers into one file, which a test may look at, and whose disk it may break."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writing: Callable[[int], None] = lambda count: None
        self.reading: Callable[[int], None] = lambda count: None
        self.writes = self.reads = 0

    def __call__(
        self, optimizer: torch.optim.Optimizer, layers: Sequence[BoundLayer], order: Sequence[int]
    ) -> DiskState | None:
        states = [state for state in layer_states(optimizer, layers, order) if state.n_bytes]
        if not states:
            return None
        readers = Readers(read=self._read)
        self.file = StateFile(sum(state.n_bytes for state in states), self.folder, readers, write=self._write)
        return DiskState(states, self.file)

    def has(self, value: torch.Tensor) -> bool:
        return self.file.offset_of(value) is not None

    def _write(self, descriptor: int, source: memoryview, offset: int) -> int:
        self.writes += 1
        self.writing(self.writes)
        return os.pwrite(descriptor, source, offset)

    def _read(self, descriptor: int, targets: Any, offset: int) -> int:
        self.reads += 1
        self.reading(self.reads)
        return os.preadv(descriptor, targets, offset)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "state")


class Pair:
    """A model whose optimizer's state is on disk, and its plain twin."""

    def __init__(
        self, apply: Apply, disk: Disk, optimizer: str = "adam", plan: str = "k=3 k'=1", **options: Any
    ) -> None:
        model, self.batch = make("stack")
        self.model, self.plain = twins(model)
        self.disk = disk
        self.optimizer, self.expected = OPTIMIZERS[optimizer](self.model), OPTIMIZERS[optimizer](self.plain)
        self.streamed = apply(self.model, self.batch, PLANS[plan], optimizer=self.optimizer, disk_state=disk, **options)

    def train(self, steps: int = 3) -> None:
        for one, optimizer in ((self.model, self.optimizer), (self.plain, self.expected)):
            loop(one, optimizer, self.batch, steps)

    def step(self) -> None:
        for one, optimizer in ((self.model, self.optimizer), (self.plain, self.expected)):
            backward(one, self.batch)
            optimizer.step()
            optimizer.zero_grad()

    def restore(self, saved: tuple[dict[str, Any], dict[str, Any]]) -> None:
        """Both: the optimizer's and the model's state dict."""
        for optimizer, model in ((self.optimizer, self.model), (self.expected, self.plain)):
            optimizer.load_state_dict(copy.deepcopy(saved[0]))
            model.load_state_dict(saved[1])

    def check(self) -> None:
        assert equal(self.optimizer.state_dict()["state"], self.expected.state_dict()["state"])
        assert_same_weights(self.model, self.plain)

    def on_disk(self) -> list[torch.Tensor]:
        return [one for one in self.large() if self.disk.has(one)]

    def large(self) -> list[torch.Tensor]:
        entries = [one for state in self.optimizer.state_dict()["state"].values() for one in state.values()]
        return [one for one in entries if torch.is_tensor(one) and one.nbytes >= SMALL_BYTES]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_of_a_state_in_memory(name: str, apply: Apply, disk: Disk) -> None:
    plan = PLAN_NAMES[list(OPTIMIZERS).index(name) % (len(PLANS) - 1)]  # all but the last have streamed layers
    pair = Pair(apply, disk, name, plan)
    pair.train(5)
    pair.check()
    pair.streamed.remove()
    pair.train(2)
    pair.check()


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("before", [1, 3])
def test_state_that_is_reset_after_a_step_stays_so(before: int, reset: str, apply: Apply, disk: Disk) -> None:
    pair = Pair(apply, disk)
    for steps in (before, 2):
        for _ in range(steps):
            pair.step()
        for optimizer in (pair.optimizer, pair.expected):
            RESETS[reset](optimizer)
    pair.step()
    pair.check()


@pytest.mark.parametrize("name", ["adam", "adam over lists", "adam fused", "two groups", "sgd with momentum"])
def test_twenty_steps_under_a_budget(name: str, tmp_path: Path) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    optimizer, expected = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    plan = autosp.plan(model, batch, k=4, k_prime=2, mode="training", step=lambda m, b: loss_of(m(b)), device="cpu")
    with pytest.raises(BudgetTooSmallError) as caught:
        autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb="1KB")
    assert_same_weights(model, plain)
    with pytest.raises(BudgetTooSmallError):
        autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=f"{caught.value.least_bytes - 1}B")
    budget = f"{caught.value.least_bytes}B"
    with autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=budget):
        loop(model, optimizer, batch, 20)
    loop(plain, expected, batch, 20)
    assert equal(optimizer.state_dict()["state"], expected.state_dict()["state"])
    assert_same_weights(model, plain)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["tied", "shared", "borrowed", "fused_views", "fast_path", "convolutions"])
def test_any_model(name: str, apply: Apply, disk: Disk) -> None:
    model, batch = make(name)
    model, plain = twins(model)
    optimizers = [OPTIMIZERS["adam"](one) for one in (model, plain)]
    apply(model, batch, PLANS["k=3 k'=1"], optimizer=optimizers[0], disk_state=disk)
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        loop(one, optimizer, batch)
    assert_same_weights(model, plain)


def test_each_step_reads_and_writes_the_whole_state_once(apply: Apply, disk: Disk) -> None:
    pair = Pair(apply, disk)
    total = sum(one.n_bytes for one in layer_states(pair.optimizer, pair.streamed._bound.layers, range(14)))
    for step in range(4):
        pair.step()
        moved = pair.streamed.stats().link_bytes
        assert (moved["disk->host"], moved["host->disk"]) == (step * total, (step + 1) * total)
    pair.check()
    assert len(pair.on_disk()) == len(pair.large()) == 3 * 14
    assert not list(disk.folder.iterdir())


def test_what_the_budget_has_room_for_stays_in_memory(apply: Apply, tmp_path: Path) -> None:
    model, batch = make("stack")
    model, plain = twins(model)
    optimizer, expected = OPTIMIZERS["adam"](model), OPTIMIZERS["adam"](plain)
    plan = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=lambda m, b: loss_of(m(b)), device="cpu")
    with pytest.raises(BudgetTooSmallError) as caught:
        autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb="1KB")
    least = caught.value.least_bytes
    written = []
    for more_bytes in (0, 200_000, 10 * MB):
        streamed = autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=f"{least + more_bytes}B")
        loop(model, optimizer, batch, 3)
        loop(plain, expected, batch, 3)
        written.append(streamed.stats().link_bytes.get("host->disk", 0))
        streamed.remove()
        assert_same_weights(model, plain)
    assert written[0] > written[1] > written[2] == 0


def test_a_state_dict_goes_out_and_comes_back(apply: Apply, disk: Disk) -> None:
    """Saved once: only its own bytes. Loaded, it goes to the file at once."""
    pair = Pair(apply, disk)
    pair.train()
    saved = io.BytesIO()
    torch.save(pair.optimizer.state_dict(), saved)
    assert saved.tell() < sum(one.nbytes for one in pair.large()) + 100_000
    weights = copy.deepcopy(pair.plain.state_dict())
    pair.train()
    pair.model.load_state_dict(weights)
    pair.plain.load_state_dict(weights)
    for optimizer in (pair.optimizer, pair.expected):
        saved.seek(0)
        optimizer.load_state_dict(torch.load(saved))
    assert len(pair.on_disk()) == len(pair.large())
    pair.check()
    pair.train()
    pair.check()


def test_a_state_that_is_there_before_moves_to_the_file(apply: Apply, disk: Disk) -> None:
    """The user's tensors stay what they are, and the memory that they were in is free."""
    model, batch = make("stack")
    model, plain = twins(model)
    optimizer, expected = OPTIMIZERS["adam"](model), OPTIMIZERS["adam"](plain)
    loop(model, optimizer, batch)
    loop(plain, expected, batch)
    tensor = optimizer.state[model.head.weight]["exp_avg"]
    apply(model, batch, PLANS["k=3 k'=1"], optimizer=optimizer, disk_state=disk)
    assert optimizer.state[model.head.weight]["exp_avg"] is tensor
    assert disk.has(tensor)
    loop(model, optimizer, batch)
    loop(plain, expected, batch)
    assert equal(tensor, expected.state[plain.head.weight]["exp_avg"])
    assert disk.has(tensor)


def test_what_the_user_writes_to_the_state_counts(apply: Apply, disk: Disk) -> None:
    """In place, and by another tensor of its own."""
    pair = Pair(apply, disk)
    pair.train()
    for optimizer, model in ((pair.optimizer, pair.model), (pair.expected, pair.plain)):
        optimizer.state[model.head.weight]["exp_avg"].mul_(3)
        optimizer.state[model.embed.weight]["exp_avg_sq"] = torch.ones_like(model.embed.weight)
    pair.train()
    pair.check()
    assert len(pair.on_disk()) == len(pair.large())


def test_what_the_file_has_no_place_for_stays_in_memory(apply: Apply, disk: Disk) -> None:
    """State of a parameter that was frozen when the plan was applied, or of an option that is new."""
    model, batch = make("stack")
    model.blocks[3].up.weight.requires_grad_(False)
    model, plain = twins(model)
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.01) for one in (model, plain)]
    apply(model, batch, PLANS["k=3 k'=1"], optimizer=optimizers[0], disk_state=disk)
    for one, optimizer in zip((model, plain), optimizers, strict=True):
        loop(one, optimizer, batch)
        one.blocks[3].up.weight.requires_grad_(True)
        loop(one, optimizer, batch)
    assert_same_weights(model, plain)
    assert not disk.has(optimizers[0].state[model.blocks[3].up.weight]["exp_avg"])
    assert disk.has(optimizers[0].state[model.blocks[3].down.weight]["exp_avg"])


def test_a_parameter_without_a_gradient_keeps_its_state(apply: Apply, disk: Disk) -> None:
    """Though it is read and written with that of others of its layer."""
    pair = Pair(apply, disk)
    for step in range(4):
        for one, optimizer in ((pair.model, pair.optimizer), (pair.plain, pair.expected)):
            backward(one, pair.batch, step)
            if step % 2:
                one.blocks[1].up.weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
        pair.check()


@pytest.mark.parametrize("name", ["adam", "adam fused"])
def test_a_scaler_s_steps(name: str, apply: Apply, disk: Disk) -> None:
    """One of them is skipped. A fused optimizer's are taken at once, in the map; its pages leave memory after each."""
    pair = Pair(apply, disk, name)
    for model, optimizer in ((pair.model, pair.optimizer), (pair.plain, pair.expected)):
        scaled_loop(model, optimizer)
    pair.check()
    assert len(pair.on_disk()) == len(pair.large())


def test_memory_stays_within_the_window(apply: Apply, disk: Disk) -> None:
    """Of 8 layers with 8 MB of state each: two slots, and one layer's new state in the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(8))).train()
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    streamed = apply(model, vectors(4, 1000), Candidate(k=2, k_prime=1), optimizer=optimizer, disk_state=disk)
    backward(model, vectors(4, 1000))
    before = anonymous_bytes()
    CpuDevice(slow_tier=Tier.HOST).restart_peak()
    for _ in range(3):
        optimizer.step()
        optimizer.state_dict()  # all updates are over
        assert anonymous_bytes() < before + 2 * MB
        backward(model, vectors(4, 1000))
    files = resident_bytes()[0] - anonymous_bytes()
    # A new layer's state, a gradient's update on its way (Adam's own temporaries), and what passes take.
    assert resident_bytes()[1] - files - before < 8 * MB + 3 * 4 * MB + 2 * MB
    assert mapped_bytes("/state-") == 0
    total = sum(one.sum().item() for state in optimizer.state.values() for one in state.values() if one.ndim == 2)
    assert total != 0
    assert mapped_bytes("/state-") >= 60 * MB  # who looks at all of it has all of it in the page cache
    optimizer.step()
    optimizer.state_dict()
    assert mapped_bytes("/state-") == 0
    streamed.remove()


def test_a_disk_that_is_full_after_all_loses_nothing(apply: Apply, disk: Disk) -> None:
    """Which some filesystems are though blocks were reserved: a copy for each write. The next pass says so, once."""
    pair = Pair(apply, disk)
    pair.train()
    pair.check()

    def fail_once(count: int, at: int = disk.writes + 5) -> None:
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk.writing = fail_once
    pair.step()
    with pytest.raises(DiskFullError, match="writing the optimizer's state"):
        pair.model(pair.batch)
    pair.check()
    assert len(pair.large()) - len(pair.on_disk()) == 3
    pair.train()
    pair.check()
    assert len(pair.on_disk()) == len(pair.large())


def test_state_that_cannot_be_read_is_not_used(apply: Apply, disk: Disk) -> None:
    """The layer and those after it are not updated, and the next pass says so, once; a checkpoint brings all back."""
    pair = Pair(apply, disk)
    pair.train()
    saved = copy.deepcopy((pair.expected.state_dict(), pair.plain.state_dict()))
    head = pair.model.head.weight.clone()

    def fail(count: int) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    disk.reading = fail
    backward(pair.model, pair.batch)
    pair.optimizer.step()
    with pytest.raises(ReadError, match="reading layer embed failed"):
        pair.model(pair.batch)
    assert equal(head, pair.model.head.weight)
    disk.reading = lambda count: None
    pair.optimizer.zero_grad()
    states = [one.state[its.embed.weight] for one, its in ((pair.optimizer, pair.model), (pair.expected, pair.plain))]
    assert equal(*states)
    pair.restore(saved)
    pair.train()
    pair.check()


def test_an_update_that_fails(apply: Apply, disk: Disk) -> None:
    """As with the state in memory: what comes after it is not updated, and the next step is right."""
    pair = Pair(apply, disk)
    pair.train()
    saved = copy.deepcopy((pair.expected.state_dict(), pair.plain.state_dict()))
    weight = pair.model.blocks[2].down.weight
    right = pair.optimizer.state[weight]["exp_avg"]
    pair.optimizer.state[weight]["exp_avg"] = torch.zeros(3)
    head = pair.model.head.weight.clone()
    backward(pair.model, pair.batch)
    pair.optimizer.step()
    with pytest.raises(RuntimeError, match="size of tensor"):
        pair.model(pair.batch)
    assert equal(head, pair.model.head.weight)
    pair.optimizer.state[weight]["exp_avg"] = right
    pair.optimizer.zero_grad()
    pair.restore(saved)
    pair.train()
    pair.check()


def test_ctrl_c_while_a_pass_waits_for_an_update(apply: Apply, disk: Disk, can_be_interrupted: None) -> None:
    """Nothing is lost: whoever uses the weights next waits again. Here of the first step, which makes the state."""
    device = Held()
    pair = Pair(apply, disk, device=device)
    backward(pair.model, pair.batch)
    device.hold()
    pair.optimizer.step()
    main = threading.main_thread().ident
    assert main is not None
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        pair.model(pair.batch)
    device.release_soon()
    backward(pair.plain, pair.batch)
    pair.expected.step()
    pair.check()
    pair.train()
    pair.check()


def test_a_step_that_raises_at_once(apply: Apply, disk: Disk) -> None:
    pair = Pair(apply, disk)
    pair.train()
    for one, optimizer in ((pair.model, pair.optimizer), (pair.plain, pair.expected)):
        backward(one, pair.batch)
        betas = optimizer.param_groups[0]["betas"]
        optimizer.param_groups[0]["betas"] = ("none", "none")
        with pytest.raises(TypeError):
            optimizer.step()
            one(pair.batch)
        optimizer.param_groups[0]["betas"] = betas
    assert_same_gradients(pair.model, pair.plain)


def test_the_file_goes_with_the_last_tensor_in_it(apply: Apply, disk: Disk) -> None:
    pair = Pair(apply, disk)
    pair.train()
    pair.streamed.remove()
    assert all(disk.has(one) for one in pair.large())
    maps = Path("/proc/self/maps")
    name = f"{disk.folder}/state-"
    assert name in maps.read_text()
    pair.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))  # in RAM again
    assert not pair.on_disk()
    assert name not in maps.read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.is_file() and name in str(link.readlink())]
    pair.train()
    pair.check()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    run(
        """
        import os, signal, sys
        import torch
        from torch import nn
        import autosp
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
        optimizer = torch.optim.Adam(model.parameters())
        step = lambda model, batch: model(batch).square().mean()
        plan = autosp.plan(model, torch.ones(2, 64), k=2, k_prime=1, mode="training", step=step, device="cpu")
        try:
            autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb="1B")
        except autosp.errors.BudgetTooSmallError as error:
            autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb=f"{error.least_bytes}B")
        for _ in range(3):
            step(model, torch.ones(2, 64)).backward()
            optimizer.step()
        assert "state-" in open("/proc/self/maps").read()
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        returncode=-signal.SIGKILL,
    )
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_that_is_full_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    said = run(
        """
        import os, resource
        import torch
        from torch import nn
        import autosp
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
        optimizer = torch.optim.Adam(model.parameters())
        step = lambda model, batch: model(batch).square().mean()
        plan = autosp.plan(model, torch.ones(2, 256), k=2, k_prime=1, mode="training", step=step, device="cpu")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        before = [one.clone() for one in model.parameters()]
        opened = len(os.listdir("/proc/self/fd"))
        try:
            autosp.apply(model, plan, optimizer=optimizer, max_cpu_gb="8.5MB")
        except autosp.errors.DiskFullError as error:
            print(error)
        assert len(os.listdir("/proc/self/fd")) == opened
        assert all(torch.equal(*both) for both in zip(before, model.parameters()))
        step(model, torch.ones(2, 256)).backward()
        optimizer.step()
        """,
    )
    assert "the optimizer's state takes" in said
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_refused() -> None:
    model, batch = make("stack")
    training = autosp.plan(model, batch, k=2, k_prime=1, mode="training", step=lambda m, b: loss_of(m(b)), device="cpu")
    inference = autosp.plan(model, batch, k=2, k_prime=1, device="cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for plan in (training, inference):
        with pytest.raises(SettingError, match="max_cpu_gb without optimizer="):
            autosp.apply(model, plan, max_cpu_gb=1)
    with pytest.raises(SettingError, match="only training has an optimizer"):
        autosp.apply(model, inference, optimizer=optimizer, max_cpu_gb=1)
    with pytest.raises(autosp.errors.BudgetError, match="max_cpu_gb='much' is not a positive amount"):
        autosp.apply(model, training, optimizer=optimizer, max_cpu_gb="much")
