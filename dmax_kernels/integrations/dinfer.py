"""dInfer (the copy in the DMax repository): the fused step as its `decode_uniform`.

    decoder = spd_decoder()(temperature=0, threshold=0.5, mask_id=156895, eos_id=156892)

replaces `ThresholdParallelDecoder(...)`. B rows, T tokens, K block length, V vocabulary,
D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.decoding.state import BlockState
from dmax_kernels.integrations import engine_objects, lookup_weight
from dmax_kernels.ops.spd_step import SEMANTICS

TAU_ACC = 0.9  # fixed inside dInfer's decode_uniform


def spd_decoder(
    *, semantics: str = "released", tau_acc: float = TAU_ACC, base: type | None = None
) -> type:
    """A subclass of dInfer's `ThresholdParallelDecoder` whose `decode_uniform` is `spd_step_`.

    Args:
        semantics: "released" commits the same token ids as the class it replaces: the whole batch
            stops at once, and masks are left where a block stops with its threshold above tau_acc.
            With "settled" and "paper" (:func:`dmax_kernels.spd_step_`) each row stops by itself,
            whatever the other rows do, and no mask is left.
        tau_acc: a block is accepted when all its confidences reach this.
        base: the class to build on; by default dInfer's own.

    Returns:
        The class. One host sync per step. A decoder with temperature != 0 or use_float64 runs the
        base class's own code.

    Raises:
        ImportError: dInfer is not importable, or has no `decode_uniform` (upstream dInfer has none,
            the copy in the DMax repository does).
        ValueError: unknown semantics; `decode_uniform` on a vocabulary-sharded embedding.
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"spd_decoder: semantics must be one of {SEMANTICS}, got {semantics!r}")
    if base is None:
        module = "dinfer.decoding.parallel_strategy"
        base, _ = engine_objects(
            "dInfer",
            module,
            "ThresholdParallelDecoder",
            "ThresholdParallelDecoder.decode_uniform",
        )

    class SpdDecoder(base):  # type: ignore[misc, valid-type]
        @torch.no_grad()
        def decode_uniform(
            self,
            logits: Tensor,
            block_start: int,
            block_end: int,
            x: Any,
            active_index: Tensor,
            embedding_layer: Any,
            prev_embeddings: Tensor | None = None,
            iter_threshold: float | None = None,
            top_k: int = 1,
        ) -> tuple[bool, Tensor | None]:
            """logits [B, K, V], x a TokenArray [B, T]: writes x, returns (stop, embeds [B, K, D]).

            `prev_embeddings` is written in place and returned; None marks a block's first step.
            """
            if self.temperature != 0 or self.use_float64:
                return super().decode_uniform(
                    logits,
                    block_start,
                    block_end,
                    x,
                    active_index,
                    embedding_layer,
                    prev_embeddings,
                    iter_threshold,
                    top_k,
                )
            embedding = embedding_layer.weight
            if embedding.shape[0] < logits.shape[-1]:
                raise ValueError(
                    "decode_uniform: embedding_layer must hold the whole vocabulary "
                    f"({logits.shape[-1]} rows), got {embedding.shape[0]} rows"
                )
            embedding = lookup_weight("decode_uniform", embedding_layer)
            first = prev_embeddings is None
            before = x[:, block_start:block_end]
            if first or semantics == "released":
                state = start_block(before, active_index, embedding, self.mask_id, prev_embeddings)
                self._spd_state = state
            else:
                state = self._spd_state
            dmax_kernels.spd_step_(
                logits,
                embedding,
                **vars(state),
                mask_token_id=self.mask_id,
                tau_dec=self.threshold if iter_threshold is None else iter_threshold,
                tau_acc=tau_acc,
                semantics=semantics,
                top_k=top_k,
                # A predicted mask would count as a decoded token; the engine allows it
                suppress_token=self.mask_id if semantics != "released" else -1,
            )
            token = state.token.masked_fill(state.masked, self.mask_id)
            by_row = semantics != "released" or len(token) == 1
            # The one host sync: the runner's loop is on the host
            stop = bool(
                state.converged.all() if by_row else batch_stop(state, token, before, tau_acc)
            )
            x[:, block_start:block_end] = token
            if stop:
                return True, prev_embeddings
            if not by_row:
                refresh_stopped_rows_(state, logits, embedding, self.mask_id, top_k)
            return False, state.inputs_embeds

    return SpdDecoder


def start_block(
    token: Tensor, editable: Tensor, embedding: Tensor, mask_id: int, inputs_embeds: Tensor | None
) -> BlockState:
    """The step's buffers from what dInfer keeps: ids [B, K] and embeddings [B, K, D]."""
    batch = token.shape[0]
    if inputs_embeds is None:
        inputs_embeds = embedding[token]
    return BlockState(
        editable=editable.contiguous(),
        masked=editable & (token == mask_id),
        token=token.clone(memory_format=torch.contiguous_format),
        confidence=torch.ones(token.shape, dtype=torch.float32, device=token.device),
        converged=torch.zeros(batch, dtype=torch.bool, device=token.device),
        step=torch.zeros(batch, dtype=torch.int32, device=token.device),
        inputs_embeds=inputs_embeds,
    )


def batch_stop(state: BlockState, token: Tensor, before: Tensor, tau_acc: float) -> Tensor:
    """dInfer's rule: every row's confidences pass, or no row's ids changed."""
    confident = ((state.confidence >= tau_acc) | ~state.editable).all()
    return confident | (token == before).all()


def refresh_stopped_rows_(
    state: BlockState, logits: Tensor, embedding: Tensor, mask_id: int, top_k: int
) -> None:
    """dInfer goes on with a row that passes its own test while other rows do not."""
    tokens, confidences = state.token, state.confidence
    if top_k > 1:
        tokens, confidences = dmax_kernels.topk_confidence(logits, top_k)
    hybrid = dmax_kernels.hybrid_embedding(embedding, tokens, confidences, state.masked, mask_id)
    late = (state.converged.unsqueeze(-1) & state.editable).unsqueeze(-1)
    state.inputs_embeds.copy_(torch.where(late, hybrid, state.inputs_embeds))
