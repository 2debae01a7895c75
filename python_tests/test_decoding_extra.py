"""NAP's parallel-forced decoding of a canvas."""

import pytest
import torch
from decoding_models import MASK, PAD, ExactModel, RandomModel, random_prompts

from dmax_kernels.decoding.extra import Canvas, arness, commit_order, nap_generate
from dmax_kernels.models.checkpoint import load_checkpoint

# Two paths of 4 and 6 tokens after headers of 2 and 1, a summary of 3 after a header of 2
CANVAS = Canvas.build([[5, 6], [7]], [4, 6], [8, 9], 3)
SLOT = [-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, 1, 1, 1, -1, -1, 2, 2, 2]
HEADERS = {0: 5, 1: 6, 6: 7, 13: 8, 14: 9}
# One path of 3 tokens and a summary of 2
OTHER = Canvas.build([[10]], [3], [], 2)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_canvas_is_eq_5():
    assert CANVAS.slot.tolist() == SLOT
    assert {j: token for j, token in enumerate(CANVAS.token.tolist()) if SLOT[j] < 0} == HEADERS
    assert (CANVAS.length, CANVAS.num_slots) == (18, 2)
    slots = [[24, 25, 26, 27], [29, 30, 31, 32, 33, 34], [37, 38, 39]]
    for answer in (torch.arange(22, 40), range(22, 45)):  # what follows the canvas is not read
        assert CANVAS.read(answer) == slots


def test_closing_tags_are_tags():
    closed = Canvas.build([[5], [6]], [2, 3], [7], 1, closings=[[8, 9], []], summary_closing=[10])
    assert closed.slot.tolist() == [-1, 0, 0, -1, -1, -1, 1, 1, 1, -1, 2, -1]
    tags = closed.token[closed.slot < 0].tolist()
    assert tags == [5, 8, 9, 6, 7, 10]
    output = nap_generate(RandomModel(), random_prompts(2, 5), closed)
    for answer in output.answers:
        assert [answer[i] for i in (0, 3, 4, 5, 9, 11)] == tags
        assert [len(slot) for slot in closed.read(answer)] == [2, 3, 1]


def turns(left, tokens_per_step):
    """How many tokens each slot gets in a step: one in turn to the slot that has had fewest."""
    had = [length - masked for length, masked in zip((4, 6), left, strict=True)]
    due = [0, 0]
    for _ in range(tokens_per_step):
        open_slots = [s for s in (0, 1) if left[s] > due[s]]
        if open_slots:
            due[min(open_slots, key=lambda s: had[s] + due[s])] += 1
    return due


@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 4, 9])
def test_slots_take_turns_and_the_summary_waits(tokens_per_step, ops):
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
            due = [*turns(left[:2], tokens_per_step), 0]
            if left[:2] == [0, 0]:
                due = [0, 0, min(tokens_per_step, left[2])]
            assert [advanced.count(slot) for slot in (0, 1, 2)] == due
            # No slot waits: two that are open are at most one token apart
            left = [a - b for a, b in zip(left, due, strict=True)]
            assert 0 in left[:2] or abs((4 - left[0]) - (6 - left[1])) <= 1
            for j, token in HEADERS.items():  # clamped
                assert step["token"][7 + j] == token
        assert left == [0, 0, 0]
        answer = output.sequences[row, 7:].tolist()
        assert answer == block["steps"][-1]["token"][7:]
        assert MASK not in answer
        assert CANVAS.read(answer)[2] == answer[15:]
    steps = -(-10 // tokens_per_step) + -(-3 // tokens_per_step)
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
    output = nap_generate(
        RandomModel(), random_prompts(8, 7), CANVAS, tokens_per_step=2, trace=True, ops="reference"
    )
    rows = output.trace.to_dict()["rows"]
    for row in rows:
        first = row["blocks"][0]["steps"][0]
        for slot in (0, 1):  # one token each
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
    for slots in map(canvas.read, output.answers):
        assert [len(slot) for slot in slots] == [12, 8, 5]
        assert mask not in {token for slot in slots for token in slot}
    block = output.trace.to_dict()["rows"][0]["blocks"][0]
    assert block["start"] == 32
    assert block["editable"] == [0] * 3 + [1] * 12 + [0] + [1] * 8 + [0] + [1] * 5 + [0] * 2
    assert output.num_forwards.tolist() == [20 + 5] * 2
    assert block["steps"][0]["token"][30:] == [model.config.pad_token_id] * 2


@pytest.mark.parametrize("use_cache", [False, True])
def test_rows_of_a_batch_have_canvases_of_their_own(use_cache):
    """Prompts and canvases of several lengths: each row as it is alone, with padding behind it."""
    model = ExactModel()
    prompts = [random_prompts(1, length, seed=length)[0] for length in (9, 40, 46, 32)]
    canvases = [CANVAS, OTHER, CANVAS, OTHER]
    options = {"block_length": 32, "tokens_per_step": 2, "use_cache": use_cache, "trace": True}
    together = nap_generate(model, prompts, canvases, **options)
    assert together.num_forwards.tolist() == [5 + 2, 2 + 1, 5 + 2, 2 + 1]
    rows = together.trace.to_dict()["rows"]
    for row, (prompt, canvas) in enumerate(zip(prompts, canvases, strict=True)):
        alone = nap_generate(model, [prompt], canvas, **options)
        answer = together.answers[row]
        assert answer[: canvas.length] == alone.answers[0][: canvas.length]
        assert set(answer[canvas.length :]) <= {PAD}
        assert rows[row] == alone.trace.to_dict()["rows"][0]
        tags = canvas.slot < 0
        assert torch.equal(torch.tensor(answer)[: canvas.length][tags], canvas.token[tags])
        assert MASK not in answer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Canvas.build([], [], [], 3), "slot_lengths must be one for each of at least 1"),
        (lambda: Canvas.build([[1]], [2, 3], [], 3), "at least 1 header, got 2 for 1"),
        (
            lambda: Canvas.build([[1]], [2], [], 3, closings=[]),
            "closings must be one for each of at least 1 header, got 0 for 1",
        ),
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
            r"input_ids must be of one length where block_length is None, got lengths \[1, 2\]",
        ),
        (
            lambda: nap_generate(RandomModel(), [[3, 2], [3, 4]], [CANVAS, OTHER]),
            r"canvas must be of one length where block_length is None, got lengths \[6, 18\]",
        ),
        (
            lambda: nap_generate(RandomModel(), [[3, 2], [3, 4]], [CANVAS]),
            "canvas must be a Canvas, or one for each of 2 prompts, got 1 of them",
        ),
        (
            lambda: nap_generate(RandomModel(), [[3]], [CANVAS.token]),
            "canvas must be a Canvas, or one for each of 1 prompts, got",
        ),
        (lambda: CANVAS.read([1] * 17), "at least as long as the canvas, 18 tokens, got 17"),
        (
            lambda: nap_generate(RandomModel(), random_prompts(1, 9), CANVAS, tokens_per_step=0),
            "tokens_per_step must be a positive integer, got 0",
        ),
    ],
)
def test_mistakes_about_a_canvas_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
