"""Images and sounds for tiny models: random tensors of the shapes that the family's processor makes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import transformers
from tiny_families import IMAGE_TOKEN, TEXT_TOKENS
from torch import Tensor

IMAGE_SIZES = [(4, 8), (4, 4)]
"""Height and width in patches of two images, where a model takes images of any size. Rows and columns are merged."""
_TILES = 5
"""The whole image and four parts of it, where a model looks at both."""


def image_inputs(
    parameters: Collection[str], config: transformers.PreTrainedConfig, size: tuple[int, int]
) -> Iterator[dict[str, Tensor]]:
    """One image in every form that a function with these parameters may take: only calling it tells which one it is.

    Args:
        parameters: names of arguments; those that describe no image are left alone.
        config: that of the vision tower, for the sizes of patches and images.
        size: `(height, width)` in patches; models that take one size only get that one.
    """
    patch, length = _first(config, "patch_size", default=4), _first(config, "image_size", "max_image_size", default=32)
    channels = _first(config, "num_channels", "in_channels", default=3)
    frames = _first(config, "temporal_patch_size", "patch_temporal", default=1)
    height, width = size
    number = height * width
    columns, rows = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    described = {
        "grid_thw": torch.tensor([[1, height, width]]),
        "merge_sizes": torch.tensor([2]),
        "sizes": torch.tensor([[height * patch, width * patch]]),
        "position_ids": torch.stack([columns, rows], dim=-1).reshape(1, number, 2),
        "pixel_position_ids": torch.stack([columns, rows], dim=-1).reshape(1, number, 2),
        "spatial_shapes": torch.tensor([[height, width]]),
        "target_sizes": torch.tensor([[height, width]], dtype=torch.int32),
        "patch_attention_mask": torch.ones(1, length // patch, length // patch, dtype=torch.bool),
        "token_pooling": torch.arange(number).reshape(-1, 4),
        "grids": torch.tensor([[height // 2, width // 2, 0, 0]]),
        "num_crops": torch.ones(1, dtype=torch.long),
    }
    chosen = {name: described[name.removeprefix("image_")] for name in parameters if _describes(name, described)}
    kinds = {name.removeprefix("image_") for name in chosen}
    if kinds & {"grid_thw"}:
        flat = number, channels * frames * patch * patch
        shapes = [flat, (number, channels, patch, patch), (number, channels, frames, patch, patch)]
        shapes.append((1, number, channels, patch, patch))
    elif kinds & {"position_ids", "pixel_position_ids", "spatial_shapes"}:
        pooled = channels * (patch * _first(config, "pooling_kernel_size", default=1)) ** 2
        shapes = [(1, number, channels * patch * patch), (1, number, pooled)]
    elif "target_sizes" in kinds:
        shapes = [(1, channels, patch, number * patch)]
    elif "token_pooling" in kinds:
        shapes = [(1, (length // patch) ** 2, channels * patch * patch)]
    elif "pixel_attention_mask" in parameters:
        shapes = [(1, 1, channels, length, length), (1, channels, length, length)]
    else:
        shapes = [(1, channels, length, length), (1, _TILES, channels, length, length)]
        shapes += [(1, patches, channels * patch * patch) for patches in (number, (length // patch) ** 2)]
    if "pixel_attention_mask" in parameters and "spatial_shapes" in kinds:
        chosen["pixel_attention_mask"] = torch.ones(1, number, dtype=torch.long)
    pixels = "pixel_values" if "pixel_values" in parameters else "hidden_states"
    for shape in shapes:
        yield {pixels: torch.randn(shape), **chosen}
    if kinds == {"sizes"}:  # some read them only with another vision tower
        yield {pixels: torch.randn(shapes[0])}


def video_inputs(config: transformers.PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    length, channels = _first(config, "image_size", "crop_size", default=32), _first(config, "num_channels", default=3)
    frames = _first(config, "num_frames", "frames_per_clip", default=4)
    for name in ("pixel_values", "pixel_values_videos"):
        yield {name: torch.randn(2, frames, channels, length, length)}
        yield {name: torch.randn(2 * frames, channels, length, length)}


def sound_inputs(config: transformers.PreTrainedConfig) -> Iterator[dict[str, Tensor]]:
    """Two sounds in every form: bands by frames, frames by bands, or samples."""
    bands = _first(
        config, "num_mel_bins", "n_mels", "feature_projection_input_dim", "feature_size", "input_dim", default=80
    )
    frames = 2 * _first(config, "max_source_positions", default=32)
    is_sound = torch.arange(frames).expand(2, -1) < torch.tensor([[frames], [frames // 2]])
    for shape in ((2, bands, frames), (2, frames, bands), (2, frames, 2 * bands)):
        features = torch.randn(shape)
        yield {"input_features": features, "input_features_mask": is_sound.long()}
        yield {"input_features": features}
    for shape in ((2, 3200), (2, 1, 3200), (2, _first(config, "max_length", default=64), bands)):
        yield {"input_values": torch.randn(shape)}


def _describes(name: str, described: Collection[str]) -> bool:
    # `position_ids` without a prefix counts tokens.
    return name != "position_ids" and name.removeprefix("image_") in described


def _first(config: transformers.PreTrainedConfig, *names: str, default: int) -> int:
    value = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)
    return value[0] if isinstance(value, list | tuple) else value


def join_images(images: Sequence[dict[str, Tensor]], *, same_row: bool) -> dict[str, Tensor]:
    """The images of one row, or of several rows, as one batch.

    Most models take the images of all rows one after the other; those with `[rows, images, ...]` need to know the row.
    """
    pixels = [image.get("pixel_values", image.get("hidden_states")) for image in images]
    dimension = _dimension_of_images(images[0], pixels[0], same_row)
    joined = {name: _join([image[name] for image in images], name, dimension) for name in images[0]}
    if "image_token_pooling" in joined:
        starts = torch.tensor([0, *(math.prod(image.shape[:2]) for image in pixels[:-1])]).cumsum(0)
        pooling = [image["image_token_pooling"] + start for image, start in zip(images, starts)]
        joined["image_token_pooling"] = torch.cat(pooling)
    return joined


def _dimension_of_images(image: dict[str, Tensor], pixels: Tensor, same_row: bool) -> int:
    if "target_sizes" in image:  # [1, channels, patch, patches * patch]
        return 3
    if pixels.ndim == 5 and pixels.shape[0] == 1:
        has_patches, has_images = "grid_thw" in image, pixels.shape[1] == 1
        return int(has_patches or (has_images and same_row))
    return 0


def _join(tensors: Sequence[Tensor], name: str, dimension_of_pixels: int) -> Tensor:
    """Patches, their masks and positions are padded to those of the largest image."""
    if name in ("pixel_values", "hidden_states") and tensors[0].ndim > 3:
        return torch.cat(list(tensors), dim=dimension_of_pixels)
    if name in ("pixel_attention_mask", "image_position_ids", "pixel_position_ids") or tensors[0].ndim == 3:
        longest = max(tensor.shape[1] for tensor in tensors)
        fill = -1 if name.endswith("position_ids") else 0
        padding = [(0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]) for tensor in tensors]
        tensors = [torch.nn.functional.pad(tensor, sizes, value=fill) for tensor, sizes in zip(tensors, padding)]
    return torch.cat(list(tensors))


def with_images(texts: Sequence[int], lengths: Sequence[int]) -> dict[str, Tensor]:
    """A document `[1, S]`: `texts[0]` random tokens, the tokens of an image, `texts[1]` random tokens, and so on."""
    parts = [torch.randint(3, TEXT_TOKENS, (texts[0],))]
    for length, text in zip(lengths, texts[1:]):
        parts += [torch.full((length,), IMAGE_TOKEN), torch.randint(3, TEXT_TOKENS, (text,))]
    input_ids = torch.cat(parts)[None]
    return {"input_ids": input_ids, "token_type_ids": (input_ids == IMAGE_TOKEN).long()}


def tensors_of(output: Any) -> Tensor:
    """All that an encoder computes, `[values]`."""
    if isinstance(output, Tensor):
        return output.flatten()
    if isinstance(output, dict):
        return tensors_of([output[name] for name in ("last_hidden_state", "pooler_output") if name in output])
    values = [tensors_of(value) for value in output if value is not None]
    return torch.cat([value for value in values if value.is_floating_point()])
