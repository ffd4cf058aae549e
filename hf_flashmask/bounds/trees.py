"""Prefix trees: bounds from parents and lengths, and windows along the branches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .form import (
    NO_END,
    check_bounds,
    check_int_tensor,
    check_integer_lists,
    check_max_intervals,
    default_kv_len,
    planes_from_blocks,
    refuse_without_waiting,
)


def from_prefix_tree(
    parents: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    lengths: Sequence[int] | Sequence[Sequence[int]] | Tensor,
    *,
    kv_len: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A forest of shared prefixes in depth-first order: a token sees its node up to itself, and all nodes above.

    One plane is enough: causal, and LTS = end of the subtree. A list of roots is packed documents, a root with two
    leaves a preference pair, a root with many leaves a group of answers. Tensors with a `kv_len` are read nowhere but
    on their device, and can be traced; lists are read on the host, and are constants of a graph.

    Args:
        parents: for each node the index of its parent, or -1 for a root, in depth-first order. A list of such lists,
            with one of lengths for each, makes a batch; so does a tensor `[B, n]`, in which roots of length 0 fill up
            the shorter rows.
        lengths: for each node its number of tokens, 0 or more.
        kv_len: length to pad to; padding is hidden, and its rows see nothing. Default: the longest row, which is read
            from the device if it is there.
        device: of the bounds; default: that of the tensors, the CPU for lists.

    Returns:
        int32 `[B, 1, 1, S_k]`.

    Raises:
        ValueError: when the nodes are not in depth-first order (the message names the node), a length is negative,
            `parents` and `lengths` do not match, or `kv_len` is too small. For tensors elsewhere than on the CPU it is
            an assertion on the device.

    >>> from_prefix_tree(parents=[-1, 0, 0], lengths=[2, 2, 1]).tolist()
    [[[[5, 5, 4, 4, 5]]]]
    """
    if isinstance(parents, Tensor) and isinstance(lengths, Tensor):
        device = parents.device if device is None else device
        is_value_known = parents.is_cpu and type(parents) is Tensor and not torch.compiler.is_compiling()
        if kv_len is not None and not is_value_known:
            return _from_prefix_tree_on_device(parents, lengths, kv_len).to(device)
    parent_rows = check_integer_lists("parents", parents)
    length_rows = check_integer_lists("lengths", lengths)
    if len(parent_rows) != len(length_rows):
        raise ValueError(
            f"`parents` and `lengths` must have as many rows, got {len(parent_rows)} and {len(length_rows)}"
        )
    ends = [_subtree_ends(parent_row, length_row) for parent_row, length_row in zip(parent_rows, length_rows)]
    kv_len = default_kv_len(length_rows, kv_len)
    # Padding follows the last token, and stands for the nodes that only other rows have.
    lts = pad_sequence([torch.tensor([*row, 0], dtype=torch.int32) for row in ends], batch_first=True)
    token_ends = pad_sequence(
        [torch.tensor(list(accumulate(row)), dtype=torch.int32) for row in length_rows],
        batch_first=True,
        padding_value=kv_len,
    )
    return planes_from_blocks(lts[:, None, None], token_ends, kv_len, device)


