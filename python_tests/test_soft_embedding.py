"""soft_embedding and soft_embedding_partial: values, edges, temperatures, messages."""

from types import SimpleNamespace

import pytest
import torch
from cases import DTYPES, SMALL_VOCABS, stacked_rows, strided_copies
from tolerances import ROUNDING, assert_close
from triton_device import DEVICE, triton_op

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.reference.soft_embedding import kept_logits

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf


def triton_like(function):
    """The wrapper's arguments, at Triton's op."""

    def call(logits, other, *, temperature=1.0, cut=(None, None), top_p=1.0):
        options = {"temperature": temperature}
        if isinstance(temperature, torch.Tensor):
            options = {"temperatures": temperature.expand(logits.shape[:-1])}
        if top_p != 1:
            cut = triton_op("top_p_cut", logits, top_p, **options)
        if function != "top_p_cut":
            options |= {"least": cut[0], "last_id": cut[1]}
        return triton_op(function, logits, other, **options)

    return call


def by_products(call):
    """As with many rows, whose chunks of weights fill their buffer."""

    def run(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dmax_kernels.triton.soft_embedding.LEAST_PRODUCT_ROWS", 1)
            patch.setattr("dmax_kernels.triton.soft_products.WEIGHT_BYTES", 1)
            return call(*args, **options)

    return run


OPS = ("soft_embedding", "soft_embedding_partial", "top_p_cut")
TRITON = SimpleNamespace(**{op: triton_like(op) for op in OPS})
PRODUCTS = SimpleNamespace(**{op: by_products(triton_like(op)) for op in OPS})
BACKENDS = {
    "reference": reference,
    "cpu": dmax_kernels,
    "triton": TRITON,
    "triton by products": PRODUCTS,
}
INTERPRETED = ("triton", "triton by products") if DEVICE.type == "cpu" else ()
everywhere = pytest.mark.parametrize("backend", BACKENDS)
# Triton's interpreter multiplies the bits of bfloat16 as integers
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)[: 2 if DEVICE.type == "cpu" else 3]


def table(vocab_size, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(vocab_size + dim)
    return torch.randn(vocab_size, dim, generator=generator).to(dtype)


def exact(logits, embedding, temperature=1.0):
    """float64, and the size of what is added up, by which errors are measured."""
    temperature = torch.as_tensor(temperature, dtype=torch.float64)
    scaled = logits.double() / temperature.unsqueeze(-1)
    probability = torch.softmax(scaled, dim=-1)
    return probability @ embedding.double(), probability @ embedding.double().abs()


def assert_near(actual, logits, embedding, temperature=1.0):
    expected, size = exact(logits, embedding, temperature)
    defined = expected.isfinite().all(dim=-1)
    assert actual[~defined].isnan().all()
    error = (actual.double() - expected)[defined] / size[defined]
    assert error.numel() == 0 or error.abs().max() <= 3 * ROUNDING[actual.dtype]


# The interpreter takes seconds a size
FEW = (1, 127, 2049) if DEVICE.type == "cpu" else SMALL_VOCABS


@pytest.mark.parametrize(
    ("backend", "vocab_size"),
    [(b, size) for b in BACKENDS for size in (FEW if "triton" in b else SMALL_VOCABS)],
)
def test_every_case(backend, vocab_size):
    names, logits = stacked_rows(vocab_size, torch.float32)
    embedding = table(vocab_size, 5)
    assert len(names) > 20
    assert_near(BACKENDS[backend].soft_embedding(logits, embedding), logits, embedding)


# One row, few rows, and blocks of both; a width of less than a vector, and of two chunks and a rest
@everywhere
@pytest.mark.parametrize(("rows", "vocab_size", "dim"), [(1, 70, 3), (2, 1300, 600), (20, 600, 70)])
@pytest.mark.parametrize("scale", [0.5, 12.0])
def test_shapes_and_dtypes(backend, rows, vocab_size, dim, scale):
    if "triton" in backend and DEVICE.type == "cpu":  # a chunk of columns takes it long
        vocab_size, dim = min(vocab_size, 300), min(dim, 140)
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, vocab_size, generator=generator) * scale
    temperature = torch.rand(rows, generator=generator) + 0.3
    for logits_dtype in DTYPES:
        for dtype in TRITON_DTYPES if backend == "triton" else DTYPES:
            embedding, x = table(vocab_size, dim, dtype), logits.to(logits_dtype)
            soft = BACKENDS[backend].soft_embedding(x, embedding, temperature=temperature)
            assert soft.dtype == dtype
            assert_near(soft, x, embedding, temperature)


