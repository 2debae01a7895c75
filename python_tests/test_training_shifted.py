"""Training of models whose logits at a position predict the next one."""

import pytest
import torch
from training_models import BLOCK, generator, random_model

from dmax_kernels.training.layout import Layout
from dmax_kernels.training.model import DenoisingModel


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize("start", [4, 8])
@torch.no_grad()
def test_each_position_is_predicted_one_to_its_left(loss_from, start):
    """Block by block, after the clean tokens before it, as the decoder runs it."""
    model = random_model()
    clean = torch.randint(4, 46, (2, 16), generator=generator(1))
    noisy = [torch.randint(4, 46, (2, 16 - start), generator=generator(seed)) for seed in (2, 3)]
    net = DenoisingModel(model, loss_from=loss_from, shifted_logits=True)
    parts = net(Layout(16, start, BLOCK, 2), noisy, clean)
    weight, _ = net.head()
    for part, tokens in zip(parts, noisy, strict=True):
        logits = part if weight is None else part @ weight.t()
        for first in range(start, 16, BLOCK):
            place = slice(first - start, first - start + BLOCK)
            whole = model(input_ids=torch.cat([clean[:, :first], tokens[:, place]], dim=1)).logits
            expected = whole[:, -BLOCK - 1 : -1]
            torch.testing.assert_close(logits[:, place], expected, rtol=1e-4, atol=1e-4)


def test_position_0_has_none_before_it():
    layout = Layout(8, 0, BLOCK, 1)
    states = torch.arange(12.0).view(1, 12, 1)  # 8 noisy positions, 4 clean ones
    (part,) = layout.shifted_parts(states)
    assert part.flatten().tolist() == [8, 0, 1, 2, 11, 4, 5, 6]
