"""sample_tokens with filters, options per row and masks: what is kept, and the law."""

import math

import pytest
import torch
from cases import DTYPES, stacked_rows
from draws import assert_drawn
from fuzzing import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import packed
from tolerances import REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels import reference

SEED = torch.tensor([1234567890123456789, 42])
NAN, INF = float("nan"), float("inf")
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


# ---- What is kept, by the definition: sort, count, add


def kept_by_sorting(row, temperature, top_k, top_p, min_p):
    """Which tokens of a row of logits are kept, in float64, and the least relative distance of a
    share or ratio from the option that it is compared with."""
    x, order = row.double().sort(descending=True, stable=True)
    count = int((x > -INF).sum())
    if top_k:
        count = min(count, top_k)
    weight = ((x - x[0]) / temperature).exp()
    margin = INF
    if top_p < 1:
        share = weight[:count].cumsum(0) / weight[:count].sum()
        margin = (share / top_p - 1).abs().min().item()
        count = int((share < top_p).sum()) + 1
    if min_p > 0:
        ratio = weight[:count]
        other = ratio[ratio < 1]
        margin = min([margin, *(other / min_p - 1).abs().tolist()])
        count = int((ratio >= min_p).sum())
    return order[:count], margin


def check_against_sorting(logits, visible, seed, options):
    """The draw is the rule's over exactly the tokens that sorting keeps. Returns the sample, and
    which rows were judged: those that have a softmax and no option on the edge."""
    sample = dmax_kernels.sample_tokens(logits, seed, **options)
    columns = [torch.as_tensor(options.get(name, off)).float() for name, off in OFF.items()]
    columns = [column.expand(len(visible)).tolist() for column in columns]
    x = torch.full(visible.shape, NAN, dtype=torch.float64)
    judged = torch.zeros(len(visible), dtype=torch.bool)
    for i, (row, t, k, p, m) in enumerate(zip(visible, *columns, strict=True)):
        if not row.amax().isfinite() or t == 0:
            continue
        kept, margin = kept_by_sorting(row, t, int(k), p, m)
        judged[i] = margin > 1e-6
        if judged[i]:
            x[i] = -INF
            x[i, kept] = row[kept].double() / t
    size = x.masked_fill(x == -INF, 0).abs().amax(dim=-1)
    assert_drawn(sample.token, x, seed, 1e-5 + 4e-7 * size)
    expected = torch.softmax(x, dim=-1).gather(-1, sample.token.unsqueeze(-1)).squeeze(-1)
    assert_close(sample.probability[judged], expected[judged], REFERENCE_RTOL, atol=1e-37)
    return sample, judged


# A tie at the boundary of each filter, all equal, -inf; k = 1, k >= V; p tiny; min_p 1; and filters
# that end within the list of candidates, beyond it, and in one bucket of the histogram
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 70, 5000])
def test_kept_tokens_on_edge_cases(dtype, vocab_size):
    _, logits = stacked_rows(vocab_size, dtype)
    ties = (logits.float().nan_to_num(0, 1, -1) * 0.7).round().to(dtype)
    logits = torch.cat([logits, ties[:4]])
    visible = logits.float()
    judged = 0
    for options in (
        {"top_k": 1},
        {"top_k": 2, "temperature": 0.5},
        {"top_k": 40},
        {"top_k": 900},
        {"top_k": vocab_size},
        {"top_k": 10**9, "top_p": 0.9},
        {"top_p": 1e-30},
        {"top_p": 0.5, "temperature": 3.0},
        {"top_p": 0.999},
        {"min_p": 1.0},
        {"min_p": 0.05},
        {"min_p": 1e-30},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
        {"top_k": 900, "top_p": 0.95, "min_p": 1e-4, "temperature": 1.5},
    ):
        judged += check_against_sorting(logits, visible, SEED, options)[1].sum().item()
    assert judged > 14 * len(logits) / 2


def test_kept_tokens_of_a_large_vocabulary():
    """Few probable tokens, some thousand, and all alike: a list of candidates, and a histogram."""
    generator = torch.manual_seed(3)
    rows = torch.randn(6, 50_000, generator=generator)
    rows[0, 33333] = 30
    rows[1, :300] += 12
    rows[2] *= 4
    rows[3] = 0
    rows[4] = rows[4].bfloat16().float()  # ties of thousands
    rows[5, 0], rows[5, 1] = 3e38, -3e38  # no bucket of one width separates the rest
    for options in ({"top_k": 50}, {"top_k": 20_000}, {"top_p": 0.9}, {"min_p": 0.1, "top_p": 0.7}):
        _, judged = check_against_sorting(rows, rows, SEED, options)
        assert judged.sum() >= 3


