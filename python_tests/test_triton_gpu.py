"""The Triton kernels at real sizes on a GPU: streams, graphs, memory, 64-bit offsets, exact ids."""

import float64
import pytest
import torch
from tolerances import CONFIDENCE_RTOL, ROUNDING, assert_close, assert_statistics
from triton_device import chunked_from, cpp_op

from dmax_kernels.triton import IMPLEMENTATIONS as TRITON

pytestmark = pytest.mark.gpu

V, D = 157184, 2048


def logits_of(rows, dtype=torch.bfloat16, vocab_size=V):
    generator = torch.Generator("cuda").manual_seed(rows)
    return (3 * torch.randn(rows, vocab_size, generator=generator, device="cuda")).to(dtype)


def head(rows, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(rows)
    hidden = torch.randn(rows, D, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(V, D, generator=generator, device="cuda").mul_(D**-0.5).to(dtype)
    return hidden, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [V, V - 1])
def test_ids_as_in_cpp(dtype, vocab_size):
    logits = logits_of(32, dtype, vocab_size)
    seed = torch.tensor([7, 8])
    for op, more in (
        ("top1_confidence", ()),
        ("topk_confidence", (8,)),
        ("sample_tokens", (seed,)),
    ):
        on_gpu = (x.cuda() if torch.is_tensor(x) else x for x in more)
        token, confidence, *_ = TRITON[op](logits, *on_gpu, suppress_token=156895)
        expected, expected_confidence, *_ = cpp_op(op, logits.cpu(), *more, suppress_token=156895)
        assert torch.equal(token.cpu(), expected), op
        assert_close(confidence.cpu(), expected_confidence, 2 * CONFIDENCE_RTOL)


def test_row_statistics():
    logits = logits_of(32)
    actual = [x.cpu() for x in TRITON["row_statistics"](logits, temperature=0.7)]
    assert_statistics(actual, cpp_op("row_statistics", logits.cpu(), temperature=0.7), 2)
    assert torch.equal(actual[1], TRITON["top1_confidence"](logits, temperature=0.7)[1].cpu())
    per_row = TRITON["row_statistics"](logits, temperatures=torch.full((32,), 0.7, device="cuda"))
    number = torch.tensor(0.7).item()  # of float32, as the tensor's
    for a, b in zip(per_row, TRITON["row_statistics"](logits, temperature=number), strict=True):
        assert torch.equal(a, b)


def test_same_row_same_bits():
    logits = logits_of(4096)
    token, confidence = TRITON["top1_confidence"](logits)
    for rows in (slice(5, 6), slice(0, 32), slice(1000, 1256)):
        token_alone, confidence_alone = TRITON["top1_confidence"](logits[rows])
        assert torch.equal(token_alone, token[rows])
        assert torch.equal(confidence_alone, confidence[rows])


def test_more_than_2_to_31_elements():
    logits = torch.zeros(14000, V, dtype=torch.bfloat16, device="cuda")
    target = torch.arange(14000, device="cuda") * 11
    logits.scatter_(1, target[:, None], 5.0)
    assert torch.equal(TRITON["top1_confidence"](logits)[0], target)
    loss, *_ = TRITON["oput_loss"](logits, None, target)
    assert (loss == loss[0]).all()


# Both ways: the fused kernel, and the library's products of chunks of the vocabulary
@pytest.mark.parametrize("least_chunked_rows", [None, 1])
def test_linear_head_is_exact_on_held_inputs(least_chunked_rows):
    """Small integers in bfloat16: every product and sum is exact in float32."""
    with chunked_from(least_chunked_rows):
        linear_head_is_exact()


def linear_head_is_exact():
    for rows in (1, 16, 32, 64, 128, 200, 1000):
        generator = torch.Generator("cuda").manual_seed(rows)
        shape = {"low": -2, "high": 3, "generator": generator, "device": "cuda"}
        hidden = torch.randint(size=(rows, D), **shape).bfloat16()
        weight = torch.randint(size=(9973, D), **shape).bfloat16()
        logits = hidden.double() @ weight.double().t()
        token, confidence = TRITON["linear_top1_confidence"](hidden, weight, temperature=40.0)
        best = logits.amax(dim=-1)
        assert torch.equal(token, (logits == best[:, None]).int().argmax(dim=-1))
        probability = torch.softmax(logits / 40, dim=-1).amax(dim=-1)
        assert_close(confidence, probability, 1e-5)
        seed = torch.tensor([rows, 3], device="cuda")
        sampled, *_ = TRITON["linear_sample_tokens"](hidden, weight, seed, temperature=40.0)
        stored, *_ = TRITON["sample_tokens"](logits.float(), seed, temperature=40.0)
        assert (sampled == stored).float().mean() >= 0.99


# The buffer of a chunk, and what each chunk leaves of a row
@pytest.mark.parametrize(("least_chunked_rows", "most"), [(None, 8e6), (1, 300e6)])
@pytest.mark.parametrize("rows", [1, 64, 4096, 8192])
def test_memory_of_the_linear_head(rows, least_chunked_rows, most):
    """Beside cuBLAS's own workspace, which PyTorch keeps from the process's first product on."""
    hidden, weight = head(rows)
    with chunked_from(least_chunked_rows):
        TRITON["linear_top1_confidence"](hidden[:1], weight)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        TRITON["linear_top1_confidence"](hidden, weight)
    assert torch.cuda.max_memory_allocated() - before < most


def linear_loss(hidden, weight, target, grads, bias=None, **options):
    """(losses, logsumexps, gradients of both hiddens, weight and bias)."""
    results = TRITON["linear_oput_loss"](*hidden, weight, target, bias, **options)
    return *results, *TRITON["linear_oput_loss_backward"](
        *grads, *hidden, weight, target, *results[2:], bias, **options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 1.7}], ids=str
)
def test_linear_loss_against_float64(dtype, options):
    """Several chunks of the vocabulary with an odd end; repeated calls give the same bits."""
    generator = torch.Generator("cuda").manual_seed(5)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, device="cuda")).to(dtype)

    rows, vocab_size, dim = 300, 40001, 520
    hidden = [normal(rows, dim) for _ in range(2)]
    weight, bias = normal(vocab_size, dim, scale=2 * dim**-0.5), normal(vocab_size)
    target = torch.randint(vocab_size, (rows,), generator=generator, device="cuda")
    target[::5] = -100
    hidden[0][5] = torch.nan  # an ignored row
    grads = torch.randn(2, rows, generator=generator, device="cuda")
    results = linear_loss(hidden, weight, target, grads, bias, **options)
    again = linear_loss(hidden, weight, target, grads, bias, **options)
    assert all(torch.equal(one, other) for one, other in zip(results, again, strict=True))

    keep = target >= 0
    leaves = [t.double().where(keep[:, None], 0) for t in hidden] + [weight.double(), bias.double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    total = 0
    for h, grad, loss in zip(leaves[:2], grads, results[:2], strict=True):
        logits = h @ leaves[2].t() + leaves[3]
        expected = keep * float64.token_loss(logits, target.clamp(min=0), **options)
        assert_close(loss, expected.detach(), 2e-6, 1e-5)
        total = total + (expected * grad).sum()
    for actual, wanted in zip(results[4:], torch.autograd.grad(total, leaves), strict=True):
        atol = (1e-5 if dtype == torch.float32 else ROUNDING[dtype]) * wanted.abs().max().item()
        assert_close(actual, wanted, ROUNDING[dtype], atol)


def test_linear_loss_memory_and_syncs():
    """2 x 4,096 positions: less than 16 MB forward, 1 GB backward beside the gradients."""
    hidden, weight = head(4096)
    target = torch.randint(V, (4096,), device="cuda")
    grads = torch.full((2, 4096), 1 / 4096, device="cuda")
    linear_loss((hidden, hidden), weight, target, grads)
    results, peaks = None, []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op in ("linear_oput_loss", "linear_oput_loss_backward"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            if results is None:
                results = TRITON[op](hidden, hidden, weight, target)
            else:
                TRITON[op](*grads, hidden, hidden, weight, target, *results[2:])
            peaks.append(torch.cuda.max_memory_allocated() - before)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert peaks[0] < 16e6
    assert peaks[1] - 2 * hidden.nbytes - weight.nbytes < 1e9


def test_sample_distribution():
    """chi-squared of 100,000 draws from 5 classes: 4 degrees of freedom, p = 1e-4 at 23.5."""
    probability = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02], device="cuda")
    draws = 100_000
    seed = torch.tensor([17, 1], device="cuda")
    stored, *_ = TRITON["sample_tokens"](probability.log().expand(draws, 5), seed)
    hidden = torch.ones(draws, 1, device="cuda")
    linear, *_ = TRITON["linear_sample_tokens"](hidden, probability.log()[:, None], seed)
    for token in (stored, linear):
        counts = torch.bincount(token, minlength=5)
        chi_squared = ((counts - draws * probability).square() / (draws * probability)).sum()
        assert chi_squared < 23.5


