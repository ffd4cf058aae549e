"""Module paths of version 0.1.0, which code and pickles may still import."""

from __future__ import annotations

import sys

from . import sharing, training
from .integration import conversion
from .sharing import prefix_tree, shared_prefix, tree_attention
from .training import packing

_MODULES = {
    "conversion": conversion,
    "packing": packing,
    "preference": training,
    "prefix_tree": prefix_tree,
    "shared_prefix": shared_prefix,
    "tree_attention": tree_attention,
}


def keep_old_paths() -> None:
    """Make `hf_flashmask.<old name>` the module that holds its contents now."""
    package = sys.modules[sharing.__name__.rpartition(".")[0]]
    for name, module in _MODULES.items():
        sys.modules[f"{package.__name__}.{name}"] = module
        setattr(package, name, module)