def test_a_tie_is_cut_by_id():
    """Of equal logits the first ids are kept: draws of all rows together see them all."""
    logits = torch.zeros(4000, 300)
    logits[:, ::2] = -1.0
    kept = torch.arange(300)[1::2]
    for options, count in (({"top_k": 70}, 70), ({"top_p": 0.25}, None), ({"min_p": 1.0}, 150)):
        token = dmax_kernels.sample_tokens(logits, SEED, **options).token.unique()
        if count is None:  # 150 (1 + 1 / e) / 4 equal weights, rounded up
            count = math.ceil(150 * (1 + math.exp(-1)) / 4)
        assert token.tolist() == kept[:count].tolist()


def test_zeros_of_both_signs_are_equal():
    logits = torch.full((500, 90), -5.0)
    logits[:, 10], logits[:, 70] = -0.0, 0.0
    assert (dmax_kernels.sample_tokens(logits, SEED, top_k=1).token == 10).all()
    assert dmax_kernels.sample_tokens(logits, SEED, top_k=2).token.unique().tolist() == [10, 70]


def test_undefined_rows_and_nothing_allowed():
    names, logits = stacked_rows(300, torch.float32)
    sample = dmax_kernels.sample_tokens(logits, SEED, top_k=9, top_p=0.7, min_p=0.01)
    plain = dmax_kernels.sample_tokens(logits, SEED)
    for i, name in enumerate(names):
        undefined = "nan" in name or name in ("inf", "infs", "all_minus_inf")
        assert all(each[i].isnan() == undefined for each in sample[1:]), name
        assert not undefined or sample.token[i] == plain.token[i], name
    nothing = torch.zeros(1, 10, dtype=torch.int32)
    for options in ({}, {"top_p": 0.5}, {"temperature": 0.0}):
        sample = dmax_kernels.sample_tokens(logits, SEED, allowed=nothing, **options)
        assert (sample.token == 0).all()
        assert all(each.isnan().all() for each in sample[1:])


# ---- Masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_is_minus_infinity(dtype):
    """Whole words, halves of them, single bits, a tile of the CPU kernels with and without any; a
    NaN that is not allowed does not count. The bits are exactly those of the masked logits."""
    _, logits = stacked_rows(6000, dtype)
    rows = len(logits)
    generator = torch.manual_seed(8)
    share = torch.linspace(0, 1, rows).unsqueeze(-1)
    bits = torch.rand(rows, 6000, generator=generator) < share
    bits[:, 2048:4096] = torch.arange(rows).unsqueeze(-1) % 2 == 0
    bits[:, 64:128] = torch.arange(rows).unsqueeze(-1) % 3 == 0
    masked = logits.masked_fill(~bits, -INF)
    for options in ({}, {"top_p": 0.8, "temperature": 0.7}, {"temperature": 0.0}):
        actual = dmax_kernels.sample_tokens(logits, SEED, allowed=packed(bits), **options)
        expected = dmax_kernels.sample_tokens(masked, SEED, **options)
        for each, wanted in zip(actual, expected, strict=True):
            assert torch.equal(each.nan_to_num(7), wanted.nan_to_num(7))
    one = packed(bits[17])  # one row of bits for all
    expected = dmax_kernels.sample_tokens(logits.masked_fill(~bits[17], -INF), SEED)
    for shared in (one, one[None], one.expand(rows, -1)):
        actual = dmax_kernels.sample_tokens(logits, SEED, allowed=shared)
        assert torch.equal(actual.token, expected.token)


def test_bits_beyond_the_vocabulary_are_ignored():
    logits = torch.randn(50, 33, generator=torch.manual_seed(0))
    first, rest = (torch.tensor([[-1, word]]).int() for word in (1, -1))
    plain = dmax_kernels.sample_tokens(logits, SEED)
    for allowed in (first, rest):
        assert torch.equal(dmax_kernels.sample_tokens(logits, SEED, allowed=allowed)[1], plain[1])
    none = dmax_kernels.sample_tokens(logits, SEED, allowed=torch.tensor([0, -2]).int())
    assert none.probability.isnan().all()


