"""The ops as csrc/cuda computes them, run on the CPU by csrc/simt; signatures of dmax_kernels.

CPU tensors in, CPU tensors out. ``gpu`` is the GPU that launches are shaped for, so that a small
case can take every path; ``CHOSEN[-1]`` says which it took.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from simt_arrays import arrays_in, memory_of, resolve, snapshot
from simt_build import load
from torch import Tensor

from dmax_kernels.ops import RowStatistics, TokenLogprobs
from dmax_kernels.ops._temperature import read_temperature
from dmax_kernels.ops.edit_step import EDIT_RULES
from dmax_kernels.ops.sample import Sample
from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.vocabulary import visible_rows, visible_shard

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# (multiprocessors, compute capability's major, shared memory per block, rows up to which a row's
# blocks form a cluster where a kernel has both ways)
H200 = (132, 9, 227 * 1024, 0)
H200_CLUSTERS = (132, 9, 227 * 1024, 32)
A100 = (108, 8, 163 * 1024, 32)
A100_ONE_MULTIPROCESSOR = (1, 8, 163 * 1024, 0)
# One multiprocessor: from four rows on, a block has a whole row
ONE_MULTIPROCESSOR = (1, 9, 227 * 1024, 0)

CHOSEN: list = []  # the shape of each launch, newest last


# Calls as (name, arguments before, memory of their arrays after), where a test records them
_recorded: list | None = None


@contextlib.contextmanager
def recording():
    """Collects the calls made inside, so that a sanitizer's process can repeat them."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def raw(tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's memory as an array (16-bit floats as their bits); None for an absent one."""
    if tensor is None:
        return None
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16}.get(tensor.dtype)
    return (tensor.view(bits) if bits else tensor).numpy()


def call(name: str, *arguments):
    module = load()
    before = snapshot(arguments) if _recorded is not None else None
    chosen = getattr(module, name)(*(resolve(module, each) for each in arguments))
    if _recorded is not None:
        after = [memory_of(each) for each in arrays_in(arguments)]
        _recorded.append((name, before, after))
    CHOSEN.append(chosen)
    return chosen


def rows_of(x: Tensor) -> Tensor:
    """[..., V] as [rows, V] of one row stride, copied only where the strides do not allow it."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def gpu_input(gpu):
    return ("Gpu", *gpu)


def mask_input(allowed: Tensor | None):
    """The mask's memory, and the stride of its rows in words."""
    if allowed is None:
        return None, 0
    words = allowed.shape[-1]
    return raw(allowed.contiguous()), 0 if allowed.numel() == words else words


def logits_input(
    logits: Tensor, suppress_token: int, temperature: float, allowed: Tensor | None = None
):
    rows = rows_of(logits)
    return ("LogitsInput", DTYPE_CODES[logits.dtype], raw(rows), rows.shape[0], rows.stride(0),
            rows.shape[1], suppress_token, temperature, *mask_input(allowed))  # fmt: skip


def visible_input(op: str, logits: Tensor, suppress_token: int, temperature: float, **visibility):
    """logits_input() for an op's suppress_tokens, allowed and vocab_limit."""
    logits, suppress_token, allowed = visible_rows(op, logits, suppress_token, **visibility)
    return logits_input(logits, suppress_token, temperature, allowed)


def shard_input(
    logits_shard: Tensor, vocab_start: int, suppress_token: int, temperature: float, **visibility
):
    suppress_token, allowed = visible_shard(
        "top1_partial", logits_shard, vocab_start, suppress_token, **visibility
    )
    local = suppress_token - vocab_start
    on_shard = suppress_token >= 0 and 0 <= local < logits_shard.shape[-1]
    return logits_input(logits_shard, local if on_shard else -1, temperature, allowed)


def top1_confidence(logits, *, temperature=1.0, suppress_token=-1, gpu=H200, **visibility):
    op = "top1_confidence"
    token = torch.empty(logits.shape[:-1], dtype=torch.int64)
    confidence = torch.empty(logits.shape[:-1])
    call(op, gpu_input(gpu), visible_input(op, logits, suppress_token, temperature, **visibility),
         raw(token), raw(confidence))  # fmt: skip
    return token, confidence


