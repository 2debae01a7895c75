"""Architectures as training runs them: loss and gradients are the model's own, or it is refused."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from training_models import BLOCK, generator
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import dmax_kernels
from dmax_kernels.models.attention_window import attention_window
from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.data import Example, collate
from dmax_kernels.training.layout import Layout
from dmax_kernels.training.loop import build_objective
from dmax_kernels.training.oput import Objective, block_mask, uniform_mask
from dmax_kernels.training.prepare import build_net
from dmax_kernels.training.run import check_window

CPU = torch.device("cpu")
VOCABULARY, MASK = 96, 95
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# kind: (config, where the loss comes from, the scale of the logits)
RIGHT = {
    "llama": ({}, "hidden", 1),
    "llama, eager": ({"attn_implementation": "eager"}, "hidden", 1),
    "qwen2, tied": ({"tie_word_embeddings": True}, "hidden", 1),
    "gpt2": (GPT2, "hidden", 1),
    "phi": ({}, "hidden", 1),  # its head has a bias
    "granite": ({"logits_scaling": 8.0}, "hidden", 1 / 8),
    "cohere": ({}, "hidden", 1 / 16),
    "gemma3_text": (GEMMA, "hidden", 1),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "hidden", 1),
    "gemma2": (GEMMA, "logits", 1),
    "bert": ({"is_decoder": True}, "logits", 1),
}


# Before transformers 5 these take no mask of ours, or show no head, and are refused
OLD = int(transformers.__version__.partition(".")[0]) < 5
REFUSED_BY_OLD = {"gpt2", "gemma3_text", "gemma2", "bert"} if OLD else set()


pytestmark = pytest.mark.usefixtures("one_thread")


def configuration(kind, changes):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return AutoConfig.for_model(kind, **SIZES, **changes)


def network(kind, changes):
    torch.manual_seed(1)
    config = configuration(kind.split(",")[0], changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3 if weight.dim() > 1 else 0.1)
            if weight.dim() == 1 and "norm" in name.lower() and "bias" not in name:
                weight.add_(1)
    model.config.mask_token_id = MASK
    return model


def built(model, **changes):
    return build_net(model, TrainConfig(block_length=BLOCK, **changes), CPU)


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", RIGHT)
def test_loss_and_gradients_are_those_of_the_models_own_logits(kind):
    """The model's own run block by block, each after the clean tokens before it, never packed."""
    changes, loss_from, scale = RIGHT[kind]
    model = network(kind, changes)
    if kind in REFUSED_BY_OLD:
        with pytest.raises(ValueError, match=" must "):
            built(model, loss_from=loss_from)
        return
    net = built(model, loss_from=loss_from).eval()
    assert net.head_scale == scale
    clean = torch.randint(3, 90, (2, 12), generator=generator(0))
    noisy = torch.randint(3, 90, (2, 8), generator=generator(1))
    target = clean[:, 4:]

    (states,) = net(Layout(12, 4, BLOCK, 1), [noisy], clean)
    objective = Objective(net, dmax_kernels)
    loss = objective.summed_losses(states.flatten(0, 1), None, target.flatten())[0] / 16
    loss.backward()
    found = gradients(model)

    logits = []
    for start in (4, 8):
        tokens = torch.cat([clean[:, :start], noisy[:, start - 4 : start]], dim=1)
        at = torch.arange(start + 4)
        visible = at[None] // BLOCK <= at[:, None] // BLOCK
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min).expand(2, 1, -1, -1)
        output = model(
            input_ids=tokens, position_ids=at[None], attention_mask=mask, use_cache=False
        )
        logits.append(output.logits[:, -BLOCK:])
    own = F.cross_entropy(torch.cat(logits, dim=1).flatten(0, 1), target.flatten())
    own.backward()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=0)
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the largest entry; a key's bias has gradient 0 except for rounding
        bound = 1e-4 * gradient.abs().max() + 1e-6
        assert (found[name] - gradient).abs().max() < bound, name


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma2", GEMMA, "got Gemma2ForCausalLM's, which differ by .*; give --loss-from"),
        ("bert", {}, "got cls.predictions.transform.dense.weight, which is trained too"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "which runs parts of its own"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "tokens that the attention mask"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "whatever the order of the tokens"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "must run on input_ids, position_ids and an"),
    ],
)
def test_what_training_would_get_wrong_is_refused(kind, changes, message):
    model = network(kind, changes)
    with pytest.raises(ValueError, match=" must " if OLD else message):
        built(model)


