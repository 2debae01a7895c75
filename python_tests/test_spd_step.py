"""spd_step_ on the CPU: all semantics, by hand, against plain Python, and as trajectories."""

import pytest
import torch
from tolerances import ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.ops.spd_step import SEMANTICS

OPS = (reference.spd_step_, dmax_kernels.spd_step_)
VOCAB, DIM, MASK = 40, 12, 39
WRITTEN = ("masked", "token", "confidence", "converged", "step", "inputs_embeds")


def embedding_table(dtype=torch.float32):
    return torch.randn(VOCAB, DIM, generator=torch.manual_seed(11)).to(dtype)


def new_state(editable, embedding, prompt_token=3):
    token = torch.where(editable, MASK, prompt_token)
    batch = editable.shape[0]
    return {
        "editable": editable,
        "masked": editable.clone(),
        "token": token,
        "confidence": torch.zeros(editable.shape),
        "converged": torch.zeros(batch, dtype=torch.bool),
        "step": torch.zeros(batch, dtype=torch.int32),
        "inputs_embeds": embedding[token].clone(),
    }


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def logits_for(tokens, confidences):
    """[B, K, V] whose top-1 is the given token with about the given probability."""
    logits = torch.zeros(*tokens.shape, VOCAB)
    peak = (confidences * (VOCAB - 1) / (1 - confidences)).log()
    return logits.scatter(-1, tokens.unsqueeze(-1), peak.unsqueeze(-1))


def in_plain_python(state, y, c, embedding, tau_dec, tau_acc, semantics):
    """One step with k = 1 from section 3 of the paper, position by position."""
    released = semantics == "released"
    state = copy_of(state)
    for b in range(y.shape[0]):
        if state["converged"][b]:
            continue
        positions = range(y.shape[1])
        editable = state["editable"][b].tolist()
        masked = state["masked"][b].tolist()
        token = state["token"][b].tolist()
        passes = (lambda p, tau: p >= tau) if released else (lambda p, tau: p > tau)
        promoted = []
        for j in (j for j in positions if masked[j]):
            if not passes(c[b, j], tau_dec):
                break
            promoted.append(j)
        promoted = promoted or [j for j in positions if masked[j]][:1]
        confident = all(passes(c[b, j], tau_acc) for j in positions if editable[j])
        if released:
            updated = [j for j in positions if j in promoted or (editable[j] and not masked[j])]
            consistent = all(y[b, j] == token[j] for j in updated)
        else:
            updated = [j for j in positions if editable[j]]
            decides = semantics == "paper" or not any(masked)
            consistent = (
                state["step"][b] >= 1 and decides and all(y[b, j] == token[j] for j in updated)
            )
        converged = bool(confident or consistent or not any(editable))
        for j in updated:
            token[j] = int(y[b, j])
        for j in positions:
            if released:
                masked[j] = editable[j] and token[j] == MASK
            else:
                masked[j] = masked[j] and j not in promoted and not converged
            if editable[j]:
                state["confidence"][b, j] = c[b, j]
        state["token"][b] = torch.tensor(token)
        state["masked"][b] = torch.tensor(masked)
        state["converged"][b] = converged
        state["step"][b] += 1
        if released and converged and any(editable):
            continue
        for j in positions:
            if masked[j]:
                embed = embedding[MASK]
            elif editable[j]:
                embed = reference.hybrid_embedding(
                    embedding, y[b, j], c[b, j], torch.tensor(False), MASK
                )
            else:
                embed = embedding[token[j]]
            state["inputs_embeds"][b, j] = embed
    return state