@everywhere
def test_shards_add_up(backend):
    """Any cut of the vocabulary, one shard without any mass, another with nothing but it."""
    logits = torch.randn(3, 4, 300, generator=torch.Generator().manual_seed(0)) * 4
    logits[1, 2, :100], logits[2, 0, 100:] = -torch.inf, -torch.inf
    embedding, temperature = table(300, 9), torch.tensor([0.5, 1.0, 2.0]).view(3, 1)
    parts = [
        BACKENDS[backend].soft_embedding_partial(
            logits[..., cut], embedding[cut], temperature=temperature
        )
        for cut in (slice(0, 100), slice(100, 107), slice(107, 300))
    ]
    maximum, sum_exp, weighted = (torch.stack(each) for each in zip(*parts, strict=True))
    assert maximum[0, 1, 2] == -torch.inf
    assert sum_exp[0, 1, 2] == 0
    assert (weighted[0, 1, 2] == 0).all()
    factor = ((maximum - maximum.amax(dim=0)) / temperature).exp().unsqueeze(-1)
    merged = (weighted * factor).sum(dim=0) / (sum_exp.unsqueeze(-1) * factor).sum(dim=0)
    assert_near(merged, logits, embedding, temperature)


@everywhere
def test_undefined_shards(backend):
    logits = torch.zeros(3, 40)
    logits[0, 3], logits[1, 5], logits[2] = torch.nan, torch.inf, -torch.inf
    partial = BACKENDS[backend].soft_embedding_partial
    maximum, sum_exp, weighted = partial(logits, table(40, 4))
    if backend != "reference":
        assert sum_exp[:2].isnan().all()
    assert weighted[:2].isnan().all()
    assert maximum[2] == -torch.inf
    assert sum_exp[2] == 0
    assert (weighted[2] == 0).all()


# ---- The cut to the most probable tokens

every_cut = pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])


@every_cut
@pytest.mark.parametrize(
    ("top_p", "least", "last_id", "mirrored"),
    [(0.3, 4, 3, 2), (0.5, 2, 1, 0), (0.7, 2, 4, 1), (0.8, 2, 5, 4), (0.95, 1, 0, 5), (1, 0, 5, 5)],
)
def test_the_cut_by_hand(backend, top_p, least, last_id, mirrored):
    """Masses 1, 2, 0, 4, 2, 2: equal ones count by id, and the last one is kept whole."""
    mass = torch.tensor([1.0, 2, 0, 4, 2, 2])
    cut = BACKENDS[backend].top_p_cut(torch.stack([mass, mass.flip(0)]).log(), top_p)
    assert cut[0].tolist() == [torch.tensor(float(least)).log()] * 2
    assert cut[1].tolist() == [last_id, mirrored]


@every_cut
def test_the_cut_at_temperatures(backend):
    """Masses 4, 2, 2 become 16, 4, 4 at temperature 1/2."""
    logits = torch.tensor([2.0, 2, 4]).log().expand(2, 3)
    temperature = torch.tensor([0.5, 1.0])
    cut = BACKENDS[backend].top_p_cut(logits, 0.6, temperature=temperature)
    assert cut[1].tolist() == [2, 0]


@every_cut
def test_a_cut_of_undefined_rows_keeps_all(backend):
    logits = torch.zeros(4, 70)
    logits[0, 3], logits[1, 5], logits[2], logits[3, 1:] = torch.nan, torch.inf, -torch.inf, -9e9
    least, last_id = BACKENDS[backend].top_p_cut(logits, 0.5)
    assert least.tolist() == [-torch.inf] * 3 + [0]
    assert last_id.tolist() == [69] * 3 + [0]
    embedding = table(70, 3)
    soft = BACKENDS[backend].soft_embedding(logits, embedding, top_p=0.5)
    assert soft[:3].isnan().all()
    assert torch.equal(soft[3], embedding[0])