def limit_depth(bounds: Tensor, depth: Tensor, end_depth: Tensor, *, max_branches: int | None = None) -> Tensor:
    """Hide each key of a prefix tree from the rows of its subtree that are at `end_depth` or deeper.

    A window of W tokens along each branch is `end_depth = depth + W`, chunks of W are `(depth // W + 1) * W`.

    Args:
        bounds: `[B, 1, 1, S]`, trees in depth-first order (`from_prefix_tree`), S_q = S_k.
        depth: integers `[B, S]`, the number of tokens before each one on its path from the root. They go up one by one,
            except where a branch or a tree begins.
        end_depth: integers `[B, S]`, more than `depth`.
        max_branches: the largest number of leaves in one tree, when it is known. Otherwise it is read from the device.

    Returns:
        int32 `[B, 1, C, S]`, C = 4 for trees without branches, else 2 (max_branches + 1): each branch has its own end.

    Raises:
        TypeError, ValueError: when `bounds` do not have the form of bounds, or are not those of a prefix tree.
        ValueError: when a tree has more leaves than `max_branches`. On a device it is an assertion there.
        TooManyIntervalsError: when a tree has more than `MAX_INTERVALS - 1` branches.

    >>> tree = from_prefix_tree([-1, 0, 0], [2, 2, 2])
    >>> depth = torch.tensor([[0, 1, 2, 3, 2, 3]])
    >>> limit_depth(tree, depth, depth + 2).shape
    torch.Size([1, 1, 6, 6])
    """
    check_bounds(bounds)
    if bounds.shape[1] != 1 or bounds.shape[2] != 1:
        raise ValueError(f"`bounds` must be those of a prefix tree, [B, 1, 1, S], got {list(bounds.shape)}")
    if bounds.numel() == 0:
        return bounds.expand(-1, -1, 4, -1).contiguous()
    subtree_end = bounds[:, 0, 0].clamp(min=0)  # of padding it may be any number
    length = subtree_end.shape[1]
    row = torch.arange(length, dtype=torch.int32, device=bounds.device).expand_as(subtree_end)
    depth, end_depth = (values.to(torch.int32).expand_as(subtree_end) for values in (depth, end_depth))
    # The row is a sequence of runs, in which depth goes up one by one. `run_end[i]` is where the run of row i ends.
    begins_run = torch.nn.functional.pad(depth[:, 1:] != depth[:, :-1] + 1, (1, 0), value=True)
    next_run = torch.where(begins_run, row, length).flip(1).cummin(1).values.flip(1)
    # Not `pad`: the number that it pads with would be a constant of the graph.
    run_end = torch.cat([next_run[:, 1:], torch.full_like(next_run[:, :1], length)], dim=1)
    if max_branches is None:
        run = begins_run.cumsum(1)
        last_row = torch.maximum(subtree_end - 1, row).clamp(max=length - 1).long()
        max_branches = int((run.gather(1, last_row) - run).max()) + 1
    check_max_intervals("limit_depth", max_branches + 1)

    # In every run of the subtree the rows before `end_depth` see the key. The hidden rows after the last of these are
    # joined with the rows below the subtree, so that neighbouring keys have them in the same plane.
    branches = []
    lower_start = torch.minimum(subtree_end, run_end)
    start, end = row, torch.minimum(run_end, subtree_end)
    for _ in range(max_branches):
        first_depth = depth.gather(1, start.clamp(max=length - 1).long())
        hidden_from = torch.minimum(start + (end_depth - first_depth).clamp(min=0), end)
        lower_start = torch.where(start < subtree_end, hidden_from, lower_start)
        branches.append((hidden_from, torch.where(end < subtree_end, end, hidden_from)))
        start = end
        end = torch.minimum(run_end.gather(1, start.clamp(max=length - 1).long()), subtree_end)
    is_left = start < subtree_end.clamp(max=length)
    refuse_without_waiting(
        is_left, ValueError("`max_branches` is less than the number of leaves in a tree of `bounds`")
    )
    planes = [lower_start, torch.full_like(row, NO_END), torch.zeros_like(row), row]
    planes += [plane for branch in branches[:-1] for plane in branch]
    return torch.stack(planes, dim=1)[:, None]


def depth_in_prefix_trees(bounds: Tensor, position_ids: Tensor) -> Tensor | None:
    """How many tokens are before each one on its path from the root, if bounds and positions are those of prefix trees.

    They are where the tokens that each token sees are a path from a root, along which its positions count from any
    number on. There a layer with a window or chunks counts along the path, as it would in the sequence alone. Packed
    documents are trees without branches. Other bounds of one plane, such as windows with sinks, are final.

    Args:
        bounds: int32 `[B or 1, 1, 1, S]`, causal.
        position_ids: `[B or 1, S]`.

    Returns:
        int64 `[B or 1, S]`, of padding any numbers; None for other bounds.
    """
    end = bounds[:, 0, 0].clamp(0, bounds.shape[-1])
    key = torch.arange(end.shape[1], dtype=torch.int32, device=end.device)
    is_token = end > key  # padding does not even see itself
    # What padding sees does not matter: a key ends at the token after it.
    token_from = torch.where(is_token, key, end.shape[1]).flip(1).cummin(1).values.flip(1)
    end = torch.nn.functional.pad(token_from, (0, 1), value=end.shape[1]).gather(1, end.long())
    begun = is_token.cumsum(1, dtype=torch.int32)
    ended = torch.zeros_like(torch.nn.functional.pad(end, (0, 1)))
    ended.scatter_add_(1, end.long(), is_token.int())
    num_seen = begun - is_token.int() - ended[:, :-1].cumsum(1, dtype=torch.int32)
    # Paths: of the keys that are seen, those end first that began last, and each takes all that began after it along.
    seen_at_end = torch.nn.functional.pad(num_seen, (0, 1)).gather(1, end.long())
    root = torch.where(is_token & (num_seen == 0), key, 0).cummax(1).values.long()
    position_ids, root = torch.broadcast_tensors(position_ids, root)
    depth = position_ids - position_ids.gather(1, root)
    is_path = (seen_at_end <= num_seen) & (depth == num_seen)
    return depth.long() if bool((is_path | ~is_token).all()) else None


