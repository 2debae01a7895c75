"""edit_step_ on every backend: by hand, and trajectories against the engines' algorithms."""

import pytest
import torch
from edit_cases import EDIT_OPTIONS, copy_of, edit_case, new_state
from edit_in_python import ENGINES, Engine
from fuzzing import FLOATS, FUNCTIONS, LAYOUTS, everywhere, on, random_generator, run_examples
from hypothesis import strategies as st
from masks import packed
from tolerances import REFERENCE_RTOL, assert_close

import dmax_kernels
from dmax_kernels.ops.edit_step import EDIT_RULES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's inf - inf

VOCAB, MASK = 16, 15
WRITTEN = ("token", "prediction", "confidence", "post_edit_steps", "done")
every_rule = pytest.mark.parametrize("rule", EDIT_RULES)


def state_of(token, prompt=None):
    token = torch.tensor(token)
    editable = torch.ones(token.shape, dtype=torch.bool)
    if prompt is not None:
        editable = ~torch.tensor(prompt, dtype=torch.bool)
    return new_state(token, editable)


def take_step(backend, logits, state, **options):
    """edit_step_ on the state in place, on the backend's device."""
    functions, device = FUNCTIONS[backend]
    options = {"mask_token_id": MASK, "threshold": 0.6} | options
    there = {name: on(device, tensor) for name, tensor in state.items()}
    options = {name: on(device, option) for name, option in options.items()}
    functions.edit_step_(on(device, logits), **there, **options)
    for name in WRITTEN:
        state[name].copy_(there[name])


def logits_of(predictions):
    """[B, K, V] from pairs (y, m): y's probability is 1 / m to the bit, for m = 0 it is NaN.

    The m ids from y on share all of the mass, so no backend has anything to round.
    """
    y, m = (each.unsqueeze(-1) for each in torch.tensor(predictions).unbind(-1))
    after = torch.arange(VOCAB) - y
    inside = (after >= 0) & (after < m.clamp(min=1))
    value = torch.where(m > 0, 0.0, torch.nan)
    return torch.where(inside, value, -torch.inf)


# ---- By hand


@everywhere
def test_threshold_by_hand(backend):
    """SGLang's LowConfidence: 1/2 passes 0.4, then the best one, then one more pass reports."""
    state = state_of([[MASK, 3, MASK, MASK]], [[0, 1, 0, 0]])
    take_step(backend, logits_of([[(4, 2), (9, 1), (5, 1), (6, 4)]]), state, threshold=0.4)
    assert state["token"].tolist() == [[4, 3, 5, MASK]]
    assert state["prediction"].tolist() == [[4, -7, 5, 6]]  # the prompt's logits are not read
    assert state["confidence"].tolist() == [[0.5, -7, 1, 0.25]]
    take_step(backend, logits_of([[(7, 1), (9, 1), (7, 1), (8, 8)]]), state, threshold=0.4)
    assert state["token"].tolist() == [[4, 3, 5, 8]]  # no editing
    assert state["done"].tolist() == [False]
    take_step(backend, logits_of([[(7, 1)] * 4]), state, threshold=0.4)
    assert state["token"].tolist() == [[4, 3, 5, 8]]
    assert state["done"].tolist() == [True]
    assert state["post_edit_steps"].tolist() == [1]


@everywhere
def test_joint_threshold_by_hand(backend):
    options = {"rule": "joint_threshold", "threshold": 0.3, "edit_threshold": 0.3}
    state = state_of([[2, 3, MASK, MASK]], [[1, 0, 0, 0]])
    # 3 is edited while masks are left; the prompt's 2 is not
    take_step(backend, logits_of([[(9, 1), (4, 2), (5, 2), (6, 4)]]), state, **options)
    assert state["token"].tolist() == [[2, 4, 5, MASK]]
    take_step(backend, logits_of([[(9, 1), (4, 1), (8, 4), (6, 8)]]), state, **options)
    assert state["token"].tolist() == [[2, 4, 5, 6]]  # 1/4 is too little to edit 5
    assert state["post_edit_steps"].tolist() == [0]
    take_step(backend, logits_of([[(9, 1), (4, 1), (8, 2), (6, 1)]]), state, **options)
    assert state["token"].tolist() == [[2, 4, 8, 6]]
    assert (state["post_edit_steps"].item(), state["done"].item()) == (1, False)
    take_step(backend, logits_of([[(9, 1), (4, 1), (8, 1), (6, 1)]]), state, **options)
    assert (state["post_edit_steps"].item(), state["done"].item()) == (2, True)


