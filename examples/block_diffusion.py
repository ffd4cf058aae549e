"""Adapt an autoregressive language model to block diffusion, sample from it, and check it against a dense mask.

As in BD3-LM (arXiv 2503.09573), a row holds its tokens twice, `[x_t | x_0]`: with some of them masked, and clean. A
block of masked tokens sees itself, in both directions, and the clean blocks before it, so one pass trains all blocks.
The model has learned to predict the next token and goes on to do so, as in Fast-dLLM v2 (arXiv 2509.26328): what is
computed at a token is the prediction of the one after it. So the first token of a block stays clean, and the last one
predicts the first of the next block.

  flashmask  bounds.block_diffusion: 6 integers for each key
  sdpa       the first steps again, from the same weights, with the same mask as a dense matrix

Both compute the same loss and gradients; when they do not, the script says so and fails. Nothing is downloaded: the
texts are the documentation strings and licences of this Python installation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from _packed_text import DEVICE, Rows, load_documents, next_token_loss, pack, parser_of, report, small_llama, train
from _two_runs import draw_mask
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_flashmask import bounds

# Fractions of a block that are masked in training. Blocks with few masked tokens teach little and, weighted by 1 / t,
# make the loss noisy: BD3-LM clips them as well.
MASKED_FRACTIONS = 0.3, 1.0
PROMPT, SAMPLED = 12, 96  # tokens of a document that the samples continue, and of both together
SURE = 0.5  # a sampled token that is more likely than this does not wait for the others


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
    """Each block draws its t, and masks each of its tokens but the first with probability t.

    Returns:
        x_t `[B, L]`, and the weight of each token in the loss `[B, L]`: 1 for the first of a block, which no token
        before it sees; for the others, 1 / t if they are masked, else 0.
    """
    is_first = rows.position_ids % block_size == 0
    low, high = MASKED_FRACTIONS
    t_of_block, draw = torch.rand(2, *is_first.shape, generator=generator).to(is_first.device)
    t = (low + (high - low) * t_of_block).gather(1, is_first.cumsum(1) - 1)
    is_masked = (draw < t) & ~is_first
    weight = torch.where(is_first, 1.0, is_masked / t)
    return rows.input_ids.masked_fill(is_masked, mask_id), weight


def diffusion_loss(
    model: LlamaForCausalLM, mask: Tensor, rows: Rows, block_size: int, mask_id: int, generator: torch.Generator
) -> Tensor:
    """Weighted cross-entropy of the tokens that their predictions have not seen, per token of the row."""
    noisy_ids, weight = add_noise(rows, block_size, mask_id, generator)
    logits = model(
        input_ids=torch.cat([noisy_ids, rows.input_ids], dim=1),
        position_ids=rows.position_ids.repeat(1, 2),
        attention_mask=mask,
        logits_to_keep=torch.arange(noisy_ids.shape[1] - 1, device=DEVICE),  # of the noisy half
        use_cache=False,
    ).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.input_ids[:, 1:].flatten(), reduction="none")
    has_predecessor = rows.position_ids[:, 1:] > 0
    return (loss * (weight[:, 1:] * has_predecessor).flatten()).mean()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokens: Tensor, block_size: int, mask_id: int, end_id: int, count: int
) -> tuple[Tensor, int]:
    """Append blocks until there are `count` tokens or one ends the document.

    A pass predicts all masked tokens after a block's first one, and fills in the likeliest and all that are surer than
    `SURE`.

    Returns:
        tokens `[S]`, and how many passes of the model they took.
    """
    passes = 0
    while len(tokens) < count and end_id not in tokens:
        end = ((len(tokens) - 1) // block_size + 1) * block_size
        row = torch.nn.functional.pad(tokens, (0, end + 1 - len(tokens)), value=mask_id)
        mask = bounds.causal_with_blocks(torch.arange(end, device=DEVICE)[None] // block_size)
        while (is_masked := row[-block_size:] == mask_id).any():
            logits = model(
                input_ids=row[None, :-1], attention_mask=mask, logits_to_keep=block_size, use_cache=False
            ).logits
            likelihood, best = logits[0, :, :mask_id].softmax(-1).max(-1)
            likelihood = likelihood * is_masked
            is_taken = is_masked & (likelihood >= likelihood.max().clamp(max=SURE))
            row[-block_size:] = torch.where(is_taken, best, row[-block_size:])
            passes += 1
        tokens = row
    return tokens, passes


def show_sample(
    title: str, model: LlamaForCausalLM, tokenizer: Any, prompt: Tensor, block_size: int
) -> dict[str, str | int]:
    tokens, passes = sample(model, prompt, block_size, tokenizer.mask_token_id, tokenizer.eos_token_id, SAMPLED)
    count = len(tokens) - len(prompt)
    text = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
    print(f"\n{title}: {count} tokens in {passes} passes:\n{tokenizer.decode(prompt)}[...]{text}\n", flush=True)
    return {"text": text, "tokens": count, "passes": passes}


def main() -> None:
    parser = parser_of(__doc__, "block_diffusion", steps=400, learning_rate=3e-3)
    add = parser.add_argument
    add("--next-token-steps", type=int, default=300, help="training steps before them (default: %(default)s)")
    add("--warm-up", type=int, default=40, help="steps in which the learning rate rises (default: %(default)s)")
    add("--block-size", type=int, default=4, help="tokens of a block (default: %(default)s)")
    args = parser.parse_args()
    # A model this small learns its texts by heart: it sees each of them 48 times.
    batches = max((args.next_token_steps + args.steps) // 48, 1)
    documents, tokenizer = load_documents(args, batches * args.batch_size * args.length)
    rows, size, mask_id = pack(documents, args.length), args.block_size, tokenizer.mask_token_id
    prompt = torch.tensor(max(documents, key=len)[:PROMPT], device=DEVICE)

    model = small_llama(args, tokenizer, "flashmask")
    next_token = train(
        "next token",
        args,
        model,
        rows,
        lambda batch, _: next_token_loss(model, batch),
        steps=args.next_token_steps,
        warm_up=args.warm_up,
    )
    before = show_sample("Sampled in blocks, before the adaptation", model, tokenizer, prompt, size)
    dense_model = copy.deepcopy(model)
    dense_model.set_attn_implementation("sdpa")

    def loss_of(batch: Rows, generator: torch.Generator) -> Tensor:
        mask = bounds.block_diffusion(size, document_ids=batch.document_ids)
        return diffusion_loss(model, mask, batch, size, mask_id, generator)

    def dense_loss_of(batch: Rows, generator: torch.Generator) -> Tensor:
        return diffusion_loss(dense_model, dense_mask(batch, size), batch, size, mask_id, generator)

    ours = train("flashmask", args, model, rows, loss_of, warm_up=args.warm_up)
    dense = train("sdpa", args, dense_model, rows, dense_loss_of, warm_up=args.warm_up, stop_after=args.dense_steps)
    after = show_sample("Sampled in blocks, after the adaptation", model, tokenizer, prompt, size)

    batch = rows[: args.batch_size]
    mask = bounds.block_diffusion(size, document_ids=batch.document_ids)
    draw_mask(mask[:1], args.output / "mask.png", title="The mask of one row", q_len=mask.shape[3])
    figures = {"next_token_loss": next_token.loss, "before": before, "after": after}
    report(args, ours, dense, (mask, dense_mask(batch, size)), figures, "loss per token (nats)")


if __name__ == "__main__":
    main()
