"""A tiny model of any family that Transformers knows, built from the defaults of its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import transformers

VOCABULARY = 97
TEXT_TOKENS, IMAGE_TOKEN = 88, 90
"""Tokens below `TEXT_TOKENS` are text; `IMAGE_TOKEN` is replaced by what a model sees in an image."""
WINDOW = 4

_SIZES: list[tuple[int | float, str]] = [
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size audio_vocab_size "
        "shape_vocab_size pronunciation_vocab_size",
    ),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len "
        "context_length rel_extent",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention "
        "keep_window_size",
    ),
    # Width of the residual stream, then of what multiplies it.
    (
        32,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim dim_model_base lru_width "
        "input_embedding_size output_embedding_size hidden_size_global pronunciation_embed_dim shape_embed_dim "
        "linear_attn_config backbone_hidden_size pred_hidden_size encoder_hidden_size projector_hidden_size "
        "adapter_in_dim adapter_out_dim",
    ),
    (
        48,
        "intermediate_size d_ff d_inner dff dim_ff ffn_dim decoder_ffn_dim encoder_ffn_dim feed_forward_size "
        "ffn_hidden_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size n_inner",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank "
        "router_hidden_size "
        "index_head_dim",
    ),
    (
        8,
        "head_dim attention_head_dim swa_head_dim kv_channels d_kv d_head dim_head qk_nope_head_dim qk_rope_head_dim "
        "rotary_dim index_topk hidden_size_per_layer_input query_pre_attn_scalar state_size mamba_d_state "
        "ssm_state_size "
        "time_step_rank mamba_dt_rank linear_key_head_dim linear_value_head_dim linear_head_dim laurel_rank d_rel "
        "mamba_head_dim mamba_d_head mamba_headdim gated_norm_rank adapter_rank attention_head_size global_head_dim",
    ),
    (12, "v_head_dim"),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads "
        "linear_num_heads index_n_heads block_size chunk_size mamba_chunk_size num_decoder_attention_heads "
        "num_encoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads "
        "encoder_num_key_value_heads decoder_num_key_value_heads frames_per_clip pred_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads num_hidden_layers n_layer "
        "n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k linear_num_key_heads zero_expert_num num_query_groups num_blocks "
        "kv_n_heads encoder_num_hidden_layers decoder_num_hidden_layers pred_num_hidden_layers",
    ),
    (1, "n_group n_groups topk_group num_expert_group n_shared_experts first_k_dense_replace num_dense_layers"),
    (0, "pad_token_id"),
    (IMAGE_TOKEN, "image_token_id image_token_index image_patch_id"),
    (91, "video_token_id video_token_index"),
    (92, "audio_token_id audio_token_index"),
    (93, "image_start_token_id vision_start_token_id boi_token_id boi_token_index image_start_id"),
    (94, "image_end_token_id vision_end_token_id eoi_token_id eoi_token_index image_end_id"),
    # Vision towers: 8 x 8 patches.
    (32, "image_size max_image_size crop_size"),
    (2, "pooling_kernel_size"),
    (4, "patch_size mm_tokens_per_image num_frames"),
    (64, "num_position_embeddings num_patches"),
    (8, "n_window pos_emb_height pos_emb_width position_embedding_size posemb_grid_size"),
    (2, "depth"),
    (32, "embed_dim out_hidden_size text_hidden_size projection_dim projection_hidden_size vision_output_dim"),
    (
        0.0,
        "attention_dropout hidden_dropout_prob attention_probs_dropout_prob dropout attn_pdrop resid_pdrop "
        "embd_pdrop activation_dropout",
    ),
]
_VALUES = {name: value for value, names in _SIZES for name in names.split()}
_ALWAYS_SET = {
    "pad_token_id",
    "sliding_window",
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "moe_intermediate_size",
    "image_token_id",
    "image_token_index",
}
"""Fields whose default may be None, which would turn off what is to be tested."""

_LAYER_COUNTERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"]
_MAX_LAYERS = 6

_SHARED_CACHE = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_WINDOWS_OF_IMAGES = {"window_size": 16, "fullatt_block_indexes": [1]}
_MULTIMODAL_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 503},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": 1e4}
            for layer_type in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note_text": {
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
    },
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {**_SHARED_CACHE, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0] * 2},
    "gemma4_text": _SHARED_CACHE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hrm_text": {"prefix_lm": False},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "cosmos3_edge_text": _MULTIMODAL_ROPE,
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "hunyuan_vl_text": _MULTIMODAL_ROPE,
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "glm4v_text": _MULTIMODAL_ROPE,
    "glm_ocr_text": _MULTIMODAL_ROPE,
    "paddleocr_vl_text": _MULTIMODAL_ROPE,
    "qwen2_5_omni_text": _MULTIMODAL_ROPE,
    "qwen2_5_vl_text": _MULTIMODAL_ROPE,
    "qwen2_vl_text": _MULTIMODAL_ROPE,
    "exaone4_5_vision": _WINDOWS_OF_IMAGES,
    "qwen2_5_omni_vision_encoder": _WINDOWS_OF_IMAGES,
    "qwen2_5_vl_vision": _WINDOWS_OF_IMAGES,
    "cohere_compass_vision": {"deepstack_visual_indexes": [0]},
    "granite_docling_vision": {"deepstack_visual_indexes": [0]},
    "qwen3_omni_moe_vision_encoder": {"deepstack_visual_indexes": [0]},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0]},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0]},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "glm4v_moe_text": {"head_dim": 16, **_MULTIMODAL_ROPE},
    "lfm2_vl": {"vision_config": {"vision_use_head": False}},
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "layers_block_type": None, "attn_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""What has no common name, must agree with something else, or is needed for a layer of every kind."""


