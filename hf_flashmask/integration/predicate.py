"""Who asks Transformers whether FlashAttention is requested, and what they are told of "flashmask".

`transformers.utils.generic.is_flash_attention_requested` is True of every name with "flash" in it. What a caller does
then is wrong for flashmask in some places, and right in others. Callers pass a name or a configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .name import NAME, is_misspelled

_IS_FLASH = {
    # These callers pass a name. It is never that of FlashAttention.
    #
    # They load FlashAttention under this name. Some models would have it replaced by a name that they list (gpt-oss).
    "modeling_utils": False,
    "sentence_transformers": False,
    # It would use a paged cache, which our attention refuses. Instead it refuses the name, or takes FlashAttention.
    "generation.continuous_batching.continuous_api": False,
    # It refuses prefixes that see themselves. Bounds hold them.
    "models.hrm_text": False,
    #
    # These callers pass a configuration.
    #
    # It refuses masks in chunks (Llama 4). Bounds hold them.
    "masking_utils": False,
    # With a static cache it drops `fullgraph=True`, and keeps 2-D masks of ones.
    "generation.utils": False,
    # It waits for the device to read the length of the longest document, which the kernels do not need.
    "utils.generic.get_max_seqlen": False,
    # It refuses a row of several proteins. Bounds hold them.
    "models.esmc": False,
    # They pass the 2-D mask of an encoder to the layers. Without FlashAttention it is one that layers can broadcast.
    "models.gpt_bigcode": False,
    "models.kosmos2_5": False,
    "models.sew": False,  # until Transformers 5.10
    # Until Transformers 5.10, they pad values that are narrower than keys. The kernels take them as they are.
    "models.deepseek_v2": False,
    "models.deepseek_v3": False,
    "models.glm4_moe_lite": False,
    "models.glm_moe_dsa": False,
    "models.longcat_flash": False,
    "models.mistral4": False,
    "models.youtu": False,
    # The layers are called once for all images, or pieces of sound, with `cu_seq_lens_q`, instead of once for each.
    "models.cohere_compass": True,
    "models.cosmos3_edge": True,
    "models.dots3_note": True,
    "models.ernie4_5_vl_moe": True,
    "models.exaone4_5": True,
    "models.glm4v": True,
    "models.glm4v_moe": True,
    "models.glm5_next": True,
    "models.glm_image": True,
    "models.glm_ocr": True,
    "models.hunyuan_vl": True,
    "models.hy_v4_vl": True,
    "models.inkling2": True,
    "models.kimi_k25": True,
    "models.lfm3_vl": True,
    "models.minicpm_ocr": True,
    "models.minicpmv4_6": True,
    "models.minicpmv4_7": True,
    "models.minimax_m3_vl": True,
    "models.muse_glimmer": True,
    "models.muse_spark": True,
    "models.paddleocr_vl": True,
    "models.pixtral": True,
    "models.qwen2_5_omni": True,
    "models.qwen2_5_vl": True,
    "models.qwen2_vl": True,
    "models.qwen3_5": True,
    "models.qwen3_5_moe": True,
    "models.qwen3_asr": True,
    "models.qwen3_omni_moe": True,
    "models.qwen3_vl": True,
    "models.qwen3_vl_moe": True,
    "models.qwen4_exp": True,
    "models.radio": True,
    "models.video_llama_3": True,
    # Otherwise they cut rows off the mask as if it were dense.
    "models.gemma4": True,
    "models.gemma4_unified": True,
    # The layers that add a bias to the scores take SDPA.
    "models.edgetam": True,
    "models.edgetam_video": True,
    "models.sam2": True,
    "models.sam2_video": True,
    "models.sam3": True,
    "models.sam3_lite_text": True,
    "models.sam3_tracker": True,
    "models.sam3_tracker_video": True,
    # They do not get to ask about flashmask: the models are refused, continuous batching is, a kernel has another name.
    "models.bark": True,
    "models.falcon": True,
    "models.gpt_neo": True,
    "models.gptj": True,
    "generation.continuous_batching.cache": True,
    "generation.continuous_batching.initialization": True,
    "integrations.hub_kernels": True,
}
"""Caller -> the answer. Callers without an entry are told False of the name, and True of a configuration."""


def wrap_is_flash(original: Callable, module: str) -> Callable:
    """For `is_flash_attention_requested`, in `transformers.utils.generic` and in two modules that import it from there.

    Models and other libraries import it from `generic` when they are loaded. A model is known by its configuration.
    """
    is_flash_in_module = _IS_FLASH.get(module.removeprefix("transformers."), True)

    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
    ) -> bool:
        name = requested_attention_implementation
        if config is None and (name == NAME or is_misspelled(name)):
            return False
        if config is not None and name is None and config._attn_implementation == NAME:
            model = type(config).__module__.removeprefix("transformers.").rpartition(".")[0]
            if not is_flash_in_module or not _IS_FLASH.get(model, True):
                return False
        return original(config, name, version)

    return is_flash_attention_requested
