"""Soft cap, bias and penalties of logits, in place: a program per tile of a row.

Without soft cap and bias only the logits of tokens that have occurred are loaded and stored: the
lanes of the others are masked off.
"""

import triton
import triton.language as tl
from torch import Tensor

from dmax_kernels.triton.launch import device_of, row_view

TILE = 2048  # 16 elements a thread. Not timed yet.


@triton.jit
def tanh(x):
    """Relative error below 4e-7; Triton itself has no tanh on every backend."""
    size = tl.abs(x)
    e = tl.exp(-2 * size)
    far = (1 - e) / (1 + e)  # cancels near 0: there the series
    square = x * x
    near = 2.186948854e-2 * square - 5.396825397e-2
    near = size + size * square * ((near * square + 1.333333333e-1) * square - 3.333333333e-1)
    tanh = tl.where(size < 0.25, near, far)
    return tl.where(x < 0, -tanh, tanh)


@triton.jit(
    do_not_specialize=[
        "rows_bias", "rows_counts", "rows_prompt", "rows_penalties", "softcap", "inverse_softcap",
        "repetition", "presence", "frequency",
    ]
)  # fmt: skip
def transform_kernel(
    logits, row_stride, vocab, softcap, inverse_softcap, bias, rows_bias, counts, rows_counts,
    prompt, rows_prompt, penalties, rows_penalties, repetition, presence, frequency,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, COUNTS: tl.constexpr, PROMPT: tl.constexpr,
    ROW_PENALTIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < vocab
    count = tl.zeros([TILE], tl.int32)
    if COUNTS:
        at = row // rows_counts * vocab + token
        count = tl.maximum(tl.load(counts + at, mask=inside, other=0), 0)
    seen = count > 0
    if PROMPT:
        words = (vocab + 31) // 32
        at = row // rows_prompt * words + token // 32
        bits = tl.load(prompt + at, mask=inside, other=0)
        seen = seen | (((bits >> (token % 32)) & 1) != 0)

    changed = inside
    if not (SOFTCAP or BIAS):
        changed = inside & seen
    place = logits + row * row_stride + token
    x = tl.load(place, mask=changed, other=0.0).to(tl.float32)
    if SOFTCAP:
        # Infinity minus itself is a NaN
        x = tl.where(x - x == 0, softcap * tanh(x * inverse_softcap), x)
    if BIAS:
        x += tl.load(bias + row // rows_bias * vocab + token, mask=inside, other=0.0)
    if ROW_PENALTIES:
        own = penalties + row // rows_penalties * 3
        repetition = tl.load(own)
        presence = tl.load(own + 1)
        frequency = tl.load(own + 2)
        finite = (repetition - repetition == 0) & (presence - presence == 0)
        if (repetition > 0) & finite & (frequency - frequency == 0):
            pass
        else:
            repetition = float("nan")
    x = tl.where(seen, tl.where(x > 0, x / repetition, x * repetition), x)
    if COUNTS:
        x = tl.where(count > 0, x - frequency * count.to(tl.float32) - presence, x)
    tl.store(place, x.to(logits.dtype.element_ty), mask=changed)


def transform_logits_(
    logits: Tensor,
    *,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    output_counts: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    penalties: Tensor | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> None:
    rows = row_view(logits)
    if rows.count == 0:
        return
    operands: list[Tensor | int | None] = []
    for operand, width in (
        (bias, rows.width),
        (output_counts, rows.width),
        (prompt_tokens, -(-rows.width // 32)),
        (penalties, 3),
    ):
        each = None if operand is None else operand.contiguous()
        operands += [each, 1 if each is None else rows.count * width // each.numel()]
    with device_of(logits):
        transform_kernel[(rows.count, triton.cdiv(rows.width, TILE))](
            rows.tensor, rows.stride, rows.width, float(softcap),
            1.0 / softcap if softcap > 0 else 0.0, *operands, float(repetition_penalty),
            float(presence_penalty), float(frequency_penalty),
            SOFTCAP=softcap > 0, BIAS=bias is not None, COUNTS=output_counts is not None,
            PROMPT=prompt_tokens is not None, ROW_PENALTIES=penalties is not None, TILE=TILE,
            num_warps=4,
        )  # fmt: skip
