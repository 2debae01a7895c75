"""The SGLang algorithms on stand-ins of their bases, against each rule request by request.

test_engine_sglang.py runs them beside SGLang's own.
"""

from types import SimpleNamespace

import pytest
import torch
from engine_stand_ins import install

import dmax_kernels.integrations.sglang as adapter
from dmax_kernels import reference

PACKAGE = adapter.PACKAGE


class Algorithm:
    """What the adapter reads of SGLang's DllmAlgorithm."""

    def __init__(self, config):
        self.block_size, self.mask_id = config.block_size, config.mask_id
        self.threshold = config.algorithm_config.get("threshold", 0.5)
        self.edit_threshold = config.algorithm_config.get("edit_threshold", 0)
        self.max_post_edit_steps = config.algorithm_config.get("max_post_edit_steps", 16)
        self.penalty_lambda = config.algorithm_config.get("penalty_lambda", 0)

    @classmethod
    def configure_server_args(cls, server_args):
        pass

    @classmethod
    def validate_request(cls, req):
        return None

    def prepare_inputs(self, model_runner, forward_batch, states):
        pass

    def _prompt_mask(self, forward_batch):
        return forward_batch.input_ids.view(-1, self.block_size) != self.mask_id


@pytest.fixture
def table(monkeypatch):
    table = {}
    install(monkeypatch, PACKAGE, algo_name_to_cls=table)
    install(monkeypatch, f"{PACKAGE}.base", DllmAlgorithm=Algorithm)
    install(monkeypatch, f"{PACKAGE}.low_confidence", LowConfidence=Algorithm)
    install(monkeypatch, f"{PACKAGE}.joint_threshold", JointThreshold=Algorithm)
    adapter.register()
    return table


def config(block_size, mask_id, **options):
    return SimpleNamespace(block_size=block_size, mask_id=mask_id, algorithm_config=options)


class Requests:
    """B random blocks of K positions, some with a prompt's tail, the first perhaps all prompt."""

    def __init__(self, seed, batch=3, length=6, vocab=9):
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.length, self.vocab, self.mask_id = batch, length, vocab, vocab - 1
        ids = torch.randint(0, self.mask_id, (batch, length), generator=self.generator)
        for row in range(batch):
            ids[row, (seed + row) % 3 :] = self.mask_id
        if seed % 4 == 0:
            ids[0] = 1
        self.forward_batch = SimpleNamespace(input_ids=ids.flatten(), batch_size=batch)
        self.embedding = torch.nn.Embedding(vocab, 5)
        self.embedding.weight.data = torch.randn(vocab, 5, generator=self.generator)
        model = SimpleNamespace(get_input_embeddings=lambda: self.embedding)
        self.runner = SimpleNamespace(model=model)
        self.base = torch.randn(batch * length, vocab, generator=self.generator) * 3
        self.base[:, self.mask_id] = -50  # the model does not predict the mask

    @property
    def ids(self):
        return self.forward_batch.input_ids.view(self.batch, self.length)

    def logits(self, drift=1.0):
        shape = (self.batch * self.length, self.vocab)
        return self.base + drift * torch.randn(shape, generator=self.generator)


def low_confidence_rule(ids, logits, mask_id, threshold):
    token, confidence = reference.top1_confidence(logits)
    masked = [i for i, t in enumerate(ids) if t == mask_id]
    chosen = [i for i in masked if confidence[i] > threshold]
    chosen = chosen or sorted(masked, key=lambda i: -confidence[i].item())[:1]
    return [token[i].item() if i in chosen else t for i, t in enumerate(ids)]


@pytest.mark.parametrize("seed", range(8))
def test_low_confidence(table, seed):
    requests = Requests(seed)
    algorithm = table["DmaxLowConfidence"](config(6, 8, threshold=0.6))
    memory = requests.forward_batch.input_ids.data_ptr()
    states = algorithm.init_step_state(requests.forward_batch)
    for _ in range(7):
        before, logits = requests.ids.tolist(), requests.logits()
        done = algorithm.step(requests.forward_batch, logits, states)
        assert done == [8 not in row for row in before]
        for row, rows in zip(range(3), logits.split(6), strict=True):
            assert requests.ids[row].tolist() == low_confidence_rule(before[row], rows, 8, 0.6)
    assert all(done)
    assert requests.forward_batch.input_ids.data_ptr() == memory


def joint_rule(ids, logits, state, algorithm):
    """One request, one step: its new ids; state is changed as SGLang documents it."""
    if state["finished"]:
        return ids
    logits = logits.clone()
    if algorithm.penalty_lambda:
        for i in range(1, len(ids)):
            logits[i, ids[i - 1]] -= algorithm.penalty_lambda
    token, confidence = reference.top1_confidence(logits)
    if algorithm.mask_id in ids:
        new = low_confidence_rule(ids, logits, algorithm.mask_id, algorithm.threshold)
    else:
        new = list(ids)
        state["post_edit_steps"] += 1
        if state["post_edit_steps"] > algorithm.max_post_edit_steps:
            state["finished"] = True
            return ids
    for i, old in enumerate(ids):
        may_edit = old != algorithm.mask_id and not state["prompt_mask"][i]
        if may_edit and confidence[i] > algorithm.edit_threshold:
            new[i] = token[i].item()
    state["finished"] = new == ids
    return new


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.6, "edit_threshold": 0.5},
        {"threshold": 0.3, "edit_threshold": 0, "max_post_edit_steps": 2},
        {"threshold": 0.6, "max_post_edit_steps": 0, "penalty_lambda": 1.5},
    ],
)
def test_joint_threshold(table, seed, options):
    requests = Requests(seed)
    algorithm = table["DmaxJointThreshold"](config(6, 8, **options))
    states = algorithm.init_step_state(requests.forward_batch)
    prompts = (requests.ids != 8).tolist()
    expected_states = [
        {"post_edit_steps": 0, "finished": False, "prompt_mask": prompt} for prompt in prompts
    ]
    for step in range(24):
        before, logits = requests.ids.tolist(), requests.logits(drift=max(1 - 0.1 * step, 0))
        rules = [
            joint_rule(before[row], rows, expected_states[row], algorithm)
            for row, rows in zip(range(3), logits.split(6), strict=True)
        ]
        finished = algorithm.step(requests.forward_batch, logits, states)
        assert finished == [state["finished"] for state in expected_states]
        assert requests.ids.tolist() == rules
    assert all(finished)


