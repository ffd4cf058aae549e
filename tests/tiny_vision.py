"""Tiny models of text and images with random weights, and what they are called with: images, kinds of tokens."""

from __future__ import annotations

import inspect
import re

import torch
import transformers
from tiny_models import VOCABULARY, config_of
from torch import Tensor

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOWER |= {"image_size": 8, "patch_size": 4}
_QWEN_TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
IMAGE_TOKEN = VOCABULARY - 1

MODELS = ("gemma3_images", "paligemma2", "qwen2_vl", "qwen3_vl", "llava")


def build(name: str) -> transformers.PreTrainedModel:
    """A model in evaluation mode. The same weights at every call."""
    torch.manual_seed(1)
    if name == "gemma3_images":
        text = config_of("gemma3").to_dict()
        images = {"image_token_index": IMAGE_TOKEN, "mm_tokens_per_image": 4}
        config = transformers.Gemma3Config(text_config=text, vision_config=dict(_TOWER), **images)
        model_class = transformers.Gemma3ForConditionalGeneration
    elif name == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text = config_of("llama", rope_parameters=rope).to_dict() | {"model_type": "qwen2_vl_text"}
        tower = _QWEN_TOWER | {"embed_dim": 16, "mlp_ratio": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, image_token_id=IMAGE_TOKEN)
        model_class = transformers.Qwen2VLForConditionalGeneration
    elif name == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        text = config_of("qwen3", head_dim=8, rope_parameters=rope).to_dict() | {"model_type": "qwen3_vl_text"}
        tower = _QWEN_TOWER | {"intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 16}
        tower |= {"deepstack_visual_indexes": [0, 1]}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, image_token_id=IMAGE_TOKEN)
        model_class = transformers.Qwen3VLForConditionalGeneration
    elif name == "llava":
        text, tower = config_of("llama"), transformers.CLIPVisionConfig(**_TOWER | {"num_hidden_layers": 2})
        config = transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_id=IMAGE_TOKEN)
        model_class = transformers.LlavaForConditionalGeneration
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


def with_image_tokens(config: transformers.PreTrainedConfig, document: Tensor) -> Tensor:
    """The document, where its third token and some more are those of an image if it is long enough for one."""
    tokens, index = document.clamp(max=IMAGE_TOKEN - 1), torch.arange(document.shape[1])[None]
    is_image = (index >= 2) & (index < 2 + image_length(config)) & (document.shape[1] >= 10)
    return tokens.masked_fill(is_image, IMAGE_TOKEN)


def image_length(config: transformers.PreTrainedConfig) -> int:
    return 6 if config.model_type.startswith("qwen") else 4


def with_image(config: transformers.PreTrainedConfig, tokens: Tensor) -> dict[str, Tensor]:
    """What a model is called with beside the tokens of a document: what kind they are of, and the image."""
    call, is_image = {}, tokens == IMAGE_TOKEN
    if config.model_type != "llava":
        name = "token_type_ids" if config.model_type == "gemma3" else "mm_token_type_ids"
        call[name] = is_image.long()
    if is_image.any() and config.model_type.startswith("qwen"):  # of six rows and four columns of patches
        call |= {"pixel_values": torch.randn(24, 96), "image_grid_thw": torch.tensor([[1, 6, 4]])}
    elif is_image.any():
        call["pixel_values"] = torch.randn(1, 3, 8, 8)
    return call


def positions(document: Tensor) -> Tensor:
    """`[3, 1, S]`: time, height and width, with an image of three rows and two columns in long documents."""
    length = document.shape[1]
    if length < 10:
        return torch.arange(length).expand(3, 1, -1)
    image = torch.stack([torch.zeros(6, dtype=torch.long), torch.arange(6) // 2, torch.arange(6) % 2]) + 2
    return torch.cat([torch.arange(2).expand(3, -1), image, torch.arange(5, length - 3).expand(3, -1)], dim=1)[:, None]


def takes_shifted_labels(config: transformers.PreTrainedConfig) -> bool:
    """Whether the model hands them to its loss. Gemma 3 and Qwen3-VL have not always done so."""
    model_class = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    source = inspect.getsource(inspect.unwrap(model_class.forward))
    return re.search(r"self\.loss_function\([^#]*?\*\*kwargs", source) is not None
