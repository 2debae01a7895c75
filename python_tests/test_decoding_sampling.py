"""`spd_generate` with a temperature: law, keys, options per prompt; log-probabilities, step map."""

import math

import pytest
import torch
from decoding_models import MASK, VOCABULARY, ExactModel, RandomModel, random_prompts

from dmax_kernels.decoding import RULES, ComposedRule, spd_generate
from dmax_kernels.ops.spd_step import SEMANTICS

K = 8
LENGTHS = [3, 8, 16, 21, 53]
SAMPLERS = [rule for rule in RULES if rule not in ("credit", "edit")]
# A row each: hot, filtered, greedy, sharp, and all filters at once
OPTIONS = {
    "temperature": [1.5, 1.0, 0.0, 0.3, 2.0],
    "sample_top_k": [0, 3, 0, 0, 5],
    "top_p": [1.0, 1.0, 1.0, 0.8, 0.9],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.05],
    "seed": [1, 2**62 + 5, 3, 4, 5],
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts():
    return [random_prompts(1, n, seed=n)[0] for n in LENGTHS]


def decode(model, prompts, **changes):
    # This eos appears in some answers, at different blocks: rows leave at different times
    arguments = {"block_length": K, "max_new_tokens": 27, "eos_token_id": 3, "logprobs": True}
    return spd_generate(model, prompts, **{**arguments, **changes})


def rows_of(output, row):
    """Everything that an output says of one row."""
    return (
        output.answers[row],
        output.promotions[row],
        output.step_map[row].tolist(),
        output.logprobs[row].tolist(),
    )


# ---- The loop


@pytest.mark.parametrize("rule", SAMPLERS)
def test_a_row_is_the_same_alone_in_a_batch_and_in_any_order(prompts, rule):
    model = ExactModel()
    together = decode(model, prompts, rule=rule, **OPTIONS)
    order = [3, 0, 4, 2, 1]
    options = {name: torch.tensor(values)[order] for name, values in OPTIONS.items()}
    other = decode(model, [prompts[i] for i in order], rule=rule, **options)
    for place, row in enumerate(order):
        assert rows_of(other, place) == rows_of(together, row)
    for row in (0, 2):
        own = {name: values[row] for name, values in OPTIONS.items()}
        alone = decode(model, [prompts[row]], rule=rule, **own)
        assert rows_of(alone, 0) == rows_of(together, row)
    # The greedy one takes the tokens, steps and confidences of a run without a temperature
    greedy = decode(model, prompts, rule=rule)
    assert rows_of(greedy, 2) == rows_of(together, 2)
    assert greedy.answers[0] != together.answers[0]


@pytest.mark.parametrize("semantics", ["settled", "paper"])
@pytest.mark.parametrize("rule", SAMPLERS)
def test_a_tiny_temperature_is_greedy_in_every_step(prompts, rule, semantics):
    model = ExactModel()
    greedy = decode(model, prompts, rule=rule, semantics=semantics)
    tiny = decode(model, prompts, rule=rule, semantics=semantics, temperature=1e-6, seed=7)
    assert tiny.answers == greedy.answers
    assert tiny.promotions == greedy.promotions
    assert torch.equal(tiny.step_map, greedy.step_map)
    assert (tiny.logprobs.abs() < 1e-5).all()  # the sample's own law has one token


@pytest.mark.parametrize("rule", ["spd", "threshold"])
def test_a_seed_repeats_on_both_backends_and_another_differs(prompts, rule):
    runs = [
        decode(ExactModel(), prompts, rule=rule, temperature=1.0, seed=seed, ops=ops, poll_lag=lag)
        for seed, ops, lag in ((11, "fused", 0), (11, "fused", 1), (11, "reference", 0))
    ]
    for other in runs[1:]:
        assert other.answers == runs[0].answers
        assert torch.equal(other.step_map, runs[0].step_map)
        torch.testing.assert_close(other.logprobs, runs[0].logprobs, rtol=0, atol=1e-5)
    changed = decode(ExactModel(), prompts, rule=rule, temperature=1.0, seed=12)
    assert all(a != b for a, b in zip(changed.answers, runs[0].answers, strict=True))


# ---- The law


