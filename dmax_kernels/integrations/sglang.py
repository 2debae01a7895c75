"""SGLang's block-diffusion algorithms (`sglang.srt.dllm.algorithm`) on the ops.

    --dllm-algorithm DmaxLowConfidence             # or DmaxJointThreshold, DmaxSpd

An installed package needs nothing more: `plugin` is its entry point of SGLang's plug-in loader.

Every algorithm advances all rows of a batch by one `device_step`, which reads nothing on the host;
`step`, which SGLang calls, reads the rows' end flags after it, once. The rows' state lies in the
buffers of one batch, and what SGLang carries from round to round for a request is its `Place`.

B requests, K block size, V vocabulary, D hidden size.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.decoding.rules import or_best
from dmax_kernels.decoding.state import BlockState
from dmax_kernels.integrations import engine_objects, lookup_weight
from dmax_kernels.integrations._sglang_rows import (
    AfterImport,
    BatchedRounds,
    OneReadPerStep,
    Place,
    batch_of,
    per_request,
    places,
    probability,
)

PACKAGE = "sglang.srt.dllm.algorithm"


def register() -> None:
    """Add the three algorithms to SGLang's table, under their class names.

    Raises:
        ImportError: SGLang is not importable, or this version lacks an interface below.
    """
    (table,) = engine_objects("SGLang", PACKAGE, "algo_name_to_cls")
    for make in (low_confidence, joint_threshold, spd):
        algorithm = make()
        table[algorithm.__name__] = algorithm


def plugin() -> None:
    """The entry point `sglang.srt.plugins`, which SGLang calls in each of its processes.

    It registers the algorithms as soon as SGLang imports its own. It imports nothing of SGLang:
    most of its processes never need an algorithm, nor the model runner that comes with it.
    """
    if PACKAGE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, AfterImport(PACKAGE, register))


@dataclass
class LowConfidenceRows:
    threshold: Tensor  # float32 [B, 1]
    finished: Tensor  # bool [B]: no mask was left when the last step began


def low_confidence() -> type:
    """SGLang's `LowConfidence`: unmask what passes `threshold`, or else the most confident."""
    (base, _) = engine_objects(
        "SGLang", f"{PACKAGE}.low_confidence", "LowConfidence", "LowConfidence.validate_request"
    )

    options = per_request(threshold=probability)

    class DmaxLowConfidence(BatchedRounds, options, base):  # type: ignore[misc, valid-type]
        def init_step_state(self, forward_batch: Any) -> list[Any]:
            threshold = self.request_options(forward_batch)
            finished = torch.zeros(len(threshold), dtype=torch.bool, device=threshold.device)
            return places(LowConfidenceRows(threshold, finished))

        def device_step(self, forward_batch: Any, logits: Tensor, rows: LowConfidenceRows) -> None:
            ids, logits = block_views(forward_batch, logits, self.block_size)
            masked = ids == self.mask_id
            prompt = getattr(forward_batch, "dllm_prompt_mask", None)
            if prompt is not None:  # the prompt has a mask id of its own
                masked = masked & ~prompt
            token, confidence = dmax_kernels.top1_confidence(logits)
            chosen = unmask(confidence, masked, rows.threshold)
            rows.finished = ~masked.any(dim=1)
            ids.copy_(torch.where(chosen, token, ids))

    return DmaxLowConfidence


@dataclass
class JointThresholdRows:
    prompt: Tensor  # bool [B, K]
    post_edit_steps: Tensor  # int32 [B]: steps taken without a mask
    finished: Tensor  # bool [B]
    thresholds: Tensor  # float32 [B, 3]: to unmask, to edit, and the largest post_edit_steps


