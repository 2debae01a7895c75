"""Models whose logits at a position predict the next one (Dream, Fast-dLLM v2)."""

import pytest
import torch
from decoding_models import ExactModel, random_prompts

from dmax_kernels.decoding import spd_generate

OPTIONS = {"block_length": 8, "max_new_tokens": 24, "tau_dec": 0.3}


class Shifted(ExactModel):
    """An `ExactModel` whose logits lie one position to the left of where it computes them."""

    def forward(self, inputs_embeds, attention_mask, position_ids, **arguments):
        output = super().forward(inputs_embeds, attention_mask, position_ids, **arguments)
        output.logits = output.logits.roll(-1, dims=1)
        return output


def decode(model, prompts, **options):
    output = spd_generate(model, prompts, **{**OPTIONS, **options})
    return output.sequences.tolist(), output.num_forwards.tolist()


@pytest.mark.parametrize("rule", ["spd", "threshold", "entropy_bound"])
def test_the_shift_is_undone(rule):
    """On whole sequences, where a position's logits can stand anywhere."""
    for seed, length in ((0, 3), (1, 8), (2, 13)):  # a prompt's end inside a block, and at its end
        prompts, options = random_prompts(3, length, seed), {"use_cache": False, "rule": rule}
        plain = decode(ExactModel(seed=seed), prompts, **options)
        assert decode(Shifted(seed=seed), prompts, **options, shifted_logits=True) == plain
        assert decode(Shifted(seed=seed), prompts, **options) != plain


@pytest.mark.parametrize("poll_lag", [0, 1])
def test_the_cache_changes_nothing(poll_lag):
    """Rows in different blocks, the first block included; each pass forwards two blocks."""
    for seed in range(3):
        model = ExactModel(seed=seed)
        prompts = [random_prompts(1, length, seed)[0] for length in (1, 8, 17)]
        cached = decode(model, prompts, shifted_logits=True, poll_lag=poll_lag)
        assert set(model.positions_forwarded[-6:]) == {16}
        whole = decode(model, prompts, shifted_logits=True, use_cache=False)
        assert cached[0] == whole[0]
        assert cached != decode(model, prompts)
        assert torch.tensor(cached[1]).min() > 0