def test_samples_follow_the_filtered_softmax():
    """A block of one position, drawn with 2,000 seeds and four sets of options in one batch."""
    model, seeds = RandomModel(sharpness=1.0), 2000
    sets = torch.tensor([[1.0, 0, 1, 0], [2.0, 6, 1, 0], [0.7, 0, 0.8, 0], [1.5, 9, 0.9, 0.1]])
    temperature, top_k, top_p, min_p = sets.repeat_interleave(seeds, dim=0).unbind(-1)
    seen = []
    head = model.head.forward
    model.head.forward = lambda x: (seen.append(head(x)), seen[-1])[1]
    output = spd_generate(
        model, [[5]] * len(temperature), block_length=1, max_new_tokens=1, logprobs=True,
        temperature=temperature, sample_top_k=top_k.long(), top_p=top_p, min_p=min_p,
        seed=torch.arange(seeds).repeat(len(sets)),
    )  # fmt: skip
    logits = (model.sharpness * seen[-1][0, 0]).double().tolist()
    tokens = output.sequences[:, -1].view(len(sets), seeds)
    logprobs = output.logprobs.view(len(sets), seeds)
    for (t, k, p, least), drawn, logprob in zip(sets.tolist(), tokens, logprobs, strict=True):
        law = filtered(logits, t, int(k), p, least)
        counts = drawn.bincount(minlength=VOCABULARY).double()
        assert not counts[law == 0].any()
        expected = seeds * law
        common = expected >= 5  # the rest is one cell
        cells = [*zip(counts[common].tolist(), expected[common].tolist(), strict=True)]
        rest = expected[~common].sum().item()
        if rest > 0:
            cells.append((counts[~common].sum().item(), rest))
        chi_squared = sum((n - e) ** 2 / e for n, e in cells)
        freedom = len(cells) - 1
        assert freedom >= 2
        assert chi_squared < freedom + 4 * math.sqrt(2 * freedom), (t, k, p, least)
        torch.testing.assert_close(logprob.double(), law[drawn].log(), rtol=0, atol=1e-5)


def filtered(logits, t, k, p, least):
    """softmax(logits / t) of the tokens that the filters keep, by plain Python."""
    weight = {v: math.exp(x / t) for v, x in enumerate(logits) if v != MASK}
    order = sorted(weight, key=lambda v: (-weight[v], v))[: k or None]
    total, before, kept = sum(weight[v] for v in order), 0.0, []
    for v in order:
        if before < p * total and weight[v] >= least * weight[order[0]]:
            kept.append(v)
        before += weight[v]
    law = torch.zeros(VOCABULARY, dtype=torch.float64)
    law[kept] = torch.tensor([weight[v] for v in kept], dtype=torch.float64)
    return law / law.sum()


def test_positions_and_blocks_draw_independently():
    """From equal logits, any two positions of a row agree as often as two dice of 22 sides do."""
    model = RandomModel(sharpness=0.0)
    output = spd_generate(
        model, [[5]] * 200, block_length=K, max_new_tokens=31, eos_token_id=(), rule="uniform",
        temperature=1.0, seed=list(range(200)),
    )  # fmt: skip
    tokens = output.sequences[:, 1:]
    first, second = torch.triu_indices(31, 31, offset=1)
    agree = (tokens[:, first] == tokens[:, second]).double().mean(dim=0)
    deviation = math.sqrt(1 / 22 * 21 / 22 / 200)
    assert ((agree - 1 / 22).abs() < 5 * deviation).all()  # of each of 465 pairs
    assert abs(agree.mean() - 1 / 22) < 5 * deviation / math.sqrt(len(first))
    # A block of equal samples has converged: the noise of a position stays from step to step
    assert output.block_forwards.max() == 2


