"""An attention mask as one int32 tensor of bounds: for every key, the query rows that may not see it.

`bounds` is `int32 [B or 1, H or 1, C, S_k]`, keys last. Rows are counted from the first query of the call.

| C          | planes             | rows hidden from key `j`                             |
|------------|--------------------|------------------------------------------------------|
| 1          | LTS                | `i >= LTS`, and the causal triangle                  |
| 2          | LTS, UTE           | `i >= LTS`, or `i < UTE`                             |
| 4          | LTS, LTE, UTS, UTE | `LTS <= i < LTE`, or `UTS <= i < UTE`                |
| 2n, n > 2  | n pairs            | inside any of the n intervals `start <= i < end`     |

The first three are FlashMask's (arXiv 2410.01359). The causal triangle of C = 1 is aligned at the bottom right:
key `j` is hidden from the rows `i < j - (S_k - S_q)`. An interval with `start >= end` is empty, intervals may
overlap, and values below 0 or above S_q act as if clamped. A row that sees no key is legal.

n is at most `MAX_INTERVALS`. Unless its docstring says otherwise, a function here needs O(S_k) memory and a handful of
tensor operations, reads no value back to the host, and can be traced by `torch.compile(fullgraph=True)`.

Shared arguments of the constructors:

* `q_len`, `kv_len`: numbers of query rows and of keys, S_q and S_k.
* `q_offset`, `kv_offset`: position of the first query and of the first key in the sequence, as `int` or as 0-d
  tensor (static caches). `q_offset=None` means that the queries are the last `q_len` positions.
* `is_causal`: whether every key after a query's own position is hidden from that query as well.
* `device`: of the bounds; default: of the tensors among the arguments, else torch's default device.

>>> import torch
>>> documents = from_position_ids(torch.tensor([0, 1, 2, 0, 1]))
>>> mask = intersect(documents, sliding_window(2, 5))
>>> to_dense(mask)[0, 0].int()
tensor([[1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1]], dtype=torch.int32)
"""

from .algebra import hide_keys, intersect, simplify, union
from .constructors import (
    bidirectional,
    causal,
    causal_with_blocks,
    chunked,
    from_block_mask,
    from_padding_mask,
    from_startend_row_indices,
    global_and_sliding_window,
    hash_sparse,
    prefix_lm,
    sliding_window,
)
from .dense import from_dense, from_mask_mod, from_tiles
from .documents import (
    document_ends,
    document_ends_of_mask,
    document_starts,
    from_cu_seqlens,
    from_document_ends,
    from_document_ids,
    from_position_ids,
)
from .families import (
    anchored_blocks,
    block_diffusion,
    block_diffusion_decoder,
    fork_and_join,
    frame_causal,
    from_splits,
    gist_tokens,
    hstu,
    independent_chunks,
    isolated_items,
    parallel_eagle,
    sinks_and_window,
    streaming_chunks,
    teacher_forcing,
    training_time_test,
)
from .form import MAX_INTERVALS, TooManyIntervalsError, check_bounds
from .intervals import concatenate_keys, from_visible_intervals, select_rows
from .trees import from_prefix_tree, limit_depth
from .views import explain, tile_occupancy, to_dense, to_startend_row_indices, visible_pairs

__all__ = [
    "MAX_INTERVALS",
    "TooManyIntervalsError",
    "anchored_blocks",
    "bidirectional",
    "block_diffusion",
    "block_diffusion_decoder",
    "causal",
    "causal_with_blocks",
    "check_bounds",
    "chunked",
    "concatenate_keys",
    "document_ends",
    "document_ends_of_mask",
    "document_starts",
    "explain",
    "fork_and_join",
    "frame_causal",
    "from_block_mask",
    "from_cu_seqlens",
    "from_dense",
    "from_document_ends",
    "from_document_ids",
    "from_mask_mod",
    "from_padding_mask",
    "from_position_ids",
    "from_prefix_tree",
    "from_splits",
    "from_startend_row_indices",
    "from_tiles",
    "from_visible_intervals",
    "gist_tokens",
    "global_and_sliding_window",
    "hash_sparse",
    "hide_keys",
    "hstu",
    "independent_chunks",
    "intersect",
    "isolated_items",
    "limit_depth",
    "parallel_eagle",
    "prefix_lm",
    "select_rows",
    "simplify",
    "sinks_and_window",
    "sliding_window",
    "streaming_chunks",
    "teacher_forcing",
    "tile_occupancy",
    "to_dense",
    "to_startend_row_indices",
    "training_time_test",
    "union",
    "visible_pairs",
]
