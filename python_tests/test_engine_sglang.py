"""The SGLang algorithms beside SGLang's own classes, from its wheel, in SGLang's own loops."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang_wheel import ALGORITHMS, sglang_wheel
from torch.utils._python_dispatch import TorchDispatchMode

import dmax_kernels.integrations.sglang as adapter

K, VOCAB, MASK = 6, 11, 10
NAMES = ["DmaxJointThreshold", "DmaxLowConfidence", "DmaxSpd"]


@pytest.fixture(scope="module")
def table():
    """SGLang's table of algorithms, with ours in it."""
    before, finders = set(sys.modules), list(sys.meta_path)
    table = sglang_wheel().algo_name_to_cls
    adapter.register()
    yield table
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "sglang":
            del sys.modules[name]
    sys.meta_path[:] = finders


class Req:
    """What SGLang's request shows an algorithm."""

    def __init__(self, rid, custom_params=None):
        self.rid = rid
        self.sampling_params = SimpleNamespace(custom_params=custom_params)


class Request:
    """A request of two blocks: a prompt that ends inside the first, perhaps with mask ids in it."""

    def __init__(self, number, literal_masks):
        generator = torch.Generator().manual_seed(number)
        self.number, self.forwards, self.block, self.rid = number, [0, 0], 0, str(number)
        prompt_length = number % (K + 1)
        self.prompt = torch.arange(2 * K) < prompt_length
        self.ids = torch.randint(0, MASK, (2 * K,), generator=generator)
        if literal_masks:
            self.ids[torch.rand(2 * K, generator=generator) < 0.4] = MASK
        self.ids[prompt_length:] = MASK
        self.base = torch.randn(2 * K, VOCAB, generator=generator) * 3
        self.base[:, MASK] = -50  # the model does not predict the mask
        self.state = None

    @property
    def slice(self):
        return slice(self.block * K, self.block * K + K)

    def logits(self, ids):
        """A deterministic model: they depend on the block's ids and settle after some forwards."""
        n = self.forwards[self.block]
        generator = torch.Generator().manual_seed(1000 * self.number + 10 * n + self.block)
        noise = torch.randn(K, VOCAB, generator=generator) * 2 * 0.7**n
        left = torch.nn.functional.one_hot(ids.roll(1), VOCAB) + ids.sum() % 3
        self.forwards[self.block] += 1
        return self.base[self.slice] + noise + 0.4 * left


class Runner:
    """What an algorithm asks of SGLang's model runner."""

    decode_cuda_graph_runner = eager_runner = None

    def __init__(self):
        self.embedding = torch.nn.Embedding(VOCAB, 5)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(VOCAB, 5, generator=torch.manual_seed(3)))
        self.model = SimpleNamespace(get_input_embeddings=lambda: self.embedding)

    def forward(self, batch, pp_proxy_tensors):
        assert pp_proxy_tensors is None
        rows = zip(batch.requests, batch.input_ids.view(-1, K), strict=True)
        logits = torch.cat([request.logits(ids) for request, ids in rows])
        self.inputs = batch.input_embeds
        output = SimpleNamespace(full_logits=logits)
        return SimpleNamespace(logits_output=output, can_run_graph=False)


def forward_batch(requests):
    """What SGLang's ForwardBatch.init_new gives a batch of blocks."""
    prompt = torch.stack([request.prompt[request.slice] for request in requests])
    ids = torch.stack([request.ids[request.slice] for request in requests])
    literal = bool((prompt & (ids == MASK)).any())
    return SimpleNamespace(
        input_ids=ids.flatten().clone(),
        batch_size=len(requests),
        dllm_prompt_mask=prompt if literal else None,
        rids=[request.rid for request in requests],
        requests=requests,
        input_embeds=None,
    )


def algorithm(table, name, options, fdfo):
    config = SimpleNamespace(
        block_size=K, mask_id=MASK, algorithm_config=options, first_done_first_out_mode=fdfo
    )
    return table[name](config)


def serve(table, name, options, *, fdfo, numbers, literal_masks, running=3):
    """SGLang's scheduler in small: every request's ids, and its forwards for each block."""
    decoder, runner = algorithm(table, name, options, fdfo), Runner()
    waiting = [Request(number, literal_masks) for number in numbers]
    done, live = [], []
    for _ in range(100 * len(numbers)):
        # A batch changes whenever a block ends: another takes its place, at the front
        while waiting and len(live) < running:
            live.insert(0, waiting.pop())
        if not live:
            break
        batch = forward_batch(live)
        with torch.inference_mode():  # as SGLang's scheduler runs
            _, ids, accepted, states, _ = decoder.run(runner, batch, [r.state for r in live])
        new = batch.input_ids.view(-1, K)
        for row, request in enumerate(live):
            if fdfo:
                assert list(ids[row]) == new[row].tolist()
                request.state = states[row]
            request.ids[request.slice] = new[row]
            if not fdfo or accepted[row] == K:
                request.block += 1
        done += [request for request in live if request.block == 2]
        live = [request for request in live if request.block < 2]
    assert not live
    done.sort(key=lambda request: request.number)
    return [r.ids.tolist() for r in done], [r.forwards for r in done]


