"""Models whose tensors are private maps of safetensors files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from models import llama, make


def mapped_llama(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small Llama, saved in shards and loaded from them as everybody does. Needs transformers."""
    from transformers import AutoModelForCausalLM

    if not folder.exists():
        torch.manual_seed(0)
        llama().to(dtype).save_pretrained(folder, max_shard_size="300KB")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def map_weights(model: nn.Module, path: Path) -> None:
    """Write a model's parameters to a file, unless it is there, and make each a map of it. Needs safetensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not path.exists():
        save_file({name: parameter.detach() for name, parameter in model.named_parameters()}, path)
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = file.get_tensor(name)


def mapped_bytes(named: str) -> int:
    """What is in this process's memory of its maps of files in whose path that is (proc_pid_smaps(5))."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split()[0]:
            inside = named in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def sharded_stack(folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """The stack of `models.make`, each of its layers in two files, and its batch. Needs safetensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, batch = make("stack")
    folder.mkdir()
    names = [name for name, _ in model.named_parameters()]
    for number, path in enumerate((folder / "one.safetensors", folder / "two.safetensors")):
        save_file({name: model.get_parameter(name).detach() for name in names[number::2]}, path)
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in names[number::2]:
                model.get_parameter(name).data = file.get_tensor(name)
    return model, batch


def mapped_stack(path: Path) -> tuple[nn.Module, torch.Tensor]:
    """The stack of `models.make` with its weights in a file, and its batch."""
    model, batch = make("stack")
    map_weights(model, path)
    return model, batch
