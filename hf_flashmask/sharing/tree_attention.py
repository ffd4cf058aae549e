"""TRL's tree-packing trainer (`trl.experimental.async_grpo`) on FlashMask attention.

That trainer folds the rollouts of a batch into prefix trees and asks for `attn_implementation="tree_fa3"`. Its own
attention function copies the keys and values of every path from a root to a segment, in every layer. The segments are
in depth-first order, so bounds express the same mask without copies. Copies remain for sliding windows, in trees with
more branches than bounds can hold and under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bounds import MAX_INTERVALS, limit_depth
from ..integration import flashmask_attention_forward
from ..integration.memo import recent

__all__ = ["register_tree_attention", "tree_attention_forward"]


def register_tree_attention() -> None:
    """Let TRL's `AsyncGRPOTrainer` run on FlashMask attention. Call it before making the trainer; repeats are harmless.

    Every new trainer registers the attention function that it finds in TRL's module. This function replaces that one,
    so the order of imports does not matter. Neither a GPU nor the library `kernels` is needed.

    Raises:
        ImportError: without a TRL that packs trees; the message says which version does.
    """
    try:
        from trl.experimental.async_grpo import packing
    except ImportError as error:
        raise ImportError(
            f"register_tree_attention() needs trl >= 1.16 (pip install 'hf-flashmask[trl]'): {error}"
        ) from error
    if not hasattr(packing, "tree_attention") or not hasattr(packing, "register_tree_attention"):
        raise ImportError(
            "register_tree_attention() needs trl >= 1.16: the trl that is installed packs no trees, its "
            "`trl.experimental.async_grpo.packing` has no `tree_attention`"
        )
    packing.tree_attention = tree_attention_forward
    packing.register_tree_attention()


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_kv_index: Tensor | None = None,
    tree_cu_seqlens_q: Tensor | None = None,
    tree_cu_seqlens_k: Tensor | None = None,
    tree_max_seqlen_q: int | None = None,
    tree_max_seqlen_k: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed prefix tree, as TRL's `TreeRow.pack()` describes it.

    The tree consists of segments without a branch, in depth-first order. A token sees its segment up to itself, and all
    segments on the path from the root.

    Args:
        module, query, key, value: as in `flashmask_attention_forward`, with one row, B = 1, and S_q = S_k.
        attention_mask: must be None, the tree is the mask.
        tree_kv_index: int64, for every segment the tokens of its path from the root, the segment included, in order.
        tree_cu_seqlens_q: int32 `[segments + 1]`, where segments begin and end in the row.
        tree_cu_seqlens_k: int32 `[segments + 1]`, where their paths begin and end in `tree_kv_index`.
        tree_max_seqlen_q, tree_max_seqlen_k: length of the longest segment and of the longest path.
        sliding_window: a token sees that many tokens of its path, itself included; None and 0 mean no window.
        kwargs: `scaling`, `softcap`, `s_aux` and the rest, as in `flashmask_attention_forward`.

    Returns:
        output `[1, S_q, H, D_v]`, and None for the attention weights, which are never computed.

    Raises:
        NotImplementedError, ValueError: for whatever would otherwise change the result silently.
    """
    if tree_kv_index is None or tree_cu_seqlens_q is None or tree_cu_seqlens_k is None:
        raise ValueError(
            'attn_implementation="tree_fa3" needs the segments of a packed prefix tree, `tree_kv_index`, '
            "`tree_cu_seqlens_q` and `tree_cu_seqlens_k`, in every call of the model: those of "
            '`TreeRow.pack()` in TRL. Use attn_implementation="flashmask" for a model that is called without.'
        )
    _check_trl_tree(query, key, attention_mask, tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k)
    tree = _TrlTree(tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k)
    num_tokens, longest_path = query.shape[2], tree_max_seqlen_k or query.shape[2]

    def build_once(build: Callable[..., Tensor | None], *arguments: int) -> Tensor | None:
        return recent.get((build, *arguments), tree, module, lambda: build(tree, *arguments), query.device)

    if not sliding_window or sliding_window >= longest_path:
        bounds = build_once(_bounds_of_trl_tree, num_tokens)
    else:
        bounds = build_once(_windowed_bounds_of_trl_tree, num_tokens, sliding_window)
        if bounds is None:
            bounds = build_once(_windowed_bounds_of_trl_paths, sliding_window)
            key, value = key.index_select(2, tree_kv_index), value.index_select(2, tree_kv_index)
    return flashmask_attention_forward(module, query, key, value, bounds, **kwargs)


