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
class EditRows:
    """The blocks' state in `edit_step_`, but for the ids, which are SGLang's own."""

    editable: Tensor  # bool [B, K]
    prediction: Tensor  # int64 [B, K]
    confidence: Tensor  # float32 [B, K]
    post_edit_steps: Tensor  # int32 [B]
    finished: Tensor  # bool [B]
    thresholds: Tensor  # float32 [B, 2]: to unmask and to edit


def low_confidence() -> type:
    """SGLang's `LowConfidence`: unmask what passes `threshold`, or else the most confident."""
    (base, _, _) = engine_objects(
        "SGLang",
        f"{PACKAGE}.low_confidence",
        "LowConfidence",
        "LowConfidence.validate_request",
        "LowConfidence._prompt_mask",
    )
    options = per_request(threshold=probability)

    class DmaxLowConfidence(BatchedRounds, options, base):  # type: ignore[misc, valid-type]
        def init_step_state(self, forward_batch: Any) -> list[Any]:
            threshold = self.request_options(forward_batch)
            thresholds = threshold.repeat(1, 2)  # the rule does not edit
            return places(new_edit_rows(self._prompt_mask(forward_batch), thresholds))

        def device_step(self, forward_batch: Any, logits: Tensor, rows: EditRows) -> None:
            edit_blocks_(forward_batch, logits, rows, self, "threshold")

    return DmaxLowConfidence


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
        max_post_edit_steps=lambda value: value >= 0 and value % 1 == 0,
    )

    class DmaxJointThreshold(BatchedRounds, options, base):  # type: ignore[misc, valid-type]
        def init_step_state(self, forward_batch: Any) -> list[Any]:
            given = self.request_options(forward_batch)
            rows = new_edit_rows(self._prompt_mask(forward_batch), given[:, :2].contiguous())
            # The op has one budget for all rows: a smaller one is spent in part from the start
            budget = given[:, 2].clamp(max=self.max_post_edit_steps)
            rows.post_edit_steps.copy_(self.max_post_edit_steps - budget)
            return places(rows)

        def device_step(self, forward_batch: Any, logits: Tensor, rows: EditRows) -> None:
            if self.penalty_lambda > 0:  # written into the logits, as SGLang does
                ids, views = block_views(forward_batch, logits, self.block_size)
                penalty = logits.new_full((), -self.penalty_lambda).expand(ids[:, :-1, None].shape)
                views[:, 1:].scatter_add_(2, ids[:, :-1, None], penalty)
            edit_blocks_(
                forward_batch, logits, rows, self, "joint_threshold",
                max_post_edit_steps=self.max_post_edit_steps,
            )  # fmt: skip

    return DmaxJointThreshold


def new_edit_rows(prompt: Tensor, thresholds: Tensor) -> EditRows:
    """Blocks at their start, given which of their positions [B, K] the prompt fills."""
    rows, device = len(prompt), prompt.device
    return EditRows(
        editable=~prompt,
        prediction=torch.zeros(prompt.shape, dtype=torch.int64, device=device),
        confidence=torch.zeros(prompt.shape, dtype=torch.float32, device=device),
        post_edit_steps=torch.zeros(rows, dtype=torch.int32, device=device),
        finished=torch.zeros(rows, dtype=torch.bool, device=device),
        thresholds=thresholds,
    )


def edit_blocks_(
    forward_batch: Any, logits: Any, rows: EditRows, algorithm: Any, rule: str, **options: Any
) -> None:
    """`edit_step_` on the batch's own ids."""
    ids, logits = block_views(forward_batch, logits, algorithm.block_size)
    dmax_kernels.edit_step_(
        logits,
        editable=rows.editable,
        token=ids,
        prediction=rows.prediction,
        confidence=rows.confidence,
        post_edit_steps=rows.post_edit_steps,
        done=rows.finished,
        mask_token_id=algorithm.mask_id,
        threshold=0.0,  # each row has its own
        rule=rule,
        thresholds=rows.thresholds,
        **options,
    )


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
