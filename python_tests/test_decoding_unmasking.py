"""The rules beyond SPD in the loop: same tokens from both ops, any batch, with or without cache.

SPD and its ablations have the whole grid of test_decoding.py; what differs between the rules here
is one formula each (test_decoding_promote.py), for which one setting per rule is enough.
"""

import math
from dataclasses import fields

import pytest
import torch
from decoding_models import MASK, RandomModel, ScriptedModel, random_prompts

from dmax_kernels.decoding import (
    RULES,
    Autoregressive,
    Credit,
    DecodeConfig,
    Edit,
    EntropyBound,
    Factor,
    Hierarchical,
    LocalLeap,
    Margin,
    ParallelForced,
    Prophet,
    Random,
    Rule,
    SchED,
    TopN,
    Uniform,
    spd_generate,
)
from dmax_kernels.decoding.extra import arness
from dmax_kernels.decoding.rules import ABLATIONS

K = 8
NAMES = sorted(set(RULES) - set(ABLATIONS))
# Every class with an option off its default
OTHERS = [TopN(3), Autoregressive(2), Random(2, seed=5), ParallelForced(2, num_slots=4)]
OTHERS += [LocalLeap(0.3, 1), Prophet(2, early=3.0), SchED(schedule="cosine", high=3, low=1)]
OTHERS += [Credit(1.5, 0.5, 1.0), Edit(0.3, 2, max_post_edit_steps=3)]


pytestmark = pytest.mark.usefixtures("one_thread")


def decode(model, prompts, **changes):
    arguments = {"block_length": K, "max_new_tokens": 27, "ops": "reference"}
    return spd_generate(model, prompts, **{**arguments, **changes})


@pytest.mark.parametrize("rule", [*NAMES, *OTHERS], ids=str)
def test_same_tokens_from_both_ops_in_any_batch_and_without_cache(rule):
    model, prompts = RandomModel(), random_prompts(4, 11)
    settings = {"rule": rule, "tau_dec": 0.4, "eos_token_id": 3}
    expected = decode(model, prompts, **settings)
    assert (expected.sequences[:, 11:] != MASK).all()
    for changes in ({"ops": "fused"}, {"use_cache": False}):
        actual = decode(model, prompts, **settings, **changes)
        assert torch.equal(actual.sequences, expected.sequences)
        assert torch.equal(actual.block_forwards, expected.block_forwards)
    alone = decode(model, prompts[2:3], **settings)
    assert torch.equal(alone.sequences[0], expected.sequences[2])
    assert alone.num_forwards[0] == expected.num_forwards[2]


@pytest.mark.parametrize("rule", [*NAMES, *OTHERS], ids=str)
def test_a_trace_shows_the_rules_promises(rule):
    """One promotion or more per step; a rule that does not revise never changes a token."""
    model = RandomModel()
    settings = {"rule": rule, "tau_dec": 0.4, "eos_token_id": ()}
    output = decode(model, random_prompts(3, 11), **settings, trace=True)
    revises = rule in ("uniform", "edit") or isinstance(rule, Edit)
    for row in output.trace.to_dict()["rows"]:
        assert [block["start"] for block in row["blocks"]] == [8, 16, 24, 32]
        for block in row["blocks"]:
            editable = [j for j in range(K) if block["editable"][j]]
            assert len(block["steps"]) <= len(editable) or revises
            promoted = [j for step in block["steps"] for j in step["promoted"]]
            assert sorted(promoted) == editable
            for n, step in enumerate(block["steps"]):
                assert step["promoted"] or (revises and n > 0)
                assert revises or not step["revised"]
            assert block["steps"][-1]["converged"]
            if rule == "uniform":
                assert sorted(block["steps"][0]["promoted"]) == editable


# (rule, steps of a block of 8 that is all masks)
COUNTS = [(TopN(), 8), (TopN(3), 3), (Autoregressive(), 8), (Autoregressive(5), 2)]
COUNTS += [(Random(), 8), (Random(8), 1), (ParallelForced(), 3), (ParallelForced(1), 8)]
COUNTS += [(ParallelForced(8, num_slots=8), 1), (ParallelForced(2, num_slots=1), 4)]


@pytest.mark.parametrize(("rule", "steps"), COUNTS, ids=str)
def test_rules_of_a_fixed_count_take_their_number_of_steps(rule, steps):
    output = decode(RandomModel(), random_prompts(2, K), rule=rule, max_new_tokens=2 * K)
    assert (output.block_forwards == steps).all()


def test_left_to_right_is_fully_autoregressive_and_random_is_not():
    model, prompts = RandomModel(), random_prompts(8, K)

    def score(rule, **measure):
        output = decode(model, prompts, rule=rule, eos_token_id=(), trace=True)
        scores = arness(output.trace, **measure)
        return sum(scores) / len(scores)

    for rule in ("autoregressive", Autoregressive(3)):
        assert score(rule) == 1
        assert score(rule, scope="local") == 1
    # The value of a random order in blocks of 8 is (1 + 1/2 + ... + 1/8) / 8 = 0.34
    assert score("random") == pytest.approx(0.34, abs=0.08)
    assert score("random", k=K) == 1
    assert score("parallel_forced") < 0.75


