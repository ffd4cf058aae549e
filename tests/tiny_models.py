"""Tiny models of many architectures with random weights, and what they compute on each document alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

import hf_flashmask  # noqa: F401  (registers the implementation)

VOCABULARY = 97
WINDOW = 4

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

_ARCHITECTURES: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 12}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        # A softcap small enough to bend the scores of random weights.
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, **_HYBRID},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 8, **_HYBRID}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **_HYBRID},
    ),
    "afmoe": (
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_dense_layers": 1, **_EXPERTS, **_HYBRID},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "head_dim": 8,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
        },
    ),
    # Values are narrower than queries and keys.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **_EXPERTS,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {"num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
}
DECODERS = [name for name in _ARCHITECTURES if name != "bert"]
MODELS = [*DECODERS, "bert"]
WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss", "afmoe", "llama4"]


def config_of(name: str, **changes: object) -> transformers.PreTrainedConfig:
    _, config_class, settings = _ARCHITECTURES[name]
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if name == "bert":
        common.update({key: _DECODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")})
    elif name != "gpt2":
        common = dict(_DECODER)
    settings = {
        key: value for key, value in {**common, **settings, **changes}.items() if value is not None or key in common
    }
    return getattr(transformers, config_class)(**settings)


ROPE = {"rope_theta": 1e4, "factor": 4.0}


def longrope(original_length: int) -> dict[str, object]:
    """Changes to the configuration of a model: its rotary embeddings depend on the largest position of a call."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = ROPE | factors | {"rope_type": "longrope", "original_max_position_embeddings": original_length}
    return {"max_position_embeddings": 128, "rope_parameters": rope}


def dynamic_rope(original_length: int) -> dict[str, object]:
    return {"max_position_embeddings": original_length, "rope_parameters": ROPE | {"rope_type": "dynamic"}}


def build(name: str, attn_implementation: str = "flashmask", **changes: object) -> transformers.PreTrainedModel:
    """A model in evaluation mode whose attention is far from uniform. The same weights at every call."""
    torch.manual_seed(1)
    model_class = getattr(transformers, _ARCHITECTURES[name][0])
    model = model_class._from_config(config_of(name, **changes), attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def eager_twin(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same weights under Transformers' own dense attention."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def random_documents(lengths: Sequence[int]) -> list[Tensor]:
    """Token ids `[1, length]` each; 0 is left for padding."""
    return [torch.randint(1, VOCABULARY, (1, length)) for length in lengths]


def logits_alone(twin: transformers.PreTrainedModel, documents: Sequence[Tensor]) -> Tensor:
    """Logits `[1, tokens, vocabulary]` of every document in a call of its own, one after the other."""
    return torch.cat([twin(document).logits for document in documents], dim=1)


def packed(documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """One row with all documents, as DataCollatorWithFlattening makes it."""
    positions = [torch.arange(document.shape[1]) for document in documents]
    return {"input_ids": torch.cat(list(documents), dim=1), "position_ids": torch.cat(positions)[None]}


def cumulative_lengths(documents: Sequence[Tensor]) -> Tensor:
    lengths = torch.tensor([0, *(document.shape[1] for document in documents)])
    return lengths.cumsum(0, dtype=torch.int32)


def padded(documents: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """One row per document, padded on `side`, with the positions that `generate` counts."""
    longest = max(document.shape[1] for document in documents)
    input_ids = torch.zeros(len(documents), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, document in enumerate(documents):
        length = document.shape[1]
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        input_ids[row, place] = document[0]
        attention_mask[row, place] = 1
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
