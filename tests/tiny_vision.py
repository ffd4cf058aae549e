"""Tiny models of text and images with random weights, and the kinds of the tokens that they are called with."""

from __future__ import annotations

import inspect

import torch
import transformers
from tiny_models import config_of
from torch import Tensor

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOWER |= {"image_size": 8, "patch_size": 4}


MODELS = ("gemma3_images", "paligemma2", "qwen2_vl")


def build(name: str) -> transformers.PreTrainedModel:
    """A model in evaluation mode. The same weights at every call."""
    torch.manual_seed(1)
    if name == "gemma3_images":
        config = transformers.Gemma3Config(text_config=config_of("gemma3").to_dict(), vision_config=dict(_TOWER))
        model_class = transformers.Gemma3ForConditionalGeneration
    elif name == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text = config_of("llama", rope_parameters=rope).to_dict() | {"model_type": "qwen2_vl_text"}
        tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower)
        model_class = transformers.Qwen2VLForConditionalGeneration
    else:
        assert name == "paligemma2"
        config = transformers.PaliGemmaConfig(
            text_config=config_of("gemma2").to_dict(),
            vision_config=dict(_TOWER),
            projection_dim=32,
        )
        model_class = transformers.PaliGemmaForConditionalGeneration
    model = model_class._from_config(config, attn_implementation="flashmask").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_types(config: transformers.PreTrainedConfig, document: Tensor) -> Tensor:
    """Of two images that touch text on both sides; for PaliGemma of a prefix of two thirds of the document."""
    index, length = torch.arange(document.shape[1])[None], document.shape[1]
    if config.model_type == "paligemma":
        return (index >= 2 * length // 3).long()
    return ((index >= 1) & (index < 5) | (index >= 7) & (index < length - 3)).long()


def positions(document: Tensor) -> Tensor:
    """`[3, 1, S]`: time, height and width, with an image of three rows and two columns in long documents."""
    length = document.shape[1]
    if length < 10:
        return torch.arange(length).expand(3, 1, -1)
    image = torch.stack([torch.zeros(6, dtype=torch.long), torch.arange(6) // 2, torch.arange(6) % 2]) + 2
    return torch.cat([torch.arange(2).expand(3, -1), image, torch.arange(5, length - 3).expand(3, -1)], dim=1)[:, None]


def takes_shifted_labels(config: transformers.PreTrainedConfig) -> bool:
    """Whether the model hands them to its loss. Gemma 3 has not always done so."""
    forward = transformers.Gemma3ForConditionalGeneration.forward
    return config.model_type != "gemma3" or "self.loss_function(" in inspect.getsource(inspect.unwrap(forward))
