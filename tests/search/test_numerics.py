"""How kernels compute, carried to another process and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from autosp.search.numerics import FLAGS, numerics, use_numerics


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[dict[str, Any]]:
    before = numerics()
    yield before
    use_numerics(before)
    assert numerics() == before


def test_torch_has_what_is_carried() -> None:
    assert set(FLAGS) < set(numerics())


def test_what_is_set_in_the_new_way(unchanged: dict[str, Any]) -> None:
    """torch refuses to give the old name of a setting that was set by its new one."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cuda.enable_flash_sdp(False)
    torch.use_deterministic_algorithms(True)
    changed = numerics()
    use_numerics(unchanged)
    assert torch.backends.cuda.matmul.fp32_precision == unchanged["cuda.matmul.fp32_precision"]
    use_numerics(changed)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.benchmark != unchanged["cudnn.benchmark"]
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert torch.are_deterministic_algorithms_enabled()


def test_what_is_set_in_the_old_way(unchanged: dict[str, Any]) -> None:
    torch.set_float32_matmul_precision("high")
    changed = numerics()
    use_numerics(unchanged)
    use_numerics(changed)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
