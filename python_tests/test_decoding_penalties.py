"""`spd_generate` with penalties and a bias: a plain Python transcription, batches, both ops."""

import math
from collections import Counter

import pytest
import torch
from decoding_models import MASK, VOCABULARY, ExactModel, RandomModel, ScriptedModel, random_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from dmax_kernels.decoding import RULES, spd_generate
from dmax_kernels.decoding.extra import Canvas, draft_generate, nap_generate

K, END = 8, 3
LENGTHS = [3, 8, 21, 37]
REVISING = ("spd", "hybrid", "hard_prefix", "hard", "uniform", "edit")
# A row each: none, one of them, all, below 1 and 0
OPTIONS = {
    "repetition_penalty": [1.0, 1.4, 1.2, 0.8],
    "presence_penalty": [0.0, 0.0, 0.7, -0.5],
    "frequency_penalty": [0.0, 0.0, 0.4, -0.3],
    "logit_bias": [None, {5: 1.5, 9: -2.0}, torch.linspace(-1, 1, VOCABULARY), {}],
}
SAMPLED = {"temperature": [1.0, 0.0, 1.5, 0.7], "top_p": [0.9, 1, 1, 0.8], "seed": [1, 2, 3, 4]}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts():
    return [random_prompts(1, n, seed=n)[0] for n in LENGTHS]


def decode(model, prompts, **changes):
    # This end token appears in some answers, at different blocks: rows leave at different times
    arguments = {"block_length": K, "max_new_tokens": 27, "eos_token_id": END, "logprobs": True}
    return spd_generate(model, prompts, **{**arguments, **changes})


def of_row(options, row):
    return {name: values[row] for name, values in options.items()}


def assert_same(actual, place, expected, row=0):
    assert actual.answers[place] == expected.answers[row]
    assert actual.promotions[place] == expected.promotions[row]
    assert torch.equal(actual.step_map[place], expected.step_map[row])
    torch.testing.assert_close(actual.logprobs[place], expected.logprobs[row], rtol=0, atol=5e-5)


# ---- The definition


class PenalizedModel(ExactModel):
    """A model for one prompt, without a cache, whose own logits have bias and penalties in them.

    It reads the tokens so far from the embeddings that it is given.
    """

    def __init__(self, prompt, rule, options):
        super().__init__()
        self.prompt, self.revises, self.options = prompt.tolist(), rule in REVISING, options

    def forward(self, inputs_embeds, **arguments):
        output = super().forward(inputs_embeds, **arguments)
        tokens = torch.cdist(inputs_embeds[0], self.words.weight).argmin(dim=-1).tolist()
        start = len(tokens) - K
        new = range(len(self.prompt), len(tokens))
        if self.revises:
            counted = [tokens[i] for i in new if i < start]
        else:
            ends = [i for i in new if tokens[i] == END]
            counted = [tokens[i] for i in new if tokens[i] != MASK and i < min([*ends, 10**9])]
        for i in range(start, len(tokens)):
            waits = self.revises or tokens[i] == MASK
            row = output.logits[0, i].tolist()
            output.logits[0, i] = torch.tensor(self.changed(row, Counter(counted), waits))
        return output

    def changed(self, row, count, penalized):
        bias = self.options["logit_bias"]
        if bias is None:
            bias = {}
        elif torch.is_tensor(bias):
            bias = dict(enumerate(bias.tolist()))
        for v in range(len(row)):
            row[v] += bias.get(v, 0)
            if penalized and (v in self.prompt or count[v]):
                r = self.options["repetition_penalty"]
                row[v] = row[v] / r if row[v] > 0 else row[v] * r
            if penalized and count[v]:
                row[v] -= self.options["frequency_penalty"] * count[v]
                row[v] -= self.options["presence_penalty"]
        return row


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_transcription(prompts, rule, temperature):
    if temperature and rule in ("credit", "edit"):
        return  # they refuse a temperature
    sampled = SAMPLED if temperature else {}
    together = decode(ExactModel(), prompts, rule=rule, **OPTIONS, **sampled)
    for row, prompt in enumerate(prompts):
        model = PenalizedModel(prompt, rule, of_row(OPTIONS, row))
        alone = decode(model, [prompt], rule=rule, use_cache=False, **of_row(sampled, row))
        assert_same(together, row, alone)
    plain = decode(ExactModel(), prompts, rule=rule, **sampled)
    assert_same(together, 0, plain)  # its options are off
    assert plain.answers[1:] != together.answers[1:]


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("rule", ["spd", "threshold"])
def test_each_penalty_alone(prompts, rule, name):
    alone = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0, name: 1.7}
    output = decode(ExactModel(), prompts, rule=rule, **{name: 1.7})
    for row, prompt in enumerate(prompts):
        model = PenalizedModel(prompt, rule, {**alone, "logit_bias": None})
        assert_same(output, row, decode(model, [prompt], rule=rule, use_cache=False))