def test_a_softcap_is_found_where_the_logits_are_small():
    model = network("gemma2", GEMMA)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    with pytest.raises(
        ValueError, match=" must " if OLD else "got Gemma2ForCausalLM's, which differ"
    ):
        built(model)


def test_an_adapter_on_the_head_is_found_while_it_is_zero():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.weight = base, base.weight
            self.delta = nn.Parameter(torch.zeros_like(base.weight))

        def forward(self, states):
            return self.base(states) + F.linear(states, self.delta)

    model = network("llama", {})
    model.lm_head = Adapted(model.lm_head)
    with pytest.raises(ValueError, match="got lm_head.delta, which is trained too"):
        built(model)
    assert built(model, loss_from="logits").loss_from == "logits"


def test_a_new_models_zero_head_is_left_zero():
    model = network("granite", {"logits_scaling": 8.0})
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert built(model).head_scale == 1 / 8
    assert not model.lm_head.weight.any()


def test_other_masks_heads_and_devices_are_refused():
    model = network("llama", {})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention must be one of sdpa, .* got flash_attention_2"):
        built(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention must be sdpa on a CPU"):
        built(model)
    model = network("llama", {})
    model.lm_head = nn.Linear(32, 99, bias=False)
    for loss_from in ("hidden", "logits"):
        with pytest.raises(ValueError, match="over the 96 tokens of its input embedding, got 99"):
            built(model, loss_from=loss_from)


@pytest.mark.parametrize("objective", ["oput", "uniform", "mdlm", "certainty"])
def test_a_step_from_logits_is_the_step_from_hidden_states(objective):
    examples = [Example((5, 6, 7, 8), (9, 10, 11, 12, 13, 2), "a"), Example((20,), (21, 2), "b")]
    values = {}
    for loss_from in ("hidden", "logits"):
        config = TrainConfig(loss_from=loss_from, objective=objective, ops="reference")
        model = network("granite", {"logits_scaling": 8.0})
        built_objective = build_objective(model, config, CPU)
        corrupted = built_objective.corrupt(collate(examples, BLOCK, 2, "block"), seed=0, step=3)
        total, losses = built_objective(corrupted.rows([0, 1], CPU))
        total.backward()
        values[loss_from] = losses, gradients(model)
    torch.testing.assert_close(values["logits"], values["hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype):
    editable = torch.ones(4, 8, dtype=torch.bool)

    def made(model):
        mask = built(model).mask(Layout(8, 4, BLOCK, 1))
        drawn = uniform_mask(editable, (0.2, 0.8), generator())
        return mask, *drawn, *block_mask(editable, BLOCK, generator())

    models = [network("llama", {"attn_implementation": "eager"}) for _ in range(2)]
    expected = made(models[0])
    torch.set_default_dtype(dtype)
    try:
        found = made(models[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert [each.dtype for each in found] == [torch.float32, *[torch.bool, torch.float32] * 2]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 16}, 16),  # every layer
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 16}, None),  # use_sliding_window is off
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
        ("gpt_oss", {"sliding_window": 16}, 16),  # every second layer
        ("gpt_oss", {"sliding_window": 16, "layer_types": ["full_attention"] * 2}, None),
        ("llama4_text", {"attention_chunk_size": 16, "no_rope_layers": [1, 0]}, 16),
    ],
)
def test_rows_beyond_the_models_own_window_are_refused(kind, changes, window):
    config = configuration(kind, changes)
    assert attention_window(config) == window
    check_window(config, 16)
    if window is None:
        check_window(config, 17)
        return
    with pytest.raises(ValueError, match="attention window of 16 positions.* got one of 17"):
        check_window(config, 17)
