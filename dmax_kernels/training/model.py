"""A Hugging Face model as training runs it: packed sequences in, hidden states or logits out."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dmax_kernels.training.layout import ATTENTION_OF, Layout, attention_mask


class DenoisingModel(nn.Module):
    """A Hugging Face causal LM that runs packed sequences (see `layout.py`).

    With `loss_from` "hidden" only the backbone runs, and the caller multiplies by `head()` in an op
    that stores no logits. With "logits" the whole model runs.
    """

    def __init__(
        self,
        model: Any,
        *,
        loss_from: str = "hidden",
        autocast: bool = False,
        shifted_logits: bool = False,
    ) -> None:
        super().__init__()
        self.shifted_logits = shifted_logits  # those at a position are of the next one
        self.model = model
        self.loss_from = loss_from
        self.autocast = autocast
        self.mask_token_id: int = model.config.mask_token_id
        # The model's logits divided by the product of states and head (Granite, Cohere: not 1)
        self.head_scale = 1.0

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def attention(self) -> str:
        """The kind of mask that the model's attention takes."""
        implementation = self.model.config._attn_implementation
        if implementation not in ATTENTION_OF:
            raise ValueError(
                f"the model's attention must be one of {', '.join(map(str, ATTENTION_OF))}, which "
                f"take a mask of what sees what, got {implementation}"
            )
        return ATTENTION_OF[implementation]

    @property
    def backbone(self) -> nn.Module:
        """The model without its head. A PEFT adapter has a `base_model` of its own around it."""
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return inner.base_model

    def mask(self, layout: Layout) -> Any:
        dtype = self.model.get_input_embeddings().weight.dtype
        if self.autocast:
            dtype = torch.bfloat16
        return attention_mask(layout, self.attention, self.device, dtype)

    def forward(self, layout: Layout, noisy_parts: list[Tensor], clean: Tensor) -> list[Tensor]:
        """Of each noisy part, hidden states that go with `head()`, or logits: [B, W, ...]."""
        tokens = layout.pack(noisy_parts, clean)
        shifted, keep = self.shifted_logits, layout.num_noisy * layout.noisy_length
        keep = tokens.shape[1] if shifted else keep
        states = self.states(tokens, layout.position_ids, self.mask(layout), keep)
        parts = layout.shifted_parts(states) if shifted else layout.noisy_parts(states)
        return list(parts) if self.loss_from == "logits" else [self.scaled(part) for part in parts]

    def states(self, tokens: Tensor, position_ids: Tensor, mask: Any, keep: int) -> Tensor:
        """Hidden states [B, T, D], or logits of at least the first `keep` positions."""
        if isinstance(mask, Tensor):  # LLaDA2 asks for a row of the mask for each row of tokens
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

    def head(self) -> tuple[Tensor | None, Tensor | None]:
        """The head's weight and bias, in the dtype of the states; None for both with logits.

        Outside autocast: the ops that take them compute in float32 from operands of one dtype.
        """
        if self.loss_from == "logits":
            return None, None
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return head.weight.to(self.head_dtype), None if bias is None else self.scaled(bias)

    @property
    def head_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.model.get_output_embeddings().weight.dtype

    def scaled(self, values: Tensor) -> Tensor:
        """Values times `head_scale`. The weight is not scaled, since it is the largest factor."""
        scaled = values if self.head_scale == 1 else values.float() * self.head_scale
        return scaled.to(self.head_dtype)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers: the module list with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            "the model must keep its layers in a torch.nn.ModuleList, got "
            f"{type(model).__name__} without one"
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