def assert_states_equal(actual, expected, embed_rtol=2e-6, embed_atol=2e-6):
    for name in ("masked", "token", "converged", "step"):
        assert torch.equal(actual[name], expected[name]), name
    assert_close(actual["confidence"], expected["confidence"], 1e-5)
    assert_close(actual["inputs_embeds"], expected["inputs_embeds"], embed_rtol, embed_atol)


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_two_steps_by_hand(op):
    embedding = embedding_table()
    editable = torch.tensor([[False, True, True, True, True]])
    state = new_state(editable, embedding)
    options = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9}

    y = torch.tensor([[7, 8, 9, 10, 11]])
    op(logits_for(y, torch.tensor([[0.99, 0.8, 0.6, 0.4, 0.95]])), embedding, **state, **options)
    assert state["masked"].tolist() == [[False, False, False, True, True]]  # 0.4 ends the prefix
    assert state["token"].tolist() == [[3, 8, 9, 10, 11]]  # the prompt's token stays
    assert state["converged"].tolist() == [False]
    assert state["step"].tolist() == [1]
    assert torch.equal(state["inputs_embeds"][0, 0], embedding[3])
    assert torch.equal(state["inputs_embeds"][0, 3], embedding[MASK])
    e, m = embedding[8], embedding[MASK]
    p = state["confidence"][0, 1]
    mix = p * e + (1 - p) * m
    hybrid = mix / mix.norm() * (p * e.norm() + (1 - p) * m.norm())
    assert_close(state["inputs_embeds"][0, 1], hybrid, 1e-5, 1e-6)

    # The same predictions again, but two are still masks: nothing is settled by repeating those
    op(logits_for(y, torch.full((1, 5), 0.6)), embedding, **state, **options)
    assert state["masked"].tolist() == [[False] * 5]
    assert state["converged"].tolist() == [False]

    # And once more, without masks: converged by consistency
    op(logits_for(y, torch.full((1, 5), 0.3)), embedding, **state, **options)
    assert state["converged"].tolist() == [True]
    assert not state["masked"].any()
    assert state["token"].tolist() == [[3, 8, 9, 10, 11]]


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("semantics", ["settled", "paper"])
def test_first_step_is_never_consistent(op, semantics):
    """Predictions that happen to equal the initial tokens are not a repetition."""
    embedding = embedding_table()
    state = new_state(torch.ones(1, 4, dtype=torch.bool), embedding)
    y = torch.full((1, 4), MASK)
    logits = logits_for(y, torch.full((1, 4), 0.6))
    options = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9, "semantics": semantics}
    op(logits, embedding, **state, **options)
    assert not state["converged"].any()


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_thresholds_are_strict_in_the_paper_and_inclusive_when_released(op):
    """A confidence of exactly tau: four equal logits out of four give 1/4 to the bit."""
    embedding = embedding_table()[:4]
    for semantics, promoted, accepted in (
        ("settled", 1, False), ("paper", 1, False), ("released", 3, True),
    ):  # fmt: skip
        state = new_state(torch.ones(1, 3, dtype=torch.bool), embedding_table())
        state["inputs_embeds"] = torch.zeros(1, 3, DIM)
        state["token"].fill_(3)
        op(
            torch.zeros(1, 3, 4),
            embedding,
            **state,
            mask_token_id=3,
            tau_dec=0.25,
            tau_acc=0.25,
            semantics=semantics,
        )
        assert int((~state["masked"]).sum()) == promoted
        assert state["converged"].tolist() == [accepted]


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_released_defects_are_reproduced(op):
    """Table b of the released code: (5) acceptance may leave masks, (6) a predicted mask stays."""
    embedding = embedding_table()
    state = new_state(torch.ones(2, 8, dtype=torch.bool), embedding)
    before = state["inputs_embeds"].clone()
    c = torch.tensor([[0.99, 0.92] + [0.99] * 6, [0.6] * 8])
    y = torch.arange(16).view(2, 8)
    y[1, 0] = MASK
    op(
        logits_for(y, c),
        embedding,
        **state,
        mask_token_id=MASK,
        tau_dec=0.95,
        tau_acc=0.9,
        semantics="released",
    )
    assert state["converged"].tolist() == [True, True]
    assert state["masked"].sum(dim=1).tolist() == [7, 8]
    assert state["token"][0].tolist() == [0] + [MASK] * 7
    assert torch.equal(state["inputs_embeds"], before)  # untouched on the stopping step


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_converged_row_is_frozen(op, semantics):
    embedding = embedding_table()
    state = new_state(torch.ones(3, 5, dtype=torch.bool), embedding)
    state["converged"][1] = True
    before = copy_of(state)
    logits = torch.randn(3, 5, VOCAB)
    logits[1] = torch.nan  # not even read
    op(
        logits,
        embedding,
        **state,
        mask_token_id=MASK,
        tau_dec=0.1,
        tau_acc=0.9,
        semantics=semantics,
    )
    for name in WRITTEN:
        assert torch.equal(state[name][1], before[name][1]), name
        assert not torch.equal(state[name][0], before[name][0]) or name == "converged", name


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_row_without_editable_positions(op, semantics):
    embedding = embedding_table()
    editable = torch.zeros(1, 4, dtype=torch.bool)
    state = new_state(editable, embedding)
    state["inputs_embeds"].zero_()
    op(
        torch.randn(1, 4, VOCAB),
        embedding,
        **state,
        mask_token_id=MASK,
        tau_dec=0.5,
        tau_acc=0.9,
        semantics=semantics,
    )
    assert state["converged"].tolist() == [True]
    assert torch.equal(state["inputs_embeds"], embedding[3].expand(1, 4, DIM))


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_nan_is_never_promoted_or_accepted(op):
    embedding = embedding_table()
    state = new_state(torch.ones(1, 4, dtype=torch.bool), embedding)
    logits = logits_for(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0.99, 0.99, 0.99, 0.99]]))
    logits[0, 1, 20] = torch.nan
    op(logits, embedding, **state, mask_token_id=MASK, tau_dec=-1.0, tau_acc=-1.0)
    assert state["masked"].tolist() == [[False, True, True, True]]
    assert state["converged"].tolist() == [False]
    assert state["token"].tolist() == [[5, 20, 7, 8]]
    assert state["confidence"][0, 1].isnan()


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_suppressed_mask_token(op):
    embedding = embedding_table()
    state = new_state(torch.ones(1, 3, dtype=torch.bool), embedding)
    logits = torch.zeros(1, 3, VOCAB)
    logits[..., MASK] = 50
    logits[..., 7] = 5
    op(
        logits,
        embedding,
        **state,
        mask_token_id=MASK,
        tau_dec=0.5,
        tau_acc=0.9,
        suppress_token=MASK,
    )
    assert state["token"].tolist() == [[7, 7, 7]]


