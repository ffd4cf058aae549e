"""Runs every family of models that can be built tiny, flashmask beside eager; writes docs/models.json and models.md.

`make sweep`, or `python tests/sweep_models.py llama gemma2` to see some families without writing anything.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import inspect
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny_families import TEXT_TOKENS, WINDOW, tiny_config
from tiny_media import (
    IMAGE_SIZES,
    image_inputs,
    join_images,
    sound_inputs,
    tensors_of,
    video_inputs,
    with_images,
)
from tiny_models import packed, padded
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.auto import modeling_auto

from hf_flashmask import integration

DOCS = Path(__file__).resolve().parent.parent / "docs"
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of the truth (or to 1), that is float32 rounding."""
GRADIENT_TOLERANCE = 1e-3
"""The same relative to the largest value of each parameter's gradient. Eager is 2e-4 off float64 in Gemma 4."""


class Family(NamedTuple):
    """One architecture, under the name that `config.json` gives it."""

    name: str
    kind: str
    model_class: type[transformers.PreTrainedModel]


_MAPPINGS = {
    "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    "multimodal": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}


def families() -> list[Family]:
    found: dict[type, Family] = {}
    for kind, mapping in _MAPPINGS.items():
        for _, model_class in mapping.items():
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            is_encoder_decoder = model_class.config_class.is_encoder_decoder
            if kind in ("encoder", "multimodal") and is_encoder_decoder:
                continue
            # Models of speech are listed as encoder-decoders.
            own_kind = "multimodal" if kind == "encoder-decoder" and not is_encoder_decoder else kind
            found.setdefault(model_class, Family(model_class.config_class.model_type, own_kind, model_class))
    images = [
        Family(family.name, "images", family.model_class)
        for family in found.values()
        if family.kind != "encoder" and _takes_images(family.model_class)
    ]
    return [*found.values(), *images, *_encoders()]


def _takes_images(model_class: type) -> bool:
    return "pixel_values" in inspect.signature(model_class.forward).parameters


_MEDIA = {
    "pixel_values",
    "pixel_values_videos",
    "hidden_states",
    "input_features",
    "input_values",
}
_PARTS_OF_MEDIA = {
    *("grid_thw", "image_grid_thw", "image_sizes", "merge_sizes", "target_sizes", "spatial_shapes"),
    *("pixel_position_ids", "pixel_attention_mask", "patch_attention_mask", "input_features_mask"),
}
_LEFT_ALONE = {
    *("attention_mask", "bool_masked_pos", "interpolate_pos_encoding", "kwargs"),
    *("mask_time_indices", "noise", "output_attention_mask", "output_attentions", "output_hidden_states"),
    *("padding_mask", "return_dict", "self", "skip_predictor", "use_vit_merger", "context_mask", "target_mask"),
}
"""Arguments of encoders that may be left out."""


def _encoders() -> list[Family]:
    """Encoders of images, video and sound: models of their own, and the parts of others."""
    found: dict[str, Family] = {}
    for model_class in _all_models():
        if model_class.config_class is None or model_class.config_class.model_type in found:
            continue
        parameters = set(inspect.signature(model_class.forward).parameters)
        media = parameters & _MEDIA
        is_known = parameters <= _MEDIA | _PARTS_OF_MEDIA | _LEFT_ALONE
        if not media or not is_known or (media == {"hidden_states"} and "grid_thw" not in parameters):
            continue
        if re.search(r"^class \w*Attention", inspect.getsource(sys.modules[model_class.__module__]), re.MULTILINE):
            kind = "sound encoder" if media & {"input_features", "input_values"} else "image encoder"
            found[model_class.config_class.model_type] = Family(model_class.config_class.model_type, kind, model_class)
    return list(found.values())


def _all_models() -> Iterator[type[transformers.PreTrainedModel]]:
    modules = {}
    for mapping in (modeling_auto.MODEL_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for config_class in mapping:
            # Some names are of classes that do not exist, or need another library.
            with contextlib.suppress(ValueError, ImportError):
                model_class = mapping[config_class]
                model_class = model_class[0] if isinstance(model_class, tuple) else model_class
                reads_text = model_class.main_input_name == "input_ids"
                modules[sys.modules[model_class.__module__]] = None
                if not reads_text:
                    yield model_class
    for module in modules:
        for model_class in reversed(vars(module).values()):  # a wrapper comes after what it wraps
            is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
            if is_model and re.search(r"(Vision|Audio)\w*(Model|Encoder|Transformer)$|Encoder$", model_class.__name__):
                yield model_class


# Building


def config_of(family: Family) -> transformers.PreTrainedConfig:
    config = tiny_config(family.model_class.config_class)
    if family.kind == "decoder" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def build(family: Family) -> transformers.PreTrainedModel:
    """An eager model in evaluation mode whose attention is far from uniform. The same weights at every call."""
    torch.manual_seed(1)
    model = family.model_class._from_config(config_of(family), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


# Scenarios: each gives what flashmask computes, the truth, and what eager computes from the same inputs


class Runs(NamedTuple):
    ours: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    eager: Callable[[], Tensor]
    tolerance: float = TOLERANCE


class Outcome(NamedTuple):
    """How one scenario ended.

    Attributes:
        status: "exact"; "as eager" when eager computes the same, though it is not the truth; "differs"; "error" when
            only flashmask raised; "impossible" when eager cannot do it either, or the model has no such input.
        detail: the difference from the truth, or the error.
        eager_is_exact: whether eager computes the truth from the same inputs.
    """

    status: str
    detail: str = ""
    eager_is_exact: bool = False


_NO_SUCH_INPUT = "no such input"
LENGTHS = [5, 1, 8, 6]
TEXT_SCENARIOS = [
    "plain",
    "gradients",
    "packed",
    "packed, cache",
    "left padding",
    "right padding",
    "generate",
    "static cache",
]
SCENARIOS = {
    "decoder": TEXT_SCENARIOS,
    "encoder": TEXT_SCENARIOS,
    "encoder-decoder": TEXT_SCENARIOS,
    "multimodal": TEXT_SCENARIOS,
    "images": ["plain", "gradients", "packed", "packed, cache", "left padding", "generate", "static cache"],
    "image encoder": ["plain", "gradients", "packed"],
    "sound encoder": ["plain", "gradients"],
}
"""What is compared for each kind of family."""


class Pair:
    """A model under flashmask and under eager, with the same weights, and what both are run on."""

    def __init__(self, family: Family, eager: transformers.PreTrainedModel) -> None:
        self.family, self.eager = family, eager
        self.ours = copy.deepcopy(eager)
        self.ours.set_attn_implementation(integration.NAME)
        torch.manual_seed(2)

    def runs(self, scenario: str) -> Runs | None:
        """What to compare, or None where the family has no such inputs."""
        raise NotImplementedError

    def _same_call(self, call: Callable[[transformers.PreTrainedModel], Tensor]) -> Runs:
        """Eager is the truth."""
        return Runs(lambda: call(self.ours), lambda: call(self.eager), lambda: call(self.eager))

    def _gradients(self, call: Callable[[transformers.PreTrainedModel], Tensor]) -> Runs:
        """Of all parameters, each relative to its own size: those of a random function of what `call` computes."""
        seed = int(torch.randint(1000, ()))

        def gradients(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
            model.zero_grad()
            with torch.enable_grad():
                values = call(model)
                generator = torch.Generator().manual_seed(seed)
                (values * torch.randn(values.shape[-1], generator=generator)).sum().backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

        @functools.cache
        def scales() -> dict[str, float]:
            largest = {name: float(gradient.abs().max()) for name, gradient in gradients(self.eager).items()}
            return {name: max(value, 1e-3 * max(largest.values())) for name, value in largest.items()}

        def relative(model: transformers.PreTrainedModel) -> Tensor:
            return torch.cat([gradient.flatten() / scales()[name] for name, gradient in gradients(model).items()])

        return self._same_call(relative)._replace(tolerance=GRADIENT_TOLERANCE)

    def _generate(self, inputs: dict[str, Any], **arguments: Any) -> Runs:
        arguments = {
            **inputs,
            "max_new_tokens": 2 * WINDOW,
            "do_sample": False,
            "pad_token_id": 0,
            "use_cache": True,
            "return_dict_in_generate": True,
            "output_logits": True,
            **arguments,
        }
        # Greedy: the logits of two steps agree only if the tokens before them do.
        return self._same_call(lambda model: torch.stack(model.generate(**arguments).logits))


class TextPair(Pair):
    """Given random tokens."""

    def __init__(self, family: Family, eager: transformers.PreTrainedModel) -> None:
        super().__init__(family, eager)
        self.documents = [torch.randint(3, TEXT_TOKENS, (1, length)) for length in LENGTHS]
        self.is_encoder_decoder = family.kind == "encoder-decoder"
        self.takes_positions = not self.is_encoder_decoder and self._takes_positions()

    def _takes_positions(self) -> bool:
        if "position_ids" in inspect.signature(self.eager.forward).parameters:
            return True
        tokens, positions = self.documents[0], torch.arange(LENGTHS[0])[None]
        values = [_attempt(lambda p=p: self.eager(tokens, position_ids=p).logits) for p in (positions, 2 * positions)]
        return not isinstance(values[0], str) and _difference(values[1], values[0]) > TOLERANCE

    def logits(self, model: transformers.PreTrainedModel, **inputs: Any) -> Tensor:
        if not self.takes_positions:
            inputs.pop("position_ids", None)
        if self.is_encoder_decoder:
            rows = inputs["input_ids"].shape[0]
            inputs["decoder_input_ids"] = torch.arange(5, 5 + 7).expand(rows, -1)
        return model(**inputs).logits

    def runs(self, scenario: str) -> Runs | None:
        runs: dict[str, Callable[[], Runs | None]] = {
            "plain": lambda: self._same_call(self._random_call()),
            "gradients": lambda: self._gradients(self._random_call()),
            "packed": lambda: self._packed(**({} if self.family.kind == "encoder" else {"use_cache": False})),
            "packed, cache": lambda: self._packed(use_cache=True),
            "left padding": lambda: self._padded("left"),
            "right padding": lambda: self._padded("right"),
            "generate": self._generate_from_padded,
            "static cache": lambda: self._generate_from_padded(cache_implementation="static"),
        }
        needs_cache = scenario in ("packed, cache", "generate", "static cache")
        return None if needs_cache and self.family.kind == "encoder" else runs[scenario]()

    def _random_call(self) -> Callable[[transformers.PreTrainedModel], Tensor]:
        tokens = torch.randint(3, TEXT_TOKENS, (2, 20))
        return lambda model: self.logits(model, input_ids=tokens)

    def _packed(self, **arguments: Any) -> Runs | None:
        if not self.takes_positions:
            return None
        row = {**packed(self.documents), **arguments}

        def alone() -> Tensor:
            return torch.cat([self._alone(document) for document in self.documents], dim=1)

        return Runs(lambda: self.logits(self.ours, **row), alone, lambda: self.logits(self.eager, **row))

    def _alone(self, document: Tensor) -> Tensor:
        positions = torch.arange(document.shape[1])[None]
        return self.logits(self.eager, input_ids=document, position_ids=positions)

    def _padded(self, side: str) -> Runs:
        batch = padded(self.documents, side)
        tokens = torch.ones(len(LENGTHS), 7, dtype=torch.bool)
        if not self.is_encoder_decoder:
            tokens = batch["attention_mask"].bool()

        def alone() -> Tensor:
            return torch.cat([self._alone(document)[0] for document in self.documents])

        ours, eager = (
            (lambda: self.logits(self.ours, **batch)[tokens]),
            (lambda: self.logits(self.eager, **batch)[tokens]),
        )
        return Runs(ours, alone, eager)

    def _generate_from_padded(self, **arguments: Any) -> Runs:
        batch = padded(self.documents, "right" if self.is_encoder_decoder else "left")
        del batch["position_ids"]
        if self.is_encoder_decoder:
            arguments["decoder_start_token_id"] = 1
        return self._generate(batch, **arguments)


class ImagePair(Pair):
    """Given documents of text and two images each."""

    def __init__(self, family: Family, eager: transformers.PreTrainedModel) -> None:
        super().__init__(family, eager)
        self.parameters = set(inspect.signature(eager.forward).parameters)
        self.model = eager if hasattr(eager, "get_rope_index") else eager.base_model
        self.has_axes = hasattr(self.model, "get_rope_index")
        """Whether the positions in an image have several axes."""
        # The first ends with an image, the second begins with one: in a packed row the two touch.
        self.documents = [self._document((3, 2, 0), IMAGE_SIZES), self._document((0, 4, 3), IMAGE_SIZES[::-1])]

    def _document(self, texts: tuple[int, ...], sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """The arguments of a call, `[1, S]`, and its images."""
        images, lengths = zip(*(self._image(size) for size in sizes))
        document = with_images(texts, lengths)
        types = document.pop("token_type_ids")
        for name in {"token_type_ids", "mm_token_type_ids"} & self.parameters:
            document[name] = types
        return {**document, **join_images(images, same_row=True)}

    def _image(self, size: tuple[int, int]) -> tuple[dict[str, Tensor], int]:
        """One image, and the number of tokens that it takes."""
        model = self.eager.base_model if hasattr(self.eager.base_model, "get_image_features") else self.eager
        get_features = model.get_image_features
        config = getattr(self.eager.config, "vision_config", None) or self.eager.config
        errors = []
        for image in image_inputs(set(inspect.signature(get_features).parameters), config, size):
            features = _attempt(lambda image=image: _features(get_features(**image)))
            if not isinstance(features, str):
                return image, features.numel() // self.eager.get_input_embeddings().weight.shape[1]
            errors.append(features)
        raise ValueError(f"takes none of the images: {errors}")

    def runs(self, scenario: str) -> Runs | None:
        rows = join_documents(self.documents, "left")
        runs: dict[str, Callable[[], Runs | None]] = {
            "plain": lambda: self._same_call(self._random_call()),
            "gradients": lambda: self._gradients(self._random_call()),
            "packed": lambda: self._packed(use_cache=False),
            "packed, cache": lambda: self._packed(use_cache=True),
            "left padding": lambda: self._padded(rows),
            "generate": lambda: self._generate(rows),
            "static cache": lambda: self._generate(rows, cache_implementation="static"),
        }
        return runs[scenario]()

    def _random_call(self) -> Callable[[transformers.PreTrainedModel], Tensor]:
        lengths = (2, 3, 4), (5, 3, 1)
        rows = join_documents([self._document(texts, IMAGE_SIZES) for texts in lengths])
        return lambda model: model(**rows).logits

    def _packed(self, **arguments: Any) -> Runs | None:
        if "position_ids" not in self.parameters:
            return None
        row = {**join_documents(self.documents, same_row=True), **arguments}

        def logits(model: transformers.PreTrainedModel) -> Tensor:
            positions = torch.cat([self._positions(document) for document in self.documents], dim=-1)
            return model(**row, position_ids=positions).logits

        def alone() -> Tensor:
            return torch.cat([self.eager(**document).logits for document in self.documents], dim=1)

        return Runs(lambda: logits(self.ours), alone, lambda: logits(self.eager))

    def _positions(self, document: dict[str, Tensor]) -> Tensor:
        """`[1, S]`, or `[4, 1, S]`: where positions have three axes, the tokens are counted before."""
        length = document["input_ids"].shape[1]
        counted = torch.arange(length)[None]
        if not self.has_axes:
            return counted
        known = set(inspect.signature(self.model.get_rope_index).parameters)
        arguments = {name: value for name, value in document.items() if name in known}
        axes, _ = self.model.get_rope_index(**arguments, attention_mask=torch.ones(1, length, dtype=torch.long))
        return torch.cat([counted[None], axes])

    def _padded(self, rows: dict[str, Tensor]) -> Runs:
        tokens = rows["attention_mask"].bool()
        rows = dict(rows)
        if not self.has_axes and "position_ids" in self.parameters:
            rows["position_ids"] = (rows["attention_mask"].cumsum(-1) - 1).clamp(min=0)

        def alone() -> Tensor:
            return torch.cat([self.eager(**document).logits[0] for document in self.documents])

        ours, eager = (lambda: self.ours(**rows).logits[tokens]), (lambda: self.eager(**rows).logits[tokens])
        return Runs(ours, alone, eager)


def _features(output: Any) -> Tensor:
    return tensors_of(output.last_hidden_state if output.pooler_output is None else output.pooler_output)


_ROWS = {"input_ids", "token_type_ids", "mm_token_type_ids"}


def join_documents(documents: list[dict[str, Tensor]], side: str = "left", same_row: bool = False) -> dict[str, Tensor]:
    """Documents with images in one row, or in one row each, with a 2-D mask where one has to be padded."""
    images = [{name: value for name, value in document.items() if name not in _ROWS} for document in documents]
    batch = join_images(images, same_row=same_row)
    for name in documents[0].keys() & _ROWS:
        rows = [document[name] for document in documents]
        batch[name] = torch.cat(rows, dim=1) if same_row else padded(rows, side)["input_ids"]
    if not same_row and len({document["input_ids"].shape[1] for document in documents}) > 1:
        batch["attention_mask"] = padded([document["input_ids"] for document in documents], side)["attention_mask"]
    return batch


class EncoderPair(Pair):
    """An encoder of images or sounds."""

    def __init__(self, family: Family, eager: transformers.PreTrainedModel) -> None:
        super().__init__(family, eager)
        self.parameters = set(inspect.signature(eager.forward).parameters)
        self.images: list[dict[str, Tensor]] = []
        """Of different sizes, where the encoder takes those."""
        if family.kind == "image encoder":
            with contextlib.suppress(ValueError):
                self.images = [
                    self._first_that_works(image_inputs(self.parameters, eager.config, size)) for size in IMAGE_SIZES
                ]
        if self.images:
            self.inputs = join_images(self.images, same_row=False)
        elif family.kind == "image encoder":
            self.inputs = self._first_that_works(video_inputs(eager.config))
        else:
            self.inputs = self._first_that_works(sound_inputs(eager.config))

    def _first_that_works(self, candidates: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        errors = []
        for inputs in candidates:
            if inputs.keys() <= self.parameters:
                values = _attempt(lambda inputs=inputs: self._values(self.eager, inputs))
                if not isinstance(values, str):
                    return inputs
                errors.append(values)
        raise ValueError(f"takes none of the inputs: {errors}")

    def _values(self, model: transformers.PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(4)  # some hide random patches
        return tensors_of(model(**inputs, return_dict=True))

    def runs(self, scenario: str) -> Runs | None:
        if scenario == "plain":
            return self._same_call(lambda model: self._values(model, self.inputs))
        if scenario == "gradients":
            return self._gradients(lambda model: self._values(model, self.inputs))
        return self._packed()

    def _packed(self) -> Runs | None:
        if not self.parameters & {"grid_thw", "image_grid_thw"}:
            return None

        def states(model: transformers.PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
            return model(**inputs, return_dict=True)[0]

        def alone() -> Tensor:
            values = [states(self.eager, image) for image in self.images]
            return torch.cat(values, dim=values[0].ndim - 2)

        return Runs(lambda: states(self.ours, self.inputs), alone, lambda: states(self.eager, self.inputs))


def pair_of(family: Family) -> Pair:
    pair_class = {"images": ImagePair, "image encoder": EncoderPair, "sound encoder": EncoderPair}
    return pair_class.get(family.kind, TextPair)(family, build(family))


def _attempt(run: Callable[[], Tensor]) -> Tensor | str:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except Exception as error:
        return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _difference(value: Tensor | str, truth: Tensor) -> float:
    if isinstance(value, str) or value.shape != truth.shape:
        return float("inf")
    difference = float((value - truth).abs().max() / truth.abs().max().clamp(min=1))
    return float("inf") if difference != difference else difference


def judge(runs: Runs) -> Outcome:
    truth, ours, eager = _attempt(runs.truth), _attempt(runs.ours), _attempt(runs.eager)
    if isinstance(truth, str):
        return Outcome("impossible", truth)
    if not truth.isfinite().all():
        return Outcome("impossible", "eager computes values that are not finite")
    eager_is_exact = _difference(eager, truth) < runs.tolerance
    if isinstance(ours, str):
        return Outcome("impossible" if isinstance(eager, str) else "error", ours, eager_is_exact)
    difference = _difference(ours, truth)
    if difference < runs.tolerance:
        return Outcome("exact", "", eager_is_exact)
    if not isinstance(eager, str) and _difference(ours, eager) < runs.tolerance:
        return Outcome("as eager", f"{difference:.0e}", eager_is_exact)
    return Outcome("differs", f"{difference:.0e}", eager_is_exact)


# What a family's attention needs


@contextlib.contextmanager
def attention_calls() -> Iterator[list[dict[str, Any]]]:
    """The arguments of all calls of the attention function inside the block."""
    calls = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = {"heads": query.shape[1], "kv_heads": key.shape[1], "size": query.shape[3], "v_size": value.shape[3]}
        calls.append({**sizes, **kwargs})
        return integration.flashmask_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(integration.NAME, spy)
    try:
        yield calls
    finally:
        AttentionInterface.register(integration.NAME, integration.flashmask_attention_forward)


_RECURRENT = re.compile(
    r"Mamba|BambaMixer|FalconH1Mixer|DeltaNet|DeltaRule|ShortConv|Recurrent|RgLru|Rwkv|xLSTM|LinearAttention|Lightning|KDA|CCA"
)


_RECURRENT_LAYER_TYPES = {"linear_attention", "conv", "mamba"}


def features_of(model: transformers.PreTrainedModel, calls: list[dict[str, Any]]) -> list[str]:
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    has_window = "sliding_attention" in layer_types or any(call.get("sliding_window") for call in calls)
    modules = {type(module).__name__ for module in model.modules()}
    found = {
        "windows": has_window,
        "chunks": "chunked_attention" in layer_types,
        "sinks": any(call.get("s_aux") is not None for call in calls),
        "softcap": any(call.get("softcap") is not None for call in calls),
        "MLA": any(call["size"] != call["v_size"] for call in calls),
        "recurrent layers": any(map(_RECURRENT.search, modules)) or bool(layer_types & _RECURRENT_LAYER_TYPES),
        "several head sizes": len({(call["size"], call["v_size"]) for call in calls}) > 1,
    }
    return [name for name, is_there in found.items() if is_there]


def head_size_of(config: transformers.PreTrainedConfig) -> str:
    """Of the configuration's defaults, those of a published model."""
    fields = vars(config.get_text_config())
    if fields.get("qk_nope_head_dim"):
        query, value = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"], fields["v_head_dim"]
        return str(query) if query == value else f"{query}, {value}"
    sizes = [fields.get("head_dim"), fields.get("global_head_dim")]
    if not sizes[0]:
        with contextlib.suppress(AttributeError, TypeError, ZeroDivisionError, StopIteration):
            text = config.get_text_config()
            heads = next(getattr(text, name) for name in ("num_attention_heads", "num_heads") if hasattr(text, name))
            width = text.embed_dim if text.model_type == "qwen2_vl_vision" else text.hidden_size
            sizes[0] = width // heads
    return ", ".join(str(size) for size in dict.fromkeys(sizes) if size)


# One family


def sweep(family: Family) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": family.kind, "class": family.model_class.__name__}
    try:
        result["head size"] = head_size_of(family.model_class.config_class())
        config = config_of(family)
    except Exception as error:
        return {**result, "not run": _one_line(error)}
    try:
        with torch.device("meta"):
            family.model_class._from_config(config, attn_implementation=integration.NAME)
    except ValueError as error:
        if integration.NAME in str(error):
            return {**result, "refused": str(error)}
        return {**result, "not run": _one_line(error)}
    except Exception as error:
        return {**result, "not run": _one_line(error)}
    try:
        pair = pair_of(family)
    except Exception as error:
        return {**result, "not run": _one_line(error)}
    with attention_calls() as calls:
        outcomes = {}
        for scenario in SCENARIOS[family.kind]:
            runs = pair.runs(scenario)
            outcomes[scenario] = Outcome("impossible", _NO_SUCH_INPUT) if runs is None else judge(runs)
        result["features"] = features_of(pair.ours, calls)
    if outcomes["plain"].status == "impossible":
        return {**result, "not run": outcomes["plain"].detail}
    if not calls and outcomes["plain"].status == "exact":
        keeps_eager = pair.ours.config._attn_implementation != integration.NAME
        reason = "it keeps eager attention inside of models that use flashmask"
        return {**result, "not run": reason if keeps_eager else "it has no attention layers"}
    return {**result, "outcomes": {scenario: outcome._asdict() for scenario, outcome in outcomes.items()}}


# All families, each in a process of its own


SECONDS_PER_FAMILY = 60


def _child(connection: Connection, family: Family) -> None:
    torch.set_num_threads(1)
    connection.send(sweep(family))


def sweep_all(chosen: list[Family], workers: int) -> Iterator[tuple[Family, dict[str, Any]]]:
    context = multiprocessing.get_context("fork")  # nothing is imported again
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            family = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, family))
            process.start()
            sender.close()
            running[receiver] = (family, process, time.monotonic())
        for receiver in wait(list(running), timeout=1):
            family, process, _ = running.pop(receiver)
            try:
                result = receiver.recv()
            except EOFError:
                result = {"kind": family.kind, "class": family.model_class.__name__, "not run": "the process died"}
            process.join()
            yield family, result
        for receiver, (family, process, started) in list(running.items()):
            if time.monotonic() - started > SECONDS_PER_FAMILY:
                process.kill()
                del running[receiver]
                yield family, {"kind": family.kind, "class": family.model_class.__name__, "not run": "too slow"}


# The table


_RESULTS, _TABLE = DOCS / "models.json", DOCS / "models.md"
_MARKS = {"exact": "yes", "as eager": "as eager", "differs": "no", "error": "error", "impossible": "-"}
_TITLES = {
    "decoder": "Decoders",
    "encoder": "Encoders",
    "encoder-decoder": "Encoders with decoders",
    "multimodal": "Models of images, video and speech, given text",
    "images": "Models of images and text, given both",
    "image encoder": "Encoders of images and video",
    "sound encoder": "Encoders of sound",
}
_INTRODUCTION = """# Models

Every family of models in Transformers {version} that can be built tiny from its configuration, with random weights, in
float32 on a CPU: what `attn_implementation="flashmask"` computes against the truth. `make sweep` measures it again and
writes this page.

- *plain*, *gradients*: the truth is eager attention on the same batch.
- *packed*, *packed, cache*: several documents in one row, told apart by `position_ids`, without and with
  `use_cache=True`; *left padding*, *right padding*: one document in each row. The truth is each document alone under
  eager attention.
- *generate*, *static cache*: the logits of greedy generation from a left-padded batch. The truth is eager attention.

A document with images holds two, of different sizes where the model takes those; one document ends with an image and
the next begins with one. Models whose positions have several axes get `position_ids` `[4, B, S]`: the tokens counted
from 0 in each document, then the axes. Encoders of images get two images; *packed* means that these are one sequence.

"yes" is the truth up to rounding. "as eager" is what eager computes from the same inputs, and not the truth: the model
itself, not its attention, mixes the documents or counts padding. "no" is neither. "-": the family has no such inputs,
or eager attention fails on them.
"""


def render(results: dict[str, Any]) -> str:
    families = results["families"]
    text = [_INTRODUCTION.format(version=results["transformers"])]
    text += [*_summary_table(families, "decoder", "decoders"), ""]
    text += _summary_table(families, "images", "models given images and text")
    for kind, title in _TITLES.items():
        scenarios = SCENARIOS[kind]
        rows = [(name, result) for name, result in families.items() if result["kind"] == kind and "outcomes" in result]
        text += ["", f"## {title}", "", "| family | head size | attention | " + " | ".join(scenarios) + " | |"]
        text.append("|---|---|---|" + "---|" * (len(scenarios) + 1))
        for name, result in rows:
            marks = [_MARKS[result["outcomes"][scenario]["status"]] for scenario in scenarios]
            cells = [_bare(name), result["head size"], ", ".join(result["features"]), *marks, _note(result)]
            text.append("| " + " | ".join(cells) + " |")
    text += [
        "",
        "## Refused",
        "",
        "`from_pretrained` and `from_config` raise an error that says so.",
        "",
        "| family | why |",
    ]
    text.append("|---|---|")
    text += [f"| {_names(names)} | {reason} |" for reason, names in _grouped(families, "refused", _reason).items()]
    text += ["", "## Not compared", "", "| family | why |", "|---|---|"]
    text += [
        f"| {_names(names)} | {reason} |"
        for reason, names in _grouped(families, "not run", _reason_without_error).items()
    ]
    return "\n".join(text) + "\n"


def _summary_table(families: dict[str, Any], kind: str, title: str) -> list[str]:
    scenarios = SCENARIOS[kind]
    lines = [f"| {title} that are right | " + " | ".join(scenarios) + " |", "|---|" + "--:|" * len(scenarios)]
    outcomes = [result["outcomes"] for result in families.values() if result["kind"] == kind and "outcomes" in result]
    counts: dict[str, Callable[[dict[str, Any]], bool]] = {
        "flashmask": lambda outcome: outcome["status"] == "exact",
        "eager": lambda outcome: outcome["eager_is_exact"],
        "families with such inputs": lambda outcome: outcome["status"] != "impossible",
    }
    for name, is_counted in counts.items():
        numbers = [str(sum(is_counted(outcome[scenario]) for outcome in outcomes)) for scenario in scenarios]
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    return lines


def _note(result: dict[str, Any]) -> str:
    """Why some columns are not "yes"."""
    status, notes = {name: outcome["status"] for name, outcome in result["outcomes"].items()}, []
    if status.get("packed") in ("as eager", "differs"):
        if "recurrent layers" in result["features"]:
            notes.append("recurrent layers carry their state from one document to the next")
        elif status["packed"] == "as eager":
            notes.append("attention is not told `position_ids`: pass bounds to pack")
    reads_text = result["kind"] in ("decoder", "encoder", "multimodal", "images")
    if status.get("packed") == "impossible" and reads_text and result["outcomes"]["packed"]["detail"] == _NO_SUCH_INPUT:
        notes.append("takes no `position_ids`")
    if status.get("left padding") == "as eager":
        is_about_images = result["kind"] == "images"
        notes.append(
            "what it makes of a document depends on the rest of the batch"
            if is_about_images
            else "positions count the padding on the left"
        )
    return "; ".join(notes)


def unexplained(results: dict[str, Any]) -> list[str]:
    """What must not happen: another result than both the truth and eager's, or an error where eager has none."""
    found = []
    for name, result in results["families"].items():
        for scenario, outcome in result.get("outcomes", {}).items():
            is_recurrent = scenario.startswith("packed") and "recurrent layers" in result["features"]
            if outcome["status"] == "error" or (outcome["status"] == "differs" and not is_recurrent):
                found.append(f"{name}: {scenario}: {outcome['status']} {outcome['detail']}")
    return found


def _bare(name: str) -> str:
    return name.partition("/")[2]


def _names(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(_bare(name) for name in names))


def _reason(message: str) -> str:
    return re.sub(r"^.*flashmask\": |\. Use .*$", "", message)


def _reason_without_error(reason: str) -> str:
    """The errors are in the JSON: they are about tiny sizes and missing inputs, not about attention."""
    if re.match(r"\w+Error: ", reason):
        return "not built tiny from its configuration alone, or computes nothing from the inputs tried"
    return reason


def _grouped(families: dict[str, Any], key: str, reason_of: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, result in families.items():
        if key in result:
            groups.setdefault(reason_of(result[key]), []).append(name)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="run and print these only, and write nothing")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    chosen = [family for family in families() if not arguments.families or family.name in arguments.families]
    found = {}
    for family, result in sweep_all(chosen, arguments.workers):
        found[f"{family.kind}/{family.name}"] = result
        print(f"{family.name:28}", _line(result), flush=True)
    results = {"transformers": transformers.__version__, "families": dict(sorted(found.items()))}
    if not arguments.families:
        _write_results(results)
        _TABLE.write_text(render(results))
    if unexplained(results):
        raise SystemExit("\n".join(["neither right nor refused:", *unexplained(results)]))


def _write_results(results: dict[str, Any]) -> None:
    """JSON with one line for each family, so that changes are seen in a diff."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results["families"].items())
    version = json.dumps(results["transformers"])
    _RESULTS.write_text(f'{{"transformers": {version}, "families": {{\n{lines}\n}}}}\n')


def _line(result: dict[str, Any]) -> str:
    for key in ("refused", "not run"):
        if key in result:
            return f"{key}: {result[key]}"
    outcomes = result["outcomes"].items()
    bad = [f"{name}: {o['status']} {o['detail']}" for name, o in outcomes if o["status"] not in ("exact", "impossible")]
    return " | ".join(bad) or "right"


if __name__ == "__main__":
    main()
