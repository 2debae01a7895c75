"""The model as training runs it: states of the packed layout, then an op that they go to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.layout import ATTENTION_OF, Layout, attention_mask
from dmax_kernels.training.probe import check_attention, check_head, head_scale

# then(parts, weight, bias): the noisy parts' hidden states with the head's weight and bias, or
# their logits with None for both
Then = Callable[[list[Tensor], Tensor | None, Tensor | None], Any]


class DenoisingModel(nn.Module):
    """A Hugging Face causal LM, from packed tokens to what a loss or a draw is computed from.

    With `loss_from` "hidden" the backbone runs here, and the head's weight goes to an op that
    stores no logits; with "logits" the whole model runs. `then` is called inside `forward`: with
    FSDP the head's weight is whole only there.
    """

    def __init__(self, model: Any, *, loss_from: str = "hidden", autocast: bool = False) -> None:
        super().__init__()
        self.model = model
        self.loss_from = loss_from
        self.autocast = autocast
        self.mask_token_id: int = model.config.mask_token_id
        self.head_scale = 1.0  # of the model's logits over the head's product (Granite, Cohere)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def attention(self) -> str:
        """What the model's attention takes for a mask."""
        implementation = self.model.config._attn_implementation
        if implementation not in ATTENTION_OF:
            raise ValueError(
                f"the model's attention must be one of {', '.join(map(str, ATTENTION_OF))}, which "
                f"take a mask of what sees what, got {implementation}"
            )
        return ATTENTION_OF[implementation]

    @property
    def backbone(self) -> nn.Module:
        """The model without its head. An adapter of PEFT's has a `base_model` of its own."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return inner.base_model

    def mask(self, layout: Layout) -> Any:
        dtype = self.model.get_input_embeddings().weight.dtype
        if self.autocast:
            dtype = torch.bfloat16
        return attention_mask(layout, self.attention, self.device, dtype)

    def states(self, tokens: Tensor, position_ids: Tensor, mask: Any, keep: int) -> Tensor:
        """Hidden states [B, T, D], or logits of at least the first `keep` positions."""
        if isinstance(mask, Tensor):  # one mask for all rows, in the shape that LLaDA2 asks for
            mask = mask.expand(tokens.shape[0], -1, -1, -1)
        inputs = {
            "input_ids": tokens,
            "position_ids": position_ids.to(tokens.device),
            "attention_mask": mask,
            "use_cache": False,
        }
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            if self.loss_from == "hidden":
                return self.backbone(**inputs).last_hidden_state
            if "logits_to_keep" in signature(self.model.forward).parameters:
                inputs["logits_to_keep"] = torch.arange(keep, device=tokens.device)
            return self.model(**inputs).logits

    def forward(self, layout: Layout, noisy: list[Tensor], clean: Tensor, then: Then) -> Any:
        tokens = layout.pack(noisy, clean)
        keep = layout.num_noisy * layout.noisy_length
        parts = layout.noisy_parts(
            self.states(tokens, layout.position_ids, self.mask(layout), keep)
        )
        if self.loss_from == "logits":
            return then(list(parts), None, None)
        head = self.model.get_output_embeddings()
        # Outside autocast: the op's own arithmetic is float32, from operands of one dtype
        dtype = torch.bfloat16 if self.autocast else head.weight.dtype

        def scaled(values: Tensor) -> Tensor:
            return (values if self.head_scale == 1 else values.float() * self.head_scale).to(dtype)

        bias = getattr(head, "bias", None)
        return then(
            [scaled(states) for states in parts],
            head.weight.to(dtype),
            None if bias is None else scaled(bias),
        )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers: the module list with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            "the model must keep its layers in a torch.nn.ModuleList, got "
            f"{type(model).__name__} without one"
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def build_net(model: Any, config: TrainConfig, device: torch.device) -> DenoisingModel:
    """`model` on `device`, ready to train, with float32 weights.

    Raises:
        ValueError: a model whose loss or packed forward pass would not be its own; see probe.py.
    """
    if getattr(model.config, "mask_token_id", None) is None:
        raise ValueError("the model has no mask token (config.mask_token_id): give --mask-token-id")
    net = DenoisingModel(model.float(), loss_from=config.loss_from).to(device).eval()
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
