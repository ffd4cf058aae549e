"""Runs Transformers' own tests of attention implementations with flashmask, on tiny models of many architectures.

`make transformers-tests`, or `python tests/run_transformers_tests.py llama gemma2` with model types of your choice. The
tests are those of tests/test_modeling_common.py in the source distribution of the installed Transformers, which pip
downloads into runs/transformers-tests/. They run on a GPU when there is one.

The columns of the table that it prints:

    left, right    `flash_attn_inference_equivalence("flashmask", padding_side)`: as eager in bfloat16
    from config    `flash_attn_from_config("flashmask")`: `_from_config`, a forward pass in training mode, saving
    composite      `flash_attn_can_dispatch_composite_models("flashmask")`: every part of a multimodal model gets it
    eager = sdpa   `_test_eager_matches_sdpa_inference` with flashmask in sdpa's place: float16, float32 and bfloat16,
                   padding on either side or none, `output_attentions`
    batching       `test_batching_equivalence` with flashmask in sdpa's place
    checkpointing  `test_training_gradient_checkpointing_use_reentrant_*` with flashmask in sdpa's place

As they are, these tests pass when padding is ignored: attention hardly counts in models of such small weights, and one
row in seven, the padded one, may differ. Here weights are larger, and every row must agree.

A test that passes without a call of flashmask's attention function fails. What fails is run again with Transformers'
own sdpa: if that fails too, the cell says "upstream", otherwise "FAIL", and the exit status is 1. "-" means that the
test does not apply. Transformers' tests of padding-free batches are not in its source distribution.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import inspect
import logging
import subprocess
import sys
import tarfile
import time
import types
import unittest
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
from tiny_families import VOCABULARY, tiny_config
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from hf_flashmask import integration

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "transformers-tests"


# Transformers' tests


def fetch_tests(version: str) -> Path:
    """The folder of the tests of a version of Transformers, downloaded if it is not there."""
    source = f"transformers-{version}"
    tests = FOLDER / source / "tests"
    if not tests.is_dir():
        options = ["--quiet", "--no-binary=:all:", "--no-deps", "--no-build-isolation", f"--dest={FOLDER}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"], check=True)
        with tarfile.open(FOLDER / f"{source}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{source}/tests/")]
            archive.extractall(FOLDER, members, filter="data")
    return tests


def import_common_tests(tests: Path) -> types.ModuleType:
    """`test_modeling_common`. What it imports from files that are not distributed becomes empty classes."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(tests)]
    sys.modules[package.__name__] = package
    for node in ast.walk(ast.parse((tests / "test_modeling_common.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
            if tests.joinpath(*node.module.split(".")).with_suffix(".py").exists():
                continue
            stub = types.ModuleType(f"{package.__name__}.{node.module}")
            vars(stub).update({name.name: type(name.name, (), {}) for name in node.names})
            sys.modules[stub.__name__] = stub
    # It multiplies tests for a test runner; there is none here.
    no_runner = types.SimpleNamespace(expand=lambda *args, **kwargs: lambda test: test)
    sys.modules["parameterized"] = mock.Mock(parameterized=no_runner)
    common = importlib.import_module(f"{package.__name__}.test_modeling_common")
    # It demands that a mean of rows agree.
    common.np = types.SimpleNamespace(**{**vars(np), "mean": np.min})  # type: ignore[attr-defined]
    return common


class Check(NamedTuple):
    """One test: a function of the test case and the name of an implementation."""

    column: str
    name: str
    run: Callable[[Any, str], None]
    in_place_of_sdpa: bool = False
    must_attend: bool = True


def list_checks(common: types.ModuleType) -> list[Check]:
    tests = common.ModelTesterMixin
    checks = [
        Check("left", "left", lambda case, name: case.flash_attn_inference_equivalence(name, "left")),
        Check("right", "right", lambda case, name: case.flash_attn_inference_equivalence(name, "right")),
        Check("from config", "from config", tests.flash_attn_from_config),
        Check("composite", "composite", tests.flash_attn_can_dispatch_composite_models, must_attend=False),
    ]
    for name, *arguments in common.TEST_EAGER_MATCHES_SDPA_INFERENCE_PARAMETERIZATION:
        if not name.endswith("_sdpa_kernels"):  # they choose between the kernels of torch's sdpa
            checks.append(_in_place("eager = sdpa", name, common._test_eager_matches_sdpa_inference, name, *arguments))
    checks.append(_in_place("batching", "batching", tests.test_batching_equivalence))
    for use_reentrant in (False, True):
        name = f"test_training_gradient_checkpointing_use_reentrant_{use_reentrant}".lower()
        checks.append(_in_place("checkpointing", name, getattr(tests, name)))
    return checks


def _in_place(column: str, name: str, test: Callable[..., None], *arguments: Any) -> Check:
    return Check(column, name, lambda case, _: test(case, *arguments), in_place_of_sdpa=True)


# Models and their inputs


# fmt: off
DEFAULTS = [
    "llama", "qwen3", "mistral", "phi3", "smollm3", "cohere2", "olmo3", "gemma2", "gemma3_text", "gemma4_text",
    "gpt_oss", "afmoe", "qwen3_moe", "deepseek_v3", "llama4_text", "gpt2", "gpt_neox", "opt",
    "bert", "roberta", "modernbert", "bart", "t5gemma", "gemma3", "paligemma", "llava",
]
# fmt: on
IMAGE_TOKEN = VOCABULARY - 1
IMAGE_SIZE, PATCH_SIZE = 8, 4
TOKENS_OF_AN_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2
# Some tests widen all heads to 16, without what must then be as wide.
_HEADS_OF_16 = {"hidden_size": 64, "head_dim": 16}
_SETTINGS: dict[str, dict[str, Any]] = {
    # A softcap small enough to bend the scores.
    "gemma2": {"attn_logit_softcapping": 1.0},
    "deepseek_v3": {"qk_rope_head_dim": 16},
    "t5gemma": {"encoder": _HEADS_OF_16, "decoder": {**_HEADS_OF_16, "cross_attention_hidden_size": 64}},
}
_SETTINGS_WITH_IMAGES: dict[str, Any] = {
    "image_token_index": IMAGE_TOKEN,
    "mm_tokens_per_image": TOKENS_OF_AN_IMAGE,
    "projection_dim": 64,
    "text_config": _HEADS_OF_16,
    "vision_config": {"hidden_size": 64, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 64},
}
_HEADS = (
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
)


class ModelTester:
    """Makes configurations and inputs, as in every test file of a model in Transformers."""

    batch_size, seq_length = 7, 9
    is_training = True

    def __init__(self, architecture: str) -> None:
        self.config_class = transformers.CONFIG_MAPPING[architecture]
        self.has_images = "vision_config" in self.config_class.sub_configs
        self.settings = _SETTINGS_WITH_IMAGES if self.has_images else _SETTINGS.get(architecture, {})
        head = next(mapping[self.config_class] for mapping in _HEADS if self.config_class in mapping)
        self.model_classes: tuple[Any, Any] = (modeling_auto.MODEL_MAPPING[self.config_class], head)

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor]]:
        config = tiny_config(self.config_class, **copy.deepcopy(self.settings))
        _enlarge_weights(config)
        shape = (self.batch_size, self.seq_length)
        tokens = torch.randint(3, IMAGE_TOKEN, shape)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones(shape, dtype=torch.long).tril(2)}
        if config.is_encoder_decoder:
            inputs |= {f"decoder_{name}": value.flip(0) for name, value in inputs.items()}
        if self.has_images:
            is_image = torch.zeros(shape, dtype=torch.long)
            is_image[:, 2 : 2 + TOKENS_OF_AN_IMAGE] = 1
            inputs["input_ids"] = tokens.where(is_image == 0, IMAGE_TOKEN)
            inputs["pixel_values"] = torch.randn(self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
            if "token_type_ids" in inspect.signature(self.model_classes[0].forward).parameters:
                inputs["token_type_ids"] = is_image
        return config, {name: value.to(torch_device) for name, value in inputs.items()}


def _enlarge_weights(config: transformers.PreTrainedConfig) -> None:
    """To where attention counts, and float16 does not yet send tokens to other experts."""
    for name in ("initializer_range", "init_std"):
        if hasattr(config, name):
            setattr(config, name, 0.08)
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _enlarge_weights(getattr(config, name))


def make_case(common: types.ModuleType, architecture: str) -> unittest.TestCase:
    tester = ModelTester(architecture)
    attributes = {
        "model_tester": tester,
        "all_model_classes": tester.model_classes,
        "all_generative_model_classes": tester.model_classes,
        "additional_model_inputs": ["pixel_values", "token_type_ids"],
        "_is_composite": tester.has_images,
        # Not all layers of a vision tower are used.
        "test_all_params_have_gradient": not tester.has_images,
    }
    case: unittest.TestCase = type("Case", (common.ModelTesterMixin, unittest.TestCase), attributes)()
    return case


def model_classes_within(tester: ModelTester) -> set[type[PreTrainedModel]]:
    """The classes that are tested, and those of their parts."""
    config, _ = tester.prepare_config_and_inputs_for_common()
    modules = [module for model_class in tester.model_classes for module in model_class(config).modules()]
    return {type(module) for module in modules if isinstance(module, PreTrainedModel)}


# With flashmask, and without


def run_with_flashmask(check: Check, case: Any) -> None:
    name = "sdpa" if check.in_place_of_sdpa else integration.NAME
    attend = mock.Mock(wraps=integration.flashmask_attention_forward)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.dict(AttentionInterface._global_mapping, {name: attend}))
        enter(mock.patch.dict(AttentionMaskInterface._global_mapping, {name: integration.flashmask_mask}))
        for model_class in model_classes_within(case.model_tester):
            enter(mock.patch.multiple(model_class, **_SUPPORTS_ALL))
        check.run(case, name)
    if check.must_attend and not attend.called:
        raise AssertionError("the test passed without calling flashmask's attention function")


