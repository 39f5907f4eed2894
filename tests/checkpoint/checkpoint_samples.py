"""Checkpoints on disk, and what says where a loaded model's bytes are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from autosp.devices.memory import anonymous_bytes

BIG_BYTES = 200 * 2**20


class Rotary(nn.Module):
    """A buffer that is in no checkpoint, one that is, a frozen parameter, and one with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.linear.bias.requires_grad_(False)
        self.linear.weight.is_special = True
        one = nn.Parameter(torch.rand(8))
        self.first, self.second = one, one
        self.register_buffer("frequencies", torch.arange(8.0) / 7, persistent=False)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.frequencies + self.mean) * self.first


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether the tensor's bytes are a private map of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, _, *path = line.split(maxsplit=5)
        begin, end = (int(text, 16) for text in addresses.split("-"))
        if begin <= tensor.data_ptr() < end:
            return access.endswith("p") and path == [str(file.resolve())]
    return False


def files_of(model: nn.Module) -> set[str]:
    """The names of the files that a model's parameters are mapped from; "RAM" for what is in none."""
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    found = set()
    for parameter in model.parameters():
        for addresses, _, _, _, inode, *path in maps:
            begin, end = (int(text, 16) for text in addresses.split("-"))
            if begin <= parameter.data_ptr() < end:
                found.add(Path(path[0]).name if inode != "0" else "RAM")
    return found


def big_state() -> dict[str, torch.Tensor]:
    """200 MiB of float32, in twenty tensors."""
    rows = BIG_BYTES // 20 // 4096
    return {f"{index}.weight": torch.full((rows, 1024), float(index + 1) / 3) for index in range(20)}


def big_model() -> nn.Module:
    """The model of `big_state`."""
    rows = BIG_BYTES // 20 // 4096
    return nn.Sequential(*(nn.Linear(1024, rows, bias=False) for _ in range(20)))


class AnonymousPeak:
    """Samples a process's anonymous memory: the kernel keeps a peak of all resident memory only, maps included."""

    def __init__(self) -> None:
        self._before = anonymous_bytes()
        self.growth_bytes = 0

    def sample(self, _written: int = 0) -> None:
        """Call it while it happens."""
        self.growth_bytes = max(self.growth_bytes, anonymous_bytes() - self._before)


def conversions(cache: Path) -> Iterator[Path]:
    """The folders of the conversions in a cache."""
    root = cache / "checkpoints"
    return root.iterdir() if root.exists() else iter(())
