"""Input embeddings whose forward is more than a look-up in `weight`: the model's own rows count."""

import pytest
import torch
from decoding_models import MASK, VOCABULARY, RandomModel, random_prompts
from torch import nn

from dmax_kernels.decoding import spd_generate
from dmax_kernels.decoding.embedding import embedding_table
from dmax_kernels.decoding.extra import Canvas, nap_generate
from dmax_kernels.integrations import lookup_weight

HIDDEN = 16


pytestmark = pytest.mark.usefixtures("one_thread")


class Wrapped(nn.Module):
    """An adapter's layer: the base layer's `weight`, and a different forward."""

    def __init__(self, base, change):
        super().__init__()
        self.base, self.change = base, change

    @property
    def weight(self):
        return self.base.weight

    def forward(self, ids):
        return self.change(ids, self.base(ids))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4


def scaled(layer):
    module = Scaled(VOCABULARY, HIDDEN)
    module.weight = layer.weight
    return module, 4 * layer.weight


def lora(layer):
    generator = torch.Generator().manual_seed(3)
    # Small integers over 8: the product is exact in any order
    a = torch.randint(-4, 5, (VOCABULARY, 3), generator=generator) / 8
    b = torch.randint(-4, 5, (3, HIDDEN), generator=generator) / 8
    return Wrapped(layer, lambda ids, rows: rows + a[ids] @ b), layer.weight + a @ b


def one_trained_token(layer):
    table = layer.weight.detach().clone()
    table[5] = -table[5]
    return Wrapped(layer, lambda ids, rows: torch.where((ids == 5)[..., None], -rows, rows)), table


def hooked(layer):
    table = 2 * layer.weight.detach()
    layer.register_forward_hook(lambda module, ids, rows: 2 * rows)
    return layer, table


def replaced_forward(layer):
    """As accelerate does, on the instance."""
    table, forward = -layer.weight.detach(), layer.forward
    layer.forward = lambda ids: -forward(ids)
    return layer, table


def offloaded(layer):
    """As accelerate does: the weight is there only while the module runs."""
    kept = layer.weight.detach().clone()
    away = nn.Parameter(kept.to("meta"))
    layer.weight = away
    layer.register_forward_pre_hook(
        lambda module, ids: setattr(module, "weight", nn.Parameter(kept))
    )
    layer.register_forward_hook(lambda module, ids, rows: setattr(module, "weight", away))
    return layer, kept


LAYERS = [scaled, lora, one_trained_token, hooked, replaced_forward, offloaded]


def two_models(make):
    """The model with such a layer, and one whose plain embedding holds the rows that it gives."""
    model, plain = RandomModel(), RandomModel()
    model.words, table = make(model.words)
    plain.words = nn.Embedding.from_pretrained(table.detach())
    return model, plain


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rule", ["spd", "autoregressive"])
@pytest.mark.parametrize("make", LAYERS)
def test_decodes_as_a_plain_table_of_the_same_rows(make, rule, use_cache):
    model, plain = two_models(make)
    options = {"block_length": 8, "max_new_tokens": 20, "rule": rule, "use_cache": use_cache}
    prompts = random_prompts(3, 11)
    got = spd_generate(model, prompts, eos_token_id=(), **options)
    expected = spd_generate(plain, prompts, eos_token_id=(), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.block_forwards, expected.block_forwards)


@pytest.mark.parametrize("make", [scaled, offloaded])
def test_a_canvas_decodes_too(make):
    model, plain = two_models(make)
    canvas = Canvas.build([[2], [3]], [3, 3], [4], 2)
    got, expected = (nap_generate(each, random_prompts(2, 9), canvas) for each in (model, plain))
    assert torch.equal(got.sequences, expected.sequences)


def test_a_look_up_costs_no_second_table():
    """Its own weight comes back: unread if the embedding is plain, else after a comparison."""
    model = RandomModel()
    calls = []
    forward = nn.Embedding.forward
    address = model.words.weight.data_ptr()
    assert embedding_table(model, MASK).data_ptr() == address
    model.words.forward = lambda ids: calls.append(ids.shape) or forward(model.words, ids)
    assert embedding_table(model, MASK).data_ptr() == address
    assert calls == [(1, VOCABULARY)]


def place_dependent(layer):
    places = torch.arange(64.0)[:, None]
    return Wrapped(layer, lambda ids, rows: rows + places[: ids.shape[-1]])


def not_brought_in(layer):
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    return layer


def failing(layer):
    def fail(ids, rows):
        raise RuntimeError("no memory\nand more lines")

    return Wrapped(layer, fail)


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (
            place_dependent,
            "one vector at every position, .* got Wrapped, which gave tokens 0 and",
        ),
        (
            lambda layer: Wrapped(layer, lambda i, rows: rows.double()),
            "got Tensor on cpu of torch.f",
        ),
        (not_brought_in, "one vector, .* got Tensor on meta of torch.float32"),
        (failing, "got Wrapped, which raised: no memory$"),
    ],
)
def test_what_no_table_can_stand_for_is_refused(make, got):
    model = RandomModel()
    model.words = make(model.words)
    with pytest.raises(ValueError, match=f"^spd_generate: the model's input embedding must.*{got}"):
        spd_generate(model, random_prompts(1, 8), block_length=8, max_new_tokens=8)


def test_an_engines_layer_is_compared_once():
    """The engines' adapters look rows up at each step: an unlike layer is refused at the first."""
    base = nn.Embedding(VOCABULARY, HIDDEN)
    calls = []
    same = Wrapped(base, lambda ids, rows: calls.append(ids) or rows)
    for _ in range(3):
        weight = lookup_weight("adapter", same)
        assert weight.data_ptr() == base.weight.data_ptr()
        assert not weight.requires_grad  # the step refuses tensors that require a gradient
    assert len(calls) == 1
    for make in (scaled, not_brought_in):
        layer = make(nn.Embedding(VOCABULARY, HIDDEN))
        layer = layer[0] if isinstance(layer, tuple) else layer
        with pytest.raises(ValueError, match="^adapter: the input embedding must be a layer whose"):
            lookup_weight("adapter", layer)