def test_a_penalty_without_end_lets_no_final_token_come_again(prompts):
    options = {"eos_token_id": (), "presence_penalty": 1e6, "max_new_tokens": 16}
    output = decode(ExactModel(), prompts, rule="top_n", **options)
    for answer in output.answers:
        assert len(set(answer)) == 16
    output = decode(ExactModel(), prompts, rule="spd", **options)
    for length, answer in zip(LENGTHS, output.answers, strict=True):
        first = K - length % K
        assert not set(answer[:first]) & set(answer[first : first + K])
    assert any(len(set(answer[:K])) < K for answer in output.answers)  # inside a block they do


def test_an_end_token_that_was_decoded_first_does_not_keep_the_answer_from_ending():
    """Position 3 is surest of the end; 1 prefers it by less than the penalty."""
    logits = torch.zeros(K, 1, K, VOCABULARY)
    logits[..., 9] = 4.0
    logits[:, 0, 1, END], logits[:, 0, 1, 8], logits[:, 0, 3, END] = 5.0, 4.5, 20.0
    options = {"rule": "top_n", "use_cache": False, "max_new_tokens": K - 1}
    output = decode(ScriptedModel(logits), [[2]], presence_penalty=3.0, **options)
    assert output.answers == [[END]]
    assert output.step_map[0, 0] > 1
    output = decode(ScriptedModel(logits), [[2]], presence_penalty=3.0, **options, eos_token_id=())
    assert output.answers[0][0] != END  # where nothing ends an answer it counts as any other


def test_sixteen_bits_do_not_round_a_penalty():
    """bfloat16 has no number between 19.875 and 20."""
    logits = torch.zeros(3, 1, 4, VOCABULARY)
    logits[..., 7], logits[..., 8] = 20.0, 19.875
    output = decode(
        ScriptedModel(logits.bfloat16()), [[2]], block_length=1, max_new_tokens=3, use_cache=False,
        frequency_penalty=0.07,
    )  # fmt: skip
    assert output.answers == [[7, 7, 8]]


# ---- Batches, backends, the other options


@pytest.mark.parametrize("rule", RULES)
def test_backends_lags_and_orders_agree(prompts, rule):
    # (Where a sample is the runner-up, the lead that margin reads is 0 to rounding)
    sampled = {} if rule in ("credit", "edit", "margin") else SAMPLED
    options = {"rule": rule, **OPTIONS, **sampled}
    expected = decode(ExactModel(), prompts, **options)
    for changes in ({"ops": "reference"}, {"poll_lag": 1}, {"use_cache": False}):
        again = decode(ExactModel(), prompts, **options, **changes)
        for row in range(len(prompts)):
            assert_same(again, row, expected, row)
    order = [2, 0, 3, 1]
    moved = {name: [values[i] for i in order] for name, values in {**OPTIONS, **sampled}.items()}
    other = decode(ExactModel(), [prompts[i] for i in order], rule=rule, **moved)
    for place, row in enumerate(order):
        assert_same(other, place, expected, row)
    alone = decode(ExactModel(), prompts[2:3], rule=rule, **of_row({**OPTIONS, **sampled}, 2))
    assert_same(alone, 0, expected, 2)


def test_forms_of_a_bias_agree(prompts):
    bias = {4: 2.5, 11: -1.0}
    table = torch.zeros(VOCABULARY)
    table[list(bias)] = torch.tensor(list(bias.values()))
    expected = decode(ExactModel(), prompts, logit_bias=bias)
    assert expected.answers != decode(ExactModel(), prompts).answers
    for form in (table, table.bfloat16(), table.expand(4, -1), [bias] * 4, (table, bias) * 2):
        assert decode(ExactModel(), prompts, logit_bias=form).answers == expected.answers


def test_allowed_tokens_stay_the_only_ones(prompts):
    def allowed(block):
        return torch.tensor([1 << 4 | 1 << 7], dtype=torch.int32)

    options = {"allowed": allowed, "logit_bias": {5: 1e6, 4: -0.5}, "frequency_penalty": 1.0}
    for rule in ("spd", "threshold", "entropy_bound"):
        output = decode(ExactModel(), prompts, rule=rule, **options)
        assert {token for answer in output.answers for token in answer} == {4, 7}


@pytest.mark.parametrize("ops", ["fused", "reference"])
def test_the_models_own_logits_are_not_written(prompts, ops):
    kept = []

    class Keeps(RandomModel):
        def forward(self, **arguments):
            output = super().forward(**arguments)
            kept.append((output.logits, output.logits.clone()))
            return output

    options = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "logit_bias": {5: 2.0}}
    for use_cache in (True, False):
        decode(Keeps(), prompts, use_cache=use_cache, ops=ops, **options)
    assert len(kept) > 10
    assert all(torch.equal(logits, copy) for logits, copy in kept)


