"""Sample batches for any transformers model, from the names in its forward's signature and the sizes in its config.

One name may stand for several layouts (mel bins before or after time, images or videos or patches), so that a model has
several candidate batches, the one with the most inputs first; the caller takes the first that the model runs on.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

Batch = dict[str, Any]

MOST_CANDIDATES = 40
FIRST_ID = 10
LAST_ID = 800
MERGED_PATCHES = 4  # a side of the patch grid: 2 × 2 tokens after a spatial merge of 2

_PRIMARY = (
    *("input_ids", "pixel_values", "pixel_values_videos", "input_features", "input_values", "bbox", "past_values"),
    *("decoder_input_ids", "image_grid_thw", "grid_thw", "mm_token_type_ids", "visual_feats", "visual_pos"),
    "image_sizes",
)
_TEXT = ("input_ids", "decoder_input_ids")
_MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask", "input_values_mask")
_VISION = ("pixel_values", "image_sizes", "image_grid_thw", "mm_token_type_ids")
_MEL_BINS = (
    *("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels", "mel_bins"),
    *("input_feat_size", "input_dim", "feature_size", "input_size", "n_mel_bins"),
)
_MISMATCH = re.compile(r"tokens\D*(?P<tokens>\d+)\D*features\D*(?P<features>\d+)")


@dataclass(frozen=True)
class Size:
    """Sequences or images in a batch, and tokens in a sequence."""

    rows: int = 2
    length: int = 12


PROFILED = Size()
OTHER = Size(rows=3, length=9)


def knob(config: PreTrainedConfig, names: Sequence[str], default: Any, prefer: str = "") -> Any:
    """The first of `names` that the config has; nested ones whose name contains `prefer` are asked first."""
    nested = {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    if prefer:
        for name in nested:
            if prefer in name:
                found = knob(nested[name], names, None)
                if found is not None:
                    return found
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for value in nested.values():
        found = knob(value, names, None, prefer)
        if found is not None:
            return found
    return default


@dataclass(frozen=True)
class Maker:
    """Makes every layout of one input, the same values at every call."""

    config: PreTrainedConfig
    parameters: frozenset[str]
    size: Size

    def ids(self, length: int, prefer: str = "text") -> torch.Tensor:
        """Token ids that are no special ones."""  # [B, S]
        names = ("vocab_size", "src_vocab_size", "text_vocab_size", "codebook_size")
        last = min(LAST_ID, int(knob(self.config, names, LAST_ID, prefer)))
        return torch.randint(min(FIRST_ID, last - 1), last, (self.size.rows, length), generator=self._generator())

    def noise(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        return torch.randn(*shape, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.size.rows)

    @property
    def channels(self) -> int:
        """Of images."""
        return int(knob(self.config, ("num_channels", "in_channels", "in_chans"), 3, "vision"))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of images."""
        side = knob(self.config, ("image_size", "img_size", "image_resolution", "crop_size"), 64, "vision")
        if isinstance(side, Mapping):
            return int(side["height"]), int(side["width"])
        return (int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[-1]))

    @property
    def frames(self) -> int:
        """Of videos."""
        return int(knob(self.config, ("num_frames", "frames_per_clip", "num_image_with_embedding"), 2, "vision"))

    def patches(self) -> torch.Tensor:
        """Flattened patches of a 4 × 4 grid per image."""  # [B * 16, C * T * P * P]
        side = knob(self.config, ("patch_size", "spatial_patch_size"), 16, "vision")
        side = side if isinstance(side, int) else side[0]
        frames = knob(self.config, ("temporal_patch_size",), 1, "vision")
        return self.noise(self.size.rows * MERGED_PATCHES**2, self.channels * frames * side * side)

    def images(self) -> list[torch.Tensor]:
        """Images, videos, tiles of images, patches: the likeliest first."""
        rows, channels, (height, width) = self.size.rows, self.channels, self.sides
        layouts = [
            self.noise(rows, channels, height, width),
            self.noise(rows, self.frames, channels, height, width),
            self.noise(rows, 1, channels, height, width),
            self.noise(rows, channels, self.frames, height, width),
        ]
        flat = [self.patches()]
        in_rows = [flat[0].reshape(rows, MERGED_PATCHES**2, -1)]
        return flat + layouts if self.parameters & {"image_grid_thw", "grid_thw"} else layouts + in_rows + flat

    def grid(self) -> torch.Tensor:
        """Time, height and width of each image, in patches."""  # [B, 3]
        return torch.tensor([[1, MERGED_PATCHES, MERGED_PATCHES]] * self.size.rows)

    def spectrograms(self) -> list[torch.Tensor]:
        """Mel bins before time, and after."""
        bins = int(knob(self.config, _MEL_BINS, 80, "audio"))
        positions = int(knob(self.config, ("max_source_positions",), 128, "audio"))
        rows = self.size.rows
        lengths = dict.fromkeys((2 * positions, int(knob(self.config, ("max_length",), 128)), 64))
        return [self.noise(rows, *shape) for time in lengths for shape in ((bins, time), (time, bins))]

    def waves(self) -> list[torch.Tensor]:
        """Audio samples, mono; last, a spectrogram under this name."""
        samples = 400 * self.size.length
        rows = self.size.rows
        return [self.noise(rows, samples), self.noise(rows, 1, samples), *self.spectrograms()]

    def boxes(self) -> list[torch.Tensor]:
        """x0 ≤ x1 and y0 ≤ y1, whole thousandths or fractions."""  # [B, S, 4]
        corners = torch.randint(0, 50, (self.size.rows, self.size.length, 2, 2), generator=self._generator())
        boxes = corners.sort(dim=2).values.flatten(2)
        return [boxes, boxes / 100]

    def states(self) -> list[torch.Tensor]:
        """Hidden states, or the patches that vision encoders call so."""
        width = knob(self.config, ("hidden_size", "d_model", "embed_dim"), 64)
        width = width if isinstance(width, int) else width[0]
        dense = self.noise(self.size.rows, self.size.length, width)
        return [self.patches(), dense] if "grid_thw" in self.parameters else [dense, self.patches()]

    def history(self) -> list[torch.Tensor]:
        """Past values of a time series."""
        length = knob(self.config, ("context_length",), 32)
        lags = max(knob(self.config, ("lags_sequence",), [0]))
        channels = int(knob(self.config, ("num_input_channels", "input_size"), 1))
        rows = self.size.rows
        return [self.noise(rows, length + lags), self.noise(rows, length, channels), self.noise(rows, length)]