def _from_prefix_tree_on_device(parents: Tensor, lengths: Tensor, kv_len: int) -> Tensor:
    """`from_prefix_tree` of tensors whose values the host does not know. O(n log n) for n nodes."""
    for name, values in (("parents", parents), ("lengths", lengths)):
        check_int_tensor(name, values, (1, 2), "[B, n] or [n]")
    if parents.shape != lengths.shape:
        raise ValueError(
            f"`parents` and `lengths` must have the same shape, got {list(parents.shape)} and {list(lengths.shape)}"
        )
    parents, lengths = (values.long() if values.ndim == 2 else values[None].long() for values in (parents, lengths))
    last_node, is_refused = _last_nodes_of_subtrees(parents)
    ends = lengths.cumsum(1)
    is_refused = is_refused | (lengths < 0).any(1) | (ends[:, -1:] > kv_len).any(1)
    # Without numbers: a length in the text would be a constant of the graph.
    reason = "`parents` are not in depth-first order, or `lengths` are negative or add up to more than `kv_len`"
    refuse_without_waiting(is_refused, ValueError(reason))
    subtree_end = torch.nn.functional.pad(ends.gather(1, last_node), (0, 1), value=0)
    key = torch.arange(kv_len, device=parents.device).expand(len(parents), -1).contiguous()
    node = torch.searchsorted(ends, key, right=True)
    return subtree_end.gather(1, node).to(torch.int32)[:, None, None]


def _last_nodes_of_subtrees(parents: Tensor) -> tuple[Tensor, Tensor]:
    """The last node of each node's subtree, `[B, n]`, and for which rows the order is not depth-first, `[B]`.

    Each round doubles the number of levels below a node that it has seen. Node 0 of the tables stands above all roots.
    """
    batch, nodes = parents.shape
    above = torch.nn.functional.pad((parents + 1).clamp(0, nodes), (1, 0))
    last = torch.arange(nodes + 1, device=parents.device).expand(batch, -1)
    depth = (above > 0).long()
    is_refused = ((parents < -1) | (parents >= last[:, :-1])).any(1)
    levels = 1
    while levels < nodes:
        last = last.scatter_reduce(1, above, last, "amax")
        depth = depth + depth.gather(1, above)
        above = above.gather(1, above)
        levels *= 2
    # Every node is in the subtrees of its path. They are rows of neighbours only in depth-first order.
    node = torch.arange(1, nodes + 1, device=parents.device)
    sizes = last[:, 1:] - node + 1
    return last[:, 1:] - 1, is_refused | (sizes.sum(1) != (depth[:, 1:] + 1).sum(1))


def _subtree_ends(parents: list[int], lengths: list[int]) -> list[int]:
    """Past-the-last token of each node's subtree, after checking the depth-first order."""
    if len(parents) != len(lengths):
        raise ValueError(f"`parents` and `lengths` must name as many nodes, got {len(parents)} and {len(lengths)}")
    path: list[int] = []
    for node, (parent, length) in enumerate(zip(parents, lengths)):
        if length < 0:
            raise ValueError(f"`lengths` must not be negative, node {node} has {length}")
        while path and path[-1] != parent:
            path.pop()
        if parent != -1 and not path:
            raise ValueError(
                f"`parents` must be in depth-first order, every node right after its parent's earlier subtrees: node "
                f"{node} has parent {parent}, which is not an ancestor-or-self of node {node - 1}"
            )
        path.append(node)
    ends = list(accumulate(lengths))
    for node in reversed(range(len(parents))):
        if parents[node] != -1:
            ends[parents[node]] = max(ends[parents[node]], ends[node])
    return ends
