"""Sequential Dependence: Eq. 4 against its definition, and what it says of two kinds of text."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dmax_kernels.decoding.extra import SeqDep, seq_dep

V = 29


def llama(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, **heads, **changes)).eval()


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def draw(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]


def log_probability(model, before, tokens):
    """log p(tokens | before), a token at a time and in float64 after the model."""
    total, seen = 0.0, list(before)
    with torch.no_grad():
        for token in tokens:
            logits = model(input_ids=torch.tensor([seen])).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            seen.append(token)
    return total


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_seq_dep_is_eq_4(make, batch_size):
    model = make()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
    prompt, *segments = draw(1, 3, 4, 1, 6, 2)
    scored = seq_dep(model, prompt, segments, batch_size=batch_size)
    before = list(prompt)
    with_prefix, alone = [], []
    for number, segment in enumerate(segments):
        if number:
            with_prefix.append(log_probability(model, before, segment))
            alone.append(log_probability(model, prompt, segment))
        before += segment
    assert scored.with_prefix == pytest.approx(with_prefix, abs=1e-4)
    assert scored.alone == pytest.approx(alone, abs=1e-4)
    gains = [a - b for a, b in zip(with_prefix, alone, strict=True)]
    assert scored.gains == pytest.approx(gains, abs=2e-4)
    assert scored.value == pytest.approx(sum(gains) / 3, abs=2e-4)
    assert max(map(abs, gains)) > 0.1


class Copying(torch.nn.Module):
    """Expects a text to repeat itself after `period` tokens, with probability p each."""

    def __init__(self, period, p):
        super().__init__()
        self.words, self.config = torch.nn.Embedding(V, 2), SimpleNamespace()
        self.period, self.p = period, p

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, V)
        known = input_ids[:, 1 : 1 - self.period]  # after the prompt's one token
        value = torch.full(known.shape, math.log(self.p * (V - 1) / (1 - self.p))).unsqueeze(-1)
        logits[:, self.period :].scatter_(-1, known.unsqueeze(-1), value)
        return SimpleNamespace(logits=logits)


def test_copies_depend_on_what_is_before_and_other_texts_do_not():
    """log p of a copied token is log 0.9 after the original, and -log V without it."""
    model, (first, other) = Copying(4, 0.9), draw(2, 4, 4)
    copied = seq_dep(model, [3], [first, first])
    assert copied.value == pytest.approx(4 * (math.log(0.9) + math.log(V)), rel=1e-5)
    different = [(token + 1) % V for token in first]
    missed = seq_dep(model, [3], [first, different])
    assert missed.value == pytest.approx(4 * (math.log(0.1 / (V - 1)) + math.log(V)), rel=1e-5)
    # A scorer that looks too far back to see anything finds them independent
    assert seq_dep(Copying(9, 0.9), [3], [first, other]).value == 0


def test_values_are_the_means_of_the_gains():
    scored = SeqDep(with_prefix=[-1.0, -2.0], alone=[-4.0, -2.5])
    assert (scored.gains, scored.value) == ([3.0, 0.5], 1.75)


@pytest.mark.parametrize(
    ("prompt", "segments", "message"),
    [
        ([], [[1], [2]], "seq_dep: prompt must be at least one token, got none"),
        ([1], [[1]], "seq_dep: segments must be at least two, got 1"),
        ([1], [[1], [], [2]], "segments must be of at least one token each, got none in segment 2"),
        ([1], [[1], [V]], rf"token ids in \[0, {V}\), the model's vocabulary, got {V}"),
        ([1], [[1], [-1]], "the model's vocabulary, got -1"),
        ([1] * 40, [[1] * 20, [2] * 5], "at most 64 tokens together, the model's context, got 65"),
    ],
)
def test_mistakes_are_named(prompt, segments, message):
    with pytest.raises(ValueError, match=message):
        seq_dep(llama(), prompt, segments)
    with pytest.raises(ValueError, match="seq_dep: batch_size must be a positive integer, got 0"):
        seq_dep(llama(), [1], [[1], [2]], batch_size=0)
