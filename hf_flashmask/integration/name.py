"""The name of the implementation, and the logger that speaks for it."""

from __future__ import annotations

import difflib
import re
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

NAME = "flashmask"
"""The value of `attn_implementation`."""


logger = logging.get_logger(__name__)


def is_misspelled(name: Any) -> bool:
    """Whether this is no implementation, but resembles the name: "FlashMask", "hf_flash_mask", "flashmsk"."""
    if not isinstance(name, str) or name == NAME or "/" in name or name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return False
    letters = re.sub("[^a-z]", "", name.lower()).removeprefix("hf")
    return letters.startswith(NAME) or bool(difflib.get_close_matches(letters, [NAME], cutoff=_SIMILARITY))


_SIMILARITY = 0.85
"""That of two letters in another order is 0.89, that of "flash_mla", another implementation, 0.82."""
