"""spd_step_ on every backend: by hand, against Algorithm 1, and as trajectories."""

import pytest
import torch
from fuzzing import FUNCTIONS, everywhere, on
from spd_in_python import algorithm_1, step_of_positions
from tolerances import ROUNDING, assert_close

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.ops.spd_step import SEMANTICS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

VOCAB, DIM, MASK = 40, 12, 39
WRITTEN = ("masked", "token", "confidence", "converged", "step", "inputs_embeds")


def embedding_table(dtype=torch.float32):
    return torch.randn(VOCAB, DIM, generator=torch.manual_seed(11)).to(dtype)


def new_state(editable, embedding=None, prompt_token=3):
    embedding = embedding_table() if embedding is None else embedding
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


def all_editable(batch, block):
    return new_state(torch.ones(batch, block, dtype=torch.bool))


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def take_step(backend, logits, state, embedding=None, **options):
    """spd_step_ on the state in place, on the backend's device."""
    functions, device = FUNCTIONS[backend]
    embedding = embedding_table() if embedding is None else embedding
    options = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9} | options
    there = {name: on(device, tensor) for name, tensor in state.items()}
    options = {name: on(device, option) for name, option in options.items()}
    functions.spd_step_(on(device, logits), on(device, embedding), **there, **options)
    for name in WRITTEN:
        state[name].copy_(there[name])


def logits_of(token, probability):
    """[B, K, V] with that probability of the token; the others share the rest."""
    odds = probability * (VOCAB - 1) / (1 - probability)
    logits = torch.zeros(*token.shape, VOCAB)
    return logits.scatter(-1, token.unsqueeze(-1), odds.log().unsqueeze(-1))


def assert_states_equal(actual, expected, embed_rtol=2e-6, embed_atol=2e-6):
    for name in ("masked", "token", "converged", "step"):
        assert torch.equal(actual[name], expected[name]), name
    assert_close(actual["confidence"], expected["confidence"], 1e-5)
    assert_close(actual["inputs_embeds"], expected["inputs_embeds"], embed_rtol, embed_atol)


# ---- By hand


@everywhere
def test_steps_by_hand(backend):
    embedding = embedding_table()
    state = new_state(torch.tensor([[False, True, True, True, True]]))
    y = torch.tensor([[7, 8, 9, 10, 11]])
    take_step(backend, logits_of(y, torch.tensor([[0.99, 0.8, 0.6, 0.4, 0.95]])), state)
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
    take_step(backend, logits_of(y, torch.full((1, 5), 0.6)), state)
    assert state["masked"].tolist() == [[False] * 5]
    assert state["converged"].tolist() == [False]

    # And once more, without masks: converged by consistency
    take_step(backend, logits_of(y, torch.full((1, 5), 0.3)), state)
    assert state["converged"].tolist() == [True]
    assert not state["masked"].any()
    assert state["token"].tolist() == [[3, 8, 9, 10, 11]]


@everywhere
@pytest.mark.parametrize("semantics", ["settled", "paper"])
def test_first_step_is_never_consistent(backend, semantics):
    """Predictions that happen to equal the initial tokens are not a repetition."""
    state = all_editable(1, 4)
    logits = logits_of(torch.full((1, 4), MASK), torch.full((1, 4), 0.6))
    take_step(backend, logits, state, semantics=semantics)
    assert not state["converged"].any()


@everywhere
@pytest.mark.parametrize(
    ("semantics", "promoted", "accepted"),
    [("settled", 1, False), ("paper", 1, False), ("released", 3, True)],
)
def test_thresholds_are_strict_unless_released(backend, semantics, promoted, accepted):
    """A confidence of exactly tau: four equal logits out of four give 1/4 to the bit."""
    state = all_editable(1, 3)
    state["token"].fill_(3)
    options = {"mask_token_id": 3, "tau_dec": 0.25, "tau_acc": 0.25, "semantics": semantics}
    take_step(backend, torch.zeros(1, 3, 4), state, embedding_table()[:4], **options)
    assert int((~state["masked"]).sum()) == promoted
    assert state["converged"].tolist() == [accepted]


