"""Train a draft model for speculative decoding, measure how much it saves, and check it against a dense mask.

As in DFlash (arXiv 2602.06036), the drafter writes a block at once: it sees the target model's hidden states of the
tokens before an anchor, the anchor, and masked places after it. Training draws many anchors in each packed row. Draft
tokens are the queries; keys are `[context | draft tokens]`, so the mask is a rectangle that changes in every step.

  flashmask  bounds.anchored_blocks: 2 integers for each key
  sdpa       the first steps again, from the same weights, with the same mask as a dense matrix

Both compute the same loss and gradients; when they do not, the script says so and fails. Nothing is downloaded: a small
target learns the documentation strings and licences of this Python installation, then writes the drafter's texts.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from _packed_text import DEVICE, Rows, load_documents, next_token_loss, pack, parser_of, report, small_llama, train
from _two_runs import draw_mask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from hf_flashmask import bounds

PROMPT, ANSWER = 16, 96  # tokens that the target reads, and writes
DECAY = 4.0  # the loss of the k-th draft token weighs exp(-(k - 1) / DECAY): a wrong one spoils those after it


# Models


class DraftAttention(LlamaAttention):
    """Queries are draft tokens; keys and values are made of the context, then of the draft tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        def heads(states: Tensor) -> Tensor:
            return states.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        seen = torch.cat([context, hidden_states], dim=1)
        query, key, value = heads(self.q_proj(hidden_states)), heads(self.k_proj(seen)), heads(self.v_proj(seen))
        cos, sin = position_embeddings
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -query.shape[2] :], sin[:, -query.shape[2] :])
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(output.flatten(2)), None