# B x K: one position, around a warp, LLaDA's block, DiffusionGemma's; random prompts' tails,
# steps repeated until everything has converged; few distinct predictions so that rows do converge
@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize(("batch", "block"), [(1, 1), (3, 31), (4, 32), (2, 33), (1, 256)])
def test_trajectories(op, semantics, batch, block):
    generator = torch.manual_seed(batch * block)
    embedding = embedding_table()
    editable = torch.rand(batch, block, generator=generator) < 0.8
    state = new_state(editable, embedding)
    logits = torch.randn(batch, block, VOCAB, generator=generator)
    for step in range(12):
        logits = logits + torch.randn(logits.shape, generator=generator) / (1 + step)
        sharpened = logits * (1 + step)
        y, c = reference.top1_confidence(sharpened)
        expected = in_plain_python(state, y, c, embedding, 0.4, 0.8, semantics)
        op(
            sharpened,
            embedding,
            **state,
            mask_token_id=MASK,
            tau_dec=0.4,
            tau_acc=0.8,
            semantics=semantics,
        )
        assert_states_equal(state, expected, 1e-5, 1e-5)
        state = expected  # rounding must not add up into another trajectory


def test_rows_do_not_depend_on_each_other():
    embedding = embedding_table()
    generator = torch.manual_seed(7)
    logits = 3 * torch.randn(16, 8, VOCAB, generator=generator)
    together = new_state(torch.rand(16, 8, generator=generator) < 0.8, embedding)
    alone = copy_of(together)
    options = {"mask_token_id": MASK, "tau_dec": 0.3, "tau_acc": 0.9}
    dmax_kernels.spd_step_(logits, embedding, **together, **options)
    for b in range(16):
        row = {name: tensor[b : b + 1] for name, tensor in alone.items()}
        dmax_kernels.spd_step_(logits[b : b + 1], embedding, **row, **options)
    for name in WRITTEN:
        assert torch.equal(together[name], alone[name]), name


def test_real_size_and_strides():
    generator = torch.manual_seed(8)
    padded = torch.randn(2, 4, 157200, generator=generator).bfloat16()[..., :157184]
    embedding = torch.randn(157184, 16, generator=generator).bfloat16()
    token = torch.full((2, 4), 156895)
    ones = torch.ones(2, 4, dtype=torch.bool)
    state = {
        "editable": ones,
        "masked": ones.clone(),
        "token": token,
        "confidence": torch.zeros(2, 4),
        "converged": torch.zeros(2, dtype=torch.bool),
        "step": torch.zeros(2, dtype=torch.int32),
        "inputs_embeds": embedding[token].clone(),
    }
    expected = copy_of(state)
    options = {"mask_token_id": 156895, "tau_dec": 0.0, "tau_acc": 0.9, "top_k": 3}
    dmax_kernels.spd_step_(padded, embedding, **state, **options)
    reference.spd_step_(padded, embedding, **expected, **options)
    assert_states_equal(state, expected, ROUNDING[torch.bfloat16], 1e-5)


