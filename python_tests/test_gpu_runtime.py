"""The ops as citizens of CUDA: opcheck, compile, graphs, streams, no sync, launches counted."""

import pytest
import torch
from edit_cases import EDIT_OPTIONS, edit_case
from test_registration import samples
from test_simt_embeddings import MASK, copy_of, spd_case

import dmax_kernels
from dmax_kernels import reference
from dmax_kernels.ops.edit_step import EDIT_RULES

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SPD = {"mask_token_id": MASK, "tau_dec": 0.5, "tau_acc": 0.9}


def move(value):
    if torch.is_tensor(value):
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    return value


def sample_on_device(op):
    arguments, options = samples()[op]
    return tuple(map(move, arguments)), {name: move(value) for name, value in options.items()}


@pytest.mark.parametrize("op", list(samples()))
def test_opcheck(op):
    arguments, options = sample_on_device(op)
    torch.library.opcheck(getattr(torch.ops.dmax, op).default, arguments, options)


@pytest.mark.parametrize("op", ["top1_confidence", "row_statistics", "sample_tokens", "oput_loss"])
def test_compile_fullgraph(op):
    arguments, options = sample_on_device(op)
    function = getattr(torch.ops.dmax, op)
    compiled = torch.compile(lambda *x: function(*x, **options), fullgraph=True)
    for a, b in zip(compiled(*arguments), function(*arguments, **options), strict=True):
        assert torch.equal(a, b)


def gpu_step_case(vocab=157184, batch=2, block=8):
    logits, embedding, state = spd_case(batch, block, vocab=vocab, dim=256, dtype=torch.bfloat16)
    state["converged"].zero_()
    return logits.to(DEVICE), embedding.to(DEVICE), {k: v.to(DEVICE) for k, v in state.items()}


def capture(function):
    """A graph of one call, after the warm-up that PyTorch asks for on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


def test_spd_graph_replays_1000_times_on_changing_inputs():
    """Every replay equals an eager step on the same state and logits, bit for bit."""
    logits, embedding, state = gpu_step_case(vocab=20_000)
    start = copy_of(state)
    graph, _ = capture(lambda: dmax_kernels.spd_step_(logits, embedding, **state, **SPD))
    eager = copy_of(start)
    for name in state:
        state[name].copy_(start[name])
    generator = torch.Generator(DEVICE).manual_seed(0)
    for replay in range(1000):
        logits.normal_(generator=generator).mul_(1 + replay % 7)
        if replay % 10 == 0:
            for name in state:
                state[name].copy_(start[name])
                eager[name].copy_(start[name])
        graph.replay()
        dmax_kernels.spd_step_(logits, embedding, **eager, **SPD)
        if replay % 50 == 9:
            for name in state:
                assert torch.equal(state[name], eager[name]), (replay, name)


# A first call inside a capture must find its counters, without any warm-up of the op
def test_row_ops_in_a_graph():
    logits = torch.randn(4, 100_000, device=DEVICE).bfloat16()
    seed = torch.tensor([5, 0], device=DEVICE)
    target = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = (
            *dmax_kernels.top1_confidence(logits),
            *dmax_kernels.topk_confidence(logits, 3),
            *dmax_kernels.sample_tokens(logits, seed),
            dmax_kernels.oput_loss(logits, None, target)[0],
            *dmax_kernels.row_statistics(logits),
        )
    drawn = set()
    for replay in range(100):
        logits.normal_()
        seed[1] = replay  # a replayed graph draws new samples
        graph.replay()
        expected = (
            *dmax_kernels.top1_confidence(logits),
            *dmax_kernels.topk_confidence(logits, 3),
            *dmax_kernels.sample_tokens(logits, seed),
            dmax_kernels.oput_loss(logits, None, target)[0],
            *dmax_kernels.row_statistics(logits),
        )
        for a, b in zip(results, expected, strict=True):
            assert torch.equal(a, b)
        drawn.add(int(results[4][0]))
    assert len(drawn) > 50


def test_graphs_and_eager_calls_at_the_same_time():
    """Each captured launch has counters of its own, and so does each stream."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [torch.randn(4, 157184, device=DEVICE) for _ in range(4)]
    expected = [dmax_kernels.top1_confidence(x) for x in inputs]
    graphs = [capture(lambda x=x: dmax_kernels.top1_confidence(x)) for x in inputs[:2]]
    torch.cuda.synchronize()
    outputs = [[], []]
    for _ in range(200):
        for i, (graph, _) in enumerate(graphs):
            with torch.cuda.stream(streams[i]):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            outputs[0].append(dmax_kernels.top1_confidence(inputs[2]))
        outputs[1].append(dmax_kernels.top1_confidence(inputs[3]))
    torch.cuda.synchronize()
    for (_, result), right in zip(graphs, expected[:2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, right, strict=True))
    for results, right in zip(outputs, expected[2:], strict=True):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, right, strict=True))


