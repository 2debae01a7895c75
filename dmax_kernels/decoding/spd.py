"""Soft Parallel Decoding (arXiv 2604.08302, section 3.2, Algorithm 1), block by block.

spd_generate -> prefill -> Batch.step -> Batch.advance, of which the last two are in `batch.py`.
Shapes: B rows, b of them live, T prompt tokens, K block length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dmax_kernels.decoding.batch import Batch, CommittedBlock, Request
from dmax_kernels.decoding.config import DecodeConfig, RunConfig
from dmax_kernels.decoding.embedding import embedding_table
from dmax_kernels.decoding.forward import BlockForward
from dmax_kernels.decoding.graph import make_runner
from dmax_kernels.decoding.masks import BlockMasks, NextBlock
from dmax_kernels.decoding.output import GenerationOutput, Statistics, assemble
from dmax_kernels.decoding.penalties import Penalties, make_penalties
from dmax_kernels.decoding.prompts import (
    Prompts,
    Rows,
    check_prompts,
    read_prompts,
    row_sampling,
    row_thresholds,
    unwrap,
)
from dmax_kernels.decoding.rules import find_rule
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import Rule
from dmax_kernels.decoding.trace import Trace


@torch.no_grad()
def spd_generate(
    model: Any,
    input_ids: Prompts,
    config: DecodeConfig | None = None,
    *,
    attention_mask: Rows | None = None,
    thresholds: Tensor | Sequence[Sequence[float]] | None = None,
    allowed: Callable[[NextBlock], Tensor | None] | None = None,
    on_block: Callable[[CommittedBlock], None] | None = None,
    trace: bool = False,
    logprobs: bool = False,
    progress: bool = False,
    **options: Any,
) -> GenerationOutput:
    """Decode `max_new_tokens` after each prompt, several tokens per forward pass.

    Each row's sequence is cut into blocks of K positions, counted from its own first token. A block
    starts fully masked and is denoised until it converges: the top-1 predictions are equal twice in
    a row, with no mask left before the second time, or all confidences exceed tau_acc. A prompt's
    tail inside the first decoded block is kept as it is.

    Rows are independent: a row whose block has converged goes on to its next block while the others
    are still at theirs, and a row that ends leaves the batch. No decision about a row reads another
    row. A row therefore gives the same result alone or in a batch, provided the model gives it the
    same logits. (Matrix products may round differently at different batch sizes; nothing else
    depends on the batch.)

    With a `temperature`, predictions are samples, as `decoding.step.draw` describes. Soft Parallel
    Decoding then runs as the composed rule "spd" of `ABLATIONS`, and a hybrid embedding mixes the
    sample and the mask by the sample's confidence. Rules that make their own predictions (credit,
    edit) refuse a temperature.

    Penalties and a bias change the logits before the rule sees them, greedy or with a temperature:
    predictions, confidences, thresholds and log-probabilities are then those of the changed logits.
    Repetition counts prompt and output, presence and frequency the output alone, as in vLLM and
    OpenAI's interface. The output is the answer's tokens that are final. A rule that revises (spd
    and its ablations, uniform, edit) may change any token of a block until the block is committed,
    so that committed blocks alone count, and the positions of a block do not penalise each other. A
    rule that keeps a token once it is decoded adds the decoded tokens of the live block, up to an
    end token, at every position that is still masked; tokens of one step do not see each other.

    Args:
        model: a Hugging Face causal LM that takes `inputs_embeds`, a 4-D additive `attention_mask`,
            `position_ids`, a KV cache as `cache` or `past_key_values`, and `use_cache`, and
            predicts each position's own token (no shift by one).
        input_ids: [B, T], or a list of B prompts of any lengths; or the mapping that a tokenizer
            or a chat template returns, with "input_ids" and perhaps "attention_mask".
        config: how to decode. Instead of it, or to change some of its fields, pass `options`.
        attention_mask: [B, T], 0 where a prompt is padded, on either side; or one for each prompt
            of a list.
        thresholds: [B, 2], (tau_dec, tau_acc) of each row in place of the two numbers.
        allowed: called with each `NextBlock` before it begins; returns the tokens that its
            positions may take, int32 [ceil(V / 32)], or [length, ceil(V / 32)] with a mask for each
            position (token v has bit v % 32 of word v // 32, as in xgrammar and llguidance), or
            None for all. They hold for the top-1, for samples and for soft embeddings.
        on_block: called with each `CommittedBlock` when it is committed (streaming).
        trace: record every step in the output's `trace`.
        logprobs: return the output's `logprobs` and `step_map` too.
        progress: show a progress bar over blocks.
        options: fields of `DecodeConfig`, of which `max_new_tokens` is required.

    Raises:
        ValueError: one sentence, for any argument that does not fit the model or the others.
        TypeError: an option that does not exist, or no `max_new_tokens`.
    """
    chosen = read_options(config, options)
    settings = chosen.for_model(model)
    rule = find_rule(settings)
    if chosen.max_steps_per_block is None:
        most = rule.max_steps(settings.block_length)
        settings = replace(settings, max_steps_per_block=most)
    ids, attention_mask = unwrap(input_ids, attention_mask)
    prompts = read_prompts(ids, attention_mask)
    embedding = embedding_table(model, settings.mask_token_id)
    check_prompts(prompts, len(embedding), model.config, settings)
    table = row_thresholds(thresholds, settings, len(prompts))
    sampling = row_sampling(settings, len(prompts), embedding.device)
    penalties = make_penalties(rule, prompts, settings, embedding)
    runner = make_runner(settings.cuda_graph, embedding.device)
    recorder = Trace() if trace else None

    started = time.perf_counter()
    forward = prefill(model, embedding, prompts, settings)
    masks = None if allowed is None else BlockMasks(allowed, len(embedding))
    requests, state = first_blocks(
        forward, prompts, table, sampling, logprobs, rule, settings, masks, penalties
    )
    if embedding.is_cuda:
        torch.cuda.synchronize(embedding.device)  # once per call, to time the prefill by itself
    prefilled = time.perf_counter()
    batch = Batch(forward, state, requests, rule, settings, runner, recorder, masks, penalties)
    with Progress(requests, settings, progress) as bar:
        for block in batch.run():
            bar.update(block)
            if on_block is not None:
                on_block(block)
    finished = time.perf_counter()

    statistics = Statistics(
        tokens=sum(len(request.answer) for request in requests),
        forwards=batch.forwards,
        refreshing_forwards=batch.refreshing_forwards,
        row_forwards=sum(sum(request.block_forwards) for request in requests),
        prefill_seconds=prefilled - started,
        decode_seconds=finished - prefilled,
        captured_steps=len(runner.replays),
        capture_refusal=runner.refusal,
    )
    device = ids.device if isinstance(ids, Tensor) else embedding.device
    return assemble(
        prompts, requests, batch.promotions, statistics, recorder, settings, device, logprobs
    )


def read_options(config: DecodeConfig | None, options: dict[str, Any]) -> DecodeConfig:
    """The configuration, changed by the options; or one made of the options alone."""
    names = [item.name for item in fields(DecodeConfig)]
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        raise TypeError(f"spd_generate: an option must be one of {', '.join(names)}, got {unknown}")
    if config is not None:
        return replace(config, **options)
    if "max_new_tokens" not in options:
        raise TypeError("spd_generate: max_new_tokens must be a positive integer, got none")
    return DecodeConfig(**options)


def prefill(
    model: Any, embedding: Tensor, prompts: list[Tensor], config: RunConfig
) -> BlockForward:
    """Put the prompts' whole blocks into a new KV cache."""
    length = config.block_length
    longest = max(map(len, prompts)) + config.max_new_tokens
    tokens = torch.full(
        (len(prompts), -(-longest // length) * length), config.pad_token_id, device="cpu"
    )
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    tokens = tokens.to(embedding.device)
    forward = BlockForward(
        model, embedding, tokens, length, config.use_cache, config.shifted_logits
    )
    forward.prefill(max(len(prompt) // length * length for prompt in prompts))
    return forward


def first_blocks(
    forward: BlockForward,
    prompts: list[Tensor],
    thresholds: Tensor,
    sampling: dict[str, Tensor],
    logprobs: bool,
    rule: Rule,
    config: RunConfig,
    masks: BlockMasks | None = None,
    penalties: Penalties | None = None,
) -> tuple[list[Request], LiveBlocks]:
    """Each row's request, and its first block: masks after the prompt's tail that falls in it."""
    device, block = forward.tokens.device, config.block_length
    requests = [
        Request(row, len(prompt), len(prompt) // block * block)
        for row, prompt in enumerate(prompts)
    ]
    start = torch.tensor([request.start for request in requests], device=device)
    tail = torch.tensor([request.prompt_length for request in requests], device=device) - start
    record = {}
    if logprobs:
        dtypes = {"step_map": torch.int32, "probability": torch.float32, "logprob": torch.float32}
        shape = (len(requests), block)
        record = {name: torch.zeros(shape, dtype=t, device=device) for name, t in dtypes.items()}
    state = LiveBlocks.fully_masked(
        forward.tokens.gather(1, start.unsqueeze(-1) + forward.offsets),
        tail,
        forward.embedding,
        config.mask_token_id,
        row=torch.arange(len(requests), device=device),
        start=start,
        thresholds=thresholds.to(device),
        memory=rule.memory(len(requests), config, device),
        sampling=sampling,
        record=record,
        masks={} if masks is None else masks.buffers(len(requests), block, device),
        penalties={} if penalties is None else penalties.of_rows,
    )
    if masks is not None:
        masks.begin_(state, enumerate(requests))
    begin = torch.ones(len(requests), dtype=torch.bool, device=device)
    rule.begin_(state, begin, forward.embedding, config)
    return requests, state


class Progress:
    """A progress bar over the rows' blocks; when a row ends early, its other blocks are dropped."""

    def __init__(self, requests: list[Request], config: RunConfig, show: bool) -> None:
        self.bar: Any = None
        self.length = config.block_length
        self.ends = [each.prompt_length + config.max_new_tokens for each in requests]
        self.requests = requests
        if show:
            from tqdm.auto import tqdm

            blocks = sum(self._left(each) for each in requests)
            self.bar = tqdm(total=blocks, desc="blocks", unit="block")

    def _left(self, request: Request) -> int:
        return -(-(self.ends[request.row] - request.start) // self.length)

    def update(self, block: CommittedBlock) -> None:
        if self.bar is None:
            return
        if block.finished:
            self.bar.total -= self._left(self.requests[block.row]) - 1
        self.bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
