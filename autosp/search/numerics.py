"""torch's global settings of how kernels compute: what another process must be told to compute alike."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

FLAGS = (
    "fp32_precision",
    "cuda.matmul.fp32_precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cudnn.conv.fp32_precision",
    "cudnn.rnn.fp32_precision",
    "mkldnn.matmul.fp32_precision",
    "mkldnn.conv.fp32_precision",
    "mkldnn.rnn.fp32_precision",
)
"""Of `torch.backends`. Some are newer than the oldest torch that autosp runs with."""

ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
"""Kinds of kernels of `scaled_dot_product_attention`, which torch.backends.cuda enables one by one."""


def numerics() -> dict[str, Any]:
    """The settings now, to be pickled."""
    found: dict[str, Any] = {
        "default_dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }
    with suppress(RuntimeError):  # torch refuses to say it in the old way of what was set in the new one
        found["matmul_precision"] = torch.get_float32_matmul_precision()
    for flag in FLAGS:
        with suppress(AttributeError):
            found[flag] = _value(flag)
    for kind in ATTENTION:
        with suppress(AttributeError):
            found[f"{kind}_sdp"] = getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
    return found


def use_numerics(settings: dict[str, Any]) -> None:
    """Set what `numerics` gave, in the process that asked or in another of the same torch."""
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["default_dtype"])
    torch.use_deterministic_algorithms(settings["deterministic"])
    if "matmul_precision" in settings:
        torch.set_float32_matmul_precision(settings["matmul_precision"])
    for flag in FLAGS:
        if flag in settings and _value(flag) != settings[flag]:
            path, _, name = flag.rpartition(".")
            setattr(_backend(path), name, settings[flag])
    for kind in ATTENTION:
        if f"{kind}_sdp" in settings:
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(settings[f"{kind}_sdp"])


def _value(flag: str) -> Any:
    path, _, name = flag.rpartition(".")
    return getattr(_backend(path), name)


def _backend(path: str) -> Any:
    found: Any = torch.backends
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found