_SUPPORTS_ALL: dict[str, Any] = {
    "_supports_attention_backend": True,
    "_supports_flash_attn": True,
    "_supports_sdpa": True,
    "_compatible_flash_implementations": None,
}
"""What models declare about FlashAttention and sdpa, such as that they have no softcap, is not about flashmask."""


def run_without_flashmask(check: Check, case: Any) -> None:
    if not all(model_class._supports_sdpa for model_class in case.all_model_classes):
        raise unittest.SkipTest("Transformers has no sdpa for this model")
    check.run(case, "sdpa")


class Outcome(NamedTuple):
    """How a test ended: "pass", "-", "upstream" or "FAIL"."""

    status: str
    detail: str = ""


def judge(check: Check, case: Any) -> Outcome:
    try:
        transformers.set_seed(0)
        run_with_flashmask(check, case)
        return Outcome("pass")
    except unittest.SkipTest as reason:
        return Outcome("-", str(reason))
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
    try:
        transformers.set_seed(0)
        run_without_flashmask(check, case)
    except unittest.SkipTest:
        pass
    except Exception as error:
        return Outcome("upstream", f"{detail}\n  without flashmask: {type(error).__name__}: {error}")
    return Outcome("FAIL", detail)


def summary(outcomes: list[Outcome]) -> str:
    """One cell of the table: the worst status, and how many tests passed of those that ran."""
    ran = [outcome.status for outcome in outcomes if outcome.status != "-"]
    if not ran:
        return "-"
    worst = next(status for status in ("FAIL", "upstream", "pass") if status in ran)
    return worst if len(ran) == 1 else f"{worst} {ran.count('pass')}/{len(ran)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "architectures", nargs="*", default=DEFAULTS, metavar="model_type", help="llama, gemma3_text ..."
    )
    architectures = parser.parse_args().architectures
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.getLogger("hf_flashmask").setLevel(logging.CRITICAL)

    start = time.perf_counter()
    common = import_common_tests(fetch_tests(transformers.__version__))
    checks = list_checks(common)
    columns = list(dict.fromkeys(check.column for check in checks))
    print(f"Transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    findings, failed = [], False
    for architecture in architectures:
        case = make_case(common, architecture)
        outcomes = {check: judge(check, case) for check in checks}
        cells = [summary([outcomes[check] for check in checks if check.column == column]) for column in columns]
        print(f"| {architecture} | " + " | ".join(cells) + " |", flush=True)
        for check, outcome in outcomes.items():
            failed |= outcome.status == "FAIL"
            if outcome.detail and (outcome.status != "-" or check.column != "composite"):
                findings.append(f"{architecture}, {check.name}: {outcome.status}: {outcome.detail}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    print("".join(f"\n{finding}" for finding in findings))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
