"""Block diffusion language models: noisy copies of a sequence beside the clean one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..form import (
    check_int_tensor,
    check_integer,
    check_per_position,
    check_q_len_and_kv_len,
    check_size,
    refuse_without_waiting,
)
from ..intervals import concatenate_keys, from_ordered_intervals
from .runs import DocumentRuns, Runs, document_runs_beside, document_runs_of, runs_of


def block_diffusion(
    block_size: int | None = None,
    *,
    block_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    length: int | None = None,
    clean_first: bool = False,
    clean_causal: bool = False,
    noisy_causal: bool = False,
    num_noisy: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """A noisy and a clean copy of L tokens, `[x_t | x_0]`: noisy blocks see themselves and earlier clean blocks.

    A noisy query sees the noisy keys of its block and the clean keys of earlier blocks; a clean query sees the clean
    keys of its own and of earlier blocks, and nothing noisy. This is the mask of BD3-LM (arXiv 2503.09573), SDAR, LLaDA
    2 and Fast-dLLM v2. Both copies have the same position ids, so the model must be given this mask explicitly.

    Args:
        block_size: blocks of so many tokens, counted from the start of each document; the last one may be shorter.
        block_ids: instead of a size, integers `[B, L]` or `[L]`: blocks are runs of adjacent equal ids, of any lengths.
        document_ids, length, device: see `bounds.families`, for L positions. Blocks end where documents end.
        clean_first: the layout `[x_0 | x_t]`.
        clean_causal: a clean query sees no later key of its own block (I-DLM).
        noisy_causal: a noisy query sees no later key of its own block.
        num_noisy: so many noisy copies, which do not see each other: `[x_t | ... | x_t | x_0]`.

    Returns:
        int32 `[B, 1, C, (num_noisy + 1) L]`, C = 2 (num_noisy + 2) with `document_ids`, else 2 (num_noisy + 1).

    Raises:
        TypeError: when ids are not integer tensors.
        ValueError: when not one of `block_size` and `block_ids` is given, or they have other shapes or values.
        TooManyIntervalsError: when there are too many noisy copies.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(block_diffusion(2, length=4))[0, 0].int()
    tensor([[1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 1],
            [0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    """
    check_size("num_noisy", num_noisy)
    documents, blocks = _blocks(block_size, block_ids, document_ids, length, device)
    return beside_clean(
        documents,
        blocks,
        documents.runs.end,
        clean_first=clean_first,
        clean_causal=clean_causal,
        noisy_causal=noisy_causal,
        num_noisy=num_noisy,
        is_seen_to_the_last=not documents.are_packed,
    )


def beside_clean(
    documents: DocumentRuns,
    blocks: Runs,
    reach: Tensor,
    *,
    clean_first: bool,
    clean_causal: bool = False,
    noisy_causal: bool = False,
    num_noisy: int = 1,
    is_seen_to_the_last: bool,
) -> Tensor:
    """The mask of noisy copies beside the clean one.

    Args:
        reach: past-the-last position that sees the clean key of each position, `[B, L]`.
        is_seen_to_the_last: whether `reach` is known to be L.
    """
    length = documents.position.shape[0]
    q_len = (num_noisy + 1) * length
    clean_row = 0 if clean_first else num_noisy * length
    noisy_rows = [(copy + clean_first) * length for copy in range(num_noisy)]
    own_start = documents.position if noisy_causal else blocks.start
    own_ends = [_rows_of_copy(row, blocks.end) for row in noisy_rows]
    noisy = [
        from_ordered_intervals([(_rows_of_copy(row, own_start), end)], q_len) for row, end in zip(noisy_rows, own_ends)
    ]
    own_start = documents.position if clean_causal else blocks.start
    by_clean = [(_rows_of_copy(clean_row, own_start), _rows_of_copy(clean_row, reach))]
    by_noisy = [(end, _rows_of_copy(row, reach)) for row, end in zip(noisy_rows, own_ends)]
    visible = by_clean + by_noisy if clean_first else by_noisy + by_clean
    clean = from_ordered_intervals(visible, q_len, to_the_last=is_seen_to_the_last)
    result = concatenate_keys(*([clean, *noisy] if clean_first else [*noisy, clean]), q_len=q_len)
    return documents.hide_padding(result, copies=num_noisy + 1)


def _rows_of_copy(row: int, positions: Tensor) -> Tensor:
    """Rows of positions of a copy that begins at `row`."""
    return positions if row == 0 else positions + row


def block_diffusion_decoder(
    prompt_lengths: int | Tensor,
    response_len: int,
    encoder_len: int,
    block_size: int,
    *,
    sliding_window: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """DiffusionGemma's decoder in training: noisy blocks of a response see what the encoder made of the text before.

    Queries are the R noisy tokens of the response. Keys are `[encoder | canvas]`: E clean tokens, the prompt and then
    the response, and the R noisy tokens. A query sees the encoder's keys before its block, and the canvas of its block.

    Args:
        prompt_lengths: tokens of the prompt, an `int` or integers `[B]`. What the encoder holds after the response is
            padding, and hidden. `bounds.hide_keys` hides other keys.
        response_len, encoder_len: R and E.
        block_size: tokens of a canvas.
        sliding_window: of local layers: a block sees the encoder's last `sliding_window - 1` keys before its first
            token, and its whole canvas.

    Returns:
        int32 `[B or 1, 1, 2, E + R]`, for R queries.

    Raises:
        TypeError: when `prompt_lengths` is a tensor of other values, or a number is no integer.
        ValueError: when it has another shape, a size or window is less than 1, or the encoder does not hold prompt and
            response; of lengths on a device the latter is an assertion there.

    >>> from hf_flashmask.bounds import to_dense
    >>> to_dense(block_diffusion_decoder(1, 4, 5, 2), 4)[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 1, 1, 0, 0],
            [1, 0, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 1, 1],
            [1, 1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    block_size = check_size("block_size", block_size)
    check_integer("response_len", response_len)
    check_integer("encoder_len", encoder_len)
    check_q_len_and_kv_len(response_len, encoder_len)
    if isinstance(prompt_lengths, Tensor):
        check_int_tensor("prompt_lengths", prompt_lengths, (1,), "[B]")
        device, prompt_lengths = prompt_lengths.device, prompt_lengths.long()[:, None]
        refuse_without_waiting(
            (prompt_lengths < 0) | (prompt_lengths + response_len > encoder_len),
            ValueError("`prompt_lengths` must not be negative, and with `response_len` at most `encoder_len`"),
        )
    else:
        check_integer("prompt_lengths", prompt_lengths)
        if not 0 <= prompt_lengths <= encoder_len - response_len:
            raise ValueError(
                "`prompt_lengths` must not be negative, and with `response_len` at most `encoder_len`, got "
                f"{prompt_lengths} and {response_len} of {encoder_len}"
            )
    # In int64, a place and two sizes add up.
    place = torch.arange(encoder_len, device=device) - prompt_lengths  # in the response
    first = place.div(block_size, rounding_mode="floor").add(1).mul(block_size).masked_fill(place < 0, 0)
    end = torch.full_like(first, response_len)
    if sliding_window is not None:
        sliding_window = check_size("sliding_window", sliding_window)
        end = (place + (sliding_window + block_size - 1)).div(block_size, rounding_mode="floor") * block_size
    encoder = from_ordered_intervals([(first, end.masked_fill(place >= response_len, 0))], response_len)
    canvas = torch.arange(response_len, dtype=torch.int32, device=first.device)
    start = canvas - canvas % block_size
    return concatenate_keys(
        encoder, from_ordered_intervals([(start, start + block_size)], response_len), q_len=response_len
    )


def _blocks(
    block_size: int | None,
    block_ids: Tensor | None,
    document_ids: Tensor | None,
    length: int | None,
    device: torch.device | str | None,
) -> tuple[DocumentRuns, Runs]:
    if block_ids is not None and block_size is None:
        block_ids = check_per_position("block_ids", block_ids)
        if length is not None and length != block_ids.shape[1]:
            raise ValueError(f"`block_ids` have {block_ids.shape[1]} positions, `length` says {length}")
        documents = document_runs_beside(block_ids, document_ids)
        return documents, runs_of(block_ids, *documents.ids)
    if block_size is None or block_ids is not None:
        raise ValueError("pass one of `block_size` and `block_ids`")
    block_size = check_size("block_size", block_size)
    documents = document_runs_of(document_ids, length, device)
    place = documents.position - documents.runs.start
    start = documents.position - place % block_size
    return documents, Runs(start, torch.minimum(start + block_size, documents.runs.end))