def without(logits, cut):
    """float64 logits whose dropped tokens have none, found by sorting."""
    kept = kept_logits(logits, cut)
    return torch.where(kept == -torch.inf, -torch.inf, logits.double())


# The interpreter takes seconds a case
CUT_SHAPES = [(2, 130, 3), (3, 1300, 9), (20, 600, 70)]


@pytest.mark.parametrize(
    ("backend", "rows", "vocab_size", "dim"),
    [(b, *shape) for b in BACKENDS for shape in CUT_SHAPES[: 1 if b in INTERPRETED else 3]],
)
def test_top_p_keeps_the_fewest(backend, rows, vocab_size, dim):
    """The cut is the shortest prefix in float64, and the sum is that of what it keeps."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(torch.bfloat16)
    embedding, temperature = table(vocab_size, dim), torch.rand(rows, generator=generator) + 0.3
    for top_p in (0.8,) if backend in INTERPRETED else (0.05, 0.6, 0.97):
        options = {"temperature": temperature}
        cut = BACKENDS[backend].top_p_cut(logits, top_p, **options)
        p = torch.softmax(logits.double() / temperature.double().unsqueeze(-1), dim=-1)
        kept = without(logits, cut) > -torch.inf
        last = p.gather(-1, cut[1].unsqueeze(-1)).squeeze(-1)
        share = (p * kept).sum(dim=-1)
        assert (share >= top_p - 1e-6).all()
        assert (share - last < top_p + 1e-6).all()
        assert (p * ~kept).amax(dim=-1).le(last).all()  # in descending order
        soft = BACKENDS[backend].soft_embedding(logits, embedding, top_p=top_p, **options)
        assert_near(soft, without(logits, cut), embedding, temperature)


@everywhere
def test_shards_of_a_cut_add_up(backend):
    """With ids counted from each shard's first; the last shard keeps nothing of two rows."""
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(4)).round() * 2
    logits[:2, 107:] = -30.0
    embedding = table(300, 9)
    least, last_id = reference.top_p_cut(logits, 0.7)
    parts = [
        BACKENDS[backend].soft_embedding_partial(
            logits[:, part], embedding[part], cut=(least, last_id - part.start)
        )
        for part in (slice(0, 100), slice(100, 107), slice(107, 300))
    ]
    maximum, sum_exp, weighted = (torch.stack(each) for each in zip(*parts, strict=True))
    assert (maximum[2, :2] == -torch.inf).all()
    assert (sum_exp[2, :2] == 0).all()
    factor = (maximum - maximum.amax(dim=0)).exp().unsqueeze(-1)
    merged = (weighted * factor).sum(dim=0) / (sum_exp.unsqueeze(-1) * factor).sum(dim=0)
    assert_near(merged, without(logits, (least, last_id)), embedding)


def test_only_tokens_with_mass_are_read():
    """A sure row gives its token's embedding itself."""
    logits = torch.full((2, 5000), -50.0)
    logits[0, 4321], logits[1, 7] = 0.0, 3.0
    embedding = table(5000, 33, torch.bfloat16)
    soft = dmax_kernels.soft_embedding(logits, embedding)
    assert torch.equal(soft, embedding[[4321, 7]])