def test_random_repeats_itself_and_differs_by_seed():
    model, prompts = RandomModel(), random_prompts(4, K)
    first, again, other = (
        decode(model, prompts, rule=Random(seed=seed), trace=True).trace.to_dict()
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def constant_script(probabilities, steps=6):
    """Logits [steps, 1, K, V]: at every step the top-1 of position j is token 4 + j with p_j."""
    script = torch.zeros(
        1, len(probabilities), MASK
    )  # a vocabulary without the mask token's column
    for j, p in enumerate(probabilities):
        script[0, j, 4 + j] = math.log(p / (1 - p) * (MASK - 1))
    mask_column = torch.full((1, len(probabilities), 1), -math.inf)
    return torch.cat([script, mask_column], dim=-1).repeat(steps, 1, 1, 1)


# What each rule promotes first of confidences .9 .3 .6 .95 after a prompt token. What they compare
# with tau or their option: confidences; the margin .6 - .4 / 21 = .58; (n + 1)(1 - c_n) = .1, .3;
# entropies -p ln p - (1 - p) ln((1 - p) / 21) = .63, 2.74, 1.89, .35; the mean of the gaps
# ln(21 p / (1 - p)), 4.22, in the first of four steps; odds times (1 + p^.2)^.7: .94 .39 .70 .97
FIRST = [
    ("threshold", 0.55, [1, 3, 4]),
    (Margin(), 0.55, [1, 3, 4]),
    (Margin(), 0.59, [1, 4]),
    (Factor(0.31), 0, [1, 4]),
    (Factor(0.29), 0, [4]),
    (Hierarchical(0.2), 0.92, [4]),  # one run: its best
    (Hierarchical(0.2), 0.55, [1, 3, 4]),
    (EntropyBound(0.3), 0, [4]),
    (EntropyBound(0.36), 0, [1, 4]),
    (TopN(2), 0, [1, 4]),
    (ParallelForced(4, num_slots=5), 0, [1, 2, 3, 4]),
    (ParallelForced(2, num_slots=2), 0, [1, 4]),  # positions 0-2 and 3-4
    (Autoregressive(2), 0, [1, 2]),
    (Uniform(), 0, [1, 2, 3, 4]),
    (LocalLeap(0.5, 2), 0.92, [3, 4]),
    (LocalLeap(0.5, 3), 0.92, [1, 3, 4]),
    (Prophet(early=4.2), 0, [1, 2, 3, 4]),
    (Prophet(early=4.3, middle=0), 0, [4]),
    (Prophet(2, middle=4.2), 0, [1, 2, 3, 4]),  # the first of two steps
    (SchED(schedule="linear", high=5, low=1.6), 0, [1, 2, 3, 4]),  # 5 - 3.4 / 4 = 4.15
    (SchED(schedule="linear", high=5, low=2), 0, [4]),  # 4.25
    (Credit(), 0.69, [1, 3, 4]),
    (Credit(), 0.71, [1, 4]),
    (Credit(alpha=0), 0.61, [1, 4]),
    (Edit(), 0.55, [1, 3, 4]),
    (Edit(), 0.92, [4]),
    (Edit(tokens_per_step=2), 0.92, [1, 4]),
]


@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize(("rule", "tau", "expected"), FIRST, ids=str)
def test_first_step_by_hand(rule, tau, expected, ops):
    model = ScriptedModel(constant_script([0.5, 0.9, 0.3, 0.6, 0.95]), eos_token_id=None)
    output = spd_generate(
        model,
        torch.tensor([[2]]),
        block_length=5,
        max_new_tokens=4,
        rule=rule,
        tau_dec=tau,
        ops=ops,
        use_cache=False,
        trace=True,
    )
    steps = output.trace.to_dict()["rows"][0]["blocks"][0]["steps"]
    assert steps[0]["promoted"] == expected
    assert output.sequences[0].tolist() == [2, 5, 6, 7, 8]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_rule_with_its_defaults(name):
    rule = RULES[name]
    assert isinstance(rule, Rule)
    assert rule == type(rule)()
    (option,) = (item for item in fields(DecodeConfig) if item.name == "rule")
    assert name in option.metadata["help"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Factor(0), "Factor: factor must be a number, positive, got 0"),
        (lambda: Factor("1"), "Factor: factor must be a number, positive, got '1'"),
        (lambda: Hierarchical(1.5), "Hierarchical: low_threshold must be a number, in [0, 1]"),
        (lambda: EntropyBound(-0.1), "EntropyBound: entropy_bound must be a number, at least 0"),
        (lambda: EntropyBound(math.nan), "must be a number, at least 0, got nan"),
        (lambda: TopN(0), "TopN: tokens_per_step must be a positive integer, got 0"),
        (lambda: Autoregressive(1.0), "Autoregressive: tokens_per_step must be a positive integer"),
        (lambda: Random(seed=-1), "Random: seed must be an integer in [0, 2^64), got -1"),
        (lambda: ParallelForced(num_slots=0), "num_slots must be a positive integer, got 0"),
        (lambda: LocalLeap(1.5), "LocalLeap: relaxed_threshold must be a number, in [0, 1], got"),
        (lambda: LocalLeap(radius=-1), "LocalLeap: radius must be an integer, at least 0, got -1"),
        (lambda: Prophet(late=math.nan), "Prophet: late must be a number, not NaN, got nan"),
        (lambda: Prophet(0), "Prophet: tokens_per_step must be a positive integer, got 0"),
        (lambda: SchED(schedule="step"), "SchED: schedule must be one of 'linear', 'cosine'"),
        (lambda: SchED(rate=0), "SchED: rate must be a number, positive, got 0"),
        (lambda: Credit(beta=1.5), "Credit: beta must be a number, in [0, 1], got 1.5"),
        (lambda: Credit(alpha=-1), "Credit: alpha must be a number, at least 0, got -1"),
        (lambda: Edit(2), "Edit: edit_threshold must be a number, in [0, 1], got 2"),
        (lambda: Edit(max_post_edit_steps=-1), "max_post_edit_steps must be an integer, at least"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        make()
    assert message in str(error.value)
