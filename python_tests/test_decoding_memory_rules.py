"""The rules that remember, against the engines' algorithms; what the loop does with a memory."""

import math

import pytest
import torch
from decoding_models import MASK, RandomModel, ScriptedModel, random_prompts
from edit_in_python import Engine, sglang_joint_threshold
from test_decoding_rules import K, V, most_likely, random_script

from dmax_kernels.decoding import Credit, Edit, LiveBlocks, Rule, spd_generate

OPS = ["reference", "fused"]


pytestmark = pytest.mark.usefixtures("one_thread")


def play(script, rule, prompt_length=1, **options):
    """One block of K positions on script [STEPS, rows, K, V]."""
    model = ScriptedModel(script, eos_token_id=None)
    prompts = torch.arange(2, 2 + script.shape[1])[:, None].repeat(1, prompt_length)
    return spd_generate(
        model, prompts, block_length=K, max_new_tokens=K - prompt_length, use_cache=False,
        rule=rule, **options,
    )  # fmt: skip


def edits_of(script, editable, tau_dec, rule):
    """SGLang's JointThreshold on one request; its last step, where that only reports, not counted.

    Returns ids, steps, and how many tokens were edited.
    """
    engine = Engine(MASK, tau_dec, rule.edit_threshold, rule.tokens_per_step,
                    rule.max_post_edit_steps)  # fmt: skip
    prompt = [j not in editable for j in range(K)]
    ids = [2 if fixed else MASK for fixed in prompt]
    edits = 0
    for step in range(len(script)):
        top = [most_likely(script[step, j], MASK) for j in range(K)]
        y, c = zip(*top, strict=True)
        before = ids
        ids, done = sglang_joint_threshold(engine, ids, prompt, y, c)
        edits += sum(a not in (MASK, b) for a, b in zip(before, ids, strict=True))
        if done:
            return ids, step + (engine.post_edit_steps <= rule.max_post_edit_steps), edits
    raise AssertionError("the script is too short")


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize(
    ("tau_dec", "rule"),
    [
        (0.7, Edit()),
        (0.5, Edit(0.0)),
        (0.9, Edit(0.2, tokens_per_step=2)),
        (0.5, Edit(0.3, max_post_edit_steps=0)),
        (0.3, Edit(0.0, max_post_edit_steps=1)),
    ],
    ids=str,
)
def test_edit_is_sglangs_joint_threshold(rule, tau_dec, ops):
    edited = 0
    for seed in range(12):
        script = random_script(seed, rows=2)
        script = torch.cat([script, script[-1:].expand(16, -1, -1, -1)])
        prompt_length = 1 + seed % 3
        output = play(script, rule, prompt_length, tau_dec=tau_dec, ops=ops)
        for row in range(2):
            editable = range(prompt_length, K)
            ids, steps, edits = edits_of(script[:, row], editable, tau_dec, rule)
            assert output.sequences[row, prompt_length:].tolist() == ids[prompt_length:]
            assert output.num_forwards[row] == steps
            edited += edits
    assert edited >= 5


def test_edit_has_the_steps_that_it_needs():
    """By default a block may take its edits after all of its positions; a cap is a cap."""
    everything_changes = torch.zeros(40, 1, K, V)
    for step in range(40):
        everything_changes[step, :, :, step % 20] = 9.0
    options = {"tau_dec": 1.0, "prompt_length": 0 + 1}
    output = play(everything_changes, Edit(0.0, max_post_edit_steps=9), **options)
    assert output.num_forwards.tolist() == [K - 1 + 9]
    output = play(everything_changes, Edit(0.0), **options, max_steps_per_block=3)
    assert output.num_forwards.tolist() == [3]
    assert MASK not in output.sequences[0].tolist()  # the cap commits the last predictions
    assert output.sequences[0, 1:].tolist() == [2] * (K - 1)


def test_edit_needs_the_mask_to_be_suppressed():
    message = "suppress_mask must be True with rule 'edit', where a predicted mask token would take"
    with pytest.raises(ValueError, match=message):
        spd_generate(RandomModel(), random_prompts(1, 4), max_new_tokens=4, block_length=4,
                     rule="edit", suppress_mask=False)  # fmt: skip


