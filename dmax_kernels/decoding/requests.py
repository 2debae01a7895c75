"""One prompt and what has been decoded of its answer: the host's side of a row."""

from __future__ import annotations

from dataclasses import dataclass, field

from dmax_kernels.decoding.settings import Settings


@dataclass(frozen=True)
class CommittedBlock:
    """New tokens of one row, as `on_block` gets them when its block is committed."""

    row: int
    start: int  # of the first new token, in the answer
    token_ids: list[int]  # up to and including an eos, or to max_new_tokens
    forwards: int  # denoising passes that the block took
    finished: bool  # the row's last block


@dataclass
class Request:
    """A row of the batch that was asked for, wherever it is in the batch that runs."""

    row: int
    prompt_length: int
    start: int  # position of its live block's first token
    finished: bool = False
    answer: list[int] = field(default_factory=list)
    block_forwards: list[int] = field(default_factory=list)

    def commit(self, token: list[int], forwards: int, settings: Settings) -> CommittedBlock:
        """Take a converged block's tokens [K]; end at an eos or at `max_new_tokens`, or go on."""
        begin = len(self.answer)
        new = token[max(self.prompt_length - self.start, 0) :]  # what precedes is the prompt's tail
        new = new[: settings.max_new_tokens - begin]
        ends = [i for i, each in enumerate(new) if each in settings.eos_token_ids]
        if ends:
            new = new[: ends[0] + 1]
        self.answer += new
        self.block_forwards.append(forwards)
        self.finished = bool(ends) or len(self.answer) == settings.max_new_tokens
        if not self.finished:
            self.start += settings.block_length
        return CommittedBlock(self.row, begin, new, forwards, self.finished)
