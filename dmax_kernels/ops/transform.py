"""Logits as a sampler wants them: soft cap, bias and penalties, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmax_kernels.ops._register import register_fake, register_in_place
from dmax_kernels.ops.sample import stack_options


def penalty_options(logits: Tensor, **penalties: float | Tensor) -> dict[str, Any]:
    """The op's penalties: three numbers, or one float32 [..., 3] if any of them is a tensor."""
    tensors = {name: each for name, each in penalties.items() if isinstance(each, Tensor)}
    if not tensors:
        return penalties
    first, shape = next((name, each.shape) for name, each in tensors.items())
    stacked = stack_options("transform_logits_", logits, shape, f"as {first}", penalties)
    return {"penalties": stacked}


def transform_logits_(
    logits: Tensor,
    *,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    output_counts: Tensor | None = None,
    prompt_tokens: Tensor | None = None,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
) -> Tensor:
    """Soft cap, bias and penalties of the logits, in place, in this order.

    With x a logit of token v, c the soft cap, b the bias, n_v how often v occurs in the output, and
    r, f and p the repetition, frequency and presence penalties::

        x <- c tanh(x / c)                     if c > 0; an infinite x stays
        x <- x + b_v
        x <- x / r if x > 0, else x r          if n_v > 0 or v is in the prompt
        x <- x - f n_v - p                     if n_v > 0

    The penalties are those of OpenAI's interface and of vLLM, in vLLM's order. All arithmetic is
    float32, and the result is rounded once to the logits' dtype.

    Without soft cap and bias only the logits of tokens that have occurred are read and written, so
    the cost is that of reading the counts. With them it is one read and one write of the logits.

    Args:
        logits: [..., V], float32, bfloat16 or float16, written in place: its last dimension must be
            adjacent in memory and its rows at one stride.
        softcap: c, such as 30 for Gemma; 0 for none.
        bias: float32, added to the logits.
        output_counts: int32, how often each token occurs in the output so far. Numbers below 0
            count as 0.
        prompt_tokens: int32, a mask of the tokens in the prompt, in which token v has bit v % 32 of
            word v // 32, as ``allowed`` of :func:`dmax_kernels.sample_tokens`.
        repetition_penalty: r, above 0; 1 for none.
        presence_penalty, frequency_penalty: p and f; 0 for none.

    bias [V], output_counts [V] and prompt_tokens [ceil(V / 32)] are one for all rows, or have the
    logits' leading sizes in front: all of them, for one per row, or all but the last, for one per
    block of positions. The penalties are numbers, or tensors of either leading sizes.

    Returns:
        The logits. A NaN stays one. On a GPU, tokens that have occurred get NaN where a penalty
        tensor is out of range: finding out would mean waiting for the device.

    Raises:
        RuntimeError: wrong dtypes or shapes, a number or (on the CPU) a row's penalty out of range,
            penalties without output_counts and prompt_tokens, a presence or frequency penalty
            without output_counts, memory shared with another argument, logits that require a
            gradient.
        ValueError: penalty tensors of different shapes or devices.
    """
    penalties = penalty_options(
        logits,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    torch.ops.dmax.transform_logits_(
        logits,
        softcap=softcap,
        bias=bias,
        output_counts=output_counts,
        prompt_tokens=prompt_tokens,
        **penalties,
    )
    return logits


@register_fake("transform_logits_")
def _(logits, **options):
    return None


register_in_place("transform_logits_")