@pytest.mark.parametrize("literal_masks", [False, True])
@pytest.mark.parametrize("fdfo", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LowConfidence", {"threshold": 0.6}),
        ("LowConfidence", {"threshold": 0.3}),
        ("JointThreshold", {"threshold": 0.6, "edit_threshold": 0.5}),
        ("JointThreshold", {"threshold": 0.3, "max_post_edit_steps": 2}),
        ("JointThreshold", {"threshold": 0.8, "max_post_edit_steps": 0, "penalty_lambda": 1.5}),
        ("JointThreshold", {"threshold": 0.6, "vectorized_decoding": True}),
    ],
)
def test_same_ids_and_same_forwards_as_sglang(table, name, options, fdfo, literal_masks):
    """20 requests of two blocks each, three at a time."""
    case = {"fdfo": fdfo, "numbers": range(20), "literal_masks": literal_masks}
    ids, forwards = serve(table, name, options, **case)
    ours, our_forwards = serve(table, f"Dmax{name}", options, **case)
    assert ours == ids
    assert our_forwards == forwards
    if literal_masks:  # the case is not trivial: prompts kept masks, and nothing else did
        prompts = [Request(number, True) for number in range(20)]
        kept = [MASK in r.ids[r.prompt] for r in prompts]
        assert any(kept)
        assert [MASK in row for row in ours] == kept


@pytest.mark.parametrize("fdfo", [False, True])
def test_spd_keeps_prompts_and_leaves_no_mask(table, fdfo):
    case = {"fdfo": fdfo, "numbers": range(20), "literal_masks": True}
    ids, forwards = serve(table, "DmaxSpd", {"tau_dec": 0.4, "top_k": 2}, **case)
    for number, row in enumerate(ids):
        request = Request(number, True)
        assert torch.equal(torch.tensor(row)[request.prompt], request.ids[request.prompt])
        assert MASK not in torch.tensor(row)[~request.prompt]
    # K steps to promote all at worst, and one forward for the plain tokens' KV
    assert max(max(each) for each in forwards) <= K + 2
    if fdfo:  # a request's result does not depend on what shares its batches
        alone = serve(table, "DmaxSpd", {"tau_dec": 0.4, "top_k": 2}, **case, running=1)
        assert alone == (ids, forwards)


def test_the_last_forward_of_spd_reads_plain_tokens(table):
    decoder, runner = algorithm(table, "DmaxSpd", {"tau_dec": 0.4}, False), Runner()
    batch = forward_batch([Request(number, True) for number in (1, 2, 9)])
    decoder.run(runner, batch)
    assert torch.equal(runner.inputs, runner.embedding.weight[batch.input_ids])


@pytest.mark.parametrize("name", NAMES)
def test_requests_have_options_of_their_own(table, name):
    """A request with options gives what the algorithm gives with them for all."""
    options = {
        "DmaxLowConfidence": {"threshold": 0.25},
        "DmaxJointThreshold": {"threshold": 0.2, "edit_threshold": 0.9, "max_post_edit_steps": 1},
        "DmaxSpd": {"tau_dec": 0.2, "tau_acc": 0.3},
    }[name]
    case = {"fdfo": True, "numbers": range(6), "literal_masks": True}
    default, own = serve(table, name, {}, **case), serve(table, name, options, **case)
    requests = [Req(str(number), options if number % 2 else None) for number in range(6)]
    assert [table[name].validate_request(request) for request in requests] == [None] * 6
    mixed = serve(table, name, {}, **case)
    for number in range(6):
        expected = own if number % 2 else default
        assert [part[number] for part in mixed] == [part[number] for part in expected]
    assert own != default
    bad = table[name].validate_request(Req("bad", {next(iter(options)): "high"}))
    assert re.fullmatch(rf"{name}: custom_params\['\w+'\] must be a number .*, got 'high'", bad)


