"""The name of the implementation, and the logger that speaks for it."""

from __future__ import annotations

from transformers.utils import logging

NAME = "flashmask"
"""The value of `attn_implementation`."""


logger = logging.get_logger(__name__)
