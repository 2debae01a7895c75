"""The CUDA kernels under AddressSanitizer + UBSan, and on tiny shapes under ThreadSanitizer.

The calls run first in the plain build, in order; then a sanitizer's process repeats them in random
order with several blocks resident, and must find nothing and give the same bits.
"""

import pickle

import pytest
import simt_ops
import torch
from cases import stacked_rows, strided_copies
from edit_cases import EDIT_OPTIONS, edit_case
from simt_build import run_sanitized
from simt_ops import A100, H200, H200_CLUSTERS, ONE_MULTIPROCESSOR
from test_simt_embeddings import MASK, mix_case, spd_case

from dmax_kernels.ops.edit_step import EDIT_RULES
from dmax_kernels.ops.spd_step import SEMANTICS

# Two tiles of bfloat16 and a tail; nine tiles, the smallest rows that are split
SMALL, SPLIT = 2 * 2048 + 5, 9 * 2048 + 3


def logits_of(num_rows, vocab_size, dtype=torch.bfloat16):
    generator = torch.manual_seed(vocab_size)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def row_calls(dtype):
    """Every kernel over rows: all edge cases, tails of 1 to 2,049 elements, strides, splits."""
    seed = torch.tensor([7, 1])
    for vocab_size in (1, 9, 127, 2049):
        _, logits = stacked_rows(vocab_size, dtype)
        simt_ops.top1_confidence(logits, suppress_token=0)
        simt_ops.topk_confidence(logits, min(3, vocab_size))
        simt_ops.row_statistics(logits, suppress_token=0)
        ids = torch.tensor([[0, vocab_size - 1, vocab_size]]).expand(len(logits), -1)
        simt_ops.token_logprobs(logits, ids, top_n=min(20, vocab_size))
        simt_ops.sample_tokens(logits, seed)
        simt_ops.top1_partial(logits, 50, suppress_token=52)
        simt_ops.sample_partial(logits, seed, 64, suppress_token=65)
        simt_ops.sample_tokens(logits, seed, top_k=2, top_p=0.9, min_p=0.1)
        transform_calls(logits.nan_to_num())
    for logits in strided_copies(logits_of(3, 2100, dtype)).values():
        simt_ops.top1_confidence(logits)
    logits = logits_of(2, SPLIT, dtype)
    simt_ops.topk_confidence(logits, 8)
    for gpu in (H200, H200_CLUSTERS):
        simt_ops.row_statistics(logits, gpu=gpu)
        simt_ops.row_statistics(logits, temperature=torch.tensor([0.5, 0.0]), gpu=gpu)
    simt_ops.token_logprobs(logits, torch.tensor([5, -100]))
    simt_ops.sample_tokens(logits, seed)
    for options in ({"top_k": 3000}, {"top_p": 0.9}, {"temperature": torch.tensor([0.5, 0.0])}):
        simt_ops.sample_tokens(logits, seed, **options)
    allowed = torch.full((1, -(-SPLIT // 32)), 0x10000001, dtype=torch.int32)
    simt_ops.sample_tokens(logits[:, 1:], seed, allowed=allowed)
    masked_calls(logits, allowed)
    simt_ops.sample_tokens(torch.zeros_like(logits), seed, top_p=0.9)
    parts = [simt_ops.top1_partial(logits[:, a : a + 4096], a) for a in (0, 4096)]
    simt_ops.top1_merge(*(torch.stack(each) for each in zip(*parts, strict=True)))
    parts = [simt_ops.sample_partial(logits[:, a : a + 4096], seed, a) for a in (0, 4096)]
    simt_ops.sample_merge(*(torch.stack(each) for each in zip(*parts, strict=True)))


def transform_calls(logits):
    """All operands at once, one for all rows and one per row, of rows that begin anywhere."""
    rows, vocab_size = logits.shape
    counts = torch.ones(rows, vocab_size, dtype=torch.int32)
    counts[:, ::3] = 0
    words = torch.full((-(-vocab_size // 32),), 0x10000001, dtype=torch.int32)
    options = {"output_counts": counts, "prompt_tokens": words, "presence_penalty": 0.5}
    for gpu in (H200, ONE_MULTIPROCESSOR):
        simt_ops.transform_logits_(logits.clone(), **options, gpu=gpu)
        simt_ops.transform_logits_(
            logits.clone(), softcap=5.0, bias=torch.ones(vocab_size), **options,
            repetition_penalty=torch.full((rows,), 1.5), gpu=gpu,
        )  # fmt: skip


def masked_calls(logits, allowed):
    """Every op with a mask, whose last word is cut; rows aligned and not."""
    for x in (logits, logits[:, 1:], logits[:, :300]):
        mask = allowed[:, : -(-x.shape[-1] // 32)]
        simt_ops.top1_confidence(x, allowed=mask)
        simt_ops.topk_confidence(x, 8, allowed=mask)
        simt_ops.row_statistics(x, allowed=mask)
        simt_ops.row_statistics(x, allowed=mask, temperature=torch.linspace(0, 1, len(x)))
        simt_ops.token_logprobs(x, torch.tensor([[4, 5]] * len(x)), top_n=3, allowed=mask)
        simt_ops.top1_partial(x, 50, suppress_token=52, allowed=mask)


def loss_calls(dtype):
    for vocab_size in (1, 7, 300, SMALL):
        logits = [logits_of(3, vocab_size, dtype) for _ in range(2)]
        target = torch.tensor([0, -100, vocab_size])  # the last one lies outside
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3}):
            _, (lse, _) = simt_ops.oput_loss_with_logsumexp(*logits, target, **options)
            grad = torch.tensor([1.0, 2.0, -1.0])
            simt_ops.oput_loss_backward(grad, logits[0], target, lse, **options)
            for gpu in (H200, A100):
                written = [x.clone() for x in logits]
                simt_ops.oput_loss_and_grad_(*written, target, grad, None, **options, gpu=gpu)
    wide = logits_of(2, 18 * 2048 + 1, dtype)
    simt_ops.oput_loss_and_grad_(wide, None, torch.tensor([5, -100]))


def embedding_calls(dtype):
    confidence = torch.rand(3, 40)
    simt_ops.prefix_promote(confidence, confidence < 0.7, 0.5)
    for dim in (13, 40):
        for k in (1, 3):
            embedding, token, confidence, masked = mix_case(k, dtype=dtype, dim=dim)
            simt_ops.hybrid_embedding(embedding, token, confidence, masked, 49)
            grad = torch.randn(len(masked), dim).to(dtype)
            simt_ops.hybrid_embedding_backward(grad, embedding, token, confidence, masked, 49)
        for semantics in SEMANTICS:
            for top_k in (1, 3):
                logits, embedding, state = spd_case(5, 6, dtype=dtype, dim=dim)
                simt_ops.spd_step_(
                    logits, embedding, **state, mask_token_id=MASK, tau_dec=0.5, tau_acc=0.9,
                    semantics=semantics, top_k=top_k,
                )  # fmt: skip
                simt_ops.spd_step_(
                    logits, embedding, **state, mask_token_id=MASK, tau_dec=0.5, tau_acc=0.9,
                    semantics=semantics, top_k=top_k, suppress_tokens=(3, 20),
                )  # fmt: skip
    for gpu in (H200, H200_CLUSTERS):
        logits, embedding, state = spd_case(1, 2, vocab=SPLIT, dtype=dtype)
        simt_ops.spd_step_(
            logits, embedding, **state, mask_token_id=0, tau_dec=0.5, tau_acc=0.9, gpu=gpu
        )
    edit_calls(dtype, ((5, 6, 40), (1, 300, 5), (1, 2, SPLIT)))


def edit_calls(dtype, shapes):
    """Every rule, each until rows are done."""
    for shape in shapes:
        for rule in EDIT_RULES:
            logits, state = edit_case(*shape, dtype=dtype)
            for _ in range(3):
                simt_ops.edit_step_(logits, **state, **EDIT_OPTIONS, rule=rule)
            simt_ops.edit_step_(logits, **state, **EDIT_OPTIONS, rule=rule, suppress_tokens=(0, 1))


def tiny_calls(dtype):
    """At most 16 blocks a launch: under ThreadSanitizer all are resident at once."""
    seed = torch.tensor([7, 1])
    logits = logits_of(2, SPLIT, dtype)
    simt_ops.top1_confidence(logits)
    simt_ops.topk_confidence(logits, 2)
    simt_ops.row_statistics(logits)
    simt_ops.token_logprobs(logits, torch.tensor([5, 70]), top_n=2)
    simt_ops.sample_tokens(logits, seed)
    simt_ops.sample_tokens(logits[:, :SMALL], seed, top_k=20)
    for gpu in (ONE_MULTIPROCESSOR, H200_CLUSTERS):
        simt_ops.top1_confidence(logits, gpu=gpu)
    target = torch.tensor([3, 8])
    simt_ops.oput_loss(logits, None, target)
    for gpu in (H200, A100):
        simt_ops.oput_loss_and_grad_(logits_of(1, 18 * 2048 + 1, dtype), None, target[:1], gpu=gpu)
    for semantics in SEMANTICS:
        for top_k, gpu in ((1, H200), (1, H200_CLUSTERS), (2, H200)):
            logits, embedding, state = spd_case(2, 2, vocab=SPLIT, dtype=dtype)
            simt_ops.spd_step_(
                logits, embedding, **state, mask_token_id=0, tau_dec=0.5, tau_acc=0.9,
                semantics=semantics, top_k=top_k, gpu=gpu,
            )  # fmt: skip
    edit_calls(dtype, ((2, 2, SPLIT),))
    embedding, token, confidence, masked = mix_case(2, positions=8, dtype=dtype)
    grad = torch.randn(8, 40).to(dtype)
    simt_ops.hybrid_embedding_backward(grad, embedding, token, confidence, masked, 49)


def repeat(variant, calls, tmp_path, dtype, order, resident):
    with simt_ops.recording() as recorded:
        calls(dtype)
    path = tmp_path / "calls.pickle"
    path.write_bytes(pickle.dumps(recorded))
    done = run_sanitized(variant, "simt_replay_child.py", str(path), order, str(resident))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{len(recorded)} calls\n"


@pytest.mark.parametrize("calls", [row_calls, loss_calls, embedding_calls])
@pytest.mark.parametrize("dtype", [
    torch.bfloat16,
    pytest.param(torch.float32, marks=pytest.mark.slow),
    pytest.param(torch.float16, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_addresses_and_undefined_behaviour(calls, dtype, tmp_path):
    repeat("asan", calls, tmp_path, dtype, "random", 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["in order", pytest.param("random", marks=pytest.mark.slow)])
def test_races(dtype, order, tmp_path):
    repeat("tsan", tiny_calls, tmp_path, dtype, order, 16)