class Operations(TorchDispatchMode):
    """Counts what a GPU would launch, which of it reads or writes all logits, and what waits."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.launches = self.reads = self.passes = 0
        for name in ("tolist", "item", "__bool__"):
            read = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self.counted(read))

    def counted(self, read):
        def counting(tensor, *args):
            self.reads += 1
            return read(tensor, *args)

        return counting

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = function.is_view or function.name() == "aten::_local_scalar_dense"
        result = function(*args, **(kwargs or {}))
        self.launches += not view
        tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
        self.passes += not view and any(each.shape[-1:] == (VOCAB,) for each in tensors)
        # An index by a bool tensor reads on the host how many it takes
        if function.name() in ("aten::index.Tensor", "aten::index_put_"):
            self.reads += any(each is not None and each.dtype == torch.bool for each in args[1])
        return result


def step_cost(table, name, options, monkeypatch, rows=4):
    """(launches, passes over the logits, host reads) of the second step of fully masked blocks."""
    requests = [Request(7 * (row + 1), False) for row in range(rows)]
    decoder, runner, batch = (
        algorithm(table, name, options, True),
        Runner(),
        forward_batch(requests),
    )
    states = decoder.init_step_state(batch)
    for _ in range(2):
        decoder.prepare_inputs(runner, batch, states)
        logits = runner.forward(batch, None).logits_output.full_logits
        with monkeypatch.context() as patch, Operations(patch) as counted:
            decoder.step(batch, logits, states)
    return counted.launches, counted.passes, counted.reads


def test_launches_and_host_reads_of_a_step(table, monkeypatch):
    """Four requests; docs/integrations.md has these numbers."""
    cost = {
        name: step_cost(table, name, {"threshold": 0.6}, monkeypatch)
        for name in ("LowConfidence", "JointThreshold", *NAMES)
    }
    options = {"threshold": 0.6, "vectorized_decoding": True}
    cost["vectorized"] = step_cost(table, "JointThreshold", options, monkeypatch)
    assert cost == {
        "LowConfidence": (19, 3, 1),
        "DmaxLowConfidence": (1, 1, 1),
        "JointThreshold": (92, 12, 20),
        "vectorized": (49, 3, 2),
        "DmaxJointThreshold": (1, 1, 1),
        "DmaxSpd": (9, 1, 1),
    }


def test_rounds_of_several_forwards(table):
    """The hooks of SGLang's open change: the same ids, and one host read for the round."""
    for name, forwards in (("LowConfidence", 2), ("JointThreshold", 3)):
        decoder = algorithm(table, f"Dmax{name}", {"threshold": 0.5}, True)
        expected = algorithm(table, name, {"threshold": 0.5}, True)
        results = []
        for each in (decoder, expected):
            runner = Runner()
            batch = forward_batch([Request(number, True) for number in (2, 4, 13)])
            states = each.init_step_state(batch)
            if each is decoder:
                context = each.fdfo_batched_begin(batch, states)
                for _ in range(forwards):
                    output = runner.forward(batch, None).logits_output
                    each.fdfo_batched_step(batch, output.full_logits, context)
                assert each.fdfo_batched_all_finished(context) is False
                done = each.fdfo_batched_end(context, states)
            else:
                for _ in range(forwards):
                    output = runner.forward(batch, None).logits_output
                    done = each.step(batch, output.full_logits, states)
            results.append((batch.input_ids.tolist(), done))
        assert results[0] == results[1]


def test_sglang_loads_the_entry_point(table, monkeypatch):
    """Through SGLang's own loader of plug-ins, before and after its algorithms are imported."""
    from sglang.srt import plugins

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    ((group, name, value),) = re.findall(r'entry-points\."(sglang[.\w]+)"\]\n(\w+) = "(.*)"', text)
    assert group == plugins.GENERAL_PLUGINS_GROUP
    point = EntryPoint(name, value, group)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    for name in NAMES:
        del table[name]
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert sorted(set(table) & set(NAMES)) == NAMES

    for module in [m for m in sys.modules if m.startswith(ALGORITHMS)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    plugins.load_plugins()
    assert ALGORITHMS not in sys.modules
    again = sglang_wheel()
    assert sorted(set(again.algo_name_to_cls) & set(NAMES)) == NAMES
    assert again.get_algorithm_cls("DmaxSpd").__name__ == "DmaxSpd"


def test_spd_refuses_graphs_of_the_forward(table):
    sentence = r"^DmaxSpd: CUDA graphs of the forward must be off \(--disable-cuda-graph\), because"
    args = SimpleNamespace(
        device="cuda", cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="full"))
    )
    with pytest.raises(ValueError, match=f"{sentence}.*got a 'full' graph backend"):
        table["DmaxSpd"].configure_server_args(args)
    args.cuda_graph_config.decode.backend = "disabled"
    table["DmaxSpd"].configure_server_args(args)

    runner = Runner()
    runner.decode_cuda_graph_runner = type("DecodeCudaGraphRunner", (), {})()
    runner.decode_cuda_graph_runner.dllm_uses_input_embeds = False
    decoder, batch = algorithm(table, "DmaxSpd", {}, True), forward_batch([Request(1, False)])
    with pytest.raises(ValueError, match=f"{sentence}.*got DecodeCudaGraphRunner"):
        decoder.run(runner, batch)
    runner.decode_cuda_graph_runner.dllm_uses_input_embeds = True
    decoder.run(runner, batch)
    assert runner.inputs.shape == (K, 5)