def broken(**changes):
    """Arguments of a valid call, some of them replaced."""
    embedding = embedding_table()
    arguments = new_state(torch.ones(2, 4, dtype=torch.bool), embedding)
    arguments |= {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9}
    arguments |= {"logits": torch.randn(2, 4, VOCAB), "embedding": embedding}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.randn(4, VOCAB)}, r"logits must be \[B, K, V\] .*, got \[4, 40\]"),
        ({"logits": torch.randn(2, 4, VOCAB).double()}, "logits must be float32.*, got float64"),
        ({"embedding": torch.randn(9, DIM)}, r"embedding must be \[V, D\] with V = 40 .*\[9, 12\]"),
        ({"editable": torch.ones(2, 4)}, "editable must be bool, got float32"),
        ({"masked": torch.ones(2, 5).bool()}, r"masked must have shape \[2, 4\] .*, got \[2, 5\]"),
        ({"token": torch.ones(2, 4).int()}, "token must be int64, got int32"),
        ({"confidence": torch.ones(2, 4).half()}, "confidence must be float32, got float16"),
        ({"converged": torch.zeros(3).bool()}, r"converged must have shape \[2\] .*, got \[3\]"),
        ({"step": torch.zeros(2).long()}, "step must be int32, got int64"),
        ({"inputs_embeds": torch.zeros(2, 4, 5)}, r"inputs_embeds must have shape \[2, 4, 12\]"),
        ({"inputs_embeds": torch.zeros(2, 4, DIM).half()}, "inputs_embeds must be float32"),
        ({"masked": torch.ones(4, 2).bool().t()}, r"masked is written in place .*contiguous"),
        ({"thresholds": torch.zeros(2, 3)}, r"thresholds must have shape \[2, 2\] .*\[2, 3\]"),
        ({"thresholds": torch.zeros(2, 2).double()}, "thresholds must be float32, got float64"),
        ({"mask_token_id": VOCAB}, r"mask_token_id must be a token id in \[0, 40\), got 40"),
        ({"tau_dec": float("nan")}, "tau_dec must be a number, got NaN"),
        ({"tau_acc": float("nan")}, "tau_acc must be a number, got NaN"),
        ({"top_k": 9}, r"top_k must be in 1\.\.8 .*, got 9"),
        ({"temperature": 0.0}, "temperature must be at least 1e-30"),
        ({"suppress_token": 40}, "suppress_token must be -1 .*, got 40"),
    ],
)
def test_bad_input(changes, message):
    arguments = broken(**changes)
    before = {name: arguments[name].clone() for name in WRITTEN}
    with pytest.raises(RuntimeError, match="^spd_step_: " + message):
        dmax_kernels.spd_step_(**arguments)
    for name in WRITTEN:
        assert torch.equal(arguments[name], before[name]), name


def test_a_block_without_positions_is_an_error():
    """K = 0 on every backend in the same words (Triton's: test_triton_messages)."""
    state = new_state(torch.ones(2, 0, dtype=torch.bool), embedding_table())
    arguments = broken(**state, logits=torch.randn(2, 0, VOCAB))
    for op in (reference.spd_step_, dmax_kernels.spd_step_):
        with pytest.raises(
            RuntimeError,
            match=r"^spd_step_: logits must be \[B, K, V\] with K >= 1, got \[2, 0, 40\]",
        ):
            op(**arguments)


@pytest.mark.parametrize("op", OPS, ids=("reference", "cpu"))
def test_bad_semantics(op):
    with pytest.raises(ValueError, match=r"^spd_step_: semantics must be one of .* got 'dinfer'"):
        op(**broken(semantics="dinfer"))


def test_bad_prompt_token():
    editable = torch.tensor([[False, True]])
    state = new_state(editable, embedding_table())
    state["token"][0, 0] = VOCAB
    with pytest.raises(RuntimeError, match=r"token must be an id in \[0, 40\) wherever editable"):
        dmax_kernels.spd_step_(
            torch.randn(1, 2, VOCAB),
            embedding_table(),
            **state,
            mask_token_id=MASK,
            tau_dec=0.5,
            tau_acc=0.9,
        )
    assert state["step"].item() == 0
