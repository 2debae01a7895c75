"""What `spd_generate` returns: sequences, counts, times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dmax_kernels.decoding.batch import PromotionLog, Request
from dmax_kernels.decoding.config import RunConfig
from dmax_kernels.decoding.trace import Trace


@dataclass
class Statistics:
    """Counts and times of one call, over all of its rows."""

    tokens: int  # up to and including each row's eos
    forwards: int  # passes of the batch after the prefill
    refreshing_forwards: int  # of these, passes that also forwarded committed blocks
    row_forwards: int  # denoising passes of rows: the sum over rows of num_forwards
    prefill_seconds: float
    decode_seconds: float
    captured_steps: int  # CUDA graphs made
    capture_refusal: str | None  # why the step runs without a CUDA graph, if one was tried

    @property
    def tokens_per_forward(self) -> float:
        """Tokens over the denoising passes of their rows (TPF; the paper's, at one row)."""
        return self.tokens / self.row_forwards

    @property
    def tokens_per_second(self) -> float:
        """All rows' tokens over prefill and decoding time."""
        return self.tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("tokens_per_forward", "tokens_per_second")}
        return {**asdict(self), **rates}


@dataclass
class GenerationOutput:
    """What `spd_generate` returns. N is the number of blocks that the longest row took.

    `num_forwards` counts the denoising passes that a row took part in. The prompt's prefill is one
    more pass for the whole batch. Refreshing the KV cache costs no pass of its own, because a
    block's first pass carries the block before it; an engine that refreshes with a separate pass
    adds `num_refreshes`.
    """

    sequences: Tensor  # int64 [B, T + max_new_tokens]: prompt, padded on the left to T; answer;
    # pad after a row's first eos
    num_tokens: Tensor  # int64 [B]: generated tokens, up to and including the first eos
    block_forwards: Tensor  # int64 [B, N]: denoising passes per block, 0 after a row has ended
    num_refreshes: Tensor  # int64 [B]: finished blocks whose hard tokens entered the cache later
    promotions: list[list[int]]  # per row and step: positions that left the mask
    statistics: Statistics
    max_new_tokens: int
    trace: Trace | None = None
    # [B, max_new_tokens], with `logprobs`, 0 after a row's first eos. step_map: the step of its
    # block, from 1, at which a position took its token for the last time: left the mask with it,
    # or changed to it (0 for a mask that "released" semantics left). logprobs: the logarithm of
    # the token's probability at that step, with its temperature and filters for a sample, and
    # else of its confidence; after bias and penalties in either case.
    step_map: Tensor | None = None  # int64
    logprobs: Tensor | None = None  # float32

    @property
    def answers(self) -> list[list[int]]:
        """Each row's new tokens, up to and including its first eos."""
        rows = self.sequences[:, -self.max_new_tokens :].tolist()
        return [row[:n] for row, n in zip(rows, self.num_tokens.tolist(), strict=True)]

    @property
    def num_forwards(self) -> Tensor:
        return self.block_forwards.sum(dim=1)

    @property
    def num_blocks(self) -> Tensor:
        return (self.block_forwards > 0).sum(dim=1)


def assemble(
    prompts: list[Tensor],
    requests: list[Request],
    promotions: PromotionLog,
    statistics: Statistics,
    trace: Trace | None,
    config: RunConfig,
    device: torch.device,
    recorded: bool,
) -> GenerationOutput:
    longest = max(map(len, prompts))
    length = longest + config.max_new_tokens
    sequences = torch.full((len(prompts), length), config.pad_token_id, device="cpu")
    for sequence, prompt, request in zip(sequences, prompts, requests, strict=True):
        answer_end = longest + len(request.answer)
        sequence[longest - len(prompt) : longest] = prompt
        sequence[longest:answer_end] = torch.tensor(request.answer, device="cpu")
    shape = (len(prompts), config.max_new_tokens)
    step_map = torch.zeros(shape, dtype=torch.int64, device="cpu")
    logprobs = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for row, request in enumerate(requests):
        step_map[row, : len(request.step_map)] = torch.tensor(request.step_map, device="cpu")
        logprobs[row, : len(request.logprobs)] = torch.tensor(
            request.logprobs, dtype=torch.float32, device="cpu"
        )
    forwards = pad_sequence(
        [torch.tensor(each.block_forwards, device="cpu") for each in requests], True
    )
    blocks = (forwards > 0).sum(dim=1)
    return GenerationOutput(
        sequences=sequences.to(device),
        num_tokens=torch.tensor([len(each.answer) for each in requests], device=device),
        block_forwards=forwards.to(device),
        num_refreshes=((blocks - 1) * int(config.use_cache)).to(device),
        promotions=[promotions.promotions[row] for row in range(len(prompts))],
        statistics=statistics,
        max_new_tokens=config.max_new_tokens,
        trace=trace,
        step_map=step_map.to(device) if recorded else None,
        logprobs=logprobs.to(device) if recorded else None,
    )
