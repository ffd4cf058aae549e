"""Which models are refused when they are created, and why."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import transformers
from tiny_models import config_of, eager_twin, random_documents
from transformers import AutoModelForCausalLM

from hf_flashmask import bounds
from hf_flashmask.integration import mask_function, support


def test_notebook_class_is_judged_by_its_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "notebook_cell", types.ModuleType("notebook_cell"))
    subclass = type("Mine", (transformers.LlamaForCausalLM,), {"__module__": "notebook_cell"})
    model = subclass._from_config(config_of("llama"), attn_implementation="flashmask")
    tokens = random_documents([7])[0]
    torch.testing.assert_close(model(tokens).logits, eager_twin(model)(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.FalconConfig(), "fixed list"),
        (transformers.GPTNeoConfig(), "fixed list"),
        (transformers.GitConfig(), "fixed list"),
        (transformers.BloomConfig(), "computes attention itself"),
        (transformers.MptConfig(), "computes attention itself"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_models_that_would_be_silently_wrong_are_refused(config: transformers.PreTrainedConfig, reason: str) -> None:
    with pytest.raises(ValueError, match=f'does not work with attn_implementation="flashmask".*{reason}.*eager'):
        AutoModelForCausalLM.from_config(config, attn_implementation="flashmask")


def test_bark_is_refused() -> None:
    with pytest.raises(ValueError, match="fixed list"):
        transformers.BarkCausalModel._from_config(
            transformers.models.bark.configuration_bark.BarkSemanticConfig(), attn_implementation="flashmask"
        )


@pytest.mark.skipif(not hasattr(transformers, "LasrEncoder"), reason="this version of Transformers has no LASR")
def test_a_model_whose_convolutions_read_the_mask_is_refused() -> None:
    config = transformers.LasrEncoderConfig(num_hidden_layers=1)
    with pytest.raises(ValueError, match="its convolutions compute with a dense mask"):
        transformers.LasrEncoder._from_config(config, attn_implementation="flashmask")


@pytest.fixture
def without_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation of which only the compiled files are left."""

    def get_source(module: types.ModuleType) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(support.inspect, "getsource", get_source)
    support._reason_against_class.cache_clear()
    yield
    support._reason_against_class.cache_clear()


@pytest.mark.usefixtures("without_sources")
def test_without_sources_a_model_must_declare_its_support() -> None:
    reason = r"the source of its module `\S+modeling_bloom` cannot be read.*`_supports_attention_backend`"
    with pytest.raises(ValueError, match=rf'does not work with attn_implementation="flashmask": {reason}'):
        AutoModelForCausalLM.from_config(transformers.BloomConfig(n_layer=1), attn_implementation="flashmask")
    model = AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation="flashmask")
    assert model.config._attn_implementation == "flashmask"


@pytest.mark.parametrize("check", ["padding mask", "bounds"])
def test_a_batch_size_that_the_compiler_knows_of_one_tensor_only(check: str) -> None:
    """As in decoding with a static cache, when another batch size has made that of the queries symbolic."""
    batch, length = 3, 5
    mask = bounds.causal(length).repeat(batch, 1, 1, 1) if check == "bounds" else torch.ones(batch, length)
    queries = torch.zeros(batch, length)

    def step(mask: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        if check == "bounds":
            bounds.check_bounds(mask, batch=queries.shape[0], kv_len=queries.shape[1])
        else:
            mask_function._check_padding_mask(mask, *queries.shape, may_be_longer=False)
        return queries + 1

    torch._dynamo.reset()
    torch._dynamo.mark_static(mask)
    torch._dynamo.maybe_mark_dynamic(queries, 0)
    torch.compile(step, fullgraph=True, backend="eager")(mask, queries)