# ---- What is recorded


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", [*RULES, *SEMANTICS])
def test_the_step_map_is_the_traces(prompts, rule, temperature):
    options = {"semantics": rule} if rule in SEMANTICS else {"rule": rule}
    if temperature > 0 and rule in ("credit", "edit", "released"):
        pytest.skip("does not sample")
    if rule in SEMANTICS:
        options |= {"tau_dec": 0.3, "max_steps_per_block": 3}  # some blocks end at the cap
    plain = decode(ExactModel(), prompts, temperature=temperature, logprobs=False, **options)
    assert (plain.step_map, plain.logprobs) == (None, None)
    output = decode(ExactModel(), prompts, temperature=temperature, trace=True, **options)
    assert output.answers == plain.answers
    for row, traced in enumerate(output.trace.to_dict()["rows"]):
        steps, confidence = {}, {}
        for block in traced["blocks"]:
            for number, step in enumerate(block["steps"], 1):
                for place in (*step["promoted"], *step["revised"]):
                    steps[block["start"] + place] = number
                    confidence[block["start"] + place] = step["confidence"][place]
        answer = range(LENGTHS[row], LENGTHS[row] + int(output.num_tokens[row]))
        padding = [0] * (27 - len(answer))
        assert output.step_map[row].tolist() == [steps.get(i, 0) for i in answer] + padding
        assert output.logprobs[row, len(answer) :].tolist() == padding
        logprobs = output.logprobs[row, : len(answer)]
        assert (logprobs <= 1e-6).all()
        if rule != "released":
            assert len(set(steps.values())) > 1
        # Without a filter, a sample's confidence is its probability too
        decided = [i for i, at in enumerate(answer) if at in steps]
        expected = torch.tensor([confidence[answer[i]] for i in decided])
        torch.testing.assert_close(logprobs[decided].exp(), expected, rtol=0, atol=1e-4)


# ---- Mistakes


class Own(ComposedRule):
    def see_(self, logits, state, config):
        return super().see_(logits, state, config)

    def promote(self, seen):
        return seen.masked


FROM_0 = "temperature must be 0 or in [1e-30, 1e30], got "
OWN = "temperature must be 0 with a rule that makes its own predictions, got 0.5 with rule "
MISTAKES = {
    "below 0": ({"temperature": -1}, FROM_0 + "-1"),
    "too small": ({"temperature": 1e-31}, FROM_0 + "1e-31"),
    "NaN in a row": ({"temperature": [1.0, math.nan]}, FROM_0 + "nan"),
    "text": ({"temperature": "hot"}, FROM_0 + "'hot'"),
    "nested": ({"temperature": [[1.0], [1.0]]}, FROM_0 + "[1.0]"),
    "three temperatures": (
        {"temperature": [1, 1, 1]},
        "temperature must be a number, or one for each of the 2 prompts, got 3 of them",
    ),
    "one seed in a list": (
        {"temperature": 1, "seed": [1]},
        "seed must be a number, or one for each of the 2 prompts, got 1 of them",
    ),
    "sample_top_k": (
        {"temperature": 1, "sample_top_k": 2.5},
        "sample_top_k must be an integer in [0, 2^24], got 2.5",
    ),
    "top_p": ({"temperature": 1, "top_p": [0.5, 0]}, "top_p must be in [1e-30, 1], got 0"),
    "min_p": ({"temperature": 1, "min_p": 1.5}, "min_p must be in [0, 1], got 1.5"),
    "seed": ({"seed": -1}, "seed must be an integer in [0, 2^63), got -1"),
    "a filter without temperature": (
        {"top_p": 0.9},
        "top_p must be 1 where temperature is 0, got 0.9",
    ),
    "soft embeddings of several": (
        {"temperature": 1, "top_k": 2},
        "top_k must be 1 where tokens are sampled, as a soft embedding then holds the sample, "
        "got 2",
    ),
    "released": (
        {"temperature": 1, "semantics": "released"},
        "semantics must be 'settled' or 'paper' where tokens are sampled, got 'released'",
    ),
    "credit": ({"temperature": 0.5, "rule": "credit"}, OWN + "'credit'"),
    "edit": ({"temperature": 0.5, "rule": "edit"}, OWN + "'edit'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_names_the_mistake(mistake):
    changes, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=r"^spd_generate: ") as error:
        decode(RandomModel(), random_prompts(2, 11), **changes)
    assert str(error.value) == f"spd_generate: {sentence}"


def test_a_rule_with_predictions_of_its_own_does_not_sample():
    decode(RandomModel(), random_prompts(2, 11), rule=Own())
    with pytest.raises(ValueError, match="a rule that makes its own predictions, got 0.5 with"):
        decode(RandomModel(), random_prompts(2, 11), rule=Own(), temperature=0.5)
