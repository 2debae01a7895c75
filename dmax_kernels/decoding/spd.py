"""Soft Parallel Decoding (arXiv 2604.08302, section 3.2, Algorithm 1), block by block.

spd_generate -> prefill -> step -> advance; the last two are in `batch.py`. A row's part on the host
is in `requests.py`, its slots of the KV cache in `cache.py`; `polling.py` and `graph.py` keep a GPU
from waiting. Shapes: B rows, b of them live, T prompt tokens, K block length, V vocabulary,
D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmax_kernels.decoding.batch import Batch
from dmax_kernels.decoding.embedding import embedding_table
from dmax_kernels.decoding.forward import BlockForward
from dmax_kernels.decoding.graph import make_runner
from dmax_kernels.decoding.output import GenerationOutput, Statistics, assemble
from dmax_kernels.decoding.prompts import Prompts, Rows, check_prompts, read_prompts, unwrap
from dmax_kernels.decoding.requests import CommittedBlock, Request
from dmax_kernels.decoding.rule import Rule
from dmax_kernels.decoding.settings import (
    Settings,
    read_integer,
    resolve_settings,
    row_thresholds,
)
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.trace import Trace


@torch.no_grad()
def spd_generate(
    model: Any,
    input_ids: Prompts,
    *,
    attention_mask: Rows | None = None,
    block_length: int = 32,
    max_new_tokens: int,
    tau_dec: float = 0.5,
    tau_acc: float = 0.9,
    thresholds: Tensor | Sequence[Sequence[float]] | None = None,
    mask_token_id: int | None = None,
    eos_token_id: int | Iterable[int] | None = None,
    pad_token_id: int | None = None,
    rule: str | Rule = "spd",
    semantics: str = "settled",
    top_k: int = 1,
    convergence: str = "both",
    ops: str = "fused",
    suppress_mask: bool = True,
    use_cache: bool = True,
    max_steps_per_block: int | None = None,
    cuda_graph: bool | None = None,
    poll_lag: int = 0,
    on_block: Callable[[CommittedBlock], None] | None = None,
    trace: bool = False,
    progress: bool = False,
) -> GenerationOutput:
    """Decode `max_new_tokens` after each prompt, several tokens per forward pass.

    Each row's sequence is cut into blocks of K positions, counted from its own first token. A block
    starts fully masked and is denoised until it converges: the top-1 predictions equal twice in a
    row and no mask left before the second time, or all confidences above tau_acc. A prompt's tail
    inside the first decoded block is kept as it is.

    Rows are independent: a row whose block has converged goes on to its next block while the others
    are still at theirs, and a row that ends leaves the batch. No decision about a row reads another
    one. So a row's result is the same alone and in any batch wherever the model's own logits are;
    matrix products may round differently for different batch sizes, which is the one thing a batch
    can change (float64 models, whose logits are then float32, show the promise: a test does).

    Args:
        model: a Hugging Face causal LM that takes `inputs_embeds`, a 4-D additive `attention_mask`,
            `position_ids`, a KV cache as `cache` or `past_key_values`, and `use_cache`, and
            predicts each position's own token (no shift by one).
        input_ids: [B, T], or a list of B prompts of any lengths; or the mapping that a tokenizer
            or a chat template returns, with "input_ids" and perhaps "attention_mask".
        attention_mask: [B, T], 0 where a prompt is padded, on either side; or one for each prompt
            of a list.
        block_length: K; the length the model was trained with.
        max_new_tokens: length of each answer; decoding runs to the end of the block it falls in.
        tau_dec: a masked position is promoted when its confidence exceeds this.
        tau_acc: a block is accepted when all of its confidences exceed this.
        thresholds: [B, 2], (tau_dec, tau_acc) of each row in place of the two numbers.
        mask_token_id, pad_token_id: from the model's config unless given.
        eos_token_id: what ends an answer, one id or several; by default each that the model's
            config or generation config names (`dmax_kernels.models.end_tokens`).
        rule: "spd", or an ablation: "hybrid" (no prefix), "hard_prefix", "hard" (tokens instead of
            soft embeddings), "threshold" (no revision; `convergence` and tau_acc do not apply); or
            another decoder of `RULES`: "factor", "hierarchical", "top_n", "autoregressive",
            "random", "entropy_bound", "margin", "uniform", "parallel_forced", which are classes
            where they have options (`Hierarchical(low_threshold=0.4)`); or a `Rule` of your own.
        semantics: when predictions that repeat end a block. "settled": if no mask was left before
            the step. "paper": in any case, which is Algorithm 1, line 12 to the letter; for a
            tau_dec near 1 that is faster and less accurate (docs/semantics.md). "released": the
            token ids of the authors' released code, which may leave mask tokens in the result when
            tau_dec > tau_acc.
        top_k: how many candidates a hybrid embedding mixes (1 in the paper).
        convergence: "both" criteria, or "consistency" or "confidence" alone (the paper's Table 4).
        ops: "fused" kernels or the eager "reference".
        suppress_mask: never predict the mask token itself.
        use_cache: keep keys and values of committed blocks; False forwards the whole sequence.
        max_steps_per_block: cap on steps; at the cap the current top-1 tokens are committed.
            Default: K.
        cuda_graph: capture forward pass and step as one CUDA graph. None: on a GPU, where the
            model allows it; True: an error where it does not; False: never.
        poll_lag: how many steps the host may launch before it looks whether rows have converged.
            0 waits for each step's flags. 1 keeps a GPU busy where a step is shorter than the
            host's part in it, for one pass too many per block. The tokens are the same.
        on_block: called with each `CommittedBlock` as soon as it is (streaming).
        trace: record every step in the output's `trace`.
        progress: show a progress bar over blocks.

    Raises:
        ValueError: one sentence, for any argument that does not fit the model or the others.
    """
    settings = resolve_settings(
        model,
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
    block_length, max_new_tokens = settings.block_length, settings.max_new_tokens
    poll_lag = read_integer("poll_lag", poll_lag, "a non-negative integer", least=0)
    ids, attention_mask = unwrap(input_ids, attention_mask)
    prompts = read_prompts(ids, attention_mask)
    embedding = embedding_table(model, settings.mask_token_id)
    check_prompts(prompts, len(embedding), model.config, block_length, max_new_tokens)
    table = row_thresholds(thresholds, settings, len(prompts))
    requests = [
        Request(row, len(prompt), len(prompt) // block_length * block_length)
        for row, prompt in enumerate(prompts)
    ]
    runner = make_runner(cuda_graph, embedding.device)
    recorder = Trace() if trace else None

    started = time.perf_counter()
    forward = prefill(model, embedding, prompts, settings, use_cache)
    state = first_blocks(forward, requests, table, settings)
    if embedding.is_cuda:
        torch.cuda.synchronize(embedding.device)  # once per call: to time the prefill by itself
    prefilled = time.perf_counter()
    batch = Batch(forward, state, requests, settings, runner, poll_lag, recorder)
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
    return assemble(
        prompts,
        requests,
        max_new_tokens,
        settings.pad_token_id,
        use_cache,
        batch.promotions.promotions,
        statistics,
        recorder,
        ids.device if isinstance(ids, Tensor) else embedding.device,
    )


def prefill(
    model: Any, embedding: Tensor, prompts: list[Tensor], settings: Settings, use_cache: bool
) -> BlockForward:
    """Put the prompts' whole blocks into a new KV cache."""
    length = settings.block_length
    longest = max(map(len, prompts)) + settings.max_new_tokens
    tokens = torch.full((len(prompts), -(-longest // length) * length), settings.pad_token_id)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    forward = BlockForward(model, embedding, tokens.to(embedding.device), length, use_cache)
    forward.prefill(max(len(prompt) // length * length for prompt in prompts))
    return forward


def first_blocks(
    forward: BlockForward, requests: list[Request], thresholds: Tensor, settings: Settings
) -> LiveBlocks:
    """The state of each row's first block: masks behind the tail of the prompt that falls in it."""
    device = forward.tokens.device
    start = torch.tensor([request.start for request in requests], device=device)
    tail = torch.tensor([request.prompt_length for request in requests], device=device) - start
    state = LiveBlocks.fully_masked(
        forward.tokens.gather(1, start.unsqueeze(-1) + forward.offsets),
        tail,
        forward.embedding,
        settings.mask_token_id,
        row=torch.arange(len(requests), device=device),
        start=start,
        thresholds=thresholds.to(device),
    )
    begin = torch.ones(len(requests), dtype=torch.bool, device=device)
    settings.rule.begin_(state, begin, forward.embedding, settings)
    return state


class Progress:
    """A progress bar over the rows' blocks; a row that ends early takes its other blocks off it."""

    def __init__(self, requests: list[Request], settings: Settings, show: bool) -> None:
        self.bar: Any = None
        self.length = settings.block_length
        self.ends = [each.prompt_length + settings.max_new_tokens for each in requests]
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
