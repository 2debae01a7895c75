"""Batches of unequal rows: padding, independence, thresholds per row, streaming, late polling."""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from decoding_models import EOS, ExactModel, random_prompts

from dmax_kernels.decoding import RULES, Rule, graph, spd_generate
from dmax_kernels.decoding.graph import StepRunner
from dmax_kernels.ops.spd_step import SEMANTICS

K = 8
# In blocks of 8: no whole block; whole blocks alone; with tails; one far longer than the others
LENGTHS = [3, 8, 16, 21, 53]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts():
    return [random_prompts(1, n, seed=n)[0] for n in LENGTHS]


def decode(model, prompts, **changes):
    # This eos appears in some answers, at different blocks: rows leave at different times
    arguments = {"block_length": K, "max_new_tokens": 27, "eos_token_id": 3}
    return spd_generate(model, prompts, **{**arguments, **changes})


def assert_same(actual, expected):
    assert actual.answers == expected.answers
    assert actual.promotions == expected.promotions
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(actual.block_forwards, expected.block_forwards)
    if expected.logprobs is not None:
        assert torch.equal(actual.logprobs, expected.logprobs)
        assert torch.equal(actual.step_map, expected.step_map)


# What a captured step holds besides a rule's memory
HELD = {
    "sampled": {"temperature": [1.0, 0, 0.5, 2.0, 1.0], "seed": [1, 2, 3, 4, 5], "logprobs": True},
    "penalized": {
        "rule": "threshold",
        "presence_penalty": [1.0, 0.0, 0.5, 2.0, 1.0],
        "logit_bias": [{4: 1.0}, None, None, {5: 2.0}, None],
    },
}


@pytest.mark.parametrize(
    ("rule", "semantics", "ops", "tau_dec"),
    [
        *(("spd", semantics, "fused", tau) for semantics in SEMANTICS for tau in (0.95, 0.0)),
        ("spd", "paper", "reference", 0.5),
        *((rule, "paper", "fused", 0.5) for rule in RULES),
    ],
)
def test_five_unequal_prompts_are_five_single_runs(prompts, rule, semantics, ops, tau_dec):
    model = ExactModel()
    settings = {"rule": rule, "semantics": semantics, "ops": ops, "tau_dec": tau_dec}
    together = decode(model, prompts, **settings)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], **settings)
        assert alone.answers[0] == together.answers[row]
        assert alone.promotions[0] == together.promotions[row]
        blocks = alone.block_forwards.shape[1]
        assert torch.equal(alone.block_forwards[0], together.block_forwards[row, :blocks])
        assert not together.block_forwards[row, blocks:].any()
        assert together.num_refreshes[row] == alone.num_refreshes[0]


def test_rows_of_that_test_end_and_converge_apart(prompts):
    output = decode(ExactModel(), prompts)
    assert len(set(output.num_blocks.tolist())) > 1
    assert len(set(output.block_forwards[:, 0].tolist())) > 1
    # No row waits for another: the batch makes as many passes as its longest row
    assert output.statistics.forwards == output.num_forwards.max()
    assert output.statistics.row_forwards == output.num_forwards.sum()