def test_a_row_has_the_same_bits_in_any_batch_of_few():
    """And with any number of threads."""
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(2)) * 9
    embedding, threads = table(3000, 200, torch.bfloat16).float(), torch.get_num_threads()
    together = dmax_kernels.soft_embedding(logits, embedding)
    for row in range(8):
        assert torch.equal(dmax_kernels.soft_embedding(logits[row], embedding), together[row])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(dmax_kernels.soft_embedding(logits, embedding), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_strides(backend):
    logits, embedding = torch.randn(6, 90), table(90, 12)
    expected = BACKENDS[backend].soft_embedding(logits, embedding)
    copies = strided_copies(logits), strided_copies(embedding)
    for x, e in zip(*(each.values() for each in copies), strict=True):
        assert torch.equal(BACKENDS[backend].soft_embedding(x, e), expected)
    empty = BACKENDS[backend].soft_embedding(torch.empty(0, 3, 90), embedding)
    assert empty.shape == (0, 3, 12)


# ---- Rounded weights of many rows


def flat_rows(rows, vocab_size, dim):
    """Whose weights all count, and a bfloat16 embedding."""
    generator = torch.Generator().manual_seed(rows + dim)
    logits = torch.randn(rows, vocab_size, generator=generator)
    return logits, table(vocab_size, dim, torch.bfloat16)


# The fewest rows, one more than a part of 64, and two blocks of rows; columns in part of a step,
# in one chunk, and in two and a rest; the last block of tokens is not whole
@pytest.mark.parametrize(
    ("rows", "vocab_size", "dim"), [(9, 700, 5), (65, 1301, 64), (300, 90, 555)]
)
def test_rounded_weights_are_off_by_two_roundings(rows, vocab_size, dim):
    """Of sum p |e|, at most: those of a weight and of the divisor, besides the result's own."""
    logits, embedding = flat_rows(rows, vocab_size, dim)
    temperature = torch.linspace(0.5, 2, rows)
    expected, size = exact(logits, embedding, temperature)
    given = (logits, embedding)
    _, sum_exp, weighted = dmax_kernels.soft_embedding_partial(*given, temperature=temperature)
    error = (weighted.double() / sum_exp.double().unsqueeze(-1) - expected).abs()
    assert (error / size).max() <= 2 * ROUNDING[torch.bfloat16]
    soft = dmax_kernels.soft_embedding(*given, temperature=temperature)
    assert_close(soft, weighted / sum_exp.unsqueeze(-1), ROUNDING[torch.bfloat16], 1e-6)
    assert torch.equal(dmax_kernels.soft_embedding(*given, temperature=temperature), soft)


def test_rounded_weights_are_divided_by_their_own_sum():
    """Nearly all weights are exp(-1.3), which is rounded by 3.3e-3 of itself. The mean of a
    constant is the constant nevertheless."""
    logits = torch.full((40, 3000), -1.3)
    logits[:, 17] = 0.0
    embedding = torch.ones(3000, 3, dtype=torch.bfloat16)
    _, sum_exp, weighted = dmax_kernels.soft_embedding_partial(logits, embedding)
    assert_close(weighted, sum_exp.unsqueeze(-1).expand_as(weighted), 1e-4)


def test_embeddings_without_mass_in_many_rows_are_not_read():
    """Of tokens that lie among others, in blocks that take a product."""
    logits, embedding = flat_rows(20, 1300, 70)
    kept = torch.arange(1300) % 3 != 1
    expected = dmax_kernels.soft_embedding(logits[:, kept], embedding[kept])
    logits[:, ~kept], embedding[~kept] = -torch.inf, torch.nan
    soft = dmax_kernels.soft_embedding(logits, embedding)
    assert_close(soft, expected, 2.0**-7, 2.0**-10)
    logits[3, 5], logits[4, 6] = torch.nan, torch.inf
    broken = dmax_kernels.soft_embedding(logits, embedding)
    assert broken[3:5].isnan().all()
    assert torch.equal(broken[5:], soft[5:])


def test_a_cut_and_shards_of_rounded_weights():
    """Of 1,000 tokens about half are kept, and each shard's sum is that of its rounded weights."""
    logits, embedding = flat_rows(20, 1000, 70)
    least, last_id = dmax_kernels.top_p_cut(logits, 0.8)
    parts = [
        dmax_kernels.soft_embedding_partial(
            logits[:, part], embedding[part], cut=(least, last_id - part.start)
        )
        for part in (slice(0, 400), slice(400, 1000))
    ]
    maximum, sum_exp, weighted = (torch.stack(each) for each in zip(*parts, strict=True))
    factor = (maximum - maximum.amax(dim=0)).exp().unsqueeze(-1)
    merged = (weighted * factor).sum(dim=0) / (sum_exp.unsqueeze(-1) * factor).sum(dim=0)
    soft = dmax_kernels.soft_embedding(logits, embedding, top_p=0.8)
    for result in (merged.to(torch.bfloat16), soft):
        assert_near(result, without(logits, (least, last_id)), embedding)


def test_registrations():
    logits, embedding = torch.randn(2, 3, 50), table(50, 4, torch.bfloat16)
    temperatures = torch.rand(2, 3) + 0.5
    for op in ("soft_embedding", "soft_embedding_partial"):
        op = getattr(torch.ops.dmax, op).default
        torch.library.opcheck(op, (logits, embedding), {"temperature": 0.7})
        torch.library.opcheck(op, (logits, embedding), {"temperatures": temperatures})
        cut = dict(zip(("least", "last_id"), dmax_kernels.top_p_cut(logits, 0.5), strict=True))
        torch.library.opcheck(op, (logits, embedding), cut)
    op = torch.ops.dmax.top_p_cut.default
    torch.library.opcheck(op, (logits, 0.5), {"temperatures": temperatures})
    with pytest.raises(RuntimeError, match="soft_embedding: has no gradient; detach"):
        dmax_kernels.soft_embedding(logits.requires_grad_(), embedding).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 6)}, "embedding must be [V, D] with V = 6 as in logits and D"),
        ({"logits": torch.zeros(2, 5).int()}, "logits must be float32, bfloat16 or float16, got "),
        ({"embedding": torch.zeros(5)}, "embedding must be [V, D] with V = 5 as in logits and D"),
        ({"embedding": torch.zeros(5, 3).long()}, "embedding must be float32, bfloat16 or float16"),
        ({"temperature": 0.0}, "temperature must be at least 1e-30 and at most 1e30, got 0"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "temperature must be at least 1e-30 and at mo"),
        (
            {"temperature": torch.ones(3)},
            "temperatures must have shape [2] (one per row of logits)",
        ),
        ({"temperature": torch.ones(2).double()}, "temperatures must be float32, got float64"),
    ],
)
def test_messages(change, message):
    arguments = {"logits": torch.zeros(2, 5), "embedding": torch.zeros(5, 3), "temperature": 1.0}
    arguments |= change
    with pytest.raises(RuntimeError) as error:
        dmax_kernels.soft_embedding(**arguments)
    assert str(error.value).startswith(f"soft_embedding: {message}")


