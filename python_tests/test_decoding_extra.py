"""NAP's parallel-forced decoding of a canvas, and ARness: how left-to-right a decoding was."""

import math
import random

import pytest
import torch
from decoding_models import MASK, RandomModel, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from dmax_kernels.decoding.extra import (
    Canvas,
    arness,
    commit_order,
    global_arness,
    local_arness,
    nap_generate,
)
from dmax_kernels.models.checkpoint import load_checkpoint

# Two paths of 4 and 6 tokens after headers of 2 and 1, a summary of 3 after a header of 2
CANVAS = Canvas.build([[5, 6], [7]], [4, 6], [8, 9], 3)
SLOT = [-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, -1, -1, 2, 2, 2]
HEADERS = {0: 5, 1: 6, 6: 7, 13: 8, 14: 9}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These tensors are tiny: a second thread only costs its synchronisation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_canvas_is_eq_5():
    assert CANVAS.slot.tolist() == SLOT
    assert {j: token for j, token in enumerate(CANVAS.token.tolist()) if SLOT[j] < 0} == HEADERS
    assert (CANVAS.length, CANVAS.num_slots, CANVAS.offset) == (18, 2, 2)
    sequences = torch.arange(2 * 20).view(2, 20)
    assert CANVAS.read(sequences)[1] == [
        [24, 25, 26, 27],
        [29, 30, 31, 32, 33, 34],
        [37, 38, 39],
    ]


@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 9])
def test_every_slot_advances_at_every_step_and_the_summary_waits(tokens_per_step, ops):
    prompts = random_prompts(3, 7)
    output = nap_generate(
        RandomModel(),
        prompts,
        CANVAS,
        tokens_per_step=tokens_per_step,
        ops=ops,
        trace=True,
    )
    assert torch.equal(output.sequences[:, :7], prompts)
    for row, traced in enumerate(output.trace.to_dict()["rows"]):
        (block,) = traced["blocks"]  # all of it in one block: every position sees every other
        assert block["start"] == 0
        assert block["editable"] == [0] * 7 + [int(slot >= 0) for slot in SLOT]
        left = [4, 6, 3]
        for step in block["steps"]:
            advanced = [SLOT[j - 7] for j in step["promoted"]]
            due = [2] if left[:2] == [0, 0] else [0, 1]
            for slot in due:
                assert advanced.count(slot) == min(tokens_per_step, left[slot])
                left[slot] -= advanced.count(slot)
            assert len(advanced) == sum(advanced.count(slot) for slot in due)
            for j, token in HEADERS.items():  # clamped
                assert step["token"][7 + j] == token
        assert left == [0, 0, 0]
        answer = output.sequences[row, 7:].tolist()
        assert answer == block["steps"][-1]["token"][7:]
        assert MASK not in answer
        assert CANVAS.read(output.sequences)[row][2] == answer[15:]
    steps = -(-6 // tokens_per_step) + -(-3 // tokens_per_step)
    assert output.num_forwards.tolist() == [steps] * 3


def test_the_first_pass_reads_headers_and_masks():
    class Keeping(RandomModel):
        def forward(self, inputs_embeds, *args, **kwargs):
            self.inputs.append(inputs_embeds.clone())
            return super().forward(inputs_embeds, *args, **kwargs)

    model, prompts = Keeping(), random_prompts(2, 7)
    model.inputs = []
    nap_generate(model, prompts, CANVAS)
    read = torch.cdist(model.inputs[0], model.words.weight[None]).argmin(dim=-1)
    canvas = [HEADERS.get(j, MASK) for j in range(18)]
    assert read.tolist() == [[*prompt, *canvas] for prompt in prompts.tolist()]


def test_inside_a_slot_confidence_decides():
    """The most confident position of each slot first, left to right only by chance."""
    output = nap_generate(RandomModel(), random_prompts(8, 7), CANVAS, trace=True, ops="reference")
    rows = output.trace.to_dict()["rows"]
    for row in rows:
        first = row["blocks"][0]["steps"][0]
        for slot in (0, 1):
            places = [7 + j for j in range(18) if SLOT[j] == slot]
            best = max(places, key=lambda j: first["confidence"][j])
            assert first["confidence"][best] == max(
                first["confidence"][j] for j in first["promoted"] if j in places
            )
    in_first_slot = [[p for p in commit_order(row) if 9 <= p < 13] for row in rows]
    assert any(order != sorted(order) for order in in_first_slot)
    assert max(arness(output.trace)) < 0.9  # 1 for left to right


def test_rows_do_not_depend_on_each_other_nor_on_an_eos_in_a_slot():
    model, prompts = RandomModel(), random_prompts(8, 7)
    model.config.eos_token_id = 14
    together = nap_generate(model, prompts, CANVAS)
    assert (together.num_tokens == CANVAS.length).all()
    alone = torch.cat([nap_generate(model, row[None], CANVAS).sequences for row in prompts])
    assert torch.equal(alone, together.sequences)
    assert (together.sequences[:, 7:-1] == 14).any()  # and yet none of them ended early


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_block_diffusion_model_takes_a_canvas_that_fits_its_block(use_cache):
    """The shipped model, with its own block length: 32 positions after whole blocks of prompt."""
    model = load_checkpoint("base")[0]
    canvas = Canvas.build([[20], [21]], [12, 8], [22], 5)  # 28 positions
    prompts = torch.randint(4, 20, (2, 34), generator=torch.Generator().manual_seed(0))
    output = nap_generate(model, prompts, canvas, block_length=32, use_cache=use_cache, trace=True)
    mask = model.config.mask_token_id
    for slots in canvas.read(output.sequences):
        assert [len(slot) for slot in slots] == [12, 8, 5]
        assert mask not in {token for slot in slots for token in slot}
    block = output.trace.to_dict()["rows"][0]["blocks"][0]
    assert block["start"] == 32
    assert block["editable"] == [0] * 3 + [1] * 12 + [0] + [1] * 8 + [0] + [1] * 5 + [0] * 2
    assert output.num_forwards.tolist() == [12 + 5] * 2
    assert block["steps"][0]["token"][30:] == [model.config.pad_token_id] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Canvas.build([], [], [], 3), "slot_lengths must be one length for each of at"),
        (lambda: Canvas.build([[1]], [2, 3], [], 3), "at least 1 header, got 2 for 1"),
        (
            lambda: Canvas.build([[1]], [0], [], 3),
            "length of a slot must be a positive integer, got 0",
        ),
        (
            lambda: Canvas.build([[1]], [2], [], 0),
            "length of a slot must be a positive integer, got 0",
        ),
        (
            lambda: nap_generate(RandomModel(), random_prompts(1, 9), CANVAS, block_length=16),
            "canvas must fit into a block of 16 after 9 tokens of the prompt, got 18 positions",
        ),
        (
            lambda: nap_generate(RandomModel(), [[3, 2], [3]], CANVAS),
            r"input_ids must be prompts of one length, got \[1, 2\]",
        ),
        (
            lambda: nap_generate(RandomModel(), random_prompts(1, 9), CANVAS, tokens_per_step=0),
            "tokens_per_step must be a positive integer, got 0",
        ),
    ],
)
def test_mistakes_about_a_canvas_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


