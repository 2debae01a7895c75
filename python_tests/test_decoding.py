"""The SPD loop: cache, batches, prompt tails, eos, step cap, trace, on a small random model."""

import json

import pytest
import torch
from decoding_models import EOS, MASK, PAD, RandomModel, random_prompts

from dmax_kernels.decoding import spd_generate
from dmax_kernels.decoding.rules import ABLATIONS

K = 8
OPS = ["reference", "fused"]
TAUS = [0.95, 0.5, 0.0]
# SPD and its ablations, and the other semantics; test_decoding_unmasking.py has the other rules
RULE_GRID = [*((rule, "settled") for rule in ABLATIONS), ("spd", "paper"), ("spd", "released")]


pytestmark = pytest.mark.usefixtures("one_thread")


def decode(model, prompts, **changes):
    arguments = {"block_length": K, "max_new_tokens": 27, "ops": "reference"}
    return spd_generate(model, prompts, **{**arguments, **changes})


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("rule", "semantics"), RULE_GRID)
def test_fused_ops_give_the_tokens_of_the_reference(rule, semantics, tau):
    model, prompts = RandomModel(), random_prompts(5, 11)
    settings = {"rule": rule, "semantics": semantics, "tau_dec": tau}
    expected = decode(model, prompts, **settings)
    actual = decode(model, prompts, **settings, ops="fused")
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(actual.block_forwards, expected.block_forwards)


@pytest.mark.parametrize("top_k", [2, 3])
def test_fused_ops_give_the_tokens_of_the_reference_for_top_k(top_k):
    model, prompts = RandomModel(), random_prompts(5, 11)
    for rule in ("spd", "hybrid"):
        expected = decode(model, prompts, rule=rule, top_k=top_k)
        actual = decode(model, prompts, rule=rule, top_k=top_k, ops="fused")
        assert torch.equal(actual.sequences, expected.sequences)


def test_top_k_changes_what_the_model_reads():
    model, prompts = RandomModel(), random_prompts(8, 11)
    one, three = (decode(model, prompts, tau_dec=0.0, top_k=k) for k in (1, 3))
    assert not torch.equal(one.block_forwards, three.block_forwards)


# Prompts: shorter than a block (no prefill), whole blocks (no tail), with a tail in the block
@pytest.mark.parametrize("prompt_length", [3, 8, 16, 21])
@pytest.mark.parametrize(("rule", "semantics"), RULE_GRID)
def test_cache_gives_what_whole_sequence_passes_give(rule, semantics, prompt_length):
    model, prompts = RandomModel(), random_prompts(4, prompt_length)
    cached = decode(model, prompts, rule=rule, semantics=semantics)
    whole = decode(model, prompts, rule=rule, semantics=semantics, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    assert torch.equal(cached.block_forwards, whole.block_forwards)
    assert not whole.num_refreshes.any()


def test_refresh_rides_on_the_next_blocks_first_pass():
    model = RandomModel()
    output = decode(model, random_prompts(1, 2 * K), max_new_tokens=3 * K)
    passes = output.block_forwards[0].tolist()
    expected = [
        2 * K,
        *[K] * passes[0],
    ]  # prefill of both blocks, a first block without refresh
    for steps in passes[1:]:
        expected += [2 * K, *[K] * (steps - 1)]
    assert model.positions_forwarded == expected
    assert output.num_refreshes.tolist() == [2]
    assert output.num_forwards.tolist() == [len(expected) - 1]


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("rule", "semantics"), RULE_GRID)
def test_a_row_is_the_same_alone_and_in_a_batch(rule, semantics, tau, ops):
    model, prompts = RandomModel(), random_prompts(5, 11)
    # This eos appears in some rows at different blocks, so rows leave the batch at different times
    settings = {
        "rule": rule,
        "semantics": semantics,
        "tau_dec": tau,
        "ops": ops,
        "eos_token_id": 3,
    }
    together = decode(model, prompts, **settings)
    for row in range(len(prompts)):
        alone = decode(model, prompts[row : row + 1], **settings)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert alone.num_tokens[0] == together.num_tokens[row]
        blocks = alone.block_forwards.shape[1]
        assert torch.equal(alone.block_forwards[0], together.block_forwards[row, :blocks])
        assert not together.block_forwards[row, blocks:].any()


def test_rows_of_the_batch_test_do_end_and_converge_apart():
    output = decode(RandomModel(), random_prompts(5, 11), eos_token_id=3)
    assert len(set(output.num_blocks.tolist())) > 1
    assert len(set(output.block_forwards[:, 0].tolist())) > 1


def test_the_prompt_stays_and_its_tail_is_read_as_hard_tokens():
    model, prompts = RandomModel(), random_prompts(3, 2 * K + 5)
    output = decode(model, prompts, trace=True)
    assert torch.equal(output.sequences[:, : 2 * K + 5], prompts)
    block = output.trace.to_dict()["rows"][0]["blocks"][0]
    assert block["start"] == 2 * K
    assert block["editable"] == [0] * 5 + [1] * 3
    for step in block["steps"]:
        assert step["token"][:5] == prompts[0, 2 * K :].tolist()
        assert not {0, 1, 2, 3, 4} & {*step["promoted"], *step["revised"]}


