"""The study of training beside other systems: its rows on toy models, and its table from rows made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_peers
from kept_rows import rows_in
from peer_models import PeerModel
from torch import nn
from train_peer_measure import Job, Memory, measure, passed, state_bytes
from train_peer_systems import PLAIN, SYSTEMS, TUNED, Setting, blocks_of, trained_by
from train_peers import Case, Row
from training_models import mean_square

from autosp.devices import CpuDevice
from autosp.spec import Tier

MIB = 2**20


def figures(step_s: float, peak_mb: int, **more: Any) -> dict[str, Any]:
    found = {"title": "Tiny", "step_s": step_s, "peak_bytes": peak_mb * 10**6, "losses": [2.0, 1.0]}
    return {"figures": found | {"cap_bytes": None} | more}


def tuned(step_s: float, budget_mb: int, cap_mb: int) -> dict[str, Any]:
    sizes = {"cap_bytes": cap_mb * 10**6, "budget_bytes": budget_mb * 10**6}
    return figures(step_s, budget_mb, plan="k=2", **sizes)


ANSWERS: dict[tuple[str, str | None], dict[str, Any]] = {
    (PLAIN, None): figures(1.0, 100),
    ("fsdp2", None): figures(2.0, 40),
    (TUNED, "fsdp2"): tuned(1.5, 40, 40),
    ("deepspeed-3", None): figures(1.2, 30, losses=[2.0, 1.000001]),
    (TUNED, "deepspeed-3"): tuned(1.1, 45, 30),
    ("accelerate", None): {"outcome": "failed", "note": "RuntimeError: no gradient"},
}


def answered(measured: Callable[..., None], job: Job, folder: Path, timeout_s: float) -> dict[str, Any]:
    """A figure per system, however it is measured."""
    return ANSWERS[job.case.system, job.case.beside]


def test_autosp_runs_with_the_memory_of_each_system_that_ran(tmp_path: Path) -> None:
    words = ["--models", "mlp", "--optimizers", "SGD", "--repeats", "1", "--scale", "tiny"]
    words += ["--systems", "plain,fsdp2,accelerate,deepspeed-3,autosp"]
    words += ["--output", str(tmp_path), "--scratch", str(tmp_path)]
    train_peers.main(words, answered)
    (raw,) = tmp_path.glob("train_peers_*_tiny.jsonl")
    cases = [(row.case.system, row.case.beside) for row in rows_in(raw, Row)]
    assert sorted(cases, key=str) == sorted(ANSWERS, key=str)
    text = raw.with_suffix(".md").read_text(encoding="utf-8")
    assert "not slower than the system in 1 of 2 pairs" in text
    assert "| 40.0 MB | – | equal | 1.50 s, losses equal | 40.0 MB of 40.0 MB | k=2 | 0.75 (0.75) | no |" in text
    assert "45.0 MB of 45.0 MB = 1.50 × the system's" in text and "no, with more memory" in text
    assert "within 1e-06" in text
    assert "**accelerate cpu_offload**: failed: RuntimeError: no gradient (mlp with SGD)" in text
    assert raw.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = raw.read_bytes()
    train_peers.main(words, answered)
    assert raw.read_bytes() == before, "what is there is not measured again"


def test_losses_that_differ_are_named() -> None:
    rows = [Row(Case("mlp", "tiny", "SGD", PLAIN, 0), **figures(1.0, 100))]
    rows.append(Row(Case("mlp", "tiny", "SGD", "fsdp2", 0), **figures(1.0, 100, losses=[2.0, 1.1])))
    assert "DIFFER by 1e-01" in train_peers.table(rows)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_systems_train_as_plain_torch_does(optimizer: str, tmp_path: Path) -> None:
    losses = {}
    for system in (PLAIN, "fsdp2", TUNED):
        cap_bytes = 64 * MIB if system == TUNED else None
        case = Case("mlp", "tiny", optimizer, system, 0)
        losses[system] = measure(Job(case, str(tmp_path), cap_bytes))["figures"]["losses"]
    assert losses[PLAIN] == losses["fsdp2"] == losses[TUNED]
    assert losses[PLAIN][0] > losses[PLAIN][-1]


def test_gradients_that_do_not_arrive_are_an_error(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(RuntimeError, match="8 of 8 parameters have no gradient"):
        measure(Job(Case("mlp", "tiny", "SGD", "accelerate", 0), str(tmp_path)))


def peak_over_weights(system: str) -> float:
    """Of a plain loop, whose memory is counted as the system's is."""
    device = CpuDevice(slow_tier=Tier.HOST)
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(3)))  # 17 MB each
    made = PeerModel("", model, torch.ones(1, 2048), mean_square)
    memory = Memory(SYSTEMS[system], device, model)
    trained = trained_by(model, Setting(device, "AdamW").optimizer_of(model))
    passed(made, trained)
    trained.update()
    peak_bytes = memory.peak_bytes(made, trained)
    assert state_bytes(trained) // MIB == 2 * memory.weight_bytes // MIB
    device.close()
    return peak_bytes / memory.weight_bytes


def test_what_rests_in_host_memory_is_not_device_memory() -> None:
    """Where weights, gradients and state rest there, a gradient in the making counts; else all of them do."""
    assert 0.2 < peak_over_weights("fsdp2") < 1.5
    assert 3.9 < peak_over_weights(PLAIN) < 5


def test_the_members_of_lists_are_sharded() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Linear(2, 2)])
    model.head = nn.Linear(2, 2)
    assert blocks_of(model) == [model.blocks[0], model.blocks[1], model.blocks[0][0]]