def decode_spd(table, requests, rows, steps):
    """The scheduler's loop on some of the requests; (ids, embeddings of the last forward)."""
    ids = requests.ids[rows].clone()
    batch = SimpleNamespace(input_ids=ids.flatten(), batch_size=len(ids))
    algorithm = table["DmaxSpd"](config(6, 8, tau_dec=0.4, top_k=2))
    states = algorithm.init_step_state(batch)
    for step in range(algorithm.max_steps(6)):
        algorithm.prepare_inputs(requests.runner, batch, states)
        logits = steps[step].view(-1, 6, 9)[rows].flatten(0, 1)
        if all(algorithm.step(batch, logits, states)):
            return batch.input_ids.view(-1, 6), batch.input_embeds
    pytest.fail("the block was never reported")


@pytest.mark.parametrize("seed", range(8))
def test_spd(table, seed):
    """No mask left, the prompt kept, the last forward saw the plain tokens, rows independent."""
    requests = Requests(seed)
    steps = [requests.logits() for _ in range(8)]
    ids, embeds = decode_spd(table, requests, slice(None), steps)
    assert not (ids == 8).any()
    prompt = requests.ids != 8
    assert torch.equal(ids[prompt], requests.ids[prompt])
    torch.testing.assert_close(embeds, requests.embedding.weight[ids.flatten()], rtol=0, atol=0)
    for row in range(3):
        alone, _ = decode_spd(table, requests, slice(row, row + 1), steps)
        assert torch.equal(alone[0], ids[row])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def test_spd_commits_the_best_token_beside_the_mask(table, default_dtype):
    """The mask token is top-1 throughout, and is never a decoded token."""
    requests = Requests(1)
    requests.base[:, requests.mask_id] = 50
    steps = [requests.base] * 8
    ids, _ = decode_spd(table, requests, slice(None), steps)
    masked = requests.ids == requests.mask_id
    best = requests.base[:, : requests.mask_id].argmax(dim=-1).view(3, 6)
    assert torch.equal(ids, torch.where(masked, best, requests.ids))


def test_spd_feeds_soft_embeddings(table):
    """The second forward's input of a promoted position is its hybrid embedding."""
    requests = Requests(1, batch=1)
    algorithm = table["DmaxSpd"](config(6, 8, tau_dec=0.99))
    states = algorithm.init_step_state(requests.forward_batch)
    algorithm.prepare_inputs(requests.runner, requests.forward_batch, states)
    first = requests.ids[0].tolist().index(8)
    logits = requests.logits() / 3
    assert algorithm.step(requests.forward_batch, logits, states) == [False]
    algorithm.prepare_inputs(requests.runner, requests.forward_batch, states)
    token, confidence = reference.top1_confidence(logits[first])
    weight = requests.embedding.weight.detach()
    expected = reference.hybrid_embedding(weight, token, confidence, torch.tensor(False), 8)
    torch.testing.assert_close(requests.forward_batch.input_embeds[first], expected)
    mask_rows = requests.forward_batch.input_embeds[first + 1 :]
    assert torch.equal(mask_rows, weight[8].expand_as(mask_rows))


def test_errors_are_one_sentence(table, monkeypatch):
    assert sorted(table) == ["DmaxJointThreshold", "DmaxLowConfidence", "DmaxSpd"]
    requests = Requests(0)
    requests.embedding.tp_size = 2
    algorithm = table["DmaxSpd"](config(6, 8))
    with pytest.raises(ValueError, match="must be unsharded, got tp_size=2"):
        algorithm.prepare_inputs(requests.runner, requests.forward_batch, [])
    del requests.embedding.tp_size
    requests.embedding.register_forward_hook(lambda module, ids, rows: 2 * rows)
    with pytest.raises(ValueError, match="^DmaxSpd: the input embedding must be a layer whose"):
        algorithm.prepare_inputs(requests.runner, requests.forward_batch, [])
    old = type("DllmAlgorithm", (), {})
    install(monkeypatch, f"{PACKAGE}.base", DllmAlgorithm=old)
    with pytest.raises(ImportError, match="must have DllmAlgorithm.prepare_inputs, which this"):
        adapter.spd()


def test_a_batch_is_copied_only_when_its_rows_change():
    rows = adapter.new_edit_rows(torch.eye(3).bool(), torch.arange(6.0).view(3, 2))
    rows.finished[1] = True
    places = adapter.places(rows)
    assert adapter.batch_of(places) is rows
    fewer = adapter.batch_of([places[2], places[1]])
    assert fewer.thresholds.tolist() == [[4, 5], [2, 3]]
    assert fewer.finished.tolist() == [False, True]
    assert adapter.batch_of([places[2], places[1]]) is fewer
    assert adapter.batch_of([places[1]]).editable.tolist() == [[True, False, True]]
