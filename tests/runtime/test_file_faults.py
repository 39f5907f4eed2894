"""Files behind a whole model that do what files should not: refuse, end early, change; and how they are read."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autosp
from autosp.batch import call, equal
from autosp.devices import CpuDevice, Device
from autosp.partition import bind
from autosp.runtime.streamed_model import StreamedModel
from autosp.schedule.lowering import lower_for
from autosp.settings import settings
from autosp.spec import Plan, Reading, Tier
from autosp.store import Repository
from autosp.tiers import Originals, Readers, open_store
from mapped_models import mapped_stack
from models import make
from processes import run

pytest.importorskip("safetensors")

TESTS = Path(__file__).parent.parent

MAKERS: dict[str, Callable[[Path], tuple[nn.Module, torch.Tensor]]] = {
    "mapped": mapped_stack,
    "packed": lambda path: make("stack"),
}


def plain(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return call(model, batch)


def applied_with(readers: Readers, model: nn.Module, plan: Plan, device: Device) -> StreamedModel[nn.Module]:
    """As `autosp.apply`, but for the readers."""
    bound = bind(model, plan.partition, device.info.slow_tier)
    candidate = plan.candidate
    schedule = lower_for("inference", candidate, bound.partition)
    stored = bound.stored(candidate.residents)
    store = open_store(device, stored, settings().cache_dir, Originals.FREED, candidate.on_disk, readers)
    return StreamedModel(bound, schedule, device, store, Originals.FREED, store.close)


@pytest.mark.parametrize("tier", [Tier.DISK, Tier.HOST])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_filesystem_that_refuses_o_direct_when_a_file_is_opened(maker: str, tier: Tier, tmp_path: Path) -> None:
    refused: list[Path] = []

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return os.open(path, flags)

    model, batch = MAKERS[maker](tmp_path / "weights")
    expected = plain(model, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    device = CpuDevice(slow_tier=tier)
    limit = None if tier is Tier.DISK else "400KB"
    plan = autosp.plan(model, batch, k=3, k_prime=1, residents=1, max_cpu_gb=limit, device=device)
    assert bool(plan.candidate.on_disk) == (tier is Tier.HOST)
    streamed = applied_with(Readers(open=refuse), model, plan, device)
    assert refused
    for _ in range(3):
        assert equal(model(batch), expected)
    streamed.remove()
    assert all(equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert equal(plain(model, batch), expected)
    device.close()


READINGS = [
    Reading(readers=3, block_bytes=4096),
    Reading(readers=2, block_bytes=16384, from_cache=True),
    Reading(block_bytes=8192, from_cache=True),
]


@pytest.mark.parametrize("reading", READINGS, ids=repr)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_plan_s_reading_is_what_runs(maker: str, reading: Reading, tmp_path: Path) -> None:
    model, batch = MAKERS[maker](tmp_path / "weights")
    expected = plain(model, batch)
    threads = set(threading.enumerate())
    plan = autosp.plan(model, batch, k=2, k_prime=1, device="cpu").model_copy(update={"reading": reading})
    plan.save(tmp_path / "plan.json")
    with autosp.apply(model, Plan.load(tmp_path / "plan.json")):
        for _ in range(3):
            assert equal(model(batch), expected)
        started = {thread.name for thread in set(threading.enumerate()) - threads}
        helpers = {f"autosp-reader-{number}" for number in range(2, reading.readers + 1)}
        assert started == {"autosp-copier", *helpers}
    assert set(threading.enumerate()) <= threads
    assert equal(plain(model, batch), expected)


def test_a_tuned_plan_reads_as_its_profile_was_measured(tmp_path: Path) -> None:
    model, batch = mapped_stack(tmp_path / "weights")
    first = autosp.tune(model, batch, "300MB", device="cpu", study_name="one", max_trials=1, progress=False)
    second = autosp.resume("one", model, batch, device="cpu", max_trials=2, progress=False)
    with Repository() as repository:
        profile = repository.profile("one")
    assert profile is not None
    for plan in (first, second):
        assert plan.reading.model_copy(update={"from_cache": False}) == profile.link.reading


@pytest.mark.parametrize("residents", ["none", "all"])
def test_a_file_truncated_at_rest_is_an_error_and_no_signal(residents: str, tmp_path: Path) -> None:
    """Whoever touches a page of a map that the file does not have any more is killed by SIGBUS."""
    script = """
        import os, sys
        from pathlib import Path
        import autosp
        from autosp.devices import CpuDevice
        from autosp.errors import ReadError
        from autosp.spec import Tier
        from mapped_models import mapped_stack

        path = Path(sys.argv[1])
        model, batch = mapped_stack(path)
        batch = batch[:1, :4]  # few rows of the table: it stays where it is mapped
        for_host = autosp.plan(model, batch, k=1, k_prime=1, device=CpuDevice(slow_tier=Tier.HOST))
        plan = autosp.plan(model, batch, k=1, k_prime=1, device="cpu")
        if sys.argv[2] == "all":
            count = len(set(plan.partition.visits))
            plan = autosp.plan(model, batch, k=count, k_prime=1, residents=count, device="cpu")
        assert plan.partition.lookups
        streamed = autosp.apply(model, plan)
        model(batch)
        os.truncate(path, 4096)
        touches = {
            "pass": lambda: model(batch),
            "pass of a part": lambda: model.blocks[1](batch.new_zeros(1, 64).float()),
            "remove": streamed.remove,
            "plan": lambda: autosp.plan(model, batch, k=1, k_prime=1, device="cpu"),
            "apply": lambda: autosp.apply(model, plan),
            "apply for the host": lambda: autosp.apply(model, for_host),
            "tune": lambda: autosp.tune(model, batch, "300MB", device="cpu", progress=False),
        }
        for name, touch in touches.items():
            try:
                touch()
                print(name, "ran")
            except ReadError as error:
                print(name, "was refused" if str(path) in str(error) else error)
    """
    said = run(script, tmp_path / "weights", residents).splitlines()
    may_run = {"none": ["remove ran"], "all": ["pass of a part ran", "remove ran"]}  # residents are in no file
    assert [line for line in said if not line.endswith("was refused")] == may_run[residents], said
    assert len(said) == 7


@pytest.mark.parametrize("maker", MAKERS)
def test_a_forked_process_is_told_to_remove_the_plan_and_can(maker: str, tmp_path: Path) -> None:
    """Loads that were under way when it was forked never end in it: its threads are its parent's."""
    script = """
        import os, signal, sys, threading
        from pathlib import Path
        import torch
        import autosp
        from autosp.errors import SettingError
        from autosp.tiers import Readers
        from mapped_models import mapped_stack
        from models import make
        from autosp.batch import call, equal

        torch.set_num_threads(1)  # torch's own threads are not there either
        model, batch = mapped_stack(Path(sys.argv[1])) if sys.argv[2] == "mapped" else make("stack")
        with torch.no_grad():
            expected = call(model, batch)
        streamed = autosp.apply(model, autosp.plan(model, batch, k=2, k_prime=1, device="cpu"))
        call(model, batch)
        held = threading.Event()
        streamed._device._reader.start(held.wait)
        streamed._device._copier.start(held.wait)
        child = os.fork()
        if not child:
            signal.alarm(60)
            try:
                call(model, batch)
            except SettingError as error:
                print(error)
            streamed.remove()
            with torch.no_grad():
                print("the same", equal(call(model, batch), expected), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0) == (child, 0)
        held.set()
        print("the parent's", equal(call(model, batch), expected))
        streamed.remove()
    """
    assert run(script, tmp_path / "weights", maker).splitlines() == [
        "this process was forked while a plan was applied: call remove() in it first, and apply the plan again",
        "the same True",
        "the parent's True",
    ]