def top1_partial(
    logits_shard, vocab_start, *, temperature=1.0, suppress_token=-1, gpu=H200, **visibility
):
    maximum, sum_exp = torch.empty(logits_shard.shape[:-1]), torch.empty(logits_shard.shape[:-1])
    token = torch.empty(logits_shard.shape[:-1], dtype=torch.int64)
    call("top1_partial", gpu_input(gpu),
         shard_input(logits_shard, vocab_start, suppress_token, temperature, **visibility),
         vocab_start, raw(maximum), raw(sum_exp), raw(token))  # fmt: skip
    return maximum, sum_exp, token


def topk_confidence(logits, k, *, temperature=1.0, suppress_token=-1, gpu=H200, **visibility):
    op = "topk_confidence"
    tokens = torch.empty(*logits.shape[:-1], k, dtype=torch.int64)
    confidences = torch.empty(*logits.shape[:-1], k)
    call(op, gpu_input(gpu), visible_input(op, logits, suppress_token, temperature, **visibility),
         k, raw(tokens), raw(confidences))  # fmt: skip
    return tokens, confidences


def row_statistics(logits, *, temperature=1.0, suppress_token=-1, gpu=H200, **visibility):
    op = "row_statistics"
    token = torch.empty(logits.shape[:-1], dtype=torch.int64)
    others = [torch.empty(logits.shape[:-1]) for _ in range(4)]
    number, temperatures = read_temperature(logits, temperature)
    if temperatures is not None:
        temperatures = temperatures.contiguous()
    call(op, gpu_input(gpu), visible_input(op, logits, suppress_token, number, **visibility),
         raw(temperatures), raw(token), *map(raw, others))  # fmt: skip
    return RowStatistics(token, *others)


def token_logprobs_with_logsumexp(
    logits, ids, *, temperature=1.0, top_n=0, ignore_index=-100, gpu=H200, **visibility
):
    op = "token_logprobs"
    rows = logits.shape[:-1]
    logprob, logsumexp = torch.empty(ids.shape), torch.empty(rows)
    rank = torch.empty(ids.shape, dtype=torch.int64)
    top_ids = torch.empty(*rows, top_n, dtype=torch.int64)
    top_logprobs = torch.empty(*rows, top_n)
    per_row = 1 if ids.dim() < logits.dim() else ids.shape[-1]
    tokens = ("TokensInput", raw(ids.contiguous()), ids.dtype == torch.int64, per_row, ignore_index)
    visible = visible_input(op, logits, -1, temperature, **visibility, as_mask=True)
    call(op, gpu_input(gpu), visible, tokens, top_n,
         raw(logprob), raw(rank), raw(top_ids), raw(top_logprobs), raw(logsumexp))  # fmt: skip
    return logprob, rank, top_ids, top_logprobs, logsumexp


def token_logprobs(logits, ids, **options):
    return TokenLogprobs(*token_logprobs_with_logsumexp(logits, ids, **options)[:4])


def draw_input(temperature, top_k, top_p, min_p, allowed):
    """``("DrawInput", ...)``: options of each row are packed as sample_tokens packs them."""
    options = (temperature, top_k, top_p, min_p)
    row_options = None
    if any(isinstance(each, Tensor) for each in options):
        columns = [torch.as_tensor(each, dtype=torch.float32) for each in options]
        row_options = torch.stack(torch.broadcast_tensors(*columns), dim=-1).contiguous()
        options = (1.0, 0, 1.0, 0.0)
    return ("DrawInput", *map(float, options), raw(row_options), *mask_input(allowed))


def sample_tokens(
    logits, seed, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, suppress_token=-1,
    gpu=H200, **visibility,
):  # fmt: skip
    logits, suppress_token, allowed = visible_rows(
        "sample_tokens", logits, suppress_token, **visibility
    )
    token = torch.empty(logits.shape[:-1], dtype=torch.int64)
    floats = [torch.empty(logits.shape[:-1]) for _ in range(3)]
    draw = draw_input(temperature, top_k, top_p, min_p, allowed)
    scalar = temperature if not isinstance(temperature, Tensor) and temperature != 0 else 1.0
    call("sample_tokens", gpu_input(gpu), logits_input(logits, suppress_token, scalar),
         raw(seed.contiguous()), seed.dim() > 1, draw, raw(token), *map(raw, floats))  # fmt: skip
    return Sample(token, *floats)


