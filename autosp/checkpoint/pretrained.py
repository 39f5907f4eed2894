"""A Hugging Face directory, loaded by transformers itself: its tensors are private maps of the files they are in.

[Note: dtypes that transformers casts] `from_pretrained` casts what is not in the dtype that was asked for, or that the
config names: in RAM. So a checkpoint of which more than `CAST_SHARE` would be cast is converted on the disk first.
Tensors that transformers keeps in a dtype of their own (`_keep_in_fp32_modules`, parameters declared as float32) are
left as they are saved: rounding them first would change them.
"""

from __future__ import annotations

import bisect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autosp.checkpoint.convert import CASTABLE
from autosp.checkpoint.skeleton import some
from autosp.checkpoint.source import SAFETENSORS, TORCH_SUFFIXES, SavedTensors, find_checkpoint
from autosp.errors import CheckpointError, SettingError
from autosp.partition.tensors import held_by

CONFIG = "config.json"

CAST_SHARE = 0.05
"""Of a checkpoint's bytes: few enough to be cast in RAM rather than to write all of it again."""

UNMAPPED_BYTES = 2**20
"""What lives in RAM is told from here on."""

OF_VALUES = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError)
"""What transformers raises of a config's values, which it looks at one by one where it comes to use them."""


class Pretrained:
    """A directory with a config that transformers knows. Nothing in it is executed: see `trust_remote_code`."""

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError if the config cannot be used, SettingError if transformers is not installed."""
        self.folder = folder
        self._class = _model_class(folder)
        from huggingface_hub.errors import StrictDataclassError

        try:
            self._config = self._class.config_class.from_pretrained(folder, local_files_only=True)
        except (*OF_VALUES, StrictDataclassError) as error:
            raise _unusable(folder / CONFIG, error) from error

    def dtypes(self, saved: SavedTensors, asked: torch.dtype | None) -> dict[str, torch.dtype]:
        """Tensors to convert on the disk, and to what: see [Note: dtypes that transformers casts]."""
        target = asked or self._config.dtype
        if not isinstance(target, torch.dtype) or getattr(self._config, "quantization_config", None) is not None:
            return {}
        own = _OwnDtypes(self._skeleton(target), target)
        cast = {
            name: target
            for name, tensor in saved.tensors.items()
            if tensor.dtype in CASTABLE and tensor.dtype != target and name not in own
        }
        n_bytes = sum(tensor.nbytes for tensor in saved.tensors.values())
        return cast if sum(saved.tensors[name].nbytes for name in cast) > CAST_SHARE * n_bytes else {}

    def _skeleton(self, dtype: torch.dtype) -> nn.Module:
        try:
            with torch.device("meta"):
                model: nn.Module = self._class._from_config(self._config, dtype=dtype)
        except OF_VALUES as error:
            raise _unusable(self.folder / CONFIG, error) from error
        return model

    def load(self, weights: Path, dtype: torch.dtype | None) -> nn.Module:
        """The model, in eval mode, with its tensors mapped from `weights`: the directory, or a converted checkpoint.

        Raises: CheckpointError if tensors are missing or have another shape. A warning tells of what is not mapped.
        """
        try:
            model, info = self._class.from_pretrained(
                weights,
                config=self._config,
                dtype=dtype or "auto",
                generation_config=self._generation_config(),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # named below, with both sizes
                output_loading_info=True,
            )
        except OF_VALUES as error:
            raise _unusable(self.folder, error) from error
        self._refuse_differences(info)
        _tell_unmapped(model, self.folder)
        model.name_or_path = model.config.name_or_path = str(self.folder)
        return model.eval()

    def _generation_config(self) -> Any:
        """As transformers finds it in the directory; None for a model that does not generate."""
        from transformers import GenerationConfig

        if not self._class.can_generate():
            return None
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        return GenerationConfig.from_pretrained(
            self.folder, config_file_name=CONFIG, local_files_only=True, _from_model_config=True
        )

    def _refuse_differences(self, info: dict[str, Any]) -> None:
        for name, saved, built in sorted(info["mismatched_keys"]):
            raise CheckpointError(
                f"{self.folder}: tensor {name} has shape {tuple(saved)}, {self._class.__name__} needs {tuple(built)}: "
                f"{CONFIG} is not that of these weights"
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors of {self._class.__name__}: {some(missing)}. They would be "
                "random: fetch all of its files, or correct the architecture in its config"
            )


def _unusable(path: Path, error: Exception) -> CheckpointError:
    """Of a KeyError the text alone would be a word."""
    return CheckpointError(
        f"transformers cannot use {path} ({type(error).__name__}: {error}): correct its config, or fetch it again"
    )


class _OwnDtypes:
    """Names of tensors that do not take the dtype of their model."""

    def __init__(self, model: nn.Module, target: torch.dtype) -> None:
        self._parts: set[str] = set()
        lists = ["_keep_in_fp32_modules_strict"] if target in (torch.float16, torch.bfloat16) else []
        lists += ["_keep_in_fp32_modules"] if target is torch.float16 else []
        for module in model.modules():
            for attribute in lists:
                self._parts |= set(getattr(module, attribute, None) or ())
        tensors = model.state_dict()
        self._names = {name for name, tensor in tensors.items() if tensor.dtype in CASTABLE and tensor.dtype != target}

    def __contains__(self, saved_name: str) -> bool:
        """A checkpoint may leave out, or add, what stands before a model's names. Rather too many than too few."""
        return any(part in saved_name for part in self._parts) or any(
            f".{name}".endswith(f".{saved_name}") or f".{saved_name}".endswith(f".{name}") for name in self._names
        )


