"""The environment variables of this package, read once, when it is imported: see docs/environment_variables.md."""

from __future__ import annotations

import os


def _read_switch(name: str, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable {name} must be 0 or 1, got {value!r}")
    return default if value == "" else value == "1"


FAST_LAUNCH = _read_switch("FLASHMASK_FAST_LAUNCH", default=True)
PORTABLE = _read_switch("FLASHMASK_PORTABLE", default=False)
