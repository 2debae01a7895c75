"""The model as training runs it: hidden states of the packed layout, then the head's own op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.layout import Layout, attention_mask


class DenoisingModel(nn.Module):
    """A Hugging Face causal LM whose backbone runs here and whose head goes to an op.

    `then(noisy hidden states, head weight, head bias)` runs inside `forward`: with FSDP the head's
    weight is whole only there. The logits of the clean part are never computed.
    """

    def __init__(self, model: Any, *, attention: str, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self.autocast = autocast
        self.mask_token_id: int = model.config.mask_token_id

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        layout: Layout,
        noisy: list[Tensor],
        clean: Tensor,
        then: Callable[[list[Tensor], Tensor, Tensor | None], Any],
    ) -> Any:
        tokens = layout.pack(noisy, clean)
        mask = attention_mask(layout, self.attention, tokens.device)
        if isinstance(mask, Tensor):  # one mask for all rows, in the shape that LLaDA2 asks for
            mask = mask.expand(tokens.shape[0], -1, -1, -1)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.model.base_model(
                input_ids=tokens,
                position_ids=layout.position_ids.to(tokens.device),
                attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
        head = self.model.get_output_embeddings()
        # Outside autocast: the op's own arithmetic is float32, from operands of one dtype
        dtype = torch.bfloat16 if self.autocast else head.weight.dtype
        bias = getattr(head, "bias", None)
        return then(
            [states.to(dtype) for states in layout.noisy_parts(hidden)],
            head.weight.to(dtype),
            None if bias is None else bias.to(dtype),
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
    """`model` on `device`, ready to train, with float32 weights."""
    if config.attention == "flex" and device.type == "cpu":
        raise ValueError(
            "attention must be sdpa on a CPU (FlexAttention has no backward pass there), got flex"
        )
    if getattr(model.config, "mask_token_id", None) is None:
        raise ValueError("the model has no mask token (config.mask_token_id): give --mask-token-id")
    model.float()
    if config.gradient_checkpointing:
        for layer in decoder_layers(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    autocast = config.precision == "bf16-autocast"
    return DenoisingModel(model, attention=config.attention, autocast=autocast).to(device).train()


def trained_parameters(net: DenoisingModel) -> dict[str, nn.Parameter]:
    return {name: p for name, p in net.model.named_parameters() if p.requires_grad}


class MasterWeights:
    """float32 weights that the optimizer steps, for a model that computes in bfloat16.

    bfloat16 has 8 bits of precision: a step of 2e-6 would round away in the weights themselves.
    Gradients are added up in float32 over micro batches.
    """

    def __init__(self, net: DenoisingModel) -> None:
        parameters = trained_parameters(net)
        self.named = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        net.model.to(torch.bfloat16)
        self.model = trained_parameters(net)

    def take_gradients(self) -> None:
        for name, parameter in self.model.items():
            if parameter.grad is not None:
                master = self.named[name]
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        for name, parameter in self.model.items():
            parameter.copy_(self.named[name])


class OwnWeights:
    """The model's own parameters are the ones that the optimizer steps."""

    def __init__(self, net: DenoisingModel) -> None:
        self.named = trained_parameters(net)

    def take_gradients(self) -> None:
        pass

    def publish(self) -> None:
        pass