def spd_arguments(block=32):
    embedding = torch.randn(V, D, device="cuda").bfloat16()
    editable = torch.ones(2, block, dtype=torch.bool, device="cuda")
    token = torch.full((2, block), 156895, device="cuda")
    return (
        logits_of(2 * block).view(2, block, V), embedding, editable, editable.clone(), token,
        torch.zeros(2, block, device="cuda"), torch.zeros(2, dtype=torch.bool, device="cuda"),
        torch.zeros(2, dtype=torch.int32, device="cuda"), embedding[token], 156895, 0.3, 0.9,
    )  # fmt: skip


def test_no_host_sync():
    arguments = spd_arguments()
    hidden, weight = head(32)
    seed = torch.tensor([1, 2], device="cuda")
    target = torch.zeros(64, dtype=torch.int64, device="cuda")
    logits = arguments[0].view(64, V)
    torch.cuda.set_sync_debug_mode("error")
    try:
        TRITON["spd_step_"](*arguments)
        TRITON["sample_tokens"](logits, seed)
        TRITON["linear_top1_confidence"](hidden, weight)
        TRITON["linear_sample_tokens"](hidden, weight, seed)
        TRITON["oput_loss_and_grad_"](logits, None, target)
        hybrid = (arguments[1][:1000], target[:32], arguments[5][0], arguments[2][0], 5)
        TRITON["hybrid_embedding_backward"](arguments[8][0], *hybrid)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_steps_on_and_draws_anew():
    arguments = spd_arguments()
    logits, step = arguments[0], arguments[7]
    seed = torch.tensor([1, 0], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles before the capture, on a stream of its own
        TRITON["spd_step_"](*arguments)
        TRITON["sample_tokens"](logits, seed)
    torch.cuda.current_stream().wait_stream(side)
    step.zero_()
    arguments[6].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        TRITON["spd_step_"](*arguments)
        sampled, *_ = TRITON["sample_tokens"](logits, seed)
        seed[1] += 1
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(sampled.clone())
    assert (step > 0).all()
    assert not torch.equal(draws[0], draws[1])
    again, *_ = TRITON["sample_tokens"](logits, torch.tensor([1, 1], device="cuda"))
    assert torch.equal(again, draws[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_the_current_one():
    logits = torch.randn(3, 5000, device="cuda:1")
    token, _ = TRITON["top1_confidence"](logits)
    assert token.device == logits.device
    assert torch.equal(token, logits.argmax(-1))
