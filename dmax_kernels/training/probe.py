"""What training takes for granted of a model, asked of the model itself before the first step.

Nothing here goes by names of architectures. A mask that is ignored or a layer beside the head
raises no error, and the loss still falls: the run would teach the model something else.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmax_kernels.training.layout import Layout, attention_mask

if TYPE_CHECKING:
    from dmax_kernels.training.model import DenoisingModel

PROBED = Layout(length=6, start=2, block_length=2, num_noisy=2)  # 12 tokens
RAISED = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError)


def random_tokens(net: DenoisingModel) -> Tensor:
    """int64 [T + 1, T]: row i is the first row but for another token at place i - 1."""
    vocabulary = net.model.get_input_embeddings().weight.shape[0]
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

    A token that a position must not see is changed: the position's state must stay. The sequence is
    turned round, with its mask and positions: the states must be those of before, in the new order.
    So eager attention that reads the mask as other numbers, a causal mask or a recurrence of the
    model's own, and positions that are counted instead of read all come out.
    """
    tokens, positions, mask = random_tokens(net), PROBED.position_ids, net.mask(PROBED)
    places = positions.shape[1]
    back = torch.arange(places - 1, -1, -1, device=net.device)
    try:
        states = net.states(tokens, positions, mask, places).float()
        turned = net.states(
            tokens[:1, back], positions.flip(1), turn_round(mask, back), places
        ).float()
    except torch.OutOfMemoryError:
        raise
    except RAISED as error:
        raise ValueError(
            "the model must run on input_ids, position_ids and an attention_mask of "
            f"[rows, 1, queries, keys], got {type(error).__name__}: {first_line(error)}"
        ) from error
    vocabulary = net.model.get_input_embeddings().weight.shape[0]
    if net.loss_from == "logits" and states.shape[-1] != vocabulary:
        raise ValueError(vocabulary_message(vocabulary, states.shape[-1]))
    seen = attention_mask(PROBED, "sdpa", net.device)[0, 0].t()  # [changed place, looking place]
    change = (states[1:] - states[0]).abs().amax(-1)
    others = ~torch.eye(places, dtype=torch.bool, device=net.device)
    # What attention moves is the measure; the second term is for models that it does not move yet
    bound = 1e-2 * change[seen & others].max() + 1e-4 * states.abs().max()
    leak, moved = change[~seen].max(), (turned[0, back] - states[0]).abs().max()
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


def turn_round(mask: Any, back: Tensor) -> Any:
    if isinstance(mask, Tensor):
        return mask[..., back, :][..., back]
    from torch.nn.attention.flex_attention import create_block_mask

    visible, tokens = mask.mask_mod, len(back)

    def turned(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return visible(row, head, tokens - 1 - query, tokens - 1 - key)

    return create_block_mask(turned, None, None, tokens, tokens, device=back.device)


def check_head(net: DenoisingModel) -> None:
    """Refuses a head that is not one weight behind a backbone, as far as its parts tell."""
    backbone, head = net.backbone, net.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if backbone is net.model or not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(head_message(f"{type(net.model).__name__} without such parts"))
    vocabulary = net.model.get_input_embeddings().weight.shape[0]
    if weight.shape[0] != vocabulary:
        raise ValueError(vocabulary_message(vocabulary, weight.shape[0]))
    known = {id(p) for p in (*backbone.parameters(), weight, getattr(head, "bias", None))}
    for name, parameter in net.model.named_parameters():
        # An adapter starts at zero: the logits do not show it yet
        if parameter.requires_grad and id(parameter) not in known:
            raise ValueError(head_message(f"{name}, which is trained too"))


@torch.no_grad()
def head_scale(net: DenoisingModel) -> float:
    """s, where the model's logits are s (hidden W^T + b) with the head's weight W and bias b."""
    backbone, head = net.backbone, net.model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    inputs = {
        "input_ids": random_tokens(net)[:1],
        "position_ids": PROBED.position_ids.to(net.device),
        "attention_mask": net.mask(PROBED),
        "use_cache": False,
    }
    blank = not weight.any()  # a head that is still to be learnt
    if blank:
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    try:
        states = backbone(**inputs).last_hidden_state.float()
        # Logits up to 100 apart from the bias, where a softcap shows
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
    # Configs hold 1, 8, 0.0625: leave out the rounding of the sums above
    simple = float(Fraction(scale).limit_denominator(100))
    return simple if abs(simple - scale) < 1e-6 * abs(scale) else scale


def head_message(got: str) -> str:
    return (
        "the logits must be the hidden states times the head's weight plus its bias, times a "
        f"constant, got {got}; give --loss-from logits, which stores them as the model makes them"
    )


def vocabulary_message(vocabulary: int, got: int) -> str:
    return (
        f"the model's logits must be over the {vocabulary} tokens of its input embedding, got "
        f"{got} (resize the embedding or the head)"
    )


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