def test_suppressed_tokens_and_vocab_limit():
    logits = torch.randn(40, 300, generator=torch.manual_seed(1))
    logits[:, 290:] = NAN  # padding
    bits = torch.ones(300, dtype=torch.bool)
    bits[[0, 31, 32, 63, 289]] = False
    masked = logits[:, :290].masked_fill(~bits[:290], -INF)
    expected = dmax_kernels.sample_tokens(masked, SEED)
    more = {"vocab_limit": 290}
    for options in (
        {"suppress_tokens": (0, 31, 32, 63, 289)},
        {"suppress_tokens": [63, 32, 31, 0], "suppress_token": 289},
        {"suppress_token": 63, "allowed": packed(bits | (torch.arange(300) == 63))},
        {"suppress_tokens": (0, 31), "allowed": packed(bits)},
    ):
        for functions in (dmax_kernels, reference):
            actual = functions.sample_tokens(logits, SEED, **options, **more)
            assert torch.equal(actual.token, expected.token)
            assert_close(actual.probability, expected.probability, REFERENCE_RTOL)
    again = dmax_kernels.sample_tokens(logits, SEED, suppress_tokens=(0, 31), **more)
    one = dmax_kernels.sample_tokens(logits, SEED, suppress_tokens=(5,), **more)
    assert not set(again.token.tolist()) & {0, 31}
    assert 5 not in one.token.tolist()


# ---- The law: chi-squared of 100,000 draws over what is kept


LAWS = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 60, "top_p": 0.8, "min_p": 0.05},
    "mask": {"suppress_tokens": tuple(range(0, 150, 2)), "top_p": 0.9},
}


@pytest.mark.parametrize("name", LAWS)
def test_law(name):
    options = dict(LAWS[name])
    draws, vocab_size = 100_000, 150
    logits = torch.randn(vocab_size, generator=torch.manual_seed(6))
    token = dmax_kernels.sample_tokens(
        logits.expand(draws, vocab_size), torch.tensor([31, 0]), **options
    ).token
    hidden = options.pop("suppress_tokens", ())
    logits[list(hidden)] = -INF
    settings_of_row = {name: float(torch.tensor(v)) for name, v in (OFF | options).items()}
    settings_of_row["top_k"] = int(settings_of_row["top_k"])
    kept, margin = kept_by_sorting(logits, **settings_of_row)
    assert margin > 1e-6
    x = torch.full((vocab_size,), -INF, dtype=torch.float64)
    x[kept] = logits[kept].double() / settings_of_row["temperature"]
    expected = draws * torch.softmax(x, dim=-1)
    counts = torch.bincount(token, minlength=vocab_size).double()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi_squared = ((counts - expected).square() / expected)[seen].sum().item()
    freedom = len(kept) - 1
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


# ---- Options per row, threads, batches


def per_row_options(rows, generator):
    def some(share, value, off):
        return torch.where(torch.rand(rows, generator=generator) < share, value, off)

    uniform = torch.rand(4, rows, generator=generator)
    return {
        "temperature": some(0.8, 2 * uniform[0] + 0.1, torch.zeros(rows)),
        "top_k": some(0.5, (uniform[1] * 400).ceil(), torch.zeros(rows)),
        "top_p": some(0.5, uniform[2].clamp(min=1e-3), torch.ones(rows)),
        "min_p": some(0.5, uniform[3] * 0.2, torch.zeros(rows)),
    }


def test_options_per_row_are_those_of_calls_of_their_own():
    generator = torch.manual_seed(11)
    logits = 3 * torch.randn(30, 3000, generator=generator)
    options = per_row_options(30, generator)
    seeds = torch.stack([torch.arange(30), torch.arange(30) * 2**33], dim=1)
    together = dmax_kernels.sample_tokens(logits, seeds, **options)
    for i in range(30):
        own = {name: column[i].item() for name, column in options.items()}
        own["top_k"] = int(own["top_k"])
        alone = dmax_kernels.sample_tokens(logits[i], seeds[i], **own)
        assert alone.token == together.token[i]
        for each, wanted in zip(alone[1:], together[1:], strict=True):
            assert_close(each, wanted[i], 2e-6)
    shaped = dmax_kernels.sample_tokens(
        logits.view(5, 6, 3000),
        seeds.view(5, 6, 2),
        **{n: c.view(5, 6) for n, c in options.items()},
    )
    assert torch.equal(shaped.token.flatten(), together.token)
    mixed = dmax_kernels.sample_tokens(logits, seeds, temperature=0.5, top_p=options["top_p"])
    same = dmax_kernels.sample_tokens(
        logits, seeds, temperature=torch.full((30,), 0.5), top_p=options["top_p"]
    )
    assert torch.equal(mixed.token, same.token)
    static = torch.stack(list(options.values()), dim=-1)
    direct = torch.ops.dmax.sample_tokens(logits, seeds, row_options=static)
    assert torch.equal(direct[0], together.token)


