"""Diffulex's DMax sampler and token merge on stand-ins, against their rules block by block."""

import random
from types import SimpleNamespace

import pytest
import torch
from engine_stand_ins import install

import dmax_kernels.integrations.diffulex as adapter
from dmax_kernels import reference

MASK, VOCAB, LENGTH = 12, 13, 6


def test_register(monkeypatch):
    """Its LLaDA2 models get ours when they decode with "dmax", and the engine's otherwise."""
    table = {}

    class AutoSampler:
        @staticmethod
        def register(name, factory, *, exist_ok, use_full_config):
            assert exist_ok
            assert use_full_config
            table[name] = factory

    built = {"LLaDA2DMaxSampler": ConfiguredSampler, "build_llada2_sampler": lambda config: "other"}
    install(monkeypatch, adapter.SAMPLER, **built)
    install(monkeypatch, "diffulex.sampler.auto_sampler", AutoSampler=AutoSampler)
    adapter.register()
    assert sorted(table) == sorted(adapter.MODELS)
    for build in table.values():
        assert type(build(SimpleNamespace(decoding_strategy="dmax"))).__name__ == "DmaxSampler"
        assert build(SimpleNamespace(decoding_strategy="multi_bd")) == "other"


class Sampler:
    """What the adapter reads of LLaDA2DMaxSampler: the loop over blocks, and its helpers."""

    def __init__(self, merge_mode="dmax_topk", merge=True, fast=True):
        self._token_merge_mode, self._enable_token_merge = merge_mode, merge
        self._fast_prob_path = fast

    def _extract_block_logits(self, req, req_logits, block, is_prefill):
        start = block.start - (req.prefix if is_prefill else req.first)
        inside = start >= 0 and start + LENGTH <= len(req_logits)
        return req_logits[start : start + LENGTH] if inside else None

    def _build_manual_token_merge_descriptor(self, token, confidence, mask_id):
        return (token, confidence, mask_id)

    def _build_dmax_block_outputs(self, block, block_tokens, block_logits, temperature):
        return {}, {}, "engine"

    def _build_block_writes_map(
        self, reqs, split_logits, temperatures, sample_output, attn_metadata, **kwargs
    ):
        result = {}
        for i, (req, logits) in enumerate(zip(reqs, split_logits, strict=True)):
            for name, block in enumerate(req.dllm_blocks):
                rows = self._extract_block_logits(req, logits, block, attn_metadata.is_prefill[i])
                if block.is_active and rows is not None:
                    result[req.req_id, name] = self._build_dmax_block_outputs(
                        block, None, rows, float(temperatures[i])
                    )
        return result


class ConfiguredSampler(Sampler):
    def __init__(self, config):
        super().__init__()


