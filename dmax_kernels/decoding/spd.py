"""Soft Parallel Decoding (arXiv 2604.08302, section 3.2, Algorithm 1), block by block.

generate -> prefill -> denoise_block -> step. Shapes: B rows, T prompt tokens, K block length,
V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmax_kernels.decoding.forward import BlockForward
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.settings import Settings, resolve_settings
from dmax_kernels.decoding.state import BlockState
from dmax_kernels.decoding.trace import Trace


@dataclass
class GenerationOutput:
    """What `generate` returns. N is the number of blocks that the longest row took.

    `num_forwards` counts the denoising passes a row took part in. Nothing else is hidden in it: the
    prompt's prefill is one more pass for the whole batch, and refreshing the KV cache costs no pass
    of its own (a block's first pass carries the block before it). An engine that refreshes with a
    separate pass adds `num_refreshes`.
    """

    sequences: Tensor  # int64 [B, T + max_new_tokens]; pad after a row's first eos
    num_tokens: Tensor  # int64 [B]: generated tokens, up to and including the first eos
    block_forwards: Tensor  # int64 [B, N]: denoising passes per block, 0 after a row has ended
    num_refreshes: Tensor  # int64 [B]: finished blocks whose hard tokens entered the cache later
    trace: Trace | None = None

    @property
    def num_forwards(self) -> Tensor:
        return self.block_forwards.sum(dim=1)

    @property
    def num_blocks(self) -> Tensor:
        return (self.block_forwards > 0).sum(dim=1)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    *,
    block_length: int = 32,
    max_new_tokens: int,
    tau_dec: float = 0.5,
    tau_acc: float = 0.9,
    mask_token_id: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    rule: str | Rule = "spd",
    semantics: str = "paper",
    top_k: int = 1,
    convergence: str = "both",
    ops: str = "fused",
    suppress_mask: bool = True,
    use_cache: bool = True,
    max_steps_per_block: int | None = None,
    trace: bool = False,
    progress: bool = False,
) -> GenerationOutput:
    """Decode `max_new_tokens` after each prompt, several tokens per forward pass.

    The sequence is cut into absolute blocks of K positions. Each block starts fully masked and is
    denoised until it converges, per row: no mask left and the top-1 predictions equal twice in a
    row, or all confidences above tau_acc. A prompt's tail inside the first decoded block is kept as
    it is. Rows converge and end independently, so a row's result is the same alone and in any
    batch.

    Args:
        model: a Hugging Face causal LM that takes `inputs_embeds`, a 4-D additive `attention_mask`,
            `position_ids`, `past_key_values` and `use_cache`, and predicts each position's own
            token (no shift by one).
        input_ids: [B, T], prompts of one length.
        block_length: K; the length the model was trained with.
        max_new_tokens: length of the result; decoding runs to the end of the block it falls in.
        tau_dec: a masked position is promoted when its confidence exceeds this.
        tau_acc: a block is accepted when all of its confidences exceed this.
        mask_token_id, eos_token_id, pad_token_id: from the model's config unless given.
        rule: "spd", or an ablation: "hybrid" (no prefix), "hard_prefix", "hard" (tokens instead of
            soft embeddings), "threshold" (no revision; `convergence` and tau_acc do not apply).
        semantics: "paper", or "released" for the token ids of the authors' released code, which may
            leave mask tokens in the result when tau_dec > tau_acc.
        top_k: how many candidates a hybrid embedding mixes (1 in the paper).
        convergence: "both" criteria, or "consistency" or "confidence" alone (the paper's Table 4).
        ops: "fused" kernels or the eager "reference".
        suppress_mask: never predict the mask token itself.
        use_cache: keep keys and values of committed blocks; False forwards the whole sequence.
        max_steps_per_block: cap on steps; at the cap the current top-1 tokens are committed.
            Default: K.
        trace: record every step in the output's `trace`.
        progress: show a progress bar over blocks.

    Raises:
        ValueError: one sentence, for any argument that does not fit the model or the others.
    """
    settings = resolve_settings(
        model,
        input_ids,
        block_length=block_length,
        max_new_tokens=max_new_tokens,
        tau_dec=tau_dec,
        tau_acc=tau_acc,
        mask_token_id=mask_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        rule=rule,
        semantics=semantics,
        top_k=top_k,
        convergence=convergence,
        suppress_mask=suppress_mask,
        max_steps_per_block=max_steps_per_block,
        ops=ops,
    )
    batch, prompt_length = input_ids.shape
    first, end = prompt_length // block_length, prompt_length + max_new_tokens
    starts = range(first * block_length, end, block_length)
    device = input_ids.device

    sequences = torch.full(
        (batch, starts[-1] + block_length),
        settings.pad_token_id,
        dtype=torch.int64,
        device=device,
    )
    sequences[:, :prompt_length] = input_ids
    num_tokens = torch.full((batch,), max_new_tokens, dtype=torch.int64, device=device)
    block_forwards = torch.zeros(batch, len(starts), dtype=torch.int64, device=device)
    recorder = Trace() if trace else None

    rows = torch.arange(batch, device=device)  # rows that have not ended
    forward = prefill(model, sequences[:, : starts[0]], settings, use_cache)
    for n, start in enumerate(progress_bar(starts, progress)):
        tokens = sequences[rows, : start + block_length]
        state = BlockState.fully_masked(
            tokens[:, start:],
            torch.full_like(rows, prompt_length - start),
            forward.embedding,
            settings.mask_token_id,
            row=rows,
            start=torch.full_like(rows, start),
            thresholds=torch.tensor([[tau_dec, tau_acc]], device=device)
            .expand(len(rows), -1)
            .contiguous(),
        )
        settings.rule.begin_(state, rows, forward.embedding, settings)
        denoise_block(
            forward,
            tokens[:, :start],
            state,
            rows,
            settings.max_steps_per_block,
            settings,
            recorder,
        )
        token, ended, length = end_at_eos(state.token, state.editable, settings)
        sequences[rows, start : start + block_length] = token
        block_forwards[rows, n] = state.step.long()
        reached = start + length - prompt_length
        num_tokens[rows] = torch.where(ended, reached.clamp(max=max_new_tokens), num_tokens[rows])

        # A host sync, once per block: rows that ended leave the batch and cost no further passes
        alive = torch.nonzero(~ended).flatten()
        if len(alive) == 0:
            break
        if len(alive) < len(rows):
            rows, forward = rows[alive], forward.select_rows(alive)

    block_forwards = block_forwards[:, : n + 1]
    blocks = (block_forwards > 0).sum(dim=1)
    return GenerationOutput(
        sequences=sequences[:, :end],
        num_tokens=num_tokens,
        block_forwards=block_forwards,
        num_refreshes=blocks - 1 if use_cache else torch.zeros_like(blocks),
        trace=recorder,
    )


def prefill(model: Any, tokens: Tensor, settings: Settings, use_cache: bool) -> BlockForward:
    """Put the prompt's whole blocks, tokens [B, n * K], into a new KV cache."""
    forward = BlockForward(model, settings.block_length, use_cache)
    forward.prefill(tokens)
    return forward


def denoise_block(
    forward: BlockForward,
    tokens: Tensor,
    state: BlockState,
    rows: Tensor,
    steps: int,
    settings: Settings,
    trace: Trace | None,
) -> None:
    """Step until every row of the block has converged, `steps` times at most.

    tokens [b, start] are the committed ones before the block; rows [b] says which rows of the
    whole batch these are, for the trace.
    """
    for n in range(steps):
        if trace is not None:
            trace.before(state)
        step(forward, tokens, state, settings)
        if trace is not None:
            trace.after(state, tokens.shape[1], rows)

        # The one host sync per pass: how many rows are left decides what the host launches next
        left = torch.nonzero(~state.converged).flatten()
        if len(left) == 0:
            return
        if 2 * len(left) <= len(rows):  # frozen rows still cost their forward: go on without them
            part = state.select_rows(left)
            denoise_block(
                forward.select_rows(left),
                tokens[left],
                part,
                rows[left],
                steps - n - 1,
                settings,
                trace,
            )
            state.write_rows_(left, part)
            return
    if settings.semantics == "paper":  # the released code stops with whatever the block holds
        state.commit_()
        if trace is not None:
            trace.capped(state)


def step(
    forward: BlockForward,
    tokens: Tensor,
    state: BlockState,
    settings: Settings,
) -> None:
    """One forward pass over the block and one update of its state; no host sync of its own."""
    logits = forward.logits(tokens, state.inputs_embeds)
    settings.rule.update_(logits, forward.embedding, state, settings)


def end_at_eos(
    token: Tensor, editable: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Pad what follows a row's first decoded eos.

    Returns token [B, K], whether each row ended [B], and its length in this block with the eos [B].
    """
    eos = torch.tensor(settings.eos_token_ids, dtype=token.dtype, device=token.device)
    is_eos = torch.isin(token, eos) & editable
    after = is_eos.cumsum(dim=-1) - is_eos.long() > 0
    return (
        token.masked_fill(after, settings.pad_token_id),
        is_eos.any(dim=-1),
        (~after).sum(dim=-1),
    )


def progress_bar(starts: range, show: bool) -> Iterable[int]:
    if not show:
        return starts
    from tqdm.auto import tqdm

    return tqdm(starts, desc="blocks", unit="block")