def joint_threshold() -> type:
    """SGLang's `JointThreshold`: unmask, and edit tokens that a different one beats clearly."""
    (base, _, _) = engine_objects(
        "SGLang",
        f"{PACKAGE}.joint_threshold",
        "JointThreshold",
        "JointThreshold.validate_request",
        "JointThreshold._prompt_mask",
    )
    options = per_request(
        threshold=probability,
        edit_threshold=probability,
        # SGLang's synchronous loop takes as many steps as the algorithm's own budget allows
        max_post_edit_steps=lambda value: value >= 0 and value == int(value),
    )

    class DmaxJointThreshold(BatchedRounds, options, base):  # type: ignore[misc, valid-type]
        def init_step_state(self, forward_batch: Any) -> list[Any]:
            thresholds = self.request_options(forward_batch)
            thresholds[:, 2].clamp_(max=self.max_post_edit_steps)
            rows, device = len(thresholds), thresholds.device
            return places(
                JointThresholdRows(
                    prompt=self._prompt_mask(forward_batch),
                    post_edit_steps=torch.zeros(rows, dtype=torch.int32, device=device),
                    finished=torch.zeros(rows, dtype=torch.bool, device=device),
                    thresholds=thresholds,
                )
            )

        def device_step(self, forward_batch: Any, logits: Tensor, rows: JointThresholdRows) -> None:
            ids, logits = block_views(forward_batch, logits, self.block_size)
            if self.penalty_lambda > 0:  # written into the logits, as SGLang does
                penalty = logits.new_full((), -self.penalty_lambda).expand(ids[:, :-1, None].shape)
                logits[:, 1:].scatter_add_(2, ids[:, :-1, None], penalty)
            token, confidence = dmax_kernels.top1_confidence(logits)
            joint_threshold_step_(ids, token, confidence, rows, self.mask_id)

    return DmaxJointThreshold


def joint_threshold_step_(
    ids: Tensor, token: Tensor, confidence: Tensor, rows: JointThresholdRows, mask_id: int
) -> None:
    """One step of the rule on ids [B, K], given every position's top-1 [B, K], in place."""
    unmask_above, edit_above, budget = rows.thresholds.split(1, dim=1)
    masked = (ids == mask_id) & ~rows.prompt
    editing = ~(masked.any(dim=1) | rows.finished)
    rows.post_edit_steps += editing
    rows.finished |= editing & (rows.post_edit_steps > budget.squeeze(1))
    edit = (confidence > edit_above) & (ids != token) & ~(masked | rows.prompt)
    change = unmask(confidence, masked, unmask_above) | edit
    change &= ~rows.finished.unsqueeze(1)
    # A step without a change ends the block: the forward before it saw its final ids
    rows.finished |= ~change.any(dim=1)
    ids.copy_(torch.where(change, token, ids))


@dataclass
class SpdRows(BlockState):
    thresholds: Tensor  # float32 [B, 2]: (tau_dec, tau_acc)
    finished: Tensor  # bool [B]: converged when the last step began


