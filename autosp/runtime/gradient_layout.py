"""How a gradient lies in memory, beside its parameter."""

from __future__ import annotations

import torch
from torch import nn


def laid_as(value: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor | None:
    """A gradient with the strides of its parameter; None if it has them, or is no such run of bytes."""
    if value.layout is not torch.strided or value.dtype != parameter.dtype or value.stride() == parameter.stride():
        return None
    if not torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return None
    laid = torch.empty_strided(parameter.size(), parameter.stride(), dtype=value.dtype, device=value.device)
    return laid.copy_(value)


def is_plain(value: torch.Tensor, parameter: nn.Parameter) -> bool:
    """Whether a gradient is a run of bytes, as large as its parameter."""
    return (
        value.layout is torch.strided
        and value.dtype == parameter.dtype
        and value.numel() > 0
        and not value.is_conj()
        and not value.is_neg()
        and (value.is_contiguous() or value.stride() == parameter.stride())
    )


def added(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """As autograd adds gradients of any layout."""
    with torch.no_grad():
        if total is None:
            return value
        value = value.to(total.device)
        return value + total if total.is_sparse and not value.is_sparse else total.add_(value)