@everywhere
@pytest.mark.parametrize("most", [0, 2])
def test_the_edit_budget(backend, most):
    """Predictions that never agree are edited `most` times; the next step reads no logits."""
    state = state_of([[1, 2]])
    options = {"rule": "joint_threshold", "max_post_edit_steps": most}
    for step in range(most):
        take_step(backend, logits_of([[(5 + step, 1)] * 2]), state, **options)
        assert state["token"].tolist() == [[5 + step] * 2]
        assert not state["done"].item()
    state["prediction"].fill_(8)  # what an earlier block has left there is no prediction of now
    state["confidence"].fill_(1.0)
    before = copy_of(state)
    take_step(backend, logits_of([[(9, 1), (9, 0)]]), state, **options)
    for name in ("token", "prediction", "confidence"):
        assert torch.equal(state[name], before[name])
    assert (state["post_edit_steps"].item(), state["done"].item()) == (most + 1, True)


@everywhere
@pytest.mark.parametrize("rule", ["threshold", "joint_threshold", "low_confidence"])
def test_the_floor_of_tokens_per_step(backend, rule):
    """LLaDA2.1's num_to_transfer: the surest, the leftmost among equals, NaN never with others."""
    state = state_of([[MASK] * 6])
    step = logits_of([[(1, 0), (2, 4), (3, 4), (4, 2), (5, 4), (6, 8)]])
    take_step(backend, step, state, rule=rule, tokens_per_step=3)
    assert state["token"].tolist() == [[MASK, 2, 3, 4, MASK, MASK]]
    take_step(backend, step, state, rule=rule, tokens_per_step=9, edit_threshold=1.0)
    assert state["token"].tolist() == [[MASK, 2, 3, 4, 5, 6]]
    take_step(backend, step, state, rule=rule, tokens_per_step=9, edit_threshold=1.0)
    assert state["token"].tolist() == [[1, 2, 3, 4, 5, 6]]


@everywhere
def test_a_passed_threshold_has_no_ceiling(backend):
    for rule, left in {"threshold": 1, "dinfer_threshold": 1, "low_confidence": 3}.items():
        state = state_of([[MASK] * 4])
        step = logits_of([[(2, 1), (3, 1), (4, 1), (5, 4)]])
        take_step(backend, step, state, rule=rule)
        assert (state["token"] == MASK).sum() == left


@everywhere
@pytest.mark.parametrize(("rule", "filled"), [("threshold", 1), ("dinfer_threshold", 3)])
def test_strictness(backend, rule, filled):
    """Exactly the threshold: SGLang's > fails, dInfer's >= passes."""
    state = state_of([[MASK] * 4])
    step = logits_of([[(2, 2), (3, 2), (4, 2), (5, 4)]])
    take_step(backend, step, state, rule=rule, threshold=0.5)
    assert (state["token"] != MASK).sum() == filled


@everywhere
def test_dinfers_margin(backend):
    """All that come within 1e-5 of the best are filled, and predicted masks never."""
    state = state_of([[MASK] * 5])
    logits = torch.zeros(1, 5, VOCAB)
    for j, (y, c) in enumerate([(3, 0.3), (4, 0.299995), (5, 0.2999), (MASK, 0.5), (6, 0.1)]):
        logits[0, j, y] = torch.tensor(c / (1 - c) * (VOCAB - 1)).log()
    take_step(backend, logits, state, rule="dinfer_threshold")
    assert state["token"].tolist() == [[3, 4, MASK, MASK, MASK]]
    state = state_of([[MASK, 3]])
    take_step(backend, logits_of([[(MASK, 1), (4, 1)]]), state, rule="dinfer_threshold")
    assert state["token"].tolist() == [[MASK, 3]]  # nothing to fill, and yet not at its end
    assert state["done"].tolist() == [False]


@everywhere
def test_temperature_scales_what_is_compared(backend):
    """Odds of 3 to 1 of each other id: 3 / 18 at temperature 1, 729 / 744 at 1 / 6."""
    logits = torch.zeros(1, 2, VOCAB)
    logits[..., 5] = torch.tensor(3.0).log()
    for temperature, filled in ((1.0, 1), (1 / 6, 2)):
        state = state_of([[MASK, MASK]])
        take_step(backend, logits, state, temperature=temperature)
        assert (state["token"] == 5).sum() == filled


@everywhere
def test_a_predicted_mask_stays_or_makes_a_mask(backend):
    """As in SGLang, where a block's masks are whatever its ids say."""
    options = {"rule": "joint_threshold", "edit_threshold": 0.5}
    state = state_of([[MASK, 3]])
    take_step(backend, logits_of([[(MASK, 1), (MASK, 1)]]), state, **options)
    assert state["token"].tolist() == [[MASK, MASK]]
    assert not state["done"].item()
    logits = logits_of([[(4, 2), (5, 2)]])
    logits[..., MASK] = 20
    take_step(backend, logits, state, **options, suppress_token=MASK)
    assert state["token"].tolist() == [[4, MASK]]
    assert state["confidence"].tolist() == [[0.5, 0.5]]