def spd() -> type:
    """Soft Parallel Decoding (`spd_step_`) as an SGLang algorithm, soft embeddings included.

    Keys of `--dllm-algorithm-config`: `tau_dec` (0.5), `tau_acc` (0.9), `top_k` (1). A block is
    reported one forward after it converged: that forward puts its plain tokens into the KV cache.
    Needs a version whose `DllmAlgorithm` has `prepare_inputs`, an unsharded input embedding, and
    forwards that read `input_embeds`: SGLang's CUDA graphs of the forward read token ids alone, and
    the algorithm refuses them.
    """
    (base, *_) = engine_objects(
        "SGLang",
        f"{PACKAGE}.base",
        "DllmAlgorithm",
        "DllmAlgorithm.prepare_inputs",
        "DllmAlgorithm.validate_request",
        "DllmAlgorithm._prompt_mask",
    )
    options = per_request(tau_dec=probability, tau_acc=probability)

    class DmaxSpd(OneReadPerStep, options, base):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            given = config.algorithm_config or {}
            self.tau_dec = given.get("tau_dec", 0.5)
            self.tau_acc = given.get("tau_acc", 0.9)
            self.top_k = given.get("top_k", 1)

        @classmethod
        def configure_server_args(cls, server_args: Any) -> None:
            super().configure_server_args(server_args)
            (view,) = engine_objects("SGLang", "sglang.srt.arg_groups.overrides", "resolving_view")
            backend = view(server_args).cuda_graph_config.decode.backend
            if view(server_args).device == "cuda" and backend != "disabled":
                raise ValueError(NO_GRAPHS.format(f"a {backend!r} graph backend for decoding"))

        def max_steps(self, block_size: int) -> int:
            return block_size + 2  # one to the cap below, one for the plain tokens' forward

        def init_step_state(self, forward_batch: Any) -> list[Any]:
            self.fresh = self.request_options(forward_batch)
            return [Place(None, row) for row in range(forward_batch.batch_size)]

        def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[Any]) -> None:
            graphs = getattr(model_runner, "decode_cuda_graph_runner", None)
            if not (
                graphs is None
                or graphs is getattr(model_runner, "eager_runner", None)
                or getattr(graphs, "dllm_uses_input_embeds", False)
            ):
                raise ValueError(NO_GRAPHS.format(type(graphs).__name__))
            layer = model_runner.model.get_input_embeddings()
            if getattr(layer, "tp_size", 1) != 1:
                raise ValueError(
                    f"DmaxSpd: the input embedding must be unsharded, got tp_size={layer.tp_size}"
                )
            self.embedding = lookup_weight("DmaxSpd", layer)
            if any(state.buffers is None for state in states):
                ids = forward_batch.input_ids.view(-1, self.block_size)
                prompt = self._prompt_mask(forward_batch)
                fresh = new_blocks(ids, prompt, self.embedding, self.mask_id, self.fresh)
                for state in states:
                    state.buffers = fresh if state.buffers is None else state.buffers
            # The buffer itself: a step writes the next forward's inputs into it
            forward_batch.input_embeds = batch_of(states).inputs_embeds.flatten(0, 1)

        def device_step(self, forward_batch: Any, logits: Tensor, rows: SpdRows) -> None:
            ids, logits = block_views(forward_batch, logits, self.block_size)
            rows.finished = rows.converged.clone()
            buffers: dict[str, Any] = rows.spd_buffers()
            dmax_kernels.spd_step_(
                logits,
                self.embedding,
                **buffers,
                mask_token_id=self.mask_id,
                tau_dec=self.tau_dec,
                tau_acc=self.tau_acc,
                top_k=self.top_k,
                suppress_token=self.mask_id,  # a predicted mask would count as a decoded token
                thresholds=rows.thresholds,
            )
            rows.converged |= rows.step >= self.block_size  # all promoted by then: commit
            ids.copy_(rows.token.masked_fill(rows.masked, self.mask_id))
            # A committed block's next forward reads its plain tokens
            plain, ended = self.embedding[ids], rows.converged[:, None, None]
            rows.inputs_embeds.copy_(torch.where(ended, plain, rows.inputs_embeds))

    return DmaxSpd


NO_GRAPHS = (
    "DmaxSpd: CUDA graphs of the forward must be off (--disable-cuda-graph), because SGLang's read "
    "token ids and would drop the soft embeddings, got {}"
)


def block_views(forward_batch: Any, logits: Any, block_size: int) -> tuple[Tensor, Tensor]:
    """ids [B, K] and logits [B, K, V], as views: CUDA graphs read the ids' memory."""
    ids = forward_batch.input_ids.view(-1, block_size)
    return ids, logits.view(*ids.shape, logits.shape[-1])


def unmask(confidence: Tensor, masked: Tensor, threshold: Tensor) -> Tensor:
    """Masked positions above the threshold; where a row has none, its most confident one."""
    return or_best(masked & (confidence > threshold), confidence, masked)


def new_blocks(
    ids: Tensor, prompt: Tensor, embedding: Tensor, mask_id: int, thresholds: Tensor
) -> SpdRows:
    """Blocks [B, K] at their start; one that is all prompt has converged already."""
    editable = ~prompt
    converged = ~editable.any(dim=1)
    return SpdRows(
        editable=editable,
        masked=editable & (ids == mask_id),
        token=ids.long().clone(),
        confidence=(~editable).float(),
        converged=converged,
        step=torch.zeros(len(ids), dtype=torch.int32, device=ids.device),
        inputs_embeds=embedding[ids],
        thresholds=thresholds,
        finished=converged.clone(),
    )