def test_the_result_has_the_length_asked_for():
    for max_new_tokens in (1, 5, 8, 9):
        output = decode(RandomModel(), random_prompts(2, 11), max_new_tokens=max_new_tokens)
        assert output.sequences.shape == (2, 11 + max_new_tokens)
        assert output.num_tokens.tolist() == [max_new_tokens] * 2


def test_eos_ends_a_row_and_pads_the_rest():
    model, prompts = RandomModel(), random_prompts(16, 11)
    free = decode(model, prompts).sequences[:, 11:]
    eos = int(free[0, 6])
    output = decode(model, prompts, eos_token_id=[eos, 21])
    for row, response in enumerate(output.sequences[:, 11:].tolist()):
        length = output.num_tokens[row].item()
        if length < 27:
            assert response[length - 1] in (eos, 21)
        assert not {eos, 21} & set(response[: length - 1])
        assert response[length:] == [PAD] * (27 - length)
        # A row takes part in every block up to the one with its eos, and in none after it
        blocks = (11 + length - 1) // K - 11 // K + 1
        assert output.num_blocks[row] == blocks
    assert output.num_tokens[0] == free[0].tolist().index(eos) + 1
    assert output.num_tokens.min() < output.num_tokens.max()


def test_an_eos_in_the_prompts_tail_ends_nothing():
    prompts = random_prompts(1, 11)
    prompts[0, 9] = EOS
    with_eos = decode(RandomModel(), prompts)
    without = decode(RandomModel(), prompts, eos_token_id=())
    assert with_eos.num_blocks[0] == 4 or EOS in with_eos.sequences[0, 11:]
    assert torch.equal(
        with_eos.sequences[:, : 11 + with_eos.num_tokens[0]],
        without.sequences[:, : 11 + with_eos.num_tokens[0]],
    )


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("rule", ABLATIONS)
def test_step_cap_leaves_no_masks(rule, ops):
    model, prompts = RandomModel(), random_prompts(4, 11)
    output = decode(model, prompts, rule=rule, tau_dec=0.95, max_steps_per_block=2, ops=ops)
    assert (output.sequences != MASK).all()
    assert output.block_forwards.max() == 2
    assert output.block_forwards.min() >= 1


def test_mask_token_is_predicted_only_when_allowed():
    model, prompts = RandomModel(), random_prompts(4, 8)
    model.head.weight.data[MASK] += 0.5  # a model that likes its mask token
    allowed = decode(model, prompts, tau_dec=0.0, suppress_mask=False)
    assert (allowed.sequences == MASK).any()
    assert (decode(model, prompts, tau_dec=0.0).sequences != MASK).all()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(("rule", "semantics"), RULE_GRID)
def test_trace_agrees_with_the_output(rule, semantics, ops):
    prompts = random_prompts(4, 11)
    output = decode(
        RandomModel(),
        prompts,
        rule=rule,
        semantics=semantics,
        ops=ops,
        trace=True,
        eos_token_id=3,
    )
    trace = json.loads(json.dumps(output.trace.to_dict()))
    assert len(trace["rows"]) == 4
    for row, traced in enumerate(trace["rows"]):
        assert [len(block["steps"]) for block in traced["blocks"]] == [
            steps for steps in output.block_forwards[row].tolist() if steps
        ]
        for n, block in enumerate(traced["blocks"]):
            check_block(block, rule, semantics)
            final = block["steps"][-1]["token"]
            if n + 1 < len(traced["blocks"]):  # the last block is cut at eos or at max_new_tokens
                start = block["start"]
                assert output.sequences[row, start : start + K].tolist() == final


def check_block(block, rule, semantics):
    """Replays a block's trace: each step's masks and tokens follow from the step before."""
    masked = {j for j, editable in enumerate(block["editable"]) if editable}
    token = None
    for step in block["steps"]:
        promoted, revised = set(step["promoted"]), set(step["revised"])
        assert promoted <= masked
        assert promoted or not masked
        after = {j for j, m in enumerate(step["masked"]) if m}
        assert after == masked - promoted
        if token is not None:
            decoded = {j for j, editable in enumerate(block["editable"]) if editable} - masked
            assert revised == {j for j in decoded if step["token"][j] != token[j]}
        if rule == "threshold":
            assert not revised
        if rule in ("spd", "hard_prefix") and after:  # the masked region is a suffix
            assert after == set(range(min(after), K))
        masked, token = after, step["token"]
    assert all(step["converged"] is False for step in block["steps"][:-1])
    if semantics != "released":
        assert not masked


@pytest.mark.parametrize("semantics", ["settled", "paper"])
def test_trace_of_a_capped_block_shows_its_commit(semantics):
    output = decode(
        RandomModel(),
        random_prompts(2, 8),
        tau_dec=0.95,
        semantics=semantics,
        max_steps_per_block=1,
        trace=True,
    )
    for row in output.trace.to_dict()["rows"]:
        for block in row["blocks"]:
            (step,) = block["steps"]
            assert step["converged"]
            assert step["promoted"] == list(range(K))
            assert not any(step["masked"])


def test_progress_bar_counts_blocks(capsys):
    decode(RandomModel(), random_prompts(1, 8), max_new_tokens=2 * K, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_tensors_can_be_trained_on():
    """The loop runs without gradients, yet its ids must be ordinary tensors for autograd."""
    output = decode(RandomModel(), random_prompts(1, 8))
    words = torch.nn.Embedding(MASK + 1, 4)
    words(output.sequences).sum().backward()
    assert words.weight.grad.abs().sum() > 0