class _TrlTree(NamedTuple):
    """Segments and their paths from the root, as `tree_attention_forward` gets them."""

    kv_index: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor


def _bounds_of_trl_tree(tree: _TrlTree, num_tokens: int) -> Tensor:
    """Causal, LTS = end of the subtree, `[1, 1, 1, S_k]`: the end of the last segment whose path contains the token."""
    segment_end = tree.cu_seqlens_q[_segment_of_trl_path_entries(tree) + 1]
    subtree_end = segment_end.new_zeros(num_tokens).scatter_reduce(0, tree.kv_index.long(), segment_end, "amax")
    return subtree_end.to(torch.int32)[None, None, None]


def _windowed_bounds_of_trl_tree(tree: _TrlTree, num_tokens: int, window: int) -> Tensor | None:
    """The tree's bounds within a window along the branches, or None where bounds cannot hold so many branches.

    Reading the number of branches synchronises once, hence None under `torch.compile`.
    """
    if torch.compiler.is_compiling():
        return None
    first_depth = tree.cu_seqlens_k.diff() - tree.cu_seqlens_q.diff()
    is_leaf = nn.functional.pad(first_depth[1:] <= first_depth[:-1], (0, 1), value=True)
    root = (first_depth == 0).cumsum(0)
    branches = int(root.new_zeros(root.shape[0] + 1).index_add(0, root, is_leaf.to(root.dtype)).max())
    if branches >= MAX_INTERVALS:
        return None
    row = torch.arange(num_tokens, dtype=tree.cu_seqlens_q.dtype, device=first_depth.device)
    segment = torch.searchsorted(tree.cu_seqlens_q, row, right=True) - 1
    depth = (row - tree.cu_seqlens_q[segment] + first_depth[segment])[None]
    return limit_depth(_bounds_of_trl_tree(tree, num_tokens), depth, depth + window, max_branches=branches)


def _windowed_bounds_of_trl_paths(tree: _TrlTree, window: int) -> Tensor:
    """Bounds `[1, 1, 2, K]` over the copied keys of all paths. A token sees at most `window` tokens of its own path."""
    segment = _segment_of_trl_path_entries(tree)
    start, end = tree.cu_seqlens_q[segment], tree.cu_seqlens_q[segment + 1]
    entry = torch.arange(segment.shape[0], dtype=end.dtype, device=end.device)
    own_row = end - (tree.cu_seqlens_k[segment + 1] - entry)  # less than the segment's start for its ancestors
    lts, ute = torch.minimum(own_row + window, end), torch.maximum(own_row, start)
    return torch.stack([lts, ute]).to(torch.int32)[None, None]


def _segment_of_trl_path_entries(tree: _TrlTree) -> Tensor:
    """The segment whose path each entry of `kv_index` belongs to."""
    entry = torch.arange(tree.kv_index.shape[0], dtype=tree.cu_seqlens_k.dtype, device=tree.kv_index.device)
    return torch.searchsorted(tree.cu_seqlens_k, entry, right=True) - 1


def _check_trl_tree(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kv_index: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> None:
    if attention_mask is not None:
        raise ValueError(
            "`attention_mask` must be None for a packed prefix tree, which is a mask itself, got "
            f"{attention_mask.dtype} {list(attention_mask.shape)}; leave padding out of the row"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "a packed prefix tree is one row whose queries and keys are the same tokens, got `query` "
            f"{list(query.shape)} and `key` {list(key.shape)}; call the model with one row and use_cache=False"
        )
    for name, tensor in (
        ("tree_kv_index", kv_index),
        ("tree_cu_seqlens_q", cu_seqlens_q),
        ("tree_cu_seqlens_k", cu_seqlens_k),
    ):
        if tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"`{name}` must be int32 or int64 [n], got {tensor.dtype} {list(tensor.shape)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "`tree_cu_seqlens_q` and `tree_cu_seqlens_k` must describe the same segments, got "
            f"{cu_seqlens_q.shape[0] - 1} and {cu_seqlens_k.shape[0] - 1}"
        )