def test_rows_that_ended_are_in_no_further_pass(prompts):
    model = ExactModel()
    rows = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (
        rows.append(kwargs["inputs_embeds"].shape[0]),
        forward(*args, **kwargs),
    )[1]
    output = decode(model, prompts)
    live = [int((output.num_forwards > n).sum()) for n in range(int(output.num_forwards.max()))]
    assert rows[1:] == live  # the first is the prefill
    assert live[0] == 5
    assert live[-1] < 5


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_either_side_is_a_list_of_prompts(prompts, use_cache):
    model = ExactModel()
    expected = decode(model, prompts, use_cache=use_cache)
    longest = max(LENGTHS)
    ids = torch.full((5, longest), EOS)  # padding is not read: any token will do
    mask = torch.zeros(5, longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        begin = [0, longest - len(prompt), 2][row % 3] if len(prompt) < longest else 0
        ids[row, begin : begin + len(prompt)] = prompt
        mask[row, begin : begin + len(prompt)] = 1
    actual = decode(model, ids, attention_mask=mask, use_cache=use_cache)
    assert_same(actual, expected)
    assert_same(decode(model, ids, attention_mask=mask.bool(), use_cache=not use_cache), expected)


def test_sequences_are_prompts_padded_on_the_left_and_answers(prompts):
    output = decode(ExactModel(), prompts, pad_token_id=0)
    longest = max(LENGTHS)
    assert output.sequences.shape == (5, longest + 27)
    for row, prompt in enumerate(prompts):
        padding, rest = output.sequences[row].split([longest - len(prompt), len(prompt) + 27])
        assert not padding.any()
        assert torch.equal(rest[: len(prompt)], prompt)
        answer = output.answers[row]
        assert rest[len(prompt) :].tolist() == answer + [0] * (27 - len(answer))
        assert output.num_tokens[row] == len(answer)


def test_thresholds_per_row_are_those_of_single_runs(prompts):
    model = ExactModel()
    taus = [(0.95, 0.9), (0.0, 0.9), (0.5, 0.3), (0.0, 0.0), (0.3, 1.0)]
    for rule in ("spd", "hybrid", "hard_prefix"):
        together = decode(model, prompts, thresholds=taus, rule=rule)
        alone = [
            decode(model, [prompt], tau_dec=tau_dec, tau_acc=tau_acc, rule=rule)
            for prompt, (tau_dec, tau_acc) in zip(prompts, taus, strict=True)
        ]
        assert together.promotions == [each.promotions[0] for each in alone]
        assert together.answers == [each.answers[0] for each in alone]
    assert together.promotions != decode(model, prompts, rule=rule).promotions
    table = torch.tensor(taus)
    decode(model, prompts, thresholds=table)  # rows leave, and others take their places
    assert torch.equal(table, torch.tensor(taus))


@pytest.mark.parametrize("lag", [1, 3])
def test_late_polling_changes_no_result(prompts, lag):
    model = ExactModel()
    expected = decode(model, prompts, trace=True)
    actual = decode(model, prompts, poll_lag=lag, trace=True)
    assert_same(actual, expected)
    assert actual.trace.to_dict() == expected.trace.to_dict()
    assert actual.statistics.forwards > expected.statistics.forwards  # its price


def test_blocks_stream_in_order_and_add_up_to_the_answers(prompts):
    blocks = []
    output = decode(ExactModel(), prompts, on_block=blocks.append)
    for row in range(5):
        own = [block for block in blocks if block.row == row]
        assert [len(own[0].token_ids), K] >= [K - LENGTHS[row] % K, 0]
        assert [t for block in own for t in block.token_ids] == output.answers[row]
        assert [block.forwards for block in own] == [
            n for n in output.block_forwards[row].tolist() if n
        ]
        starts = [sum(len(b.token_ids) for b in own[:i]) for i in range(len(own))]
        assert [block.start for block in own] == starts
        assert [block.finished for block in own] == [False] * (len(own) - 1) + [True]
    # They come while other rows are still decoding, not row by row
    assert [block.row for block in blocks] != sorted(block.row for block in blocks)


def test_promotions_count_every_position_once(prompts):
    output = decode(ExactModel(), prompts, trace=True, tau_dec=0.3)
    for row, traced in enumerate(output.trace.to_dict()["rows"]):
        steps = [step for block in traced["blocks"] for step in block["steps"]]
        assert output.promotions[row] == [len(step["promoted"]) for step in steps]
        assert sum(output.promotions[row]) == sum(sum(b["editable"]) for b in traced["blocks"])


def test_statistics_add_up(prompts):
    output = decode(ExactModel(), prompts)
    s = output.statistics.as_dict()
    assert s["tokens"] == output.num_tokens.sum()
    assert s["tokens_per_forward"] == s["tokens"] / s["row_forwards"]
    seconds = s["prefill_seconds"] + s["decode_seconds"]
    assert s["tokens_per_second"] == pytest.approx(s["tokens"] / seconds)
    assert 0 < s["refreshing_forwards"] < s["forwards"]
    assert s["captured_steps"] == 0


class Snap(Rule):
    """Takes every prediction at once and records the start of each block."""

    def __init__(self):
        self.begun = []

    def begin_(self, state, rows, embedding, config):
        self.begun += zip(state.row[rows].tolist(), state.start[rows].tolist(), strict=True)

    def update_(self, logits, embedding, state, config):
        y, c = config.functions.top1_confidence(logits, suppress_token=config.suppress_token)
        live = state.editable & ~state.converged[:, None]
        state.token.copy_(torch.where(live, y, state.token))
        state.confidence.copy_(torch.where(live, c, state.confidence))
        state.masked.logical_and_(state.converged[:, None])
        state.step.add_(~state.converged)
        state.converged.fill_(True)


def test_a_rule_of_ones_own(prompts):
    rule = Snap()
    output = decode(ExactModel(), prompts, rule=rule)
    assert output.block_forwards.max() == 1
    expected = [
        (row, (LENGTHS[row] // K + block) * K)
        for row in range(5)
        for block in range(int(output.num_blocks[row]))
    ]
    assert sorted(rule.begun) == expected


class FakeCapture:
    """Captures as CUDA graphs do: it records where the buffers are, not what is in them."""

    def __init__(self):
        self.replays = 0

    def __call__(self, step):
        batch = step.func.__self__
        addresses = {name: each.data_ptr() for name, each in batch.state.buffers()}

        def replay():
            self.replays += 1
            for name, each in batch.state.buffers():
                assert each.data_ptr() == addresses[name], name
            step()

        return replay


@pytest.mark.parametrize("rule", ["spd", "credit", "edit", *HELD])  # two have a memory
def test_steps_are_captured_at_their_second_turn_and_replayed(prompts, monkeypatch, rule):
    model = ExactModel()
    options = HELD.get(rule, {"rule": rule})
    expected = decode(model, prompts, **options)
    capture = FakeCapture()
    runner = StepRunner(capture)
    monkeypatch.setattr("dmax_kernels.decoding.spd.make_runner", lambda *_: runner)
    actual = decode(model, prompts, **options)
    assert_same(actual, expected)
    assert actual.statistics.captured_steps == len(runner.replays) > 1
    assert capture.replays > actual.statistics.forwards // 2
    # Rows leave captured batches by halves: 5, then 2, then 1
    assert {rows for rows, _, _ in runner.replays} <= {5, 2, 1}


def test_a_step_that_cannot_be_captured_runs_plainly(prompts, monkeypatch):
    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    runner = StepRunner(refuse)
    monkeypatch.setattr("dmax_kernels.decoding.spd.make_runner", lambda *_: runner)
    output = decode(ExactModel(), prompts)
    assert_same(output, decode(ExactModel(), prompts))
    assert output.statistics.capture_refusal == "operation not permitted when stream is capturing"
    assert output.statistics.captured_steps == 0
    runner = StepRunner(refuse, required=True)
    with pytest.raises(ValueError, match="cuda_graph must be False or None for this model"):
        decode(ExactModel(), prompts)


class FakeCuda:
    """Notes on which device work is captured: in a graph, that of the graph's stream."""

    def __init__(self):
        self.captures, self.current = [], torch.device("cuda", 0)
        self.CUDAGraph = lambda: SimpleNamespace(replay=None)
        self.Stream = lambda device: SimpleNamespace(device=device)
        self.graph_pool_handle = lambda: (0, 1)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, device
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        self.captures.append((self.current, stream, []))  # PyTorch waits for the current device
        with self.device(stream.device):
            yield

    def zeros(self, *shape, device):
        assert device == self.current
        self.captures[-1][-1].append(device)


def test_a_capture_and_its_end_are_on_the_models_device(monkeypatch):
    """Also where an earlier model was on another device, which is still the current one."""
    cuda = FakeCuda()
    monkeypatch.setattr(graph, "torch", SimpleNamespace(cuda=cuda, zeros=cuda.zeros))
    monkeypatch.setattr(graph, "capture_stream", cache(graph.capture_stream.__wrapped__))
    devices = [torch.device("cuda", index) for index in (0, 1, 1)]
    earlier, runner, later = (graph.make_runner(None, device).capture for device in devices)
    assert runner.stream is later.stream

    def work():
        cuda.zeros(1, device=devices[1])

    def fail():
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    earlier(lambda: None)
    runner(work)
    with pytest.raises(RuntimeError, match="not permitted"):
        runner(fail)
    assert [waited for waited, _, _ in cuda.captures] == [devices[0], *3 * devices[1:2]]
    for waited, stream, done in cuda.captures[1:]:
        assert waited == stream.device
        assert done == [devices[1]]  # nor is the last one empty, of which PyTorch would warn


def device_model():
    return ExactModel().cuda()  # float64: a graph attends to more positions, masked off


@pytest.mark.gpu
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("rule", ["spd", "local_leap", "prophet", "sched", "credit", "edit", *HELD])
def test_captured_steps_give_the_tokens_of_plain_ones(prompts, rule, lag):
    model = device_model()
    options = HELD.get(rule, {"rule": rule})
    expected = decode(model, prompts, cuda_graph=False, **options)
    actual = decode(model, prompts, cuda_graph=True, poll_lag=lag, **options)
    assert actual.answers == expected.answers
    assert actual.promotions == expected.promotions
    assert actual.statistics.captured_steps > 1
    assert actual.statistics.capture_refusal is None


@pytest.mark.gpu
def test_a_model_that_asks_the_host_is_refused_and_decoded_plainly(prompts):
    model = device_model()
    forward = model.forward

    def asks(*args, **kwargs):
        output = forward(*args, **kwargs)
        assert output.logits.isfinite().all().item()
        return output

    model.forward = asks
    output = decode(model, prompts)
    assert output.statistics.capture_refusal
    assert output.answers == decode(device_model(), prompts, cuda_graph=False).answers
    with pytest.raises(ValueError, match="cannot be captured"):
        decode(model, prompts, cuda_graph=True)
    torch.randn(1, device="cuda")  # the failed captures left no generator behind
