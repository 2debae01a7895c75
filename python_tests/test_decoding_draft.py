"""Two schedules on the loop: parts that end after delimiters, and drafts that passes confirm."""

import math
import re

import pytest
import torch
from decoding_models import MASK, VOCABULARY, ExactModel, RandomModel, ScriptedModel, random_prompts

from dmax_kernels.decoding import AdaBlock, Rule, Seen, TopN, spd_generate
from dmax_kernels.decoding.extra import draft_generate
from dmax_kernels.decoding.state import LiveBlocks
from dmax_kernels.decoding.step import ComposedRule

K = 8
OPTIONS = {"max_new_tokens": 4 * K - 3, "block_length": K, "tau_dec": 0.6, "eos_token_id": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


def script_of(tokens, probabilities, steps=8):
    """Logits [steps, 1, K, V] that predict the same at every step; position 0 is the prompt's."""
    script = torch.zeros(1, K, VOCABULARY)
    for j, (token, p) in enumerate(zip(tokens, probabilities, strict=True), 1):
        script[0, j, token] = math.log(p / (1 - p) * (VOCABULARY - 2))
    script[..., MASK] = -math.inf
    return script.repeat(steps, 1, 1, 1)


A, D, E = 5, 9, 10


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        # The first of positions 1-4 that delimits is 3, then 5 of 4-7; then none: two positions
        (AdaBlock((D,), 0.3, 2, 4), [[1, 3], [2], [4, 5], [6], [7]]),
        # 0.6 is not enough at 3; of 3-6, the surest is 5
        (AdaBlock((D,), 0.7, 2, 4), [[1], [2], [3, 4, 5], [6], [7]]),
        # The surest of all is 5
        (AdaBlock([D], 0.3, 2, 7), [[1, 3, 4, 5], [2], [6], [7]]),
        (AdaBlock(D, 0.6, 2, 4), [[1, 3], [2], [4, 5], [6], [7]]),  # at the threshold
        # Both kinds: of 1-4, the surer one is 4
        (AdaBlock((D, A), 0.3, 2, 3), [[1], [3, 4], [2], [5, 6], [7]]),
        (AdaBlock((E,), 0.3, 3, 7), [[1, 3], [2], [4, 5, 6], [7]]),
        (AdaBlock((E,), 0.3, 99, 7), [[1, 3, 4, 5, 6], [2], [7]]),  # to the end of the block
    ],
    ids=str,
)
def test_a_part_ends_after_the_surest_delimiter_of_its_window(rule, steps):
    tokens, probabilities = [A, A, D, A, D, A, A], [0.9, 0.3, 0.6, 0.91, 0.8, 0.9, 0.2]
    if rule == AdaBlock((D, A), 0.3, 2, 3):  # 1 at 0.5 is behind 3
        tokens, probabilities = [A, E, A, E, D, E, E], [0.55, 0.3, 0.6, 0.91, 0.8, 0.9, 0.2]
        steps = [[1, 3], [2], [4, 5], [6], [7]]
    model = ScriptedModel(script_of(tokens, probabilities))
    output = spd_generate(
        model,
        torch.tensor([[2]]),
        rule=rule,
        tau_dec=0.5,
        block_length=K,
        max_new_tokens=K - 1,
        eos_token_id=(),
        use_cache=False,
        trace=True,
    )
    (block,) = output.trace.to_dict()["rows"][0]["blocks"]
    assert [step["promoted"] for step in block["steps"]] == steps
    assert output.answers == [tokens]


def test_parts_do_not_depend_on_the_batch_and_begin_anew_with_each_block():
    model, prompts = ExactModel(), random_prompts(6, 11)
    rule = AdaBlock((4, 5, 6, 7), 0.05, 3, 6)
    together = spd_generate(model, prompts, rule=rule, **OPTIONS)
    for changes in ({"ops": "reference"}, {"use_cache": False}):
        again = spd_generate(model, prompts, rule=rule, **OPTIONS, **changes)
        assert torch.equal(again.sequences, together.sequences)
        assert torch.equal(again.block_forwards, together.block_forwards)
    for row, prompt in enumerate(prompts):
        alone = spd_generate(model, prompt[None], rule=rule, **OPTIONS)
        assert alone.answers[0] == together.answers[row]
        assert alone.num_forwards[0] == together.num_forwards[row]
    # Without a delimiter and with a long part this is the threshold rule
    plain, parts = (
        spd_generate(model, prompts, rule=rule, **OPTIONS)
        for rule in ("threshold", AdaBlock((), 1, K, K))
    )
    assert torch.equal(plain.sequences, parts.sequences)
    assert torch.equal(plain.block_forwards, parts.block_forwards)
    assert not torch.equal(plain.block_forwards, together.block_forwards)


