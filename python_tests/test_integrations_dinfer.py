"""The dInfer adapter, and semantics="released", against the authors' rule written out in Python."""

import pytest
import torch
from engine_stand_ins import install
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dmax_kernels
from dmax_kernels.integrations.dinfer import spd_decoder

TAU_ACC = 0.9


class Decoder:
    """What the adapter reads of dInfer's ThresholdParallelDecoder."""

    def __init__(self, temperature, threshold, mask_id, use_float64=False):
        self.temperature, self.threshold = temperature, threshold
        self.mask_id, self.use_float64 = mask_id, use_float64

    def decode_uniform(
        self,
        logits,
        block_start,
        block_end,
        x,
        active_index,
        embedding_layer,
        prev_embeddings=None,
        iter_threshold=None,
        top_k=1,
    ):
        return "engine", prev_embeddings


def hybrid(embedding, tokens, confidences, mask_id):
    """Eqs. 8-10 for one position, in float64."""
    table = embedding.double()
    rest = max(1 - sum(confidences), 0.0)
    parts = [(p, table[t]) for t, p in zip(tokens, confidences, strict=True)]
    parts.append((rest, table[mask_id]))
    mix = sum(p * e for p, e in parts)
    return (mix * (sum(p * e.norm() for p, e in parts) / mix.norm())).float()


def authors_step(logits, ids, active, embedding, embeds, mask_id, tau, top_k):
    """decode_uniform as the ecosystem notes describe it: (ids, stop, embeddings), all rows at once.

    ids and active are lists [B][K]; embeds is None on a block's first step.
    """
    probability = logits.double().softmax(dim=-1)
    changed_any, all_sure, new_ids = False, True, []
    for b, row in enumerate(ids):
        top = [(p.max().item(), p.argmax().item()) for p in probability[b]]
        masked = [i for i, t in enumerate(row) if t == mask_id]
        promoted = []
        for i in masked:  # left to right, up to the first that fails
            if top[i][0] < tau:
                break
            promoted.append(i)
        promoted = promoted or masked[:1]
        new = list(row)
        for i in range(len(row)):
            if i in promoted or (active[b][i] and i not in masked):
                new[i] = top[i][1]
                changed_any = changed_any or new[i] != row[i]
            if active[b][i] and top[i][0] < TAU_ACC:
                all_sure = False
        new_ids.append(new)
    if all_sure or not changed_any:
        return new_ids, True, embeds
    result = embedding[torch.tensor(new_ids)] if embeds is None else embeds.clone()
    for b, row in enumerate(new_ids):
        for i, token in enumerate(row):
            if active[b][i] and token != mask_id:
                values, candidates = probability[b, i].sort(descending=True, stable=True)
                result[b, i] = hybrid(
                    embedding, candidates[:top_k].tolist(), values[:top_k].tolist(), mask_id
                )
            elif active[b][i]:
                result[b, i] = embedding[mask_id]
    return new_ids, False, result


# K, B and V small enough that ties of ids, repeated predictions and predicted masks all happen;
# tau above tau_acc is the setting in which the authors' rule leaves masks.
trajectories = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 8),
        "vocab": st.integers(3, 12),
        "tau": st.sampled_from([0.2, 0.5, 0.8, 0.95]),
        "sharpness": st.sampled_from([1.0, 4.0, 12.0]),
        "tail": st.integers(0, 2),
        "top_k": st.sampled_from([1, 3]),
        "drift": st.sampled_from([0.0, 0.3, 2.0]),
    }
)


class Trajectory:
    """One block's random logits, which drift from step to step, and its ids."""

    def __init__(self, seed, batch, length, vocab, tau, sharpness, tail, top_k, drift):
        self.generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(vocab, 6, generator=self.generator)
        self.base = self.normal(batch, length, vocab) * sharpness
        self.drift, self.tau, self.top_k, self.mask_id = drift, tau, top_k, vocab - 1
        self.ids = torch.full((batch, length), self.mask_id)
        self.ids[:, :tail] = 0  # a prompt's tail
        self.active = self.ids == self.mask_id

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def logits(self):
        logits = self.base + self.drift * self.normal(*self.base.shape)
        top = logits.softmax(dim=-1).amax(dim=-1)
        # A confidence on a threshold may round to either side
        assume(min((top - t).abs().min().item() for t in (self.tau, TAU_ACC)) > 1e-5)
        return logits

    def authors(self, logits, ids, embeds, rows=slice(None)):
        ids, stop, embeds = authors_step(
            logits[rows],
            ids[rows].tolist(),
            self.active[rows].tolist(),
            self.embedding,
            embeds,
            self.mask_id,
            self.tau,
            self.top_k,
        )
        return torch.tensor(ids), stop, embeds