class Calls(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


OFF = {
    "repetition_penalty": 1.0,
    "presence_penalty": [0.0] * 4,
    "frequency_penalty": torch.zeros(4),
    "logit_bias": [None, {}, None, None],
}


def test_options_that_are_off_cost_nothing(prompts):
    def calls(**options):
        with Calls() as record:
            decode(RandomModel(), prompts, **options)
        passes = record.names.index("dmax.spd_step_.default")
        return record.names[passes:]

    plain = calls()
    assert calls(**OFF) == plain
    assert not any("transform_logits_" in name for name in plain)
    assert any("transform_logits_" in name for name in calls(presence_penalty=0.1))


def test_drafts_confirm_the_tokens_of_the_penalized_rule(prompts):
    bias = torch.stack([torch.zeros(VOCABULARY), *torch.randn(3, VOCABULARY)])
    options = {**OPTIONS, "block_length": K, "max_new_tokens": 27, "eos_token_id": END}
    for logit_bias in (OPTIONS["logit_bias"], {7: 1.0}, bias):
        options["logit_bias"] = logit_bias
        expected = spd_generate(ExactModel(), prompts, rule="top_n", **options)
        drafted = draft_generate(ExactModel(), prompts, rule="top_n", drafts=3, **options)
        assert drafted.answers == expected.answers
        assert drafted.num_forwards.sum() < expected.num_forwards.sum()


def test_a_canvas_counts_the_tokens_of_all_of_its_slots():
    canvas = Canvas.build([[4], [5]], [6, 6], [6], 3)
    prompt = random_prompts(1, 8)
    output = nap_generate(ExactModel(), prompt, canvas, presence_penalty=1e6)
    slots = canvas.read(output.answers[0])
    assert len({token for slot in slots for token in slot}) == 15


# ---- Mistakes

MISTAKES = {
    "repetition 0": (
        {"repetition_penalty": 0},
        "repetition_penalty must be in [1e-30, 1e30], got 0",
    ),
    "NaN in a row": (
        {"presence_penalty": [0.0, math.nan]},
        "presence_penalty must be in [-1e30, 1e30], got nan",
    ),
    "text": (
        {"frequency_penalty": "2"},
        "frequency_penalty must be in [-1e30, 1e30], got '2'",
    ),
    "three of them": (
        {"presence_penalty": [0, 0, 0]},
        "presence_penalty must be a number, or one for each of the 2 prompts, got 3 of them",
    ),
    "nothing to count": (
        {"presence_penalty": 1.0, "max_new_tokens": 5},
        "presence_penalty must be 0 where a rule that revises decodes each answer in one block, "
        "since it counts the tokens of earlier blocks, got 1.0",
    ),
    "a token beyond the vocabulary": (
        {"logit_bias": {VOCABULARY: 1.0}},
        f"logit_bias must be of token ids in [0, {VOCABULARY}), the model's vocabulary, got 23",
    ),
    "a token below 0": (
        {"logit_bias": {-1: 1.0}},
        "logit_bias: a token must be an id of at least 0, got -1",
    ),
    "a token in text": (
        {"logit_bias": {"5": 1.0}},
        "logit_bias: a token must be an id of at least 0, got '5'",
    ),
    "infinite": (
        {"logit_bias": {5: -math.inf}},
        "logit_bias must be in [-1e30, 1e30], got -inf",
    ),
    "infinite in a tensor": (
        {"logit_bias": torch.full((VOCABULARY,), math.inf)},
        "logit_bias must be in [-1e30, 1e30], got inf",
    ),
    "integers": (
        {"logit_bias": torch.ones(VOCABULARY, dtype=torch.int64)},
        "logit_bias must be a float tensor [V] or [B, V] where it is a tensor, got torch.int64, "
        "[23]",
    ),
    "a short tensor": (
        {"logit_bias": torch.zeros(7)},
        "logit_bias must be [23] or [2, 23] where it is a tensor, got [7]",
    ),
    "numbers": (
        {"logit_bias": [1.0, 2.0]},
        "logit_bias must be a mapping from token ids to numbers, a float tensor, or a list of one "
        "for each prompt, got [1.0, 2.0]",
    ),
    "three biases": (
        {"logit_bias": [None, {}, None]},
        "logit_bias must be one for all, or one for each of the 2 prompts, got 3 of them",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_names_the_mistake(mistake):
    changes, sentence = MISTAKES[mistake]
    with pytest.raises(ValueError, match=r"^spd_generate: ") as error:
        decode(RandomModel(), random_prompts(2, 11), **changes)
    assert str(error.value) == f"spd_generate: {sentence}"


def test_where_one_block_is_enough_to_count_nothing_is_refused():
    prompts, short = random_prompts(2, 11), {"max_new_tokens": 5, "presence_penalty": 1.0}
    decode(RandomModel(), prompts, **short, rule="threshold")
    decode(RandomModel(), prompts, **{**short, "max_new_tokens": 6})  # 3 + 6 > 8
    decode(RandomModel(), prompts, max_new_tokens=5, repetition_penalty=1.2)  # of the prompt