def test_threads_and_the_place_in_the_batch_change_no_bit():
    """Few long rows, whose tiles threads share, and more rows than threads."""
    generator = torch.manual_seed(12)
    logits = 2 * torch.randn(5, 400_000, generator=generator)
    allowed = torch.randint(-(2**31), 2**31, (5, 12_500), generator=generator).int()
    options = {"top_p": 0.7, "min_p": 0.001, "allowed": allowed}
    seeds = torch.randint(-(2**62), 2**62, (5, 2), generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(dmax_kernels.sample_tokens(logits, seeds, **options))
    finally:
        torch.set_num_threads(before)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = dmax_kernels.sample_tokens(
        logits[order], seeds[order], top_p=0.7, min_p=0.001, allowed=allowed[order]
    )
    results.append([each[order.argsort()] for each in moved])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_hidden_states_with_filters():
    """More rows than fit into the stored logits at once would take too long: the two ways, stored
    and streamed, and the masks."""
    generator = torch.manual_seed(13)
    hidden = torch.randint(-3, 4, (20, 12), generator=generator).float()
    weight = torch.randint(-3, 4, (1500, 12), generator=generator).float()
    bits = torch.rand(20, 1500, generator=generator) < 0.6
    seeds = torch.randint(-(2**62), 2**62, (20, 2), generator=generator)
    logits = hidden @ weight.t()  # exact: small integers
    for options in (
        {"temperature": 6.0, "allowed": packed(bits)},
        {"temperature": torch.arange(20) / 2.0},
        {"top_p": 0.8, "top_k": 100, "temperature": 7.0, "vocab_limit": 1400},
        per_row_options(20, generator) | {"allowed": packed(bits), "suppress_tokens": (3, 4)},
    ):
        actual = dmax_kernels.linear_sample_tokens(hidden, weight, seeds, **options)
        expected = dmax_kernels.sample_tokens(logits, seeds, **options)
        assert torch.equal(actual.token, expected.token)
        for each, wanted in zip(actual[1:], expected[1:], strict=True):
            assert_close(each, wanted, 1e-5)


def test_stored_logits_are_made_a_few_rows_at_a_time():
    """64 MB hold 11 rows of 1.5 million tokens; rows keep their place in the noise."""
    weight = torch.randn(1_500_000, 1, generator=torch.manual_seed(2))
    hidden = torch.linspace(0.5, 2.0, 13).unsqueeze(-1)
    token = dmax_kernels.linear_sample_tokens(hidden, weight, SEED, top_k=100_000).token
    expected = dmax_kernels.sample_tokens(hidden * weight.t(), SEED, top_k=100_000).token
    assert torch.equal(token, expected)


def test_compiled_with_tensor_options_and_a_mask():
    @torch.compile(fullgraph=True, backend="eager")
    def draw(logits, seed, top_p):
        return dmax_kernels.sample_tokens(logits, seed, top_p=top_p, suppress_tokens=(1, 40))

    logits = torch.randn(6, 100, generator=torch.manual_seed(4))
    top_p = torch.linspace(0.1, 1.0, 6)
    expected = dmax_kernels.sample_tokens(logits, SEED, top_p=top_p, suppress_tokens=(1, 40))
    for each, wanted in zip(draw(logits, SEED, top_p), expected, strict=True):
        assert torch.equal(each, wanted)


# ---- All of it at once


@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_random_options(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
    rows = data.draw(st.integers(1, 4))
    vocab = data.draw(st.one_of(st.integers(1, 70), st.integers(71, 3000)))
    x = torch.randn(rows, vocab, generator=generator) * data.draw(st.sampled_from([0.5, 3.0, 30.0]))
    if data.draw(st.booleans()):
        x = x.round()  # ties
    x[torch.rand(rows, vocab, generator=generator) < data.draw(st.sampled_from([0, 0.3]))] = -INF
    x = x.to(data.draw(st.sampled_from(DTYPES)))
    bits = torch.rand(rows, vocab, generator=generator) < data.draw(st.sampled_from([0.02, 0.9, 2]))
    visible = x.float().masked_fill(~bits, -INF)
    options = per_row_options(rows, generator)
    for name in list(options):
        if data.draw(st.booleans()):
            del options[name]
    options["allowed"] = packed(bits)
    seed = SEED if data.draw(st.booleans()) else torch.randint(0, 2**62, (rows, 2))
    sample, _ = check_against_sorting(x, visible, seed, options)
    expected = reference.sample_tokens(x, seed, **options)
    same = sample.token == expected.token
    greedy = torch.as_tensor(options.get("temperature", 1.0)) == 0
    undefined = expected.probability.isnan()
    assert same[(greedy | undefined).expand(rows)].all()
    assert torch.equal(sample.probability.isnan(), undefined)
    for each, wanted in zip(sample[2:], expected[2:], strict=True):
        assert_close(each[same], wanted[same], REFERENCE_RTOL, atol=1e-37)
