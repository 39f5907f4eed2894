"""A small configuration of any model type of transformers: the library's own defaults, with known knobs turned down.

Only what differs from the defaults is passed on, so that a configuration derives the rest itself (layer kinds, head
sizes). Nested configurations are shrunk alike and get the same widths, so that projections between them fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 1000
"""Ids from here on become special ids, counted up from `FIRST_SPECIAL_ID`."""

FIRST_SPECIAL_ID = 900

LAYERS = 4

_KNOBS: dict[int, tuple[str, ...]] = {
    1: ("n_group", "num_expert_group", "topk_group", "n_groups", "mamba_n_groups", "first_k_dense_replace"),
    2: (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k"),
        *("temporal_patch_size", "num_frames", "speech_decoder_postnet_layers", "resampler_depth"),
    ),
    4: (
        *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers", "depth", "encoder_layers"),
        *("decoder_layers", "num_encoder_layers", "num_decoder_layers", "conf_num_hidden_layers", "dec_layers"),
        *("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_blocks", "l_layers", "x_layers", "r_layers"),
        *("t2u_encoder_layers", "t2u_decoder_layers", "speech_encoder_layers", "num_spatial_layers"),
        *("num_temporal_layers", "num_auxiliary_layers", "folding_trunk_num_hidden_layers", "num_local_layers"),
        *("num_global_layers", "num_adapter_layers", "decoder_depth", "predictor_num_hidden_layers"),
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads"),
        *("decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"),
        *("conf_num_attention_heads", "cross_num_attention_heads", "mit_num_attention_heads", "index_n_heads"),
        *("t2u_encoder_attention_heads", "t2u_decoder_attention_heads", "speech_encoder_attention_heads"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "swa_num_attention_heads"),
        *("predictor_num_attention_heads", "resampler_n_heads", "resampler_heads", "num_sliding_attention_heads"),
        *("decoder_self_attention_heads", "decoder_cross_attention_heads", "mamba_num_heads", "num_global_heads"),
        *("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"),
        *(
            "mm_tokens_per_image",
            "num_register_tokens",
            "num_quantizers",
            "num_codebooks",
            "n_codebooks",
            "num_code_groups",
        ),
    ),
    8: ("qk_rope_head_dim", "rotary_dim", "index_topk", "d_rel"),
    16: (
        *("head_dim", "v_head_dim", "qk_nope_head_dim", "d_kv", "d_head", "linear_key_head_dim", "kv_channels"),
        *("linear_value_head_dim", "linear_head_dim", "swa_head_dim", "global_head_dim", "cross_head_dim"),
        *("attention_head_dim", "resampler_head_dim", "resampler_dim_head", "dim_head", "swa_v_head_dim"),
        *("swa_qk_head_dim", "index_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "mamba_head_dim"),
        *("patch_size", "num_query_tokens", "num_queries", "num_denoising", "conv_pos_kernel_size", "mamba_d_head"),
        *("num_conv_pos_embeddings", "num_latents", "resampler_n_latents", "resampler_num_latents", "chunk_size"),
        *("mamba_chunk_size", "latent_query_num", "local_attention", "sliding_window", "attention_chunk_size"),
    ),
    32: ("kv_lora_rank", "q_lora_rank", "time_step_rank", "mamba_dt_rank", "o_lora_rank", "qk_head_dim"),
    64: (
        *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "embedding_size", "embedding_dim"),
        *("encoder_hidden_size", "decoder_hidden_size", "text_hidden_size", "vision_hidden_size", "output_dim"),
        *("out_hidden_size", "projection_dim", "projector_hidden_size", "audio_hidden_size", "hidden_dim"),
        *("word_embed_proj_dim", "image_text_hidden_size", "cross_hidden_size", "backbone_hidden_size"),
        *("hidden_size_global", "patch_embed_hidden_size", "speech_encoder_hidden_size", "mit_hidden_size"),
        *("vision_output_dim", "projector_input_dim", "projector_output_dim", "adapter_in_dim", "adapter_out_dim"),
        *("adapter_input_size", "output_hidden_size", "entity_emb_size", "project_dim", "image_size", "n_inner"),
        *("fusion_hidden_size", "encoder_hidden_dim", "mask_feature_size", "fpn_hidden_size", "feature_size"),
        *("fpn_feature_size", "memory_attention_hidden_size", "attention_hidden_size", "image_token_embed_dim"),
        *("pooler_output_size", "pooler_hidden_size", "projection_hidden_size", "lm_hidden_size", "aux_hidden_size"),
        *("moe_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_size", "pretrain_image_size"),
        *("shared_expert_intermediate_size", "output_channels", "classifier_proj_size", "mamba_d_ssm"),
        *("vector_quantization_hidden_dimension", "subsampling_conv_channels", "share_expert_dim"),
        *("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "hidden_size_per_layer_input"),
    ),
    128: (
        *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim", "d_ff", "d_inner"),
        *("ffn_hidden_size", "shared_intermediate_size", "decoder_intermediate_size", "dim_feedforward"),
        *("encoder_feedforward_dim", "mit_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"),
        *("speech_encoder_intermediate_size", "encoder_linear_units", "decoder_linear_units", "dff", "dim_ff"),
        *("projection_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "projector_ffn_dim"),
        *("entity_vocab_size", "memory_attention_feed_forward_hidden_size", "encoder_intermediate_size"),
        *("projection_intermediate_dim", "alignment_intermediate_size", "moe_hidden_size", "conv_output_size"),
        *("upsample_initial_channel", "codebook_size", "input_vocab_size", "output_vocab_size", "spec_size"),
        *("base_channels", "quantization_dim", "max_source_positions"),
    ),
    256: ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx"),
    VOCABULARY: (
        *("vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "text_vocab_size"),
        *("audio_vocab_size", "t2u_vocab_size", "unit_hifi_gan_vocab_size", "vocab_size_per_layer_input"),
        *("vision_vocab_size", "unpadded_vocab_size", "num_embeddings", "char_vocab_size", "num_hash_buckets"),
        *("encoder_hash_byte_group_vocab", "ngram_vocab_size_base", "head_out_channels", "num_bpe_labels"),
        *("num_wordpiece_labels", "vocab_size_image", "num_embeds"),
    ),
}
SMALL = {name: value for value, names in _KNOBS.items() for name in names}

_NOT_WIDTHS = ("image_size", "pretrain_image_size", "num_queries", "num_denoising", "max_source_positions", "spec_size")
WIDTHS_KEPT = {name for name, value in SMALL.items() if value in (8, 16, 32, 64, 128)} - set(_NOT_WIDTHS)
"""Knobs that stay as they are where a family's widths cannot be changed one by one."""

