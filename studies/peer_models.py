"""The models of the peers' benchmark: built from their configurations, random weights of one seed, nothing downloaded.

`cpu` sizes are 0.6-0.9 GB of fp32 weights (the decoder 4.4 GB), `gpu` sizes are published ones in bfloat16, `tiny` ones
are for trying the benchmark itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autosp.batch import Step

SCALES = ("tiny", "cpu", "gpu")


@dataclass(frozen=True)
class PeerModel:
    """One workload. `step` is None where a pass is the plain call of the model on the batch."""

    title: str
    model: nn.Module
    batch: Any
    step: Step | None = None


def build(name: str, scale: str, device: torch.device) -> PeerModel:
    """The model `name` (a key of `MODELS`) in host memory, with its batch.

    Weights are drawn on `device`, which takes seconds where a processor takes minutes; `gpu` sizes must fit there once.
    """
    with _drawn_on(device if scale == "gpu" else torch.device("cpu"), torch.bfloat16 if scale == "gpu" else None):
        made = MODELS[name](scale)
    made.model.to("cpu").eval().requires_grad_(False)
    return made


def decode(model: nn.Module, batch: Any) -> torch.Tensor:
    """One token of a sequence whose keys and values are there: logits [B, 1, vocabulary].

    The cache is made anew from the batch, so that every pass does the same.
    """
    from transformers import DynamicCache

    cache = DynamicCache(ddp_cache_data=list(zip(batch["keys"], batch["values"], strict=True)))
    logits: torch.Tensor = model(input_ids=batch["input_ids"], past_key_values=cache, use_cache=True).logits
    return logits


def prefill(model: nn.Module, batch: Any) -> torch.Tensor:
    """A prompt without a cache: logits of its last token. [B, 1, vocabulary]"""
    logits: torch.Tensor = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1).logits
    return logits


def translate(model: nn.Module, batch: Any) -> torch.Tensor:
    """Encoder and decoder once each: logits [B, T, vocabulary]."""
    logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits


def denoise(model: nn.Module, batch: Any) -> torch.Tensor:
    """One denoising step: the predicted noise [B, C, H, W]."""
    sample: torch.Tensor = model(**batch, return_dict=False)[0]
    return sample


def _llama(scale: str) -> tuple[nn.Module, Any, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes: dict[str, dict[str, Any]] = {
        "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4},
        "cpu": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        "gpu": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    }
    key_value_heads = {"tiny": 4, "cpu": 8, "gpu": 32}[scale]
    vocabulary = 1000 if scale == "tiny" else 32000
    config = LlamaConfig(**shapes[scale], num_key_value_heads=key_value_heads, vocab_size=vocabulary)
    model = LlamaForCausalLM(config)
    return model, config, f"Llama shape, {_size(model)}"


def _llama_prefill(scale: str) -> PeerModel:
    model, config, title = _llama(scale)
    length = {"tiny": 16, "cpu": 128, "gpu": 2048}[scale]
    batch = {"input_ids": _integers(config.vocab_size, 1, length)}
    return PeerModel(f"{title}, prefill of 1×{length} tokens", model, batch, prefill)


def _llama_decode(scale: str) -> PeerModel:
    model, config, title = _llama(scale)
    length = {"tiny": 16, "cpu": 128, "gpu": 2048}[scale]
    head = config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, length, head)
    keys, values = _normal(*shape, seed=1), _normal(*shape, seed=2)
    batch = {"input_ids": _integers(config.vocab_size, 1, 1), "keys": tuple(keys), "values": tuple(values)}
    return PeerModel(f"{title}, decode of 1 token after {length}", model, batch, decode)


def _vit(scale: str) -> PeerModel:
    from transformers import ViTConfig, ViTModel

    shapes: dict[str, dict[str, Any]] = {
        "tiny": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 3},
        "cpu": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16},
        "gpu": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16},
    }
    pixels, patch, images = {"tiny": (32, 8, 1), "cpu": (224, 16, 1), "gpu": (224, 14, 16)}[scale]
    model = ViTModel(ViTConfig(**shapes[scale], image_size=pixels, patch_size=patch), add_pooling_layer=False)
    batch = {"pixel_values": _normal(images, 3, pixels, pixels)}
    name = "ViT bigG/14 shape" if scale == "gpu" else "ViT"
    return PeerModel(f"{name}, {_size(model)}, {images}×3×{pixels}×{pixels}", model, batch)


def _clip(scale: str) -> PeerModel:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    towers = {  # width, layers and heads of the text tower, then of the vision tower; width shared by both; patch
        "tiny": ((128, 6, 2), (192, 6, 3), 64, 8),
        "cpu": ((512, 12, 8), (768, 12, 12), 512, 32),
        "gpu": ((1280, 32, 20), (1664, 48, 16), 1280, 14),
    }
    text, vision, shared, patch = towers[scale]
    pixels, count = {"tiny": (32, 2), "cpu": (224, 4), "gpu": (224, 16)}[scale]
    vocabulary = 1000 if scale == "tiny" else 49408
    config = CLIPConfig(
        text_config=_tower(CLIPTextConfig, text, vocab_size=vocabulary, eos_token_id=vocabulary - 1),
        vision_config=_tower(CLIPVisionConfig, vision, image_size=pixels, patch_size=patch),
        projection_dim=shared,
    )
    model = CLIPModel(config)
    batch = {
        "input_ids": _integers(vocabulary, count, 77),
        "pixel_values": _normal(count, 3, pixels, pixels),
        "attention_mask": torch.ones(count, 77, dtype=torch.int64),
    }
    return PeerModel(f"CLIP, two towers, {_size(model)}, {count} images and {count} texts", model, batch)


def _tower(kind: Callable[..., Any], shape: tuple[int, int, int], **rest: Any) -> dict[str, Any]:
    width, layers, heads = shape
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return dict(kind(intermediate_size=4 * width, **sizes, **rest).to_dict())


def _t5(scale: str) -> PeerModel:
    from transformers import T5Config, T5ForConditionalGeneration

    shapes: dict[str, dict[str, Any]] = {
        "tiny": {"d_model": 128, "d_ff": 512, "num_layers": 4, "num_heads": 4, "d_kv": 32, "vocab_size": 1000},
        "cpu": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "d_kv": 64, "vocab_size": 32128},
        "gpu": {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "d_kv": 64, "vocab_size": 32128},
    }
    source, target = {"tiny": (16, 4), "cpu": (128, 16), "gpu": (512, 64)}[scale]
    model = T5ForConditionalGeneration(T5Config(**shapes[scale]))
    vocabulary = shapes[scale]["vocab_size"]
    batch = {"input_ids": _integers(vocabulary, 1, source), "decoder_input_ids": _integers(vocabulary, 1, target)}
    title = f"T5, encoder and decoder, tied embeddings, {_size(model)}, {source} tokens to {target}"
    return PeerModel(title, model, batch, translate)


def _dit(scale: str) -> PeerModel:
    from diffusers import DiTTransformer2DModel

    heads, width, layers = {"tiny": (4, 32, 6), "cpu": (16, 64, 10), "gpu": (16, 144, 28)}[scale]
    side, count = {"tiny": (8, 1), "cpu": (32, 1), "gpu": (64, 4)}[scale]
    make: Any = DiTTransformer2DModel
    model: nn.Module = make(
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=layers,
        sample_size=side,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    batch = {
        "hidden_states": _normal(count, 4, side, side),
        "timestep": torch.full((count,), 500),
        "class_labels": _integers(1000, count),
    }
    return PeerModel(f"DiT, {_size(model)}, latents {count}×4×{side}×{side}", model, batch, denoise)


MODELS: dict[str, Callable[[str], PeerModel]] = {
    "llama-prefill": _llama_prefill,
    "llama-decode": _llama_decode,
    "vit": _vit,
    "clip": _clip,
    "t5": _t5,
    "dit": _dit,
}


@contextmanager
def _drawn_on(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Modules made inside have their weights there, of that dtype, from one seed."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0), device="cpu")


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """In the default dtype, as the model that is being made."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _size(model: nn.Module) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{count / 1e9:.2f} B parameters {dtype}" if count > 5e7 else f"{count / 1e6:.1f} M parameters {dtype}"