@everywhere
def test_released_defects_are_reproduced(backend):
    """In the released code acceptance may leave masks, and a predicted mask token stays one."""
    state = all_editable(2, 8)
    before = state["inputs_embeds"].clone()
    y = torch.arange(16).view(2, 8)
    y[1, 0] = MASK
    c = torch.tensor([[0.99, 0.92] + [0.99] * 6, [0.6] * 8])
    take_step(backend, logits_of(y, c), state, tau_dec=0.95, semantics="released")
    assert state["converged"].tolist() == [True, True]
    assert state["masked"].sum(dim=1).tolist() == [7, 8]
    assert state["token"][0].tolist() == [0] + [MASK] * 7
    assert torch.equal(state["inputs_embeds"], before)  # untouched on the stopping step


@everywhere
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_converged_row_is_frozen(backend, semantics):
    state = all_editable(3, 5)
    state["converged"][1] = True
    before = copy_of(state)
    logits = torch.randn(3, 5, VOCAB)
    logits[1] = torch.nan  # not even read
    take_step(backend, logits, state, tau_dec=0.1, semantics=semantics)
    for name in WRITTEN:
        assert torch.equal(state[name][1], before[name][1]), name
        assert not torch.equal(state[name][0], before[name][0]) or name == "converged", name


@everywhere
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_row_without_editable_positions(backend, semantics):
    state = new_state(torch.zeros(1, 4, dtype=torch.bool))
    state["inputs_embeds"].zero_()
    take_step(backend, torch.randn(1, 4, VOCAB), state, semantics=semantics)
    assert state["converged"].tolist() == [True]
    assert torch.equal(state["inputs_embeds"], embedding_table()[3].expand(1, 4, DIM))


@everywhere
def test_nan_is_never_promoted_or_accepted(backend):
    state = all_editable(1, 4)
    logits = logits_of(torch.tensor([[5, 6, 7, 8]]), torch.full((1, 4), 0.99))
    logits[0, 1, 20] = torch.nan
    take_step(backend, logits, state, tau_dec=-1.0, tau_acc=-1.0)
    assert state["masked"].tolist() == [[False, True, True, True]]
    assert state["converged"].tolist() == [False]
    assert state["token"].tolist() == [[5, 20, 7, 8]]
    assert state["confidence"][0, 1].isnan()


@everywhere
def test_suppressed_mask_token(backend):
    state = all_editable(1, 3)
    logits = torch.zeros(1, 3, VOCAB)
    logits[..., MASK], logits[..., 7] = 50, 5
    take_step(backend, logits, state, suppress_token=MASK)
    assert state["token"].tolist() == [[7, 7, 7]]


# ---- Where the three semantics differ

# Predictions at three positions, all with one confidence; the states after each step
UNSURE = [[5, 6, 7], [5, 6, 7], [4, 6, 7], [4, 6, 3], [4, 6, 3]]
M = MASK
BY_HAND = {
    # Both predictions at masks repeat in the second step: that ends the block
    "paper": [([5, 6, 7], 2), ([5, 6, 7], 0)],
    # The second step starts with masks, the third and the fourth change a token
    "settled": [([5, 6, 7], 2), ([5, 6, 7], 1), ([4, 6, 7], 0), ([4, 6, 3], 0), ([4, 6, 3], 0)],
    # As settled, but a position has no token before it is promoted
    "released": [([5, M, M], 2), ([5, 6, M], 1), ([4, 6, 7], 0), ([4, 6, 3], 0), ([4, 6, 3], 0)],
}


@everywhere
@pytest.mark.parametrize("semantics", BY_HAND)
def test_the_three_by_hand(backend, semantics):
    state, expected = all_editable(1, 3), BY_HAND[semantics]
    options = {"semantics": semantics, "tau_dec": 0.9, "tau_acc": 0.95}
    for step, y in enumerate(UNSURE):
        take_step(backend, logits_of(torch.tensor([y]), torch.full((1, 3), 0.6)), state, **options)
        last = min(step, len(expected) - 1)
        tokens, num_masks = expected[last]
        assert state["token"].tolist() == [tokens]
        assert state["masked"].sum() == num_masks
        assert state["converged"].tolist() == [last == len(expected) - 1]
        assert state["step"].tolist() == [last + 1]