def requests(seed):
    """Two requests of one or two blocks, with masks, prompts' tails and predictions that repeat."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    reqs, logits = [], []
    for name in ("a", "b"):
        blocks = []
        for start in range(20, 20 + LENGTH * choose.choice([1, 2]), LENGTH):
            share = choose.choice([0.0, 0.5, 1.0])
            ids = [
                MASK if choose.random() < share else choose.randrange(MASK) for _ in range(LENGTH)
            ]
            block = SimpleNamespace(
                is_active=choose.random() < 0.9,
                start=start,
                block_size=LENGTH,
                token_ids=ids,
                mask_token_id=MASK,
                thresholds=SimpleNamespace(accept_threshold=choose.choice([0.3, 0.6])),
                editable_start=choose.choice([0, 0, 2, LENGTH]),
            )
            blocks.append(block)
        rows = torch.randn(len(blocks) * LENGTH, VOCAB, generator=generator)
        rows *= choose.choice([1.0, 3.0, 12.0])
        for i, token in enumerate(token for block in blocks for token in block.token_ids):
            if token != MASK and choose.random() < 0.8:
                rows[i, token] += 40
        reqs.append(SimpleNamespace(req_id=name, dllm_blocks=blocks, prefix=20, first=20))
        logits.append(rows)
    return reqs, logits


def block_rule(block, logits, fast, merge):
    """One block as Diffulex documents it: ids to write, merges, and whether it may be committed."""
    token, confidence = (t.tolist() for t in reference.top1_confidence(logits))
    before = block.token_ids
    if fast:
        confidence = [c if t == MASK else 1.0 for t, c in zip(before, confidence, strict=True)]
    masked = [i for i, t in enumerate(before) if t == MASK]
    passing = [confidence[i] >= block.thresholds.accept_threshold for i in masked]
    promoted = masked[: max(passing.index(False) if False in passing else len(masked), 1)]
    after = [token[i] if t != MASK or i in promoted else t for i, t in enumerate(before)]
    editable = range(block.editable_start, LENGTH)
    pairs = [(o, n) for o, n in zip(before, after, strict=True) if MASK not in (o, n)]
    same, sure = before == after, min(confidence) >= 0.9
    state = {
        "committable": same or sure,
        "same_as_previous": same,
        "same_token_ratio": sum(o == n for o, n in pairs) / len(pairs) if pairs else 1.0,
        "all_confident": sure,
    }
    writes = {i: after[i] for i in editable if after[i] != before[i]}
    merges = {i: (after[i], confidence[i], MASK) for i in editable if after[i] != MASK}
    return writes, merges if merge else {}, state


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_blocks(seed, merge, fast):
    reqs, logits = requests(seed)
    metadata = SimpleNamespace(is_prefill=[True, False])
    sampler = adapter.dmax_sampler(Sampler)(merge=merge, fast=fast)
    result = sampler._build_block_writes_map(reqs, logits, torch.zeros(2), None, metadata)
    for req, rows in zip(reqs, logits, strict=True):
        for name, block in enumerate(req.dllm_blocks):
            if not block.is_active:
                assert (req.req_id, name) not in result
                continue
            writes, merges, state = result[req.req_id, name]
            if block.editable_start == LENGTH:  # nothing to decode: the engine says so itself
                assert state == "engine"
                continue
            start = name * LENGTH
            rule = block_rule(block, rows[start : start + LENGTH], fast, merge)
            assert (writes, state) == (rule[0], rule[2])
            assert merges.keys() == rule[1].keys()
            for i, (token, confidence, mask_id) in merges.items():
                assert (token, mask_id) == (rule[1][i][0], MASK)
                assert confidence == pytest.approx(rule[1][i][1], rel=1e-5)


def test_what_is_not_covered_runs_the_engines_code():
    """A request with a temperature; merging by the exact top-k; logits that are not there."""
    reqs, logits = requests(0)
    for req in reqs:
        for block in req.dllm_blocks:
            block.is_active, block.editable_start = True, 0
    metadata = SimpleNamespace(is_prefill=[False, False])

    def states(sampler, temperatures, rows=logits):
        result = sampler._build_block_writes_map(reqs, rows, temperatures, None, metadata)
        return {name: output[2] == "engine" for (name, _), output in result.items()}

    adapted = adapter.dmax_sampler(Sampler)
    assert states(adapted(), [0.0, 0.7]) == {"a": False, "b": True}
    assert states(adapted("iter_smooth_topk"), [0.0, 0.0]) == {"a": True, "b": True}
    assert states(adapted("iter_smooth_topk", merge=False), [0, 0]) == {"a": False, "b": False}
    assert states(adapted(), [0.0, 0.0], [logits[0], logits[1][:0]]) == {"a": False}


class Model(torch.nn.Module):
    """What the adapter reads of LLaDA2Model."""

    def __init__(self, dtype):
        super().__init__()
        self.word_embeddings = torch.nn.Embedding(VOCAB, 8, dtype=dtype)

    def _maybe_apply_token_merge(self, hidden_states):
        return "engine"


# k = 1 is the engine's default; bfloat16 is what it serves
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_merge(monkeypatch, dtype, k):
    torch.manual_seed(k)
    probs = torch.rand(9, k + 1).softmax(dim=-1)
    metadata = SimpleNamespace(
        token_merge_enabled=True,
        token_merge_mask=torch.arange(9) % 3 > 0,
        token_merge_topk_ids=torch.randint(0, MASK, (9, k)),
        token_merge_topk_probs=probs[:, :k],
        token_merge_residual_probs=probs[:, k:],
        token_merge_mask_token_id=MASK,
        token_merge_mode="dmax_topk",
        token_merge_renormalize=True,
    )
    install(monkeypatch, "diffulex.attention", fetch_attn_metadata=lambda: metadata)
    model = Model(dtype)
    adapter.merge_tokens(SimpleNamespace(model=model))  # the causal-LM wrapper
    hidden = torch.randn(9, 8).to(dtype)
    merged = model._maybe_apply_token_merge(hidden)

    table = model.word_embeddings.weight.detach().double()
    parts = torch.cat([table[metadata.token_merge_topk_ids], table[MASK].expand(9, 1, 8)], dim=1)
    weighted = (parts * probs.double().unsqueeze(-1)).sum(dim=1)
    target = (parts.norm(dim=-1) * probs).sum(dim=-1, keepdim=True)
    expected = (weighted * target / weighted.norm(dim=-1, keepdim=True)).to(dtype)
    expected = torch.where(metadata.token_merge_mask.unsqueeze(-1), expected, hidden)
    torch.testing.assert_close(
        merged, expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5
    )
    assert torch.equal(merged[::3], hidden[::3])

    for name, value, result in (
        ("token_merge_renormalize", False, "engine"),
        ("token_merge_mode", "iter_smooth_topk", "engine"),
        ("token_merge_topk_ids", None, "engine"),
        ("token_merge_enabled", False, hidden),
    ):
        with monkeypatch.context() as change:
            change.setattr(metadata, name, value)
            assert model._maybe_apply_token_merge(hidden) is result
    model.word_embeddings.tp_size = 2
    assert model._maybe_apply_token_merge(hidden) == "engine"


def test_errors_are_one_sentence(monkeypatch):
    with pytest.raises(ImportError, match="^Diffulex: module .* must be importable, got: "):
        adapter.dmax_sampler()
    install(monkeypatch, adapter.SAMPLER, LLaDA2DMaxSampler=type("Old", (), {}))
    with pytest.raises(ImportError, match="LLaDA2DMaxSampler._build_block_writes_map, which this"):
        adapter.dmax_sampler()
    install(monkeypatch, adapter.SAMPLER, LLaDA2DMaxSampler=Sampler)
    assert issubclass(adapter.dmax_sampler(), Sampler)
    install(monkeypatch, "diffulex.attention", fetch_attn_metadata=None)
    with pytest.raises(TypeError, match="must have _maybe_apply_token_merge, got Linear"):
        adapter.merge_tokens(torch.nn.Linear(1, 1))