_LAYOUTS: dict[str, Callable[[Maker], list[Any]]] = {
    "input_ids": lambda make: [make.ids(make.size.length)],
    "decoder_input_ids": lambda make: [make.ids(make.size.length // 2 + 1, "decoder")],
    "attention_mask": lambda make: [torch.ones(make.size.rows, make.size.length, dtype=torch.long)],
    "mm_token_type_ids": lambda make: [torch.zeros(make.size.rows, make.size.length, dtype=torch.long)],
    "position_ids": lambda make: [torch.arange(make.size.length).expand(make.size.rows, -1).clone()],
    "pixel_values": Maker.images,
    "pixel_values_videos": lambda make: [make.noise(make.size.rows, make.frames, make.channels, *make.sides)],
    "image_grid_thw": lambda make: [make.grid()],
    "grid_thw": lambda make: [make.grid()],
    "image_sizes": lambda make: [torch.tensor([make.sides] * make.size.rows)],
    "input_features": Maker.spectrograms,
    "input_values": Maker.waves,
    "bbox": Maker.boxes,
    "hidden_states": Maker.states,
    "inputs_embeds": Maker.states,
    "encoder_hidden_states": lambda make: make.states()[-1:] if "grid_thw" in make.parameters else make.states()[:1],
    "past_values": Maker.history,
    "past_observed_mask": lambda make: [torch.ones_like(make.history()[0])],
    "visual_feats": lambda make: [make.noise(make.size.rows, 5, make.config.visual_feat_dim)],
    "visual_pos": lambda make: [make.noise(make.size.rows, 5, 4).abs()],
}


def parameters_of(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the forward's inputs: all of them, and those without a default."""
    named = [
        item
        for item in inspect.signature(model.forward).parameters.values()
        if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
    ]
    return [item.name for item in named], [item.name for item in named if item.default is item.empty]


def candidates(model: Any, size: Size, given: Mapping[str, Callable[[Maker], Any]]) -> Iterator[Batch]:
    """Batches the model may take: with all the inputs that are known, with text only, with the least.

    Inputs in `given` are made by the function there, whatever the name; None leaves one out.
    """
    names, required = parameters_of(model)
    make = Maker(model.config, frozenset(names), size)
    main = getattr(model, "main_input_name", "input_ids")
    fixed = {name: function(make) for name, function in given.items()}
    levels = [[name for name in names if name in _PRIMARY or name in required]]
    if "pixel_values" in names:
        one_modality = [name for name in levels[0] if name != "pixel_values_videos"]
        vision = [name for name in names if name in _TEXT or name in _VISION or name in required]
        levels = [[name for name in one_modality if name != "image_sizes"], one_modality, vision, *levels]
    levels.append([name for name in names if name in _TEXT or name in required])
    levels.append([name for name in names if name == main or name in required])
    for level in dict.fromkeys(tuple(level) for level in levels):
        known = [name for name in level if name in _LAYOUTS and name not in fixed]
        layouts = itertools.product(*(_LAYOUTS[name](make) for name in known))
        for values in itertools.islice(layouts, MOST_CANDIDATES):
            batch = {**dict(zip(known, values, strict=True)), **fixed}
            batch |= {name: mask for name in names if name in _MASKS for mask in _masks(name, batch)}
            if "input_features" in batch and "input_ids" in batch and "attention_mask" in names:
                batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            yield {name: value for name, value in batch.items() if value is not None}


def _masks(name: str, batch: Batch) -> list[torch.Tensor]:
    """Ones for every frame of the audio in the batch, if there is any."""  # [B, T]
    audio = batch.get("input_values" if name == "input_values_mask" else "input_features", batch.get("input_values"))
    return [] if name in batch or audio is None else [torch.ones(len(audio), audio.shape[-1], dtype=torch.long)]


def with_placeholders(batch: Batch, config: PreTrainedConfig, complaint: str) -> Batch | None:
    """The batch with as many image, video or audio tokens in every row as the model's complaint asks for.

    None if it complains of something else. Some count a feature's width too: the second time it is divided out.
    """
    mismatch = _MISMATCH.search(complaint)
    if mismatch is None or "input_ids" not in batch:
        return None
    kind = next((kind for kind in ("video", "audio") if kind in complaint.lower()), "image")
    token = knob(config, (f"{kind}_token_id", f"{kind}_token_index"), None)
    rows = len(batch["input_ids"])
    width = knob(config, ("hidden_size", "d_model"), 1, "text")
    again = token is not None and bool((batch["input_ids"] == token).any())
    count, rest = divmod(int(mismatch["features"]), rows * (width if again else 1))
    if token is None or rest or not 0 < count < 10_000:
        return None
    text = batch["input_ids"][batch["input_ids"] != token].view(rows, -1)
    ids = torch.cat([text, torch.full((rows, count), token), text[:, :3]], dim=1)
    changed: Batch = {"input_ids": ids}
    if "mm_token_type_ids" in batch:
        changed["mm_token_type_ids"] = (ids == token).long() * (2 if kind == "video" else 1)
    if "attention_mask" in batch:
        changed["attention_mask"] = torch.ones_like(ids)
    return {**batch, **changed}