def pretrained_folder(path: Path) -> Path | None:
    """The Hugging Face directory that a path names, itself or a file in it.

    Raises: CheckpointError for a file of weights in it that transformers would not take.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        return None
    taken = find_checkpoint(folder)
    known = {folder, folder / CONFIG, taken.path, *taken.files}
    if path not in known and path.suffix in (SAFETENSORS, *TORCH_SUFFIXES):
        raise CheckpointError(
            f"the weights of {folder} are {taken.path.name}, not {path.name}: pass the folder, or a factory that "
            f"builds the model and weights={str(path)!r}"
        )
    return folder


def _model_class(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SettingError(f"loading {folder} needs {error.name}: pip install 'autosp[hf]'") from error
    name = _architecture(folder / CONFIG)
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise CheckpointError(
            f"{folder / CONFIG} names the architecture {name}, which transformers {transformers.__version__} does not "
            "have, and code that comes with a checkpoint is never run: pass a factory that builds the model, and "
            f"weights={str(folder)!r}"
        )
    return found


def _architecture(config: Path) -> str:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        return str(found["architectures"][0])
    except OSError as error:
        raise CheckpointError(f"{config} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{config} names no architecture, so the class to build is unknown: pass a factory that builds the model, "
            f"and weights={str(config.parent)!r}"
        ) from error


def _tell_unmapped(model: nn.Module, folder: Path) -> None:
    unmapped = dict(_unmapped(model))
    if sum(unmapped.values()) >= UNMAPPED_BYTES:
        warnings.warn(
            f"{len(unmapped)} parameters of {type(model).__name__}, {sum(unmapped.values()) / 1e9:.3g} GB, are in RAM: "
            f"{some(unmapped)}. While loading {folder}, transformers merged or cast the tensors that they come from",
            stacklevel=5,
        )


def _unmapped(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parameters with bytes that are not in a private map of a file."""
    maps = sorted(_private_file_maps())
    for name, parameter in model.named_parameters():
        for _, held in held_by(parameter):
            before = bisect.bisect(maps, (held.data_ptr(), 2**64)) - 1
            if held.nbytes and (before < 0 or held.data_ptr() >= maps[before][1]):
                yield name, held.nbytes


def _private_file_maps() -> Iterator[tuple[int, int]]:
    """Begin and end addresses."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").split("\n")[:-1]:
        addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
        if access.endswith("p") and inode != "0":
            begin, end = addresses.split("-")
            yield int(begin, 16), int(end, 16)