def sample_partial(
    logits_shard, seed, vocab_start, *, temperature=1.0, suppress_token=-1, gpu=H200
):
    shape = logits_shard.shape[:-1]
    maximum, sum_exp, score, weight = (torch.empty(shape) for _ in range(4))
    token = torch.empty(shape, dtype=torch.int64)
    call("sample_partial", gpu_input(gpu),
         shard_input(logits_shard, vocab_start, suppress_token, temperature),
         raw(seed.contiguous()), seed.dim() > 1, vocab_start, raw(maximum), raw(sum_exp),
         raw(token), raw(score), raw(weight))  # fmt: skip
    return maximum, sum_exp, token, score, weight


def shard_rows(maximum, sum_exp, token, temperature):
    return (raw(maximum.contiguous()), raw(sum_exp.contiguous()), raw(token.contiguous()),
            maximum.shape[0], maximum[0].numel(), temperature)  # fmt: skip


def top1_merge(maximum, sum_exp, token, *, temperature=1.0):
    merged = torch.empty(maximum.shape[1:], dtype=torch.int64)
    confidence = torch.empty(maximum.shape[1:])
    call("top1_merge", *shard_rows(maximum, sum_exp, token, temperature), raw(merged),
         raw(confidence))  # fmt: skip
    return merged, confidence


def sample_merge(maximum, sum_exp, token, score, weight, *, temperature=1.0):
    sampled = torch.empty(maximum.shape[1:], dtype=torch.int64)
    probability = torch.empty(maximum.shape[1:])
    call("sample_merge", *shard_rows(maximum, sum_exp, token, temperature),
         raw(score.contiguous()), raw(weight.contiguous()), raw(sampled),
         raw(probability))  # fmt: skip
    return sampled, probability


