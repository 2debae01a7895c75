"""A model made ready for training, after it was tested for what training takes for granted.

The tests run the model itself on a few tokens and do not go by names of architectures. A mask that
is ignored, or a layer beside the head, raises no error, and the loss still falls: without the tests
the run would teach the model something else.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.layout import Layout, attention_mask
from dmax_kernels.training.model import DenoisingModel, decoder_layers

PROBED = Layout(length=6, start=2, block_length=2, num_noisy=2)  # 12 tokens
RAISED = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError)


def build_net(model: Any, config: TrainConfig, device: torch.device) -> DenoisingModel:
    """`model` on `device`, ready to train, with float32 weights.

    Raises:
        ValueError: a model whose loss or packed forward pass would not be its own.
    """
    if getattr(model.config, "mask_token_id", None) is None:
        raise ValueError("the model has no mask token (config.mask_token_id): give --mask-token-id")
    options = {"loss_from": config.loss_from, "shifted_logits": config.shifted_logits}
    net = DenoisingModel(model.float(), **options).to(device).eval()
    if (net.attention == "flex" or config.attention == "flex") and device.type == "cpu":
        raise ValueError(
            "attention must be sdpa on a CPU (FlexAttention has no backward pass there), got flex"
        )
    if config.attention == "flex" and net.attention != "flex":
        raise ValueError(
            'attention "flex" needs a model with attn_implementation "flex_attention", got '
            f"{model.config._attn_implementation}"
        )
    if config.loss_from == "hidden":
        check_head(net)
    check_attention(net)
    if config.loss_from == "hidden":
        net.head_scale = head_scale(net)
    net.autocast = config.precision == "bf16-autocast"
    if config.gradient_checkpointing:
        for layer in decoder_layers(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return net.train()


def random_tokens(net: DenoisingModel) -> Tensor:
    """int64 [T + 1, T]: row i is row 0 with a different token at position i - 1."""
    vocabulary = net.vocabulary
    tokens = PROBED.position_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (1, tokens), generator=generator).repeat(tokens + 1, 1)
    shift = torch.randint(1, vocabulary, (tokens,), generator=generator)
    places = torch.arange(tokens)
    rows[places + 1, places] = (rows[0] + shift) % vocabulary
    return rows.to(net.device)


@torch.no_grad()
def check_attention(net: DenoisingModel) -> None:
    """Refuses a model that does not follow the layout's mask and positions alone.

    First, each token is changed: the states of positions that must not see it must stay the same.
    Second, the sequence is reversed together with its mask and positions: the states must come out
    reversed and otherwise the same. This finds eager attention that misreads the mask's numbers, a
    causal mask or a recurrence of the model's own, and positions that are counted, not read.
    """
    tokens, positions, mask = random_tokens(net), PROBED.position_ids, net.mask(PROBED)
    places = positions.shape[1]
    back = torch.arange(places - 1, -1, -1, device=net.device)
    try:
        states = net.states(tokens, positions, mask, places).float()
        reversed_states = net.states(
            tokens[:1, back], positions.flip(1), reversed_mask(mask, back), places
        ).float()
    except torch.OutOfMemoryError:
        raise
    except RAISED as error:
        raise ValueError(
            "the model must run on input_ids, position_ids and an attention_mask of "
            f"[rows, 1, queries, keys], got {type(error).__name__}: {first_line(error)}"
        ) from error
    vocabulary = net.vocabulary
    if net.loss_from == "logits" and states.shape[-1] != vocabulary:
        raise ValueError(vocabulary_message(vocabulary, states.shape[-1]))
    mask = attention_mask(PROBED, "sdpa", net.device)[0, 0]
    seen = mask.t()  # [changed position, looking position]
    change = (states[1:] - states[0]).abs().amax(-1)
    others = ~torch.eye(places, dtype=torch.bool, device=net.device)
    # Relative to what attention moves; the second term is for attention that moves nothing yet
    bound = 1e-2 * change[seen & others].max() + 1e-4 * states.abs().max()
    leak, moved = change[~seen].max(), (reversed_states[0, back] - states[0]).abs().max()
    if leak > bound:
        raise ValueError(
            "a position's state must not depend on tokens that the attention mask hides from it, "
            f"got a change of {leak:.2g} in {type(net.model).__name__} "
            f"(attention {net.model.config._attn_implementation})"
        )
    if moved > bound:
        raise ValueError(
            "attention must follow the given mask and positions, whatever the order of the tokens, "
            f"got states that differ by {moved:.2g} in {type(net.model).__name__} "
            f"(attention {net.model.config._attn_implementation})"
        )


def reversed_mask(mask: Any, back: Tensor) -> Any:
    """The mask of the sequence in the order `back`, which is the reverse one."""
    if isinstance(mask, Tensor):
        return mask[..., back, :][..., back]
    from torch.nn.attention.flex_attention import create_block_mask

    visible, tokens = mask.mask_mod, len(back)

    def visible_reversed(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return visible(row, head, tokens - 1 - query, tokens - 1 - key)

    return create_block_mask(visible_reversed, None, None, tokens, tokens, device=back.device)


def check_head(net: DenoisingModel) -> None:
    """Refuses a model whose parts show that it is not a backbone and then one weight."""
    backbone, head = net.backbone, net.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if backbone is net.model or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(head_message(f"{type(net.model).__name__} without such parts"))
    vocabulary = net.vocabulary
    if weight.shape[0] != vocabulary:
        raise ValueError(vocabulary_message(vocabulary, weight.shape[0]))
    known = {id(p) for p in (*backbone.parameters(), weight, getattr(head, "bias", None))}
    for name, parameter in net.model.named_parameters():
        # Logits do not show an adapter of the head yet: it starts at zero
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(head_message(f"{name}, which is trained too"))


@torch.no_grad()
def head_scale(net: DenoisingModel) -> float:
    """The s in logits = s (hidden W^T + b), with the head's weight W and bias b."""
    backbone, head = net.backbone, net.model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    inputs = {
        "input_ids": random_tokens(net)[:1],
        "position_ids": PROBED.position_ids.to(net.device),
        "attention_mask": net.mask(PROBED),
        "use_cache": False,
    }
    blank = not weight.any()  # a new model's head
    if blank:
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    try:
        states = backbone(**inputs).last_hidden_state.float()
        # Scaled to logits of up to 100 before the bias, at which a softcap shows
        states = states * (100 / F.linear(states, weight).abs().max())
        plain = F.linear(states, weight, bias).double()
        replaced = []

        def replace(module: nn.Module, arguments: Any, output: Any) -> Any:
            replaced.append(output)
            output.last_hidden_state = states
            return output

        hook = backbone.register_forward_hook(replace)
        try:
            logits = net.model(**inputs).logits.double()
        finally:
            hook.remove()
    finally:
        if blank:
            weight.zero_()
    if not replaced:
        raise ValueError(head_message(f"{type(net.model).__name__}, which runs parts of its own"))
    if logits.shape != plain.shape:
        raise ValueError(head_message(f"logits of shape {list(logits.shape)}"))
    scale = float((logits * plain).sum() / plain.square().sum())
    error = float((logits - scale * plain).abs().max() / logits.abs().max())
    if not error < 1e-3:  # a softcap of 30 leaves 0.3 here; NaN is refused too
        raise ValueError(
            head_message(
                f"{type(net.model).__name__}'s, which differ by {error:.1%} of the largest"
            )
        )
    # Configs hold numbers such as 1, 8 and 0.0625: remove the rounding of the sums above
    simple = float(Fraction(scale).limit_denominator(100))
    return simple if abs(simple - scale) < 1e-6 * abs(scale) else scale


def head_message(got: str) -> str:
    return (
        "the logits must be the hidden states times the head's weight plus its bias, times a "
        f"constant, got {got}; give --loss-from logits, which stores and uses the model's own"
    )


def vocabulary_message(vocabulary: int, got: int) -> str:
    return (
        f"the model's logits must be over the {vocabulary} tokens of its input embedding, got "
        f"{got} (resize the embedding or the head)"
    )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
