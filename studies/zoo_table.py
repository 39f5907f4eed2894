"""What the generic way does not find out about a model type: its configuration, class and inputs, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import ResNetConfig

from zoo_inputs import Maker


@dataclass(frozen=True)
class Entry:
    """Knobs of the configuration, nested ones by their name; the class; inputs, None for one to leave out.

    `widths`: whether the widths of layers can be changed; None tries both.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    class_name: str | None = None
    inputs: Mapping[str, Callable[[Maker], Any]] = field(default_factory=dict)
    widths: bool | None = None


GENERIC = Entry()

# Sections of rotary dimensions for time, height and width: together half a head of 16.
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_IN_TEXT = {"text_config": _ROPE}
_LAGS = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3]}
_SERIES: dict[str, Callable[[Maker], Any]] = {
    "past_values": lambda make: make.noise(make.size.rows, 19),
    "past_time_features": lambda make: make.noise(make.size.rows, 19, 1),
    "past_observed_mask": lambda make: make.noise(make.size.rows, 19) < 9,
    "future_values": lambda make: make.noise(make.size.rows, 8),
    "future_time_features": lambda make: make.noise(make.size.rows, 8, 1),
}
_MEL: dict[str, Callable[[Maker], Any]] = {"spectrogram": lambda make: make.noise(make.size.rows, 16, 80)}

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_HEADS = {"head_dim": 16, "num_key_value_heads": 4}
_RESNET_KNOBS: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_RESNET = ResNetConfig(**_RESNET_KNOBS)

TABLE: dict[str, Entry] = {
    **{
        name: Entry(config=_ROPE)
        for name in (
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen2_5_omni_talker", "glm4v_text"),
            *("glm_ocr_text", "glm_image_text", "paddleocr_vl_text", "cosmos3_edge_text"),
        )
    },
    **{
        name: Entry(config=_IN_TEXT)
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "glm4v",
            "glm46v",
            "glm_ocr",
            "glm_image",
            "paddleocr_vl",
            "cosmos3_edge",
        )
    },
    "glm4v_moe_text": Entry(config={"rope_parameters": {**_ROPE["rope_parameters"], "mrope_section": [1, 1, 2]}}),
    "autoformer": Entry(config={**_LAGS, "num_time_features": 1, "label_length": 4}, inputs=_SERIES),
    "informer": Entry(config={**_LAGS, "num_time_features": 1}, inputs=_SERIES),
    "time_series_transformer": Entry(config={**_LAGS, "num_time_features": 1}, inputs=_SERIES),
    "jamba": Entry(config={"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}),
    "bailing_hybrid": Entry(config={"layer_group_size": 2}),
    "mamba2": Entry(config={"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "bamba": Entry(config={"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1, 3]}),
    "falcon_h1": Entry(config={"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128}),
    "gpt_neo": Entry(config={"attention_types": [[["global", "local"], 2]]}),
    "deepseek_v2": Entry(config={"num_experts_per_tok": 2, "topk_method": "greedy"}),
    "efficientnet": Entry(config={"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640}),
    "fastspeech2_conformer_hifigan": Entry(inputs=_MEL),
    "speecht5_hifigan": Entry(inputs=_MEL),
    "decision_transformer": Entry(
        inputs={
            "states": lambda make: make.noise(make.size.rows, make.size.length, 17),
            "actions": lambda make: make.noise(make.size.rows, make.size.length, 4),
            "rewards": lambda make: make.noise(make.size.rows, make.size.length, 1),
            "returns_to_go": lambda make: make.noise(make.size.rows, make.size.length, 1),
            "timesteps": lambda make: make.ids(make.size.length) % 50,
        }
    ),
    **{
        name: Entry(config={"use_timm_backbone": False, "backbone": None, "backbone_config": _RESNET})
        for name in ("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")
    },
    **{name: Entry(config=_HEADS) for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron")},
    "esm": Entry(config={"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32}),
    "align": Entry(
        config={
            "projection_dim": 160,
            "vision_config": {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 160},
        }
    ),
    "align_vision_model": Entry(config={"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640}),
    "bit": Entry(config={"embedding_size": 64, "hidden_sizes": [64, 64, 128, 128], "num_groups": 2}),
    "blip_2_qformer": Entry(
        inputs={
            "query_embeds": lambda make: make.noise(make.size.rows, 5, 64),
            "encoder_hidden_states": lambda make: make.noise(make.size.rows, 9, 64),
        }
    ),
    "idefics2_perceiver": Entry(
        inputs={
            "context": lambda make: make.noise(make.size.rows, 9, 64),
            "attention_mask": lambda make: (make.noise(make.size.rows, 9) < 9).long(),
        }
    ),
    "timesfm": Entry(
        inputs={
            "past_values": lambda make: make.noise(make.size.rows, 512),
            "past_values_padding": lambda make: make.noise(make.size.rows, 512).mul(0).long(),
            "freq": lambda make: make.noise(make.size.rows, 1).mul(0).long(),
        }
    ),
    "bridgetower_vision_model": Entry(inputs={"image": lambda make: make.noise(make.size.rows, 3, 64, 64)}),
    "video_llama_3_vision": Entry(inputs={"merge_sizes": lambda make: make.grid()[:, 0] * 2}),
    "granitemoehybrid": Entry(config={**_MAMBA, "layer_types": ["mamba", "attention", "mamba", "attention"]}),
    "voxtral": Entry(config={"audio_token_id": 901}),
    "vipllava": Entry(config={"vision_feature_layers": [-2, -3]}),
    "xmod": Entry(config={"default_language": "en_XX"}),
    "vjepa2": Entry(
        config={"crop_size": 64, "frames_per_clip": 2, "pred_hidden_size": 64, "pred_num_attention_heads": 4}
    ),
}