def prefix_promote(confidence, masked, threshold, *, inclusive=False):
    promoted = torch.empty(masked.shape, dtype=torch.bool)
    block = masked.shape[-1]
    call("prefix_promote", raw(confidence.contiguous()), raw(masked.contiguous()),
         masked.numel() // block, block, threshold, inclusive, raw(promoted))  # fmt: skip
    return promoted


def embedding_input(embedding: Tensor, mask_token_id: int):
    vocab, dim = embedding.shape
    return ("EmbeddingInput", DTYPE_CODES[embedding.dtype], raw(embedding), embedding.stride(0),
            vocab, dim, mask_token_id)  # fmt: skip


def mix_input(token, confidence, masked):
    k = 1 if token.dim() == masked.dim() else token.shape[-1]
    return ("MixInput", raw(token.contiguous()), token.dtype == torch.int64,
            raw(confidence.contiguous()), raw(masked.contiguous()), masked.numel(), k)  # fmt: skip


def hybrid_embedding(embedding, token, confidence, masked, mask_token_id):
    out = torch.empty(*masked.shape, embedding.shape[1], dtype=embedding.dtype)
    call("hybrid_embedding", embedding_input(embedding, mask_token_id),
         mix_input(token, confidence, masked), raw(out))  # fmt: skip
    return out


def hybrid_embedding_backward(grad_output, embedding, token, confidence, masked, mask_token_id):
    grad_embedding = torch.zeros(embedding.shape, dtype=embedding.dtype)
    grad_confidence = torch.empty(confidence.shape)
    call("hybrid_embedding_backward", embedding_input(embedding, mask_token_id),
         mix_input(token, confidence, masked), raw(grad_output.contiguous()), raw(grad_embedding),
         raw(grad_confidence))  # fmt: skip
    return grad_embedding, grad_confidence


def spd_step_(
    logits, embedding, *, editable, masked, token, confidence, converged, step, inputs_embeds,
    mask_token_id, tau_dec, tau_acc, semantics="settled", top_k=1, temperature=1.0,
    suppress_token=-1, thresholds=None, gpu=H200, **visibility,
):  # fmt: skip
    op = "spd_step_"
    batch, block, _ = logits.shape
    state = ("StateInput", *map(raw, (editable, masked, token, confidence, converged, step,
             inputs_embeds, thresholds)), batch, block)  # fmt: skip
    call(op, gpu_input(gpu), visible_input(op, logits, suppress_token, temperature, **visibility),
         embedding_input(embedding, mask_token_id), state, tau_dec, tau_acc,
         SEMANTICS.index(semantics), top_k)  # fmt: skip


def edit_step_(
    logits, *, editable, token, prediction, confidence, post_edit_steps, done, mask_token_id,
    threshold, edit_threshold=0.0, rule="threshold", tokens_per_step=1, max_post_edit_steps=16,
    temperature=1.0, suppress_token=-1, thresholds=None, gpu=H200, **visibility,
):  # fmt: skip
    op = "edit_step_"
    batch, block, _ = logits.shape
    state = ("EditStateInput", *map(raw, (editable, token, prediction, confidence, post_edit_steps,
             done, thresholds)), batch, block)  # fmt: skip
    options = ("EditOptionsInput", mask_token_id, threshold, edit_threshold, EDIT_RULES.index(rule),
               min(tokens_per_step, block), max_post_edit_steps)  # fmt: skip
    call(op, gpu_input(gpu), visible_input(op, logits, suppress_token, temperature, **visibility),
         state, options)  # fmt: skip


def transform_logits_(
    logits, *, softcap=0.0, bias=None, output_counts=None, prompt_tokens=None,
    repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, gpu=H200,
):  # fmt: skip
    numbers = (repetition_penalty, presence_penalty, frequency_penalty)
    penalties = None
    if any(isinstance(each, Tensor) for each in numbers):
        columns = [torch.as_tensor(each, dtype=torch.float32) for each in numbers]
        penalties = torch.stack(torch.broadcast_tensors(*columns), dim=-1).contiguous()
        numbers = (1.0, 0.0, 0.0)
    rows, vocab = logits.numel() // logits.shape[-1], logits.shape[-1]
    operands = ((bias, vocab), (output_counts, vocab), (prompt_tokens, -(-vocab // 32)),
                (penalties, 3))  # fmt: skip
    operands = [(None if each is None else each.contiguous(), width) for each, width in operands]
    shared = [rows if each is None else rows * width // each.numel() for each, width in operands]
    call("transform_logits_", gpu_input(gpu), logits_input(logits, -1, 1.0),
         ("TransformInput", *(raw(each) for each, _ in operands), *shared, softcap,
          *numbers))  # fmt: skip
    return logits


def loss_input(
    masked, predicted, target, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    temperature=1.0,
):  # fmt: skip
    given = masked if masked is not None else predicted
    rows = [None if x is None else rows_of(x) for x in (masked, predicted)]
    strides = [0 if x is None else x.stride(0) for x in rows]
    return ("LossInput", DTYPE_CODES[given.dtype], raw(rows[0]), raw(rows[1]), *strides,
            target.numel(), given.shape[-1], raw(target.contiguous()), target.dtype == torch.int64,
            ignore_index, label_smoothing, z_loss, temperature)  # fmt: skip


def loss_buffers(passes, target):
    return [None if x is None else torch.full(target.shape, 77.0) for x in passes]


def oput_loss_with_logsumexp(logits_masked, logits_predicted, target, *, gpu=H200, **options):
    passes = (logits_masked, logits_predicted)
    loss, logsumexp = loss_buffers(passes, target), loss_buffers(passes, target)
    call("oput_loss", gpu_input(gpu), loss_input(*passes, target, **options), *map(raw, loss),
         *map(raw, logsumexp))  # fmt: skip
    return loss, logsumexp


def oput_loss(*arguments, **options):
    return tuple(oput_loss_with_logsumexp(*arguments, **options)[0])


def oput_loss_backward(grad_loss, logits, target, logsumexp, **options):
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype)
    call("oput_loss_backward", loss_input(logits, None, target, **options),
         raw(grad_loss.contiguous()), raw(logsumexp), raw(grad_logits))  # fmt: skip
    return grad_logits


def oput_loss_and_grad_(
    logits_masked, logits_predicted, target, grad_masked=None, grad_predicted=None, *, gpu=H200,
    **options,
):  # fmt: skip
    passes = (logits_masked, logits_predicted)
    loss = loss_buffers(passes, target)
    call("oput_loss_and_grad_", gpu_input(gpu), loss_input(*passes, target, **options),
         raw(grad_masked), raw(grad_predicted), *map(raw, loss))  # fmt: skip
    return tuple(loss)


def bytes_read() -> int:
    """By the launches since the last call, in vectors of logits."""
    return load().take_bytes_read()


@contextlib.contextmanager
def order(name: str, seed: int = 0, resident_blocks: int = 1):
    """How the executor runs the launches inside: "in order", "reversed" or "random"."""
    load().set_options(name, seed, resident_blocks)
    try:
        yield
    finally:
        load().set_options("in order", 0, 1)