@everywhere
@every_rule
def test_literal_masks_of_a_prompt_stay(backend, rule):
    state = state_of([[MASK, 2, MASK], [MASK, MASK, MASK]], [[1, 1, 0], [1, 1, 1]])
    take_step(backend, logits_of([[(5, 1)] * 3] * 2), state, rule=rule)
    assert state["token"].tolist() == [[MASK, 2, 5], [MASK] * 3]
    assert state["done"].tolist() == [False, True]  # a row of nothing but prompt ends at once


@everywhere
@every_rule
def test_done_row_is_left_alone(backend, rule):
    state = state_of([[MASK, 3], [MASK, 3], [MASK, 3]])
    state["done"][1] = True
    before = copy_of(state)
    logits = logits_of([[(5, 2), (6, 2)]] * 3)
    logits[1] = torch.nan  # not even read
    take_step(backend, logits, state, rule=rule)
    for name in WRITTEN:
        assert torch.equal(state[name][1], before[name][1]), name
    assert state["token"][:, 0].tolist() == [5, MASK, 5]


# ---- Trajectories against the engines

KEEPING_VALUES = sorted(set(LAYOUTS) - {"one row expanded"})
THRESHOLDS = st.sampled_from([-1.0, 0.0, 0.125, 0.2, 0.25, 0.5, 0.7, 1.0])


def exact(value):
    """float32's value of a threshold, as the kernels compare it."""
    return torch.tensor(value).item()


HIDDEN = (11, 12, 13, 14)  # ids that no prediction below has


@st.composite
def hiding(draw, batch, block):
    """Options that hide these ids, by a mask for all rows or of each, or one by one."""
    if draw(st.booleans()):
        return {"suppress_tokens": HIDDEN}
    bits = torch.ones(*draw(st.sampled_from([(1, 1), (batch, block)])), 32, dtype=torch.bool)
    bits[..., HIDDEN] = False
    return {"allowed": packed(bits)}


def follow_the_engines(draw, backend, rule):
    """A batch of requests, each against its engine alone, to the last bit of every decision."""
    slow = backend == "triton"
    generator = random_generator(draw)
    batch, block = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5] if slow else [1, 4, 33]))

    def choose(values):
        values = torch.tensor(values)
        return values[torch.randint(len(values), (batch, block), generator=generator)].tolist()

    token, prompt = choose([1, 2, 3, MASK, MASK]), choose([False, False, False, True])
    shared = {
        "tokens_per_step": draw(st.integers(1, 4)),
        "max_post_edit_steps": draw(st.integers(0, 3)),
    }
    taus = [(exact(draw(THRESHOLDS)), exact(draw(THRESHOLDS))) for _ in range(batch)]
    engines = [Engine(MASK, *each, **shared) for each in taus]
    options = {"rule": rule, "threshold": taus[0][0], "edit_threshold": taus[0][1], **shared}
    if batch > 1:
        options |= {"threshold": 0.0, "thresholds": torch.tensor(taus)}

    layout, dtype = LAYOUTS[draw(st.sampled_from(KEEPING_VALUES))], draw(FLOATS)
    hides = draw(st.booleans())
    if hides:
        options |= draw(hiding(batch, block))
    state = state_of(token, prompt)
    done = [False] * batch
    for _ in range(4 if slow else 7):
        y, m = choose([1, 2, 3, 7, MASK]), choose([1, 1, 2, 4, 0])  # 0 is for NaN
        pairs = [
            [(y, min(m, 1) if y == MASK else m) for y, m in zip(*row, strict=True)]
            for row in zip(y, m, strict=True)
        ]
        logits = logits_of(pairs)
        if hides:
            logits[..., HIDDEN] = 9.0  # more than any other
        take_step(backend, layout(logits.to(dtype)), state, **options)
        for b in range(batch):
            if done[b]:
                continue
            c = [1 / m if m else float("nan") for _, m in pairs[b]]
            token[b], done[b] = ENGINES[rule](engines[b], token[b], prompt[b], y[b], c)
        assert state["token"].tolist() == token
        assert state["done"].tolist() == done
        if rule == "joint_threshold":
            counts = [engine.post_edit_steps for engine in engines]
            assert state["post_edit_steps"].tolist() == counts


@everywhere
@every_rule
def test_trajectories_of_the_engines(backend, rule):
    run_examples(follow_the_engines, backend, rule=rule)