@everywhere
@pytest.mark.parametrize(
    ("semantics", "tokens"), [("paper", [5, 6, 7]), ("settled", [5, 6, 7]), ("released", [5, M, M])]
)
def test_acceptance_below_tau_dec_leaves_masks_only_if_released(backend, semantics, tokens):
    state = all_editable(1, 3)
    logits = logits_of(torch.tensor([[5, 6, 7]]), torch.full((1, 3), 0.9))
    take_step(backend, logits, state, tau_dec=0.95, tau_acc=0.8, semantics=semantics)
    assert state["token"].tolist() == [tokens]
    assert state["masked"].tolist() == [[token == MASK for token in tokens]]
    assert state["converged"].tolist() == [True]


# ---- Algorithm 1, line by line

STEPS, WORDS = 9, 8  # words are the few ids that are predicted, none of them the mask


def random_script(rows, length, seed):
    """Logits [STEPS, B, K, V] over the words, in which some blocks are steady."""
    generator = torch.manual_seed(seed)
    shape = (STEPS, rows, length)
    steady = torch.rand(rows, 1, generator=generator) ** 0.125
    kept = torch.rand(shape, generator=generator) < steady
    answer = torch.randint(0, WORDS, (rows, length), generator=generator)
    token = torch.where(kept, answer, torch.randint(0, WORDS, shape, generator=generator))
    certainty = torch.rand(STEPS, rows, 1, generator=generator)
    probability = 0.2 + 0.79 * (certainty + torch.rand(shape, generator=generator)) / 2
    return torch.stack([logits_of(*step) for step in zip(token, probability, strict=True)])


@everywhere
@pytest.mark.parametrize("tau_dec", [0.95, 0.7, 0.0])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_paper_is_algorithm_1_to_the_letter(backend, length, tau_dec):
    rows = {"triton": 8, "cuda, emulated": 100}.get(backend, 200)  # those two are slow
    tau_acc, script = 0.8, random_script(rows, length, seed=length)
    p = script.double().softmax(dim=-1)
    for tau in (tau_dec, tau_acc):
        assert (p.amax(dim=-1) - tau).abs().min() > 1e-6  # rounding decides none
    loops = [algorithm_1(p[:, b].tolist(), tau_dec, tau_acc) for b in range(rows)]
    state = all_editable(rows, length)
    final, ended_with_masks = {}, 0
    for t, logits in enumerate(script):
        take_step(backend, logits, state, semantics="paper", tau_dec=tau_dec, tau_acc=tau_acc)
        names = ("token", "masked", "converged", "step")
        for b, after in enumerate(zip(*(state[name].tolist() for name in names), strict=True)):
            if b not in final:
                y, masked, converged = next(loops[b])
                ended_with_masks += converged and bool(masked)
                masked = set() if converged else masked  # line 13 commits every position
                expected = (y, [j in masked for j in range(length)], converged, t + 1)
            else:
                expected = final[b]
            assert after == expected
            if expected[2]:
                final[b] = expected
    assert len(final) >= rows / 2
    if length == 6 and tau_dec == 0.95:  # where the letter matters
        assert ended_with_masks >= rows / 4


# ---- Trajectories


# B x K: one position, around a warp, LLaDA's block, DiffusionGemma's; random prompts' tails, few
# distinct predictions, and logits that get sharper, so that rows do converge
@pytest.mark.parametrize(
    ("backend", "batch", "block"),
    [(b, *s) for b in ("reference", "cpu") for s in ((1, 1), (3, 31), (4, 32), (2, 33), (1, 256))]
    + [("triton", 2, 4)],
)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_trajectories(backend, semantics, batch, block):
    generator = torch.manual_seed(batch * block)
    embedding = embedding_table()
    state = new_state(torch.rand(batch, block, generator=generator) < 0.8)
    logits = torch.randn(batch, block, VOCAB, generator=generator)
    for step in range(12):
        logits = logits + torch.randn(logits.shape, generator=generator) / (1 + step)
        sharpened = logits * (1 + step)
        y, c = reference.top1_confidence(sharpened)
        expected = step_of_positions(state, y, c, embedding, MASK, 0.4, 0.8, semantics)
        take_step(backend, sharpened, state, tau_dec=0.4, tau_acc=0.8, semantics=semantics)
        assert_states_equal(state, expected, 1e-5, 1e-5)
        state = expected  # rounding must not add up into a different trajectory


