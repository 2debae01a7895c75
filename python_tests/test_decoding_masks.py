"""`spd_generate(allowed=...)`: masks per block and position, for top-1, samples and every rule."""

import pytest
import torch
from decoding_models import MASK, VOCABULARY, ExactModel, random_prompts
from masks import packed

from dmax_kernels.decoding import RULES, NextBlock, spd_generate

K = 8
LENGTHS = [3, 8, 21]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts():
    return [random_prompts(1, n, seed=n)[0] for n in LENGTHS]


def decode(model, prompts, **changes):
    arguments = {"block_length": K, "max_new_tokens": 27, "eos_token_id": (), "logprobs": True}
    return spd_generate(model, prompts, **{**arguments, **changes})


def only(*ids):
    bits = torch.zeros(VOCABULARY, dtype=torch.bool)
    bits[list(ids)] = True
    return packed(bits)


def by_row_and_place(block):
    """Each position of an answer has three ids, which its row and its place in it determine."""
    first = len(block.token_ids)
    places = range(first, first + block.length)
    return torch.stack([only(*ids_at(block.row, place)) for place in places])


def ids_at(row, place):
    return [(5 * row + 3 * place + i) % MASK for i in (0, 4, 9)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_allowed_tokens_only(prompts, rule, temperature):
    if temperature and rule in ("credit", "edit"):
        return  # they refuse a temperature
    options = {"rule": rule, "temperature": temperature, "allowed": by_row_and_place}
    output = decode(ExactModel(), prompts, **options)
    for row, answer in enumerate(output.answers):
        assert len(answer) == 27
        for place, token in enumerate(answer):
            assert token in ids_at(row, place), (row, place)
    free = decode(ExactModel(), prompts, rule=rule, temperature=temperature)
    assert free.answers != output.answers


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9}, {"top_k": 3}])
def test_backends_batches_and_lags_agree(prompts, options):
    options = {**options, "allowed": by_row_and_place}
    together = decode(ExactModel(), prompts, **options)
    for changes in ({"ops": "reference"}, {"poll_lag": 1}):
        assert decode(ExactModel(), prompts, **options, **changes).answers == together.answers
    alone = decode(
        ExactModel(),
        prompts[1:2],
        **{
            **options,
            "allowed": lambda block: by_row_and_place(NextBlock(1, block.token_ids, block.length)),
        },
    )
    assert alone.answers[0] == together.answers[1]


def test_what_the_callback_is_told(prompts):
    blocks = []

    def allowed(block):
        blocks.append(block)
        return None

    output = decode(ExactModel(), prompts, allowed=allowed)
    assert output.answers == decode(ExactModel(), prompts).answers  # None allows everything
    for row, (length, answer) in enumerate(zip(LENGTHS, output.answers, strict=True)):
        mine = [block for block in blocks if block.row == row]
        assert mine[0].token_ids == []
        assert mine[0].length == K - length % K  # without the prompt's tail
        assert all(block.length == K for block in mine[1:])
        for block in mine:
            assert answer[: len(block.token_ids)] == block.token_ids


def test_one_mask_for_all_positions_and_fewer_words(prompts):
    output = decode(ExactModel(), prompts, allowed=lambda block: only(4, 6, 7))
    assert {token for answer in output.answers for token in answer} <= {4, 6, 7}
    again = decode(ExactModel(), prompts, allowed=lambda block: only(4, 6, 7).view(1, 1))
    assert again.answers == output.answers


def test_a_mask_ends_with_its_block(prompts):
    output = decode(
        ExactModel(), prompts, allowed=lambda block: None if block.token_ids else only(4)
    )
    for length, answer in zip(LENGTHS, output.answers, strict=True):
        first = K - length % K
        assert set(answer[:first]) == {4}
        assert set(answer[first:]) != {4}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, dtype=torch.int64), "for row 0, got torch.int64"),
        ([1], "for row 0, got list"),
        (torch.ones(2, dtype=torch.int32), r"must return int32 \[1\] or \[5, 1\] .* \[2\]"),
        (torch.ones(4, 1, dtype=torch.int32), r"for row 0, got \[4, 1\]"),
        (torch.ones(1, 1, 1, dtype=torch.int32), r"got \[1, 1, 1\]"),
        (torch.zeros(1, dtype=torch.int32), "must leave a token at every position of row 0"),
    ],
    ids=str,
)
def test_errors(prompts, mask, message):
    with pytest.raises(ValueError, match=f"^spd_generate: allowed.*{message}"):
        decode(ExactModel(), prompts, allowed=lambda block: mask)