_KEY_VALUE_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "cross_num_key_value_heads", "n_head_kv"),
    *("encoder_num_key_value_heads", "decoder_num_key_value_heads", "num_global_key_value_heads"),
)
_REPEATS = {
    "depths",
    "num_block_repeats",
    "stage_num_blocks",
    "blocks_per_stage",
    "stage_numb_of_layers",
    "block_sizes",
}
_HEADS_PER_STAGE = {"num_heads", "num_attention_heads", "num_attention_heads_per_stage"}
_CHANNELS_PER_STAGE = {"hidden_sizes", "neck_hidden_sizes", "conv_dim"}
MOST_CHANNELS = 256

Overrides = Mapping[str, Any]


def shrunk(default: PreTrainedConfig, overrides: Overrides, *, widths: bool) -> PreTrainedConfig:
    """A small configuration of the class of `default`.

    `overrides` gives values by knob, those of a nested configuration under its name. Without `widths` only depth,
    vocabulary and the numbers of experts shrink.
    """
    specials = sorted({name for name, _ in _special_ids(default)})
    return _shrunk(default, overrides, {name: FIRST_SPECIAL_ID + index for index, name in enumerate(specials)}, widths)


def _shrunk(
    default: PreTrainedConfig, overrides: Overrides, specials: Mapping[str, int], widths: bool
) -> PreTrainedConfig:
    changed: dict[str, Any] = {}
    usual = vars(type(default)())  # a nested configuration may differ from what its class would choose
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            inner = overrides.get(name, {})
            changed[name] = _shrunk(value, inner, specials, widths) if isinstance(inner, Mapping) else inner
        elif name not in overrides and isinstance(value, list | tuple | int | float | str):
            small = value
            if _is_special(name, value):
                small = specials[name]
            elif widths or name not in WIDTHS_KEPT:
                small = _small_list(name, value) if isinstance(value, list | tuple) else _small(name, value, default)
            if small != value or (name in usual and value != usual[name] and _is_free(name, value)):
                changed[name] = small
    changed.update({name: value for name, value in overrides.items() if name not in changed})
    return _made(default, changed)