# The options that plain Python leaves out: top-k, thresholds per row, suppression, 16 bits
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize(
    ("top_k", "dtype", "per_row"),
    [(1, torch.float32, False), (1, torch.bfloat16, True), (3, torch.float32, True)],
)
def test_triton_takes_the_steps_of_cpp(semantics, top_k, dtype, per_row):
    generator = torch.manual_seed(5)
    embedding = embedding_table(dtype)
    editable = torch.rand(3, 5, generator=generator) < 0.8
    editable[-1] = False  # a row with nothing to decode
    expected = new_state(editable, embedding)
    actual = copy_of(expected)
    base = 3 * torch.randn(3, 5, VOCAB, generator=generator)
    options = {"top_k": top_k, "suppress_token": 2, "temperature": 0.8, "semantics": semantics}
    if per_row:
        options["thresholds"] = torch.rand(3, 2, generator=generator)
    for step in range(4):
        noise = 0.5 * torch.randn(base.shape, generator=generator) if step < 2 else 0
        logits = (base + noise).to(dtype)
        logits[0, 2, 4] = torch.nan if step < 1 else 0  # a NaN is never promoted
        for backend, state in (("cpu", expected), ("triton", actual)):
            take_step(backend, logits, state, embedding, **options)
        # Both round, and Triton's interpreter cuts bfloat16 off
        assert_states_equal(actual, expected, 2 * ROUNDING[dtype], 4e-6)
    assert expected["converged"].any()


def test_rows_do_not_depend_on_each_other():
    generator = torch.manual_seed(7)
    logits = 3 * torch.randn(16, 8, VOCAB, generator=generator)
    together = new_state(torch.rand(16, 8, generator=generator) < 0.8)
    alone = copy_of(together)
    take_step("cpu", logits, together, tau_dec=0.3)
    for b in range(16):
        row = {name: tensor[b : b + 1] for name, tensor in alone.items()}
        take_step("cpu", logits[b : b + 1], row, tau_dec=0.3)
    for name in WRITTEN:
        assert torch.equal(together[name], alone[name]), name


def test_real_size_and_strides():
    generator = torch.manual_seed(8)
    padded = torch.randn(2, 4, 157200, generator=generator).bfloat16()[..., :157184]
    embedding = torch.randn(157184, 16, generator=generator).bfloat16()
    state = new_state(torch.ones(2, 4, dtype=torch.bool), embedding)
    expected = copy_of(state)
    options = {"mask_token_id": 156895, "tau_dec": 0.0, "top_k": 3}
    take_step("cpu", padded, state, embedding, **options)
    take_step("reference", padded, expected, embedding, **options)
    assert_states_equal(state, expected, ROUNDING[torch.bfloat16], 1e-5)


# ---- Errors: nothing is written


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
    arguments = all_editable(2, 4) | {"logits": torch.randn(2, 4, VOCAB)}
    arguments |= {"embedding": embedding_table(), "mask_token_id": MASK}
    arguments |= {"tau_dec": 0.5, "tau_acc": 0.9} | changes
    before = {name: arguments[name].clone() for name in WRITTEN}
    with pytest.raises(RuntimeError, match="^spd_step_: " + message):
        dmax_kernels.spd_step_(**arguments)
    for name in WRITTEN:
        assert torch.equal(arguments[name], before[name]), name


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_block_without_positions_is_an_error(backend):
    message = r"^spd_step_: logits must be \[B, K, V\] with K >= 1, got \[2, 0, 40\]"
    with pytest.raises(RuntimeError, match=message):
        take_step(backend, torch.randn(2, 0, VOCAB), all_editable(2, 0))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_semantics(backend):
    with pytest.raises(ValueError, match=r"^spd_step_: semantics must be one of .* got 'dinfer'"):
        take_step(backend, torch.randn(2, 4, VOCAB), all_editable(2, 4), semantics="dinfer")


def test_bad_prompt_token():
    state = new_state(torch.tensor([[False, True]]))
    state["token"][0, 0] = VOCAB
    with pytest.raises(RuntimeError, match=r"token must be an id in \[0, 40\) wherever editable"):
        take_step("cpu", torch.randn(1, 2, VOCAB), state)
    assert state["step"].item() == 0
