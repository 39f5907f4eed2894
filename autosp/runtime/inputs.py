"""What layers are given from the host on an accelerator.

[Note: sent to a weight] A module may send its input to where the weight of another one is, and call that one with it:
`self.conv1(x.to(self.conv1.weight.device))`. Under a plan the weight is on the host until it is called. So whatever has
no modules inside takes its input from the host, too: it could compute nothing with it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autosp.intercept import Around


def taking_from_host(module: nn.Module, device: torch.device, in_pass: Callable[[], bool], around: Around) -> Around:
    """`around`; in a pass with positional inputs on the device: see [Note: sent to a weight].

    As it is where that is never needed.
    """
    if device.type == "cpu" or next(module.children(), None) is not None:
        return around

    def bring(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) and value.is_cpu else value

    def brought(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return around(forward, tuple(map(bring, args)) if in_pass() else args, kwargs)

    return brought