def _is_free(name: str, value: Any) -> bool:
    """Whether a value may be passed on as it is: no entry per layer, nothing that the library keeps for itself."""
    return not isinstance(value, list | tuple) and not name.startswith("_") and name != "transformers_version"


def _made(default: PreTrainedConfig, changed: dict[str, Any]) -> PreTrainedConfig:
    """With lists that have an entry per layer cut, if the configuration does not derive them from its depth."""
    old = {len(value) for name, value in vars(default).items() if name == "layer_types" and value}
    old |= {value for name, value in vars(default).items() if SMALL.get(name) == LAYERS and isinstance(value, int)}
    cut = {
        name: _every_kind(value)
        for name, value in vars(default).items()
        if isinstance(value, list | tuple) and len(value) > LAYERS and len(value) in old and name not in changed
    }
    cut = {name: value for name, value in cut.items() if not name.startswith("_") and name != "stage_names"}
    make: Callable[..., PreTrainedConfig] = type(default)
    try:
        made = make(**changed)
    except (ValueError, IndexError, TypeError):
        return make(**changed, **cut)
    stale = {name: value for name, value in cut.items() if len(getattr(made, name, ())) != len(value)}
    return make(**changed, **stale) if stale else made


def _every_kind(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """`LAYERS` entries, with as many of the kinds among `values` as fit, in their order."""
    kinds = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return [*kinds[:LAYERS], *values[: max(0, LAYERS - len(kinds))]]


def _small(name: str, value: Any, config: PreTrainedConfig) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _KEY_VALUE_HEADS:
        heads = getattr(config, "num_attention_heads", None)
        return value if value == 1 else 4 if value == heads else 2
    if name == "head_dim" and value == getattr(config, "qk_rope_head_dim", None):
        name = "qk_rope_head_dim"
    return min(value, SMALL.get(name, value))


def _small_list(name: str, values: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    if not values or not all(type(value) is int for value in values):
        return values
    kind = type(values)
    if name in _REPEATS:
        return kind(min(value, 2) for value in values)
    if name in _HEADS_PER_STAGE and values[0] > 1 and all(value % values[0] == 0 for value in values):
        return kind(value // values[0] for value in values)
    if name in _CHANNELS_PER_STAGE:
        while max(values) > MOST_CHANNELS and all(value % 16 == 0 for value in values):
            values = kind(value // 2 for value in values)
    if name == "image_size":
        return kind(64 for _ in values)
    return values


def _special_ids(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _special_ids(value)
        elif _is_special(name, value):
            yield name, value


def _is_special(name: str, value: Any) -> bool:
    named = name.endswith(("_token_id", "_token_index", "_start_id", "_end_id", "_bos_id", "_eos_id", "_newline_id"))
    return named and isinstance(value, int) and value >= FIRST_SPECIAL_ID
