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
    *,
    as_mask: bool = False,
) -> Visible:
    """``vocab_limit`` leaves the ids below it, ``suppress_tokens`` of more than one id is a mask.

    ``as_mask`` makes one id a mask, too, for an op that has no ``suppress_token``.

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
    if not ids or (len(ids) == 1 and not as_mask):
        return Visible(vocab, ids[0] if ids else -1, allowed)
    mask = _mask_without(tuple(ids), vocab, device)
    return Visible(vocab, -1, mask if allowed is None else allowed & mask)


def visible_rows(
    op: str,
    logits: Tensor,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
    *,
    as_mask: bool = False,
) -> tuple[Tensor, int, Tensor | None]:
    """(logits [..., V] without the ids that do not exist, suppress_token, allowed) for the op."""
    if vocab_limit is None and not suppress_tokens:  # every step of a decoding loop comes here
        return logits, suppress_token, allowed
    vocab, suppress_token, allowed = visible_tokens(
        op, logits.shape[-1] if logits.dim() else 1, logits.device, suppress_token,
        suppress_tokens, allowed, vocab_limit, as_mask=as_mask,
    )  # fmt: skip
    return logits if vocab_limit is None else logits[..., :vocab], suppress_token, allowed


def visible_head(
    op: str,
    weight: Tensor,
    bias: Tensor | None,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
    vocab_limit: int | None = None,
    *,
    as_mask: bool = False,
) -> tuple[Tensor, Tensor | None, int, Tensor | None]:
    """visible_rows() of an LM head: weight [V, D] and bias [V] in place of the logits."""
    if vocab_limit is None and not suppress_tokens:
        return weight, bias, suppress_token, allowed
    vocab, suppress_token, allowed = visible_tokens(
        op, weight.shape[0] if weight.dim() else 1, weight.device, suppress_token,
        suppress_tokens, allowed, vocab_limit, as_mask=as_mask,
    )  # fmt: skip
    if vocab_limit is not None:
        weight = weight[:vocab]
        bias = None if bias is None else bias[:vocab]
    return weight, bias, suppress_token, allowed


def visible_shard(
    op: str,
    logits_shard: Tensor,
    start: int,
    suppress_token: int = -1,
    suppress_tokens: Sequence[int] = (),
    allowed: Tensor | None = None,
) -> tuple[int, Tensor | None]:
    """(suppress_token, allowed) for the op; the mask is the shard's, the ids are of all shards."""
    if not suppress_tokens:
        return suppress_token, allowed
    wrong = [i for i in suppress_tokens if i < 0]
    if wrong:
        raise ValueError(f"{op}: suppress_tokens must be token ids, got {wrong[0]}")
    width = logits_shard.shape[-1] if logits_shard.dim() else 1
    here = {i - start for i in suppress_tokens if 0 <= i - start < width}
    local = suppress_token - start if 0 <= suppress_token - start < width else -1
    _, local, allowed = visible_tokens(op, width, logits_shard.device, local, sorted(here), allowed)
    return (local if local < 0 else local + start), allowed


def shard_mask(allowed: Tensor, start: int, width: int) -> Tensor:
    """The mask's bits of the ids ``start`` to ``start + width``, the first in bit 0 of word 0.

    Ids beyond the mask's last word are not allowed.
    """
    first, shift = start // 32, start % 32
    words = mask_words(width)
    allowed = torch.nn.functional.pad(allowed, (0, max(0, first + words + 1 - allowed.shape[-1])))
    low = allowed[..., first : first + words]
    if shift == 0:
        return low
    # Of a shifted int32 the new bits are the sign's: masked off
    low = (low >> shift) & ((1 << 32 - shift) - 1)
    return low | allowed[..., first + 1 : first + words + 1] << 32 - shift


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
