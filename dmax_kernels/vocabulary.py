"""Which tokens of the vocabulary count: from the forms a caller may use to the two of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Visible(NamedTuple):
    """What an op is given: the id ``suppress_token``, the mask ``allowed`` and the rest of V."""

    vocab: int
    suppress_token: int
    allowed: Tensor | None


def mask_words(vocab: int) -> int:
    """How many int32 words hold a bit per token."""
    return -(-vocab // 32)


def allowed_tokens(allowed: Tensor, vocab: int) -> Tensor:
    """The mask's bits as bool [..., V]; one row of them for all is [V]."""
    bits = allowed.unsqueeze(-1) >> torch.arange(32, device=allowed.device, dtype=torch.int32)
    tokens = (bits & 1).bool().flatten(-2)[..., :vocab]
    return tokens.flatten() if tokens.numel() == vocab else tokens


def pack_mask(tokens: Tensor) -> Tensor:
    """bool [..., V] as the int32 words of a mask [..., ceil(V / 32)]."""
    padded = torch.nn.functional.pad(tokens, (0, -tokens.shape[-1] % 32)).unflatten(-1, (-1, 32))
    places = torch.arange(32, device=tokens.device)
    words = (padded.long() << places).sum(dim=-1)
    return words.to(torch.int32)  # the upper half of the numbers wraps to negative ones


def visible_tokens(
    op: str,
    vocab: int,
    device: torch.device,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
) -> Visible:
    """``vocab_limit`` leaves the ids below it, ``suppress_tokens`` of more than one id is a mask.

    Raises:
        ValueError: a limit outside 1..V, a suppressed id outside the vocabulary.
    """
    if vocab_limit is not None:
        if not 1 <= vocab_limit <= vocab:
            raise ValueError(f"{op}: vocab_limit must be in 1..V = {vocab}, got {vocab_limit}")
        vocab = vocab_limit
        if allowed is not None:
            allowed = allowed[..., : mask_words(vocab)]
    ids = sorted({*suppress_tokens, *([] if suppress_token == -1 else [suppress_token])})
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong and suppress_tokens:  # a suppress_token alone is checked by the op
        raise ValueError(f"{op}: suppress_tokens must be token ids in [0, {vocab}), got {wrong[0]}")
    if len(ids) <= 1:
        return Visible(vocab, ids[0] if ids else -1, allowed)
    mask = _mask_without(tuple(ids), vocab, device)
    return Visible(vocab, -1, mask if allowed is None else allowed & mask)


# Tokens to suppress stay the same from call to call. The mask of 157,184 tokens is 20 kB.
_masks: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}


def _mask_without(ids: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
    """int32 [ceil(V / 32)] with every bit set but those of the ids."""
    key = (ids, vocab, device)
    if torch.compiler.is_compiling() or key not in _masks:
        words = [-1] * mask_words(vocab)
        for i in ids:
            words[i // 32] ^= 1 << i % 32 if i % 32 < 31 else -(1 << 31)
        with torch.inference_mode(False):
            mask = torch.tensor(words, dtype=torch.int32, device=device)
        # A compiler's stand-in for a tensor must not be there in the next call
        if torch.compiler.is_compiling() or type(mask) is not Tensor:
            return mask
        _masks[key] = mask
    return _masks[key]