@settings(max_examples=60, deadline=None)
@given(trajectories)
def test_released_is_the_authors_rule(case):
    """Row by row, from the first step to the stop: ids, stop, embeddings."""
    t = Trajectory(**case)
    batch, length = t.ids.shape
    state = {
        "editable": t.active.clone(),
        "masked": t.active.clone(),
        "token": t.ids.clone(),
        "confidence": torch.zeros(batch, length),
        "converged": torch.zeros(batch, dtype=torch.bool),
        "step": torch.zeros(batch, dtype=torch.int32),
        "inputs_embeds": t.embedding[t.ids],
    }
    rows = dict.fromkeys(range(batch), (t.ids, None))  # the rows that go on
    for _ in range(length):
        logits = t.logits()
        dmax_kernels.spd_step_(
            logits,
            t.embedding,
            **state,
            mask_token_id=t.mask_id,
            tau_dec=t.tau,
            tau_acc=TAU_ACC,
            semantics="released",
            top_k=min(t.top_k, case["vocab"]),
        )
        for b, (ids, embeds) in list(rows.items()):
            new, stop, embeds = t.authors(logits, ids, embeds, slice(b, b + 1))
            assert state["token"][b].tolist() == new[0].tolist()
            assert state["converged"][b].item() == stop
            if stop:
                del rows[b]
                continue
            torch.testing.assert_close(state["inputs_embeds"][b], embeds[0], rtol=1e-4, atol=1e-5)
            ids = ids.clone()
            ids[b] = new[0]
            rows[b] = ids, embeds


@settings(max_examples=60, deadline=None)
@given(trajectories)
def test_decode_uniform_commits_the_authors_ids(case):
    """The whole batch, whose rows stop together; x holds the block at an offset."""
    t = Trajectory(**case)
    batch, length = t.ids.shape
    x = torch.cat([torch.zeros(batch, 3, dtype=torch.int64), t.ids, t.ids], dim=1)
    layer = torch.nn.Embedding.from_pretrained(t.embedding)
    decoder = spd_decoder(base=Decoder)(0, t.tau, t.mask_id)
    ids, expected, embeds = t.ids, None, None
    for _ in range(length):
        logits = t.logits()
        stop, embeds = decoder.decode_uniform(
            logits, 3, 3 + length, x, t.active, layer, embeds, None, t.top_k
        )
        ids, expected_stop, expected = t.authors(logits, ids, expected)
        assert torch.equal(x[:, 3 : 3 + length], ids)
        assert stop is expected_stop
        if stop:
            break
        torch.testing.assert_close(embeds, expected, rtol=1e-4, atol=1e-5)
    assert (x[:, :3] == 0).all()
    assert (x[:, 3 + length :] == t.ids).all()


@settings(max_examples=30, deadline=None)
@given(trajectories, st.sampled_from(["settled", "paper"]))
def test_rows_are_independent_and_leave_no_mask_unless_released(case, semantics):
    t = Trajectory(**case)
    batch, length = t.ids.shape
    layer = torch.nn.Embedding.from_pretrained(t.embedding)
    steps = [t.base + t.drift * t.normal(*t.base.shape) for _ in range(length)]
    # This semantics skips a predicted mask, whatever its rank
    steps = [s.index_fill(-1, torch.tensor(t.mask_id), 50.0 * (i % 2)) for i, s in enumerate(steps)]

    def decode(rows):
        decoder = spd_decoder(semantics=semantics, base=Decoder)(0, t.tau, t.mask_id)
        x, embeds = t.ids[rows].clone(), None
        for logits in steps:
            stop, embeds = decoder.decode_uniform(
                logits[rows], 0, length, x, t.active[rows], layer, embeds
            )
            if stop:
                break
        return x

    together = decode(slice(None))
    assert torch.equal(together, torch.cat([decode(slice(b, b + 1)) for b in range(batch)]))
    assert not (together == t.mask_id).any()


def test_what_is_not_covered_runs_the_engines_code():
    layer = torch.nn.Embedding(5, 4)
    block = torch.full((1, 2), 4)
    arguments = (torch.zeros(1, 2, 5), 0, 2, block, block == 4, layer)
    adapted = spd_decoder(base=Decoder)
    assert adapted(0.7, 0.5, 4).decode_uniform(*arguments)[0] == "engine"
    assert adapted(0, 0.5, 4, use_float64=True).decode_uniform(*arguments)[0] == "engine"
    assert adapted(0, 0.5, 4).decode_uniform(*arguments)[0] != "engine"


def test_errors_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="semantics must be one of .* got 'dinfer'"):
        spd_decoder(semantics="dinfer", base=Decoder)
    shard = torch.nn.Embedding(3, 4)
    block = torch.full((1, 2), 4)
    with pytest.raises(ValueError, match="whole vocabulary \\(5 rows\\), got 3 rows"):
        spd_decoder(base=Decoder)(0, 0.5, 4).decode_uniform(
            torch.zeros(1, 2, 5), 0, 2, block, block == 4, shard
        )
    offloaded = torch.nn.Embedding(5, 4, device="meta")
    with pytest.raises(ValueError, match="^decode_uniform: the input embedding must be a layer"):
        spd_decoder(base=Decoder)(0, 0.5, 4).decode_uniform(
            torch.zeros(1, 2, 5), 0, 2, block, block == 4, offloaded
        )
    with pytest.raises(ImportError, match="^dInfer: module .* must be importable, got: "):
        spd_decoder()
    module = "dinfer.decoding.parallel_strategy"
    install(monkeypatch, module, ThresholdParallelDecoder=type("Upstream", (), {}))
    with pytest.raises(ImportError, match="ThresholdParallelDecoder.decode_uniform, which this"):
        spd_decoder()
    install(monkeypatch, module, ThresholdParallelDecoder=Decoder)
    assert issubclass(spd_decoder(), Decoder)
