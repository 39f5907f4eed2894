"""One measurement of microbatches under a plan, grouped or one after another; and of the model without a plan."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kept_rows import answering
from torch import nn

import autosp
from autosp.batch import backward, equal
from autosp.devices import CpuDevice, Device
from autosp.report.units import size
from autosp.runtime.bench import Bench
from autosp.spec import Tier

GROUPED = "grouped"
SEPARATE = "one after another"
ALONE = "all weights in memory"

ENOUGH_S = 15.0
"""Steps are timed for that long, `MOST_STEPS` at most."""
MOST_STEPS = 5

K, K_PRIME = 4, 1


@dataclass(frozen=True)
class Scale:
    """A decoder's shape, and tokens of a microbatch in training; inference is of one token."""

    width: int
    layers: int
    vocabulary: int
    tokens: int


SCALES = {"toy": Scale(64, 4, 100, 4), "cpu": Scale(1024, 4, 8000, 8)}


@dataclass(frozen=True)
class Job:
    """A case with what its process needs."""

    case: Any
    scratch: str


def run_job(job: Job, answer: str) -> None:
    """Measure in this process."""
    answering(_figures, job, answer)


def _figures(job: Job) -> dict[str, Any]:
    case = job.case
    training = case.study == "training"
    scale = SCALES[case.scale]
    model = _model(scale).train(training).requires_grad_(training)
    tokens = scale.tokens if training else 1
    batches = [(torch.arange(tokens)[None] * 31 + 7 * number) % scale.vocabulary for number in range(case.microbatches)]
    step = _loss if training else _logits
    expected = _results(model, batches, step, training)
    figures: dict[str, Any] = {"title": f"Llama shape, {size(sum(p.numel() * 4 for p in model.parameters()))}"}
    if case.way == ALONE:
        return {"figures": figures | {"samples_s": _timed(lambda: _loop(model, batches, step, training), model)}}
    paced_bytes_per_s = None if case.paced_gb_per_s is None else case.paced_gb_per_s * 1e9
    device = CpuDevice(slow_tier=Tier.HOST if training else Tier.DISK, paced_bytes_per_s=paced_bytes_per_s)
    mode = "training" if training else "inference"
    plan = autosp.plan(model, batches[0], k=K, k_prime=K_PRIME, mode=mode, step=step, device=device)
    with Bench(model, plan.partition, device, Path(job.scratch), mode=plan.mode) as bench:
        link_bytes_per_s = _bytes_per_s(bench, device)
        streamed = bench.apply(plan.candidate)
        group = streamed.backward_group if training else streamed.run_group
        ways: dict[str, Callable[[], Any]] = {
            GROUPED: lambda: group(batches, step),
            SEPARATE: lambda: _loop(model, batches, step, training),
        }
        model.zero_grad()
        found = ways[case.way]()
        same = equal((found, [one.grad for one in model.parameters()]), expected)
        _update(model)
        before = streamed.stats()
        samples_s = _timed(ways[case.way], model)
        after = streamed.stats()
        streamed.remove()
    moved_bytes = (after.moved_bytes - before.moved_bytes) // len(samples_s)
    figures |= {
        "plan": plan.candidate.label(),
        "equal": same,
        "samples_s": samples_s,
        "moved_bytes": moved_bytes,
        "least_bytes": moved_bytes // (1 if case.way == GROUPED else case.microbatches),
        "misses": after.misses - before.misses,
        "link_bytes_per_s": link_bytes_per_s,
    }
    device.close()
    return {"figures": figures}


def _model(scale: Scale) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=scale.width,
        intermediate_size=4 * scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.width // 64,
        num_key_value_heads=scale.width // 64,
        vocab_size=scale.vocabulary,
    )
    return LlamaForCausalLM(config)


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def _logits(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=batch, use_cache=False).logits
    return logits


def _loop(model: nn.Module, batches: list[Any], step: Any, training: bool) -> list[torch.Tensor]:
    """What a group stands for."""
    if training:
        return [backward(step, model, batch) for batch in batches]
    with torch.no_grad():
        return [step(model, batch) for batch in batches]


def _results(model: nn.Module, batches: list[Any], step: Any, training: bool) -> tuple[Any, Any]:
    """Losses and gradients, or outputs, without a plan."""
    results = _loop(model, batches, step, training)
    gradients = [None if one.grad is None else one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    return results, gradients


def _one_step(run: Callable[[], Any], model: nn.Module) -> None:
    """With its update."""
    run()
    _update(model)


def _update(model: nn.Module) -> None:
    """Where there are gradients."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-6)
                parameter.grad = None


def _timed(run: Callable[[], Any], model: nn.Module) -> list[float]:
    samples: list[float] = []
    while len(samples) < MOST_STEPS and sum(samples) < ENOUGH_S:
        begin = time.perf_counter()
        _one_step(run, model)
        samples.append(time.perf_counter() - begin)
    return samples


def _bytes_per_s(bench: Bench, device: Device) -> float:
    """Of reading every layer once, one after another, to one place."""
    layers = bench.partition.layers
    place = device.allocate(max(layer.n_bytes for layer in layers))
    begin = time.perf_counter()
    for layer in layers:
        device.wait(device.copy(bench.store.regions([layer.index]), place[: layer.n_bytes], None))
    return sum(layer.n_bytes for layer in layers) / (time.perf_counter() - begin)
