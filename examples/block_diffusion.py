"""Train a block diffusion language model on packed documents, sample from it, and check it against a dense mask.

As in BD3-LM (arXiv 2503.09573), a row holds its tokens twice, `[x_t | x_0]`: with some of them masked, and clean. A
block of masked tokens sees itself, in both directions, and the clean blocks before it, so one pass trains all blocks.

  flashmask  bounds.block_diffusion: 6 integers for each key
  sdpa       the first steps again, from the same weights, with the same mask as a dense matrix

Both compute the same loss and gradients; when they do not, the script says so and fails. Nothing is downloaded: the
texts are the documentation strings and licences of this Python installation.
"""

from __future__ import annotations

import torch
from _packed_text import DEVICE, Rows, draw_mask, load_documents, pack, parser_of, report, small_llama, train
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_flashmask import bounds

# Fractions of a block that are masked in training. Blocks with few masked tokens teach little and, weighted by 1 / t,
# make the loss noisy: BD3-LM clips them as well.
MASKED_FRACTIONS = 0.3, 1.0
SURE = 0.9  # a sampled token that is more likely than this does not wait for the others


def dense_mask(rows: Rows, block_size: int) -> Tensor:
    """The definition, pair by pair: bool `[B, 1, 2L, 2L]`."""
    document = rows.document_ids.repeat(1, 2)
    block = rows.position_ids.repeat(1, 2) // block_size
    is_clean = torch.arange(document.shape[1], device=document.device) >= document.shape[1] // 2
    document_q, block_q, clean_q = document[:, :, None], block[:, :, None], is_clean[:, None]
    document_k, block_k, clean_k = document[:, None], block[:, None], is_clean[None]
    noisy_sees = torch.where(clean_k, block_k < block_q, block_k == block_q)
    clean_sees = clean_k & (block_k <= block_q)
    return ((document_q == document_k) & torch.where(clean_q, clean_sees, noisy_sees))[:, None]


def add_noise(rows: Rows, block_size: int, mask_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each block draws its t, and masks each of its tokens with probability t.

    Returns:
        x_t `[B, L]`, and the weight of each token in the loss `[B, L]`: 1 / t if it is masked, else 0.
    """
    block = (rows.position_ids % block_size == 0).cumsum(1) - 1
    low, high = MASKED_FRACTIONS
    t_of_block, draw = torch.rand(2, *block.shape, generator=generator).to(block.device)
    t = (low + (high - low) * t_of_block).gather(1, block)
    is_masked = draw < t
    return rows.input_ids.masked_fill(is_masked, mask_id), is_masked / t


def diffusion_loss(
    model: LlamaForCausalLM, mask: Tensor, rows: Rows, block_size: int, mask_id: int, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of the masked tokens, each predicted at its own place, weighted by 1 / t; per token of the row."""
    noisy_ids, weight = add_noise(rows, block_size, mask_id, generator)
    logits = model(
        input_ids=torch.cat([noisy_ids, rows.input_ids], dim=1),
        position_ids=rows.position_ids.repeat(1, 2),
        attention_mask=mask,
        logits_to_keep=torch.arange(noisy_ids.shape[1], device=DEVICE),  # of the noisy half
        use_cache=False,
    ).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.input_ids.flatten(), reduction="none")
    return (loss * weight.flatten()).mean()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokens: Tensor, block_size: int, mask_id: int, end_id: int, count: int
) -> tuple[Tensor, int]:
    """Append blocks until there are `count` tokens or one ends the document.

    A pass predicts all masked tokens of the block, and fills in the likeliest and all that are surer than `SURE`.

    Returns:
        tokens `[S]`, and how many passes of the model they took.
    """
    passes = 0
    while len(tokens) < count and end_id not in tokens:
        row = torch.nn.functional.pad(tokens, (0, block_size - len(tokens) % block_size), value=mask_id)
        block = torch.arange(len(row), device=DEVICE) // block_size
        mask = bounds.causal_with_blocks(block[None])
        while (is_masked := row[-block_size:] == mask_id).any():
            logits = model(input_ids=row[None], attention_mask=mask, logits_to_keep=block_size, use_cache=False).logits
            likelihood, best = logits[0, :, :mask_id].softmax(-1).max(-1)
            likelihood = likelihood * is_masked
            is_taken = is_masked & (likelihood >= likelihood.max().clamp(max=SURE))
            row[-block_size:] = torch.where(is_taken, best, row[-block_size:])
            passes += 1
        tokens = row
    return tokens, passes


def main() -> None:
    parser = parser_of(__doc__, "block_diffusion", steps=600)
    parser.add_argument("--block-size", type=int, default=4, help="tokens of a block (default: %(default)s)")
    args = parser.parse_args()
    per_step = args.batch_size * args.length
    # A model this small learns by repetition: it sees each text 16 times.
    documents, tokenizer = load_documents(args, max(args.steps // 16, 1) * per_step)
    rows, size, mask_id = pack(documents, args.length), args.block_size, tokenizer.mask_token_id

    model = small_llama(args, tokenizer, "flashmask")

    def loss_of(batch: Rows, generator: torch.Generator) -> Tensor:
        mask = bounds.block_diffusion(size, document_ids=batch.document_ids)
        return diffusion_loss(model, mask, batch, size, mask_id, generator)

    ours = train("flashmask", args, model, rows, loss_of)

    dense_model = small_llama(args, tokenizer, "sdpa")

    def dense_loss_of(batch: Rows, generator: torch.Generator) -> Tensor:
        return diffusion_loss(dense_model, dense_mask(batch, size), batch, size, mask_id, generator)

    dense = train("sdpa", args, dense_model, rows, dense_loss_of, stop_after=args.dense_steps)

    prompt = torch.tensor(max(documents, key=len)[:12])
    tokens, passes = sample(model, prompt.to(DEVICE), size, mask_id, tokenizer.eos_token_id, 96)
    text = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
    print(f"\nSampled {len(tokens) - len(prompt)} tokens in {passes} passes:\n{tokenizer.decode(prompt)}[...]{text}")

    batch = rows[: args.batch_size]
    mask = bounds.block_diffusion(size, document_ids=batch.document_ids)
    draw_mask(mask[:1], mask.shape[3], "The mask of one row", args.output / "mask.png")
    figures = {"sample": text, "sampled_tokens": len(tokens) - len(prompt), "passes": passes}
    report(args, ours, dense, (mask, dense_mask(batch, size)), figures, "loss per token (nats)")


if __name__ == "__main__":
    main()