def tiny_config(config_class: type[transformers.PreTrainedConfig], **settings: Any) -> transformers.PreTrainedConfig:
    """A configuration as the class makes it by default, with sizes of a few dozen and one layer of each kind.

    Args:
        settings: fields to set in the end, a dict for the configuration of a part.
    """
    default = config_class()
    settings = {**_FAMILIES.get(config_class.model_type, {}), **settings}
    fields = {field.name: _default_value(default, field.name) for field in dataclasses.fields(config_class)}
    changes = {name: _tiny_value(name, value) for name, value in fields.items() if name in _VALUES}
    if "kv_lora_rank" in fields:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    changes.update(_one_layer_of_each_kind(default, fields))
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if part is not None or name in settings:
            part_class = config_class.sub_configs[name] if part is None else type(part)
            changes[name] = tiny_config(part_class, **settings.pop(name, {}))
    changes.update(settings)
    return config_class(**changes)


def _default_value(default: transformers.PreTrainedConfig, name: str) -> Any:
    """Read past the attributes of configurations, some of which raise where layers differ."""
    return vars(default).get(default.attribute_map.get(name, name))


def _tiny_value(name: str, default: Any) -> Any:
    if default is None and name not in _ALWAYS_SET:
        return None
    value = _VALUES[name]
    if isinstance(default, list | tuple):
        return type(default)([value] * len(default))
    return type(default)(value) if type(default) in (int, float) else value


def _one_layer_of_each_kind(default: transformers.PreTrainedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The number of layers, and all lists with an entry for each layer."""
    counter = next((name for name in _LAYER_COUNTERS if isinstance(fields.get(name), int)), None)
    if counter is None:
        return {}
    lists = {
        name: value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == fields[counter]
    }
    kinds = {}
    for layer in range(fields[counter]):
        kinds.setdefault(tuple(str(value[layer]) for value in lists.values()), layer)
    layers = list(kinds.values())[:_MAX_LAYERS] if len(kinds) > 1 else [0, 1]
    return {counter: len(layers)} | {name: [value[layer] for layer in layers] for name, value in lists.items()}