class Drafter(nn.Module):
    """Llama layers between the embeddings and the head of the target, which stay as they are."""

    def __init__(self, target: LlamaForCausalLM, layers: int, attention: str) -> None:
        super().__init__()
        config = copy.deepcopy(target.config)
        config._attn_implementation = attention
        hidden_size = config.hidden_size
        self.embedding, self.head = target.get_input_embeddings(), target.lm_head
        self.rotary = target.model.rotary_emb
        self.fuse = nn.Linear(config.num_hidden_layers * hidden_size, hidden_size, bias=False)
        self.fused_norm, self.norm = LlamaRMSNorm(hidden_size), LlamaRMSNorm(hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
        for index, layer in enumerate(self.layers):
            layer.self_attn = DraftAttention(config, index)

    def forward(self, features: Tensor, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of draft tokens `[B, Q, V]`.

        Args:
            features: of S tokens of context, `[B, S, layers of the target x hidden size]`.
            input_ids: `[B, Q]`.
            position_ids: of both, `[B, S + Q]`.
            mask: bounds or a dense mask for Q queries and S + Q keys.
        """
        context, hidden = self.fused_norm(self.fuse(features)), self.embedding(input_ids)
        rotary = self.rotary(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, context=context)
        return self.head(self.norm(hidden))


@torch.no_grad()
def read(target: LlamaForCausalLM, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The target's logits `[B, S, V]`, and the outputs of its layers beside each other."""
    output = target(input_ids=input_ids, position_ids=position_ids, output_hidden_states=True, use_cache=False)
    return output.logits, torch.cat(output.hidden_states[1:], dim=2)


# Training


def draw_anchors(count: int, rows: Rows, generator: torch.Generator) -> Tensor:
    """Places in the rows, ascending, `[B, count]`."""
    draw = torch.rand(rows.input_ids.shape, generator=generator)
    return draw.topk(count).indices.sort().values.to(DEVICE)


def dense_mask(rows: Rows, anchors: Tensor, block_size: int) -> Tensor:
    """The definition, pair by pair: bool `[B, 1, N block_size, L + N block_size]`."""
    anchor = anchors.repeat_interleave(block_size, dim=1)[:, :, None]
    document = rows.document_ids.gather(1, anchor[..., 0])[:, :, None]
    key = torch.arange(rows.input_ids.shape[1], device=anchors.device)
    sees_context = (key < anchor) & (rows.document_ids[:, None] == document)
    block = torch.arange(anchor.shape[1], device=anchors.device) // block_size
    sees_block = (block[:, None] == block).expand(len(anchors), -1, -1)
    return torch.cat([sees_context, sees_block], dim=2)[:, None]


def draft_loss(
    drafter: Drafter,
    features: Tensor,
    rows: Rows,
    anchors: Tensor,
    mask: Tensor,
    block_size: int,
    mask_id: int,
) -> Tensor:
    """Cross-entropy of the tokens after each anchor, up to the end of its document; `features` are the target's."""
    offset = torch.arange(block_size, device=DEVICE)
    place = (anchors[..., None] + offset).flatten(1)
    inside = place.clamp(max=rows.input_ids.shape[1] - 1)
    label = rows.input_ids.gather(1, inside)
    is_anchor = offset.repeat(anchors.shape[1]) == 0
    position = (rows.position_ids.gather(1, anchors)[..., None] + offset).flatten(1)
    logits = drafter(
        features,
        label.where(is_anchor, torch.full_like(label, mask_id)),
        torch.cat([rows.position_ids, position], dim=1),
        mask,
    )
    is_in_document = (place == inside) & (rows.position_ids.gather(1, inside) == position)
    weight = torch.exp(-(offset - 1) / DECAY).repeat(anchors.shape[1]) * (is_in_document & ~is_anchor)
    loss = cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
    return (loss * weight.flatten()).sum() / weight.sum()


@torch.no_grad()
def answers(target: LlamaForCausalLM, prompts: Tensor, end_id: int) -> list[list[int]]:
    """The prompts `[N, PROMPT]` with what the target writes after them: drafters learn the target's own texts."""
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=ANSWER, do_sample=False
    ).tolist()
    return [ids[: ids.index(end_id) + 1] if end_id in ids else ids for ids in texts]


# Speculative decoding


@torch.no_grad()
def speculate(
    target: LlamaForCausalLM, drafter: Drafter, prompt: Tensor, block_size: int, mask_id: int, end_id: int
) -> tuple[Tensor, int]:
    """Greedy decoding: the drafter writes a block, the target reads it in one pass and keeps what it would write.

    Nothing is cached, to keep this short.

    Returns:
        tokens `[S]`, and how many passes of the target wrote them.
    """
    logits, features = read(target, prompt[None])
    tokens, passes = torch.cat([prompt, logits[0, -1:].argmax(-1)]), 1
    while len(tokens) < PROMPT + ANSWER and end_id not in tokens:
        anchor = len(tokens) - 1
        block = torch.nn.functional.pad(tokens[-1:], (0, block_size - 1), value=mask_id)
        mask = bounds.anchored_blocks(torch.tensor([[anchor]], device=DEVICE), block_size, anchor)
        position = torch.arange(anchor + block_size, device=DEVICE)
        draft = drafter(features, block[None], position[None], mask)[0, 1:].argmax(-1)
        logits, features = read(target, torch.cat([tokens, draft])[None])
        written = logits[0, anchor:].argmax(-1)
        kept = int((draft == written[:-1]).int().cumprod(0).sum()) + 1  # the first one that differs is the target's
        tokens, features = torch.cat([tokens, written[:kept]]), features[:, : anchor + kept]
        passes += 1
    return tokens, passes


def acceptance(
    target: LlamaForCausalLM, drafter: Drafter, prompts: Tensor, args: argparse.Namespace, tokenizer: Any
) -> tuple[float, list[list[int]]]:
    """How many tokens a pass of the target writes on average, and the texts."""
    end_id, texts, passes = tokenizer.eos_token_id, [], 0
    for prompt in prompts:
        tokens, taken = speculate(target, drafter, prompt, args.block_size, tokenizer.mask_token_id, end_id)
        texts.append(tokens.tolist())
        passes += taken
    return (sum(map(len, texts)) - prompts.numel()) / passes, texts


def main() -> None:
    parser = parser_of(__doc__, "draft_model", steps=300, learning_rate=4e-3)
    add = parser.add_argument
    add("--target-steps", type=int, default=400, help="training steps of the target (default: %(default)s)")
    add("--block-size", type=int, default=8, help="the anchor and the tokens drafted at once (default: %(default)s)")
    add("--anchors", type=int, default=16, help="of each row (default: %(default)s)")
    add("--draft-layers", type=int, default=2, help="of the drafter (default: %(default)s)")
    add("--prompts", type=int, default=256, help="that the target continues for the drafter (default: %(default)s)")
    args = parser.parse_args()
    documents, tokenizer = load_documents(args, max(args.target_steps * args.batch_size // 4, 8) * args.length)
    size, mask_id, end_id = args.block_size, tokenizer.mask_token_id, tokenizer.eos_token_id

    target = small_llama(args, tokenizer, "flashmask")
    texts = pack(documents, args.length)
    train("target", args, target, texts, lambda rows, _: next_token_loss(target, rows), steps=args.target_steps)
    target.requires_grad_(False)
    prompts = torch.tensor([ids[:PROMPT] for ids in documents if len(ids) > PROMPT], device=DEVICE)
    prompts, held_out = prompts[:-4][: args.prompts], prompts[-4:]
    rows = pack(answers(target, prompts, end_id), args.length)

    def drafter_under(attention: str) -> Drafter:
        torch.manual_seed(args.seed)
        return Drafter(target, args.draft_layers, attention).to(DEVICE)

    drafter, dense_drafter = drafter_under("flashmask"), drafter_under("sdpa")

    def features_of(batch: Rows) -> Tensor:
        return read(target, batch.input_ids, batch.position_ids)[1]

    def loss_of(batch: Rows, generator: torch.Generator) -> Tensor:
        anchors = draw_anchors(args.anchors, batch, generator)
        mask = bounds.anchored_blocks(anchors, size, args.length, document_ids=batch.document_ids)
        return draft_loss(drafter, features_of(batch), batch, anchors, mask, size, mask_id)

    def dense_loss_of(batch: Rows, generator: torch.Generator) -> Tensor:
        anchors = draw_anchors(args.anchors, batch, generator)
        mask = dense_mask(batch, anchors, size)
        return draft_loss(dense_drafter, features_of(batch), batch, anchors, mask, size, mask_id)

    before, _ = acceptance(target, drafter, held_out, args, tokenizer)
    ours = train("flashmask", args, drafter, rows, loss_of)
    dense = train("sdpa", args, dense_drafter, rows, dense_loss_of, stop_after=args.dense_steps)
    after, written = acceptance(target, drafter, held_out, args, tokenizer)
    plain = answers(target, held_out, end_id)
    is_same_text = all(ids[: len(reference)] == reference for ids, reference in zip(written, plain))
    print(f"\nTokens per pass of the target: {before:.2f} before training, {after:.2f} after. The text is", end=" ")
    print("that of plain greedy decoding:" if is_same_text else "NOT that of plain greedy decoding:")
    print(tokenizer.decode(plain[0][:PROMPT]) + "[...]" + tokenizer.decode(plain[0][PROMPT:]))

    batch = rows[: args.batch_size]
    anchors = draw_anchors(args.anchors, batch, torch.Generator().manual_seed(args.seed))
    mask = bounds.anchored_blocks(anchors, size, args.length, document_ids=batch.document_ids)
    draw_mask(mask[:1], args.output / "mask.png", title="Draft tokens of one row", q_len=args.anchors * size)
    figures = {"acceptance": {"before": before, "after": after}, "is_same_text": is_same_text}
    report(args, ours, dense, (mask, dense_mask(batch, anchors, size)), figures, "weighted loss per draft token (nats)")


if __name__ == "__main__":
    main()