# Around a warp and a block of threads; a vocabulary of several tiles, one of them cut
@pytest.mark.parametrize(
    ("backend", "batch", "block", "vocab", "dtype"),
    [
        ("cpu", 4, 32, 5000, torch.bfloat16),
        ("cpu", 2, 300, 70, torch.float32),
        ("triton", 3, 3, 9001, torch.float32),
        pytest.param("cuda", 4, 32, 157184, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
@every_rule
def test_random_blocks(backend, batch, block, vocab, dtype, rule):
    logits, state = edit_case(batch, block, vocab, dtype)
    expected = copy_of(state)
    for _ in range(2):
        take_step("reference", logits, expected, **EDIT_OPTIONS, rule=rule)
        take_step(backend, logits, state, **EDIT_OPTIONS, rule=rule)
        for name in ("token", "prediction", "post_edit_steps", "done"):
            assert torch.equal(state[name], expected[name]), name
        assert_close(state["confidence"], expected["confidence"], REFERENCE_RTOL)


def test_strided_logits_and_a_mask_outside_the_vocabulary():
    """As an engine passes them that cuts the padding off."""
    logits, state = edit_case(2, 5, mask_token_id=60)
    padded = torch.full((2, 5, 48), 77.0)
    padded[..., :40] = logits
    expected = copy_of(state)
    take_step("cpu", padded[..., :40], state, mask_token_id=60)
    take_step("reference", logits, expected, mask_token_id=60)
    assert torch.equal(state["token"], expected["token"])


def test_an_empty_batch():
    state = state_of([[1, 2]])
    empty = {name: tensor[:0] for name, tensor in state.items()}
    for backend in ("cpu", "triton", "reference"):
        take_step(backend, torch.zeros(0, 2, VOCAB), empty)


# ---- Errors: nothing is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.randn(4, VOCAB)}, r"logits must be \[B, K, V\] .*, got \[4, 16\]"),
        ({"logits": torch.randn(2, 0, VOCAB)}, r"logits must be \[B, K, V\] .*, got \[2, 0, 16\]"),
        ({"logits": torch.randn(2, 4, VOCAB).double()}, "logits must be float32.*, got float64"),
        ({"editable": torch.ones(2, 4)}, "editable must be bool, got float32"),
        ({"token": torch.ones(2, 4).int()}, "token must be int64, got int32"),
        ({"token": torch.ones(4, 2).long().t()}, r"token is written in place .*contiguous"),
        ({"prediction": torch.ones(2, 5).long()}, r"prediction must have shape \[2, 4\]"),
        ({"confidence": torch.ones(2, 4).half()}, "confidence must be float32, got float16"),
        ({"post_edit_steps": torch.zeros(2).long()}, "post_edit_steps must be int32, got int64"),
        ({"done": torch.zeros(3).bool()}, r"done must have shape \[2\] .*, got \[3\]"),
        ({"thresholds": torch.zeros(2, 3)}, r"thresholds must have shape \[2, 2\] .*\[2, 3\]"),
        ({"mask_token_id": -1}, "mask_token_id must be a token id, got -1"),
        ({"threshold": float("nan")}, "threshold must be a number, got NaN"),
        ({"edit_threshold": float("nan")}, "edit_threshold must be a number, got NaN"),
        ({"tokens_per_step": 0}, "tokens_per_step must be at least 1, got 0"),
        ({"max_post_edit_steps": -1}, "max_post_edit_steps must be in 0.*, got -1"),
        ({"temperature": 0.0}, "temperature must be at least 1e-30"),
        ({"suppress_token": 16}, "suppress_token must be -1 .*, got 16"),
    ],
)
def test_bad_input(changes, message):
    arguments = state_of([[MASK, 1, MASK, 2]] * 2) | {"logits": torch.randn(2, 4, VOCAB)}
    arguments |= {"mask_token_id": MASK, "threshold": 0.5, "rule": "joint_threshold"} | changes
    before = {name: arguments[name].clone() for name in WRITTEN}
    with pytest.raises(RuntimeError, match="^edit_step_: " + message):
        dmax_kernels.edit_step_(**arguments)
    for name in WRITTEN:
        assert torch.equal(arguments[name], before[name]), name


def test_buffers_that_share_memory_are_an_error():
    arguments = state_of([[MASK, 1]])
    arguments["prediction"] = arguments["token"]
    with pytest.raises(RuntimeError, match=r"^edit_step_: .* must not share memory"):
        dmax_kernels.edit_step_(
            torch.randn(1, 2, VOCAB), **arguments, mask_token_id=MASK, threshold=0.5
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_rule(backend):
    with pytest.raises(ValueError, match=r"^edit_step_: rule must be one of .* got 'confidence'"):
        take_step(backend, torch.randn(1, 2, VOCAB), state_of([[MASK, 1]]), rule="confidence")


def test_bad_rule_number():
    state = state_of([[MASK, 1]])
    with pytest.raises(RuntimeError, match=r"^edit_step_: rule must be 0 \(threshold\).* got 4"):
        torch.ops.dmax.edit_step_(torch.randn(1, 2, 9), *state.values(), MASK, 0.5, 0.5, rule=4)