orders = st.integers(0, 12).flatmap(lambda n: st.permutations(range(3, 3 + n)))


@pytest.mark.parametrize(
    ("order", "k", "expected_global", "expected_local"),
    [
        ([0, 1, 2, 3], 1, 1, 1),
        ([0, 1, 2, 3], 3, 1, 1),
        ([3, 2, 1, 0], 1, 1 / 4, 0),  # the last one left is always the leftmost
        ([3, 2, 1, 0], 2, 2 / 4, 0),
        # masked before each commit: 0123, 012, 02, 2
        ([3, 1, 0, 2], 1, 2 / 4, 0),
        ([3, 1, 0, 2], 2, 3 / 4, 0),
        # pairs: 0-1 yes, 1-4 no, 4-5 yes, 5-6 yes, 6-2 no, 2-3 yes
        ([0, 1, 4, 5, 6, 2, 3], 1, 4 / 7, 4 / 6),
        # triples: 014 no, 145 no, 456 yes, 562 no, 623 no
        ([0, 1, 4, 5, 6, 2, 3], 2, 4 / 7, 1 / 5),
        ([10, 20], 1, 1, 0),  # a gap is no successor, but nothing masked lies in it
    ],
)
def test_arness_by_hand(order, k, expected_global, expected_local):
    assert global_arness(order, k) == pytest.approx(expected_global)
    assert local_arness(order, k) == pytest.approx(expected_local)


@settings(max_examples=200, deadline=None)
@given(orders, st.integers(1, 6))
def test_arness_is_its_definition(order, k):
    masked, hits = set(order), 0
    for position in order:
        hits += position in sorted(masked)[:k]
        masked.remove(position)
    spans = [
        all(order[c - i] == order[c] - i for i in range(1, k + 1)) for c in range(k, len(order))
    ]
    for measure, right, count in (
        (global_arness, hits, len(order)),
        (local_arness, sum(spans), len(spans)),
    ):
        actual = measure(order, k)
        assert actual == pytest.approx(right / count) if count else math.isnan(actual)


def test_a_random_order_is_far_from_autoregressive():
    """Expectation of Global-ARness@1 of a random order: the harmonic mean H_L / L."""
    rng = random.Random(0)
    scores = [global_arness(rng.sample(range(32), 32)) for _ in range(500)]
    expected = sum(1 / n for n in range(1, 33)) / 32
    assert sum(scores) / len(scores) == pytest.approx(expected, abs=0.01)


TRACE = {
    "rows": [
        {
            "blocks": [
                {"start": 4, "steps": [{"promoted": [1]}, {"promoted": []}, {"promoted": [3, 2]}]},
                {"start": 8, "steps": [{"promoted": [2, 3]}, {"promoted": [0, 1]}]},
            ]
        },
        {"blocks": [{"start": 4, "steps": [{"promoted": [0, 1, 2, 3]}]}]},
    ]
}


def test_a_trace_gives_its_order_step_by_step():
    assert commit_order(TRACE["rows"][0]) == [5, 6, 7, 10, 11, 8, 9]
    assert commit_order(TRACE["rows"][0], end=10) == [5, 6, 7, 8, 9]
    assert arness(TRACE) == pytest.approx([5 / 7, 1])
    assert arness(TRACE, 2) == pytest.approx([5 / 7, 1])
    assert arness(TRACE, 3) == [1, 1]
    assert arness(TRACE, scope="local") == pytest.approx([4 / 6, 1])
    assert arness(TRACE, ends=[10, 8]) == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: global_arness([0, 1], 0), "global_arness: k must be a positive integer, got 0"),
        (lambda: local_arness([0, 0]), r"local_arness: order must name each position once, got"),
        (lambda: arness(TRACE, scope="near"), "scope must be 'global' or 'local', got 'near'"),
        (lambda: arness(TRACE, ends=[1]), "ends must be one position for each of 2 rows, got 1"),
    ],
)
def test_mistakes_about_an_order_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
