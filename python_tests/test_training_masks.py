"""What training corrupts, and what sees what."""

import pytest
import torch
from test_training import CPU, numbers
from training_models import BLOCK, generator, random_llama, random_model

from dmax_kernels.training.corrupt import block_mask, uniform_mask
from dmax_kernels.training.layout import Layout, attention_mask
from dmax_kernels.training.model import DenoisingModel
from dmax_kernels.training.prepare import build_net

pytestmark = pytest.mark.usefixtures("one_thread")


def test_block_mask_draws_a_count_for_each_block():
    editable = torch.ones(2000, 2 * BLOCK, dtype=torch.bool)
    counts = block_mask(editable, BLOCK, generator())[0].view(2000, 2, BLOCK).sum(-1)
    assert counts.min() == 1  # a block without a mask would teach nothing
    assert counts.max() == BLOCK
    share = torch.bincount(counts.flatten(), minlength=BLOCK + 1)[1:] / counts.numel()
    # 1/4 each; four standard errors of 4000 draws are 0.027
    torch.testing.assert_close(share, torch.full((BLOCK,), 1 / BLOCK), rtol=0, atol=0.028)
    assert not counts[:, 0].equal(counts[:, 1])


def test_a_prompt_is_never_masked():
    editable = torch.arange(12).expand(500, 12) >= 6  # the second block is half prompt
    assert not (block_mask(editable, BLOCK, generator())[0] & ~editable).any()
    assert block_mask(editable, BLOCK, generator())[0][:, 6:8].any(-1).all()
    for ratio in ((0.0, 1.0), (1.0, 1.0)):
        assert not (uniform_mask(editable, ratio, generator())[0] & ~editable).any()
    assert uniform_mask(editable, (1.0, 1.0), generator())[0].equal(editable)


def test_uniform_mask_has_its_ratio():
    editable = torch.ones(400, 100, dtype=torch.bool)
    fixed = uniform_mask(editable, (0.75, 0.75), generator())[0].float().mean(1)
    assert fixed.mean() == pytest.approx(0.75, abs=0.01)  # standard error 0.002
    assert fixed.std() == pytest.approx((0.75 * 0.25 / 100) ** 0.5, rel=0.2)
    drawn = uniform_mask(editable, (0.2, 0.8), generator())[0].float().mean(1)
    assert drawn.mean() == pytest.approx(0.5, abs=0.04)  # standard error 0.009
    assert drawn.std() > 0.15  # one level per row: uniform over 0.6 has 0.173


# Layout


@pytest.mark.parametrize(("length", "start", "num_noisy"), [(12, 4, 2), (8, 0, 1), (16, 12, 3)])
def test_the_layout_mask_is_its_definition(length, start, num_noisy):
    layout = Layout(length, start, BLOCK, num_noisy)
    places = [(part, p) for part in range(num_noisy) for p in range(start, length)]
    places += [("clean", p) for p in range(length - BLOCK)]
    mask = attention_mask(layout, "sdpa", CPU)[0, 0]
    assert mask.dtype == torch.bool
    assert mask.shape == (len(places), len(places))
    assert layout.position_ids.tolist() == [[p for _, p in places]]
    for i, (query_part, query) in enumerate(places):
        for j, (key_part, key) in enumerate(places):
            same_block = query // BLOCK == key // BLOCK
            if query_part == key_part:
                visible = same_block or (key_part == "clean" and key // BLOCK < query // BLOCK)
            else:
                visible = key_part == "clean" and key // BLOCK < query // BLOCK
            assert bool(mask[i, j]) == visible, (i, j)


def test_a_mask_is_built_once_per_shape():
    masks = [attention_mask(Layout(12, 4, BLOCK, 2), "sdpa", CPU) for _ in range(2)]
    assert masks[0] is masks[1]
    with pytest.raises(ValueError, match="start must be a multiple of block_length 4, got 6"):
        Layout(12, 6, BLOCK, 2)


@pytest.mark.parametrize("make", [random_model, random_llama])
@torch.no_grad()
def test_flex_attention_sees_what_the_boolean_mask_shows(make):
    # Forward alone: FlexAttention has no backward pass on a CPU, which build_net says. And without
    # the compiler: on AVX2, torch 2.13's CPU template gives wrong numbers or NaN at 24 tokens, also
    # where every key is seen
    model = make()
    clean = torch.randint(4, 46, (2, 12), generator=generator(1))
    noisy = [torch.randint(4, 46, (2, 8), generator=generator(seed)) for seed in (2, 3)]
    layout = Layout(12, 4, BLOCK, 2)
    hidden = {}
    for attention, name in (("sdpa", "sdpa"), ("flex", "flex_attention")):
        model.config._attn_implementation = name
        net = DenoisingModel(model)
        assert net.attention == attention
        with torch.compiler.set_stance("force_eager"):
            hidden[attention] = torch.stack(net(layout, noisy, clean))
    torch.testing.assert_close(hidden["flex"], hidden["sdpa"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention must be sdpa on a CPU .* got flex"):
        build_net(model, numbers(attention="flex"), CPU)