def test_no_host_sync():
    logits, embedding, state = gpu_step_case()
    seed = torch.tensor([1, 2], device=DEVICE)
    rows = logits[0].clone()
    target = torch.zeros(len(rows), dtype=torch.int64, device=DEVICE)
    block = {name: tensor.to(DEVICE) for name, tensor in edit_case(*logits.shape)[1].items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        dmax_kernels.spd_step_(logits, embedding, **state, **SPD)
        dmax_kernels.spd_step_(logits, embedding, **state, **SPD, semantics="released", top_k=3)
        dmax_kernels.edit_step_(logits, **block, **EDIT_OPTIONS, rule="joint_threshold")
        dmax_kernels.top1_confidence(rows)
        dmax_kernels.topk_confidence(rows, 4)
        dmax_kernels.row_statistics(rows)
        dmax_kernels.sample_tokens(rows, seed)
        dmax_kernels.oput_loss(rows, rows, target)
        dmax_kernels.oput_loss_and_grad_(rows, None, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_launched(function) -> list[str]:
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"semantics": "paper"}, {"semantics": "released"}, {"top_k": 4}], ids=str
)
def test_spd_step_is_one_launch(options):
    logits, embedding, state = gpu_step_case()
    launched = kernels_launched(
        lambda: dmax_kernels.spd_step_(logits, embedding, **state, **SPD, **options)
    )
    assert len(launched) == 1, launched
    assert "spd_step_kernel" in launched[0]


@pytest.mark.parametrize("rule", EDIT_RULES)
def test_edit_step_is_one_launch(rule):
    logits, state = edit_case(2, 32, 157184, torch.bfloat16)
    logits, state = logits.to(DEVICE), {k: v.to(DEVICE) for k, v in state.items()}
    launched = kernels_launched(
        lambda: dmax_kernels.edit_step_(logits, **state, **EDIT_OPTIONS, rule=rule)
    )
    assert len(launched) == 1, launched
    assert "edit_step_kernel" in launched[0]


def test_row_ops_are_one_launch():
    logits = torch.randn(32, 157184, device=DEVICE).bfloat16()
    target = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    seed = torch.tensor([1, 2], device=DEVICE)
    counts = torch.ones(157184, dtype=torch.int32, device=DEVICE)
    for function in (
        lambda: dmax_kernels.transform_logits_(logits, softcap=30.0, output_counts=counts),
        lambda: dmax_kernels.top1_confidence(logits),
        lambda: dmax_kernels.topk_confidence(logits, 4),
        lambda: dmax_kernels.row_statistics(logits),
        lambda: dmax_kernels.sample_tokens(logits, seed),
        lambda: torch.ops.dmax.oput_loss(logits, logits, target),
        lambda: torch.ops.dmax.oput_loss_and_grad_(logits, None, target),
    ):
        launched = kernels_launched(function)
        assert len(launched) == 1, launched


def test_side_stream():
    """Work queued before the op on a stream that is not the default is seen by the op."""
    side = torch.cuda.Stream()
    logits = torch.zeros(4, 157184, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        logits[:, 99] = 5.0
        token, _ = dmax_kernels.top1_confidence(logits)
    side.synchronize()
    assert token.tolist() == [99] * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_other_device():
    logits = torch.randn(3, 5000, device="cuda:1")
    token, _ = dmax_kernels.top1_confidence(logits)
    assert token.device == logits.device
    assert torch.equal(token, logits.argmax(dim=-1))


def test_autocast():
    logits = torch.randn(3, 5000, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        _, confidence = dmax_kernels.top1_confidence(logits)
    assert torch.equal(confidence, dmax_kernels.top1_confidence(logits)[1])


def test_trajectory_is_the_references():
    """A whole block decoded on the GPU, against the eager reference on the GPU."""
    logits, embedding, state = gpu_step_case(vocab=2000, batch=3, block=16)
    state["token"] = torch.where(state["editable"], MASK, state["token"])
    state["masked"] = state["editable"].clone()
    state["step"].zero_()
    other = copy_of(state)
    target = torch.randint(0, 2000, (3, 16), device=DEVICE)
    for step in range(12):
        logits = torch.randn(3, 16, 2000, device=DEVICE)
        logits.scatter_add_(-1, target.unsqueeze(-1),
                            torch.full((3, 16, 1), 6.0 + step, device=DEVICE))  # fmt: skip
        dmax_kernels.spd_step_(logits, embedding, **state, **SPD)
        reference.spd_step_(logits, embedding, **other, **SPD)
        for name in ("masked", "token", "converged", "step"):
            assert torch.equal(state[name], other[name]), (step, name)
    assert state["converged"].all()