def dense_credit(script, editable, tau_dec, rule):
    """CreditDecoding with its matrix over the vocabulary, in float64; None if rounding decides."""
    masked, ids = set(editable), {}
    credit = torch.zeros(K, V, dtype=torch.float64)
    for step in range(len(script)):
        logits = script[step].double().clone()
        logits[:, MASK] = -math.inf
        p, y = logits.softmax(dim=-1).max(dim=-1)
        credit *= rule.beta
        for j in masked:
            credit[j, y[j]] += p[j] ** rule.gamma
        fused = (logits + rule.alpha * torch.log1p(credit)).softmax(dim=-1)
        (first, second), token = fused.topk(2, dim=-1).values.T, fused.argmax(dim=-1)
        if any(min(abs(first[j] - tau_dec), first[j] - second[j]) < 1e-5 for j in masked):
            return None
        chosen = {j for j in masked if first[j] > tau_dec}
        chosen = chosen or {max(sorted(masked), key=lambda j: first[j])}
        ids.update({j: int(token[j]) for j in chosen})
        masked -= chosen
        if not masked:
            return [ids[j] for j in editable], step + 1
    raise AssertionError("the script is too short")


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("rule", [Credit(), Credit(3.0, 0.95, 0.5), Credit(2.0, 0.0)], ids=str)
def test_credit_is_the_dense_matrix(rule, ops):
    compared = sooner = 0
    for seed in range(25):
        script = random_script(seed, rows=2)
        output = play(script, rule, tau_dec=0.9, ops=ops)
        plain = play(script, "threshold", tau_dec=0.9, ops=ops)
        for row in range(2):
            expected = dense_credit(script[:, row], range(1, K), 0.9, rule)
            if expected is not None:
                assert output.sequences[row, 1:].tolist() == expected[0]
                assert output.num_forwards[row] == expected[1]
                compared += 1
            sooner += int(output.num_forwards[row] < plain.num_forwards[row])
    assert compared > 40
    assert sooner > 5


@pytest.mark.parametrize("ops", OPS)
def test_a_token_with_credit_may_beat_the_top_1(ops):
    """Token 4 leads for two steps, then token 5 by little: the block keeps to 4."""
    script = torch.zeros(6, 1, K, V)
    script[:2, ..., 4] = 3.0
    script[2:, ..., 4], script[2:, ..., 5] = 4.0, 4.1
    chosen = {}
    for rule in ("threshold", Credit(1.0, 0.9)):
        output = play(script, rule, tau_dec=0.99, ops=ops, trace=True)
        steps = output.trace.to_dict()["rows"][0]["blocks"][0]["steps"]
        chosen[str(rule)] = steps[2]["token"][-1]
    assert list(chosen.values()) == [5, 4]


# ---- What the loop does with a memory


class Counts(Rule):
    """Remembers its steps in memory, and fills one mask per step from the left."""

    seen: list

    def __init__(self):
        self.seen = []

    def memory(self, rows, config, device):
        return {"steps": torch.zeros(rows, config.block_length, dtype=torch.int32, device=device)}

    def update_(self, logits, embedding, state, config):
        active = ~state.converged
        state.memory["steps"].add_(active.unsqueeze(-1))
        state.step.add_(active)
        live = zip(state.row.tolist(), state.start.tolist(), active.tolist(), strict=True)
        steps, counted = state.step.tolist(), state.memory["steps"].tolist()
        self.seen += [
            (row, start, step, count)
            for (row, start, goes), step, count in zip(live, steps, counted, strict=True)
            if goes
        ]
        first = state.masked & (state.masked.cumsum(dim=-1) == 1)
        state.masked.copy_(torch.where(active.unsqueeze(-1), state.masked & ~first, state.masked))
        y = logits[..., :MASK].argmax(dim=-1)
        state.token.copy_(torch.where(first & active.unsqueeze(-1), y, state.token))
        state.converged.logical_or_(~state.masked.any(dim=-1))


def test_a_memory_moves_with_its_row_and_begins_anew_with_each_block():
    prompts = [prompt[:n] for prompt, n in zip(random_prompts(4, 9), (5, 9, 2, 7), strict=True)]

    def decode(rule, ends):
        return spd_generate(
            RandomModel(), prompts, block_length=4, max_new_tokens=14, eos_token_id=ends, rule=rule
        )

    full = decode(Counts(), ())
    rule = Counts()
    output = decode(rule, (full.answers[0][1], full.answers[2][7]))
    assert len({len(answer) for answer in output.answers}) > 1  # rows leave, and others move
    assert len({row for row, *_ in rule.seen}) == 4
    assert len({start for _, start, *_ in rule.seen}) > 3
    for _, _, step, count in rule.seen:
        assert count == [step] * 4


def test_a_state_has_the_memory_among_its_buffers():
    state = LiveBlocks.fully_masked(
        torch.zeros(3, 4, dtype=torch.int64), 0, torch.randn(9, 2), 8,
        row=torch.arange(3), start=torch.zeros(3, dtype=torch.int64),
        thresholds=torch.zeros(3, 2), memory={"credit": torch.ones(3, 4, 5)},
    )  # fmt: skip
    assert dict(state.buffers())["credit"] is state.memory["credit"]
    first = state.first(2)
    assert first.memory["credit"].data_ptr() == state.memory["credit"].data_ptr()
    assert first.memory["credit"].shape == (2, 4, 5)
    begins = torch.tensor([False, True, False])
    state.begin_(begins, torch.zeros(3, dtype=torch.int64), 8, torch.randn(9, 2))
    assert state.memory["credit"].amax(dim=(1, 2)).tolist() == [1, 0, 1]
    state.move_rows_(torch.tensor([1]), torch.tensor([0]))
    assert state.memory["credit"].amax(dim=(1, 2)).tolist() == [0, 0, 1]