KEEPING = [
    *("top_n", "threshold", "autoregressive", "random", "entropy_bound", "parallel_forced"),
    *("hierarchical", "prophet", "credit"),
    TopN(2),
    AdaBlock((4, 5, 6, 7), 0.05, 3, 6),
]


@pytest.mark.parametrize("drafts", [1, 2, 5])
@pytest.mark.parametrize("rule", KEEPING, ids=str)
def test_drafts_change_no_token_and_save_passes(rule, drafts):
    """Token by token, pass by pass, and to the last bit of the confidences."""
    model, prompts = ExactModel(), random_prompts(5, 11)
    plain = spd_generate(model, prompts, rule=rule, logprobs=True, **OPTIONS)
    drafted = draft_generate(model, prompts, rule=rule, drafts=drafts, logprobs=True, **OPTIONS)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert torch.equal(drafted.num_tokens, plain.num_tokens)
    assert torch.equal(drafted.logprobs, plain.logprobs)
    assert (drafted.block_forwards <= plain.block_forwards).all()
    assert (drafted.step_map <= plain.step_map).all()
    saved = int((plain.num_forwards - drafted.num_forwards).sum())
    assert (saved > 0) == (drafts > 1 and rule != "credit")
    # What is reported is about the rows that the caller knows
    assert drafted.statistics.row_forwards == int(drafted.num_forwards.sum())
    assert drafted.statistics.tokens == plain.statistics.tokens
    for row, promotions in enumerate(drafted.promotions):
        assert len(promotions) == drafted.num_forwards[row]
        assert sum(promotions) == sum(plain.promotions[row])


def test_drafts_of_a_pass_that_predicts_the_same_are_all_confirmed():
    """Constant logits: the first pass has no draft yet, and then every pass takes all of them."""
    tokens, probabilities = [A, A, D, A, D, A, A], [0.9, 0.3, 0.6, 0.91, 0.8, 0.9, 0.2]

    class Constant(ScriptedModel):
        def __call__(self, inputs_embeds, use_cache, **_):
            output = super().__call__(inputs_embeds[:1], use_cache)
            output.logits = output.logits.expand(len(inputs_embeds), -1, -1)
            return output

    model = Constant(script_of(tokens, probabilities))
    options = {"max_new_tokens": K - 1, "block_length": K, "eos_token_id": (), "use_cache": False}
    output = draft_generate(model, torch.tensor([[2]]), drafts=3, **options)
    assert output.answers == [tokens]
    assert output.promotions == [[1, 3, 3]]
    assert output.num_forwards.tolist() == [3]


@pytest.mark.parametrize("options", [{"use_cache": False}, {"ops": "reference"}, {"poll_lag": 1}])
def test_drafts_take_prompts_and_thresholds_of_their_own(options):
    model = ExactModel()
    prompts = [row.tolist() for row in (random_prompts(1, n)[0] for n in (11, 4, 20))]
    thresholds = torch.tensor([[0.3, 0.9], [0.9, 0.9], [0.6, 0.9]])
    call = {"rule": "threshold", "thresholds": thresholds, **OPTIONS, **options}
    plain = spd_generate(model, prompts, **call)
    drafted = draft_generate(model, prompts, **call, drafts=3)
    assert torch.equal(drafted.sequences, plain.sequences)
    assert drafted.num_forwards.sum() < plain.num_forwards.sum()


class Own(ComposedRule):
    revise = True

    def promote(self, seen: Seen):
        return seen.masked


class Bare(Rule):
    def update_(self, logits, embedding, state: LiveBlocks, config):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafts": 0}, "draft_generate: drafts must be a positive integer, got 0"),
        ({"rule": "spd"}, "rule must be one that keeps a token once it is decoded .*, got 'spd'"),
        ({"rule": "edit"}, "rule must be one that keeps a token"),
        ({"rule": "nothing"}, "rule must be one that keeps a token .*, got 'nothing'"),
        ({"rule": Own()}, "rule must be one that keeps a token"),
        ({"rule": Bare()}, "rule must be one that keeps a token"),
        ({"trace": True}, "draft_generate: trace must be left out, got True"),
        ({"temperature": 0.5}, "temperature must be 0 with a rule that makes its own predictions"),
    ],
)
def test_what_cannot_be_drafted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draft_generate(RandomModel(), random_prompts(1, 5), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaBlock("ab"), "delimiters of AdaBlock must be a token id or several"),
        (lambda: AdaBlock((1,), 1.5), "AdaBlock: delimiter_threshold must be a number, in [0, 1]"),
        (lambda: AdaBlock((1,), 0.3, 0), "AdaBlock: default_length must be a positive integer"),
        (lambda: AdaBlock((1,), 0.3, 1, 0), "AdaBlock: window must be a positive integer, got 0"),
    ],
)
def test_mistakes_about_parts_are_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