def test_messages_of_the_cut():
    logits, embedding = torch.zeros(2, 5), torch.zeros(5, 3)
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(RuntimeError, match="top_p_cut: top_p must be above 0 and at most 1, g"):
            dmax_kernels.soft_embedding(logits, embedding, top_p=top_p)
    with pytest.raises(RuntimeError, match="top_p_cut: has no gradient; detach the logits"):
        dmax_kernels.top_p_cut(logits.clone().requires_grad_(), 0.5).least.sum().backward()
    partial, ids = dmax_kernels.soft_embedding_partial, torch.zeros(2).long()
    for cut, message in (
        ((torch.zeros(2), None), "least and last_id must be given together, got one of them"),
        ((torch.zeros(3), ids), r"least must have shape \[2\] \(one per row of logits\), got"),
        ((torch.zeros(2), ids.int()), "last_id must be int64, got int32"),
    ):
        with pytest.raises(RuntimeError, match=f"^soft_embedding_partial: {message}"):
            partial(logits, embedding, cut=cut)


def test_one_temperature_alone():
    with pytest.raises(RuntimeError, match="temperature must be left at 1 where temperatures are"):
        torch.ops.dmax.soft_embedding(
            torch.zeros(2, 5), torch.zeros(5, 3), temperature=2.0, temperatures=torch.ones(2)
        )


def test_triton_temperatures_out_of_range_are_nan():
    """On a GPU they are not read before the launch; here Triton is called without the check."""
    from dmax_kernels.triton import soft_embedding as family

    logits, embedding = torch.zeros(4, 5, device=DEVICE), table(5, 3).to(DEVICE)
    temperatures = torch.tensor([0.0, 1.0, torch.nan, -1.0], device=DEVICE)
    soft = family.soft_embedding(logits, embedding, temperatures=temperatures)
    assert soft.isnan().all(dim=1).tolist() == [True, False, True, True]
    assert_close(soft[1], embedding.mean(dim=0), 1e-5, 1e-6)
    least, last_id = family.top_p_cut(logits, 0.5, temperatures=temperatures)
    assert least.tolist() == [-torch.inf, 0, -torch.inf, -torch.inf]
    assert last_id.tolist() == [4, 2, 4, 4]
