"""SGLang's block-diffusion algorithms (`sglang.srt.dllm.algorithm`) on the ops.

    register()                                     # in the process that runs the scheduler
    --dllm-algorithm DmaxLowConfidence             # or DmaxJointThreshold, DmaxSpd

B requests, K block size, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.decoding.rules import or_best
from dmax_kernels.decoding.state import BlockState
from dmax_kernels.integrations import engine_objects, lookup_weight

PACKAGE = "sglang.srt.dllm.algorithm"


def register() -> None:
    """Add the three algorithms to SGLang's table, under their class names.

    SGLang's table belongs to a process: call this where the scheduler runs, for instance from a
    plug-in that SGLang loads in all of its processes.

    Raises:
        ImportError: SGLang is not importable, or this version lacks an interface below.
    """
    (table,) = engine_objects("SGLang", PACKAGE, "algo_name_to_cls")
    for make in (low_confidence, joint_threshold, spd):
        algorithm = make()
        table[algorithm.__name__] = algorithm


def low_confidence() -> type:
    """SGLang's `LowConfidence`: unmask what passes `threshold`, or else the most confident."""
    (base, _) = engine_objects(
        "SGLang", f"{PACKAGE}.low_confidence", "LowConfidence", "LowConfidence.step"
    )

    class DmaxLowConfidence(base):  # type: ignore[misc, valid-type]
        def step(self, forward_batch: Any, logits_output: Any, states: list[Any]) -> list[bool]:
            ids, logits = block_views(forward_batch, logits_output, self.block_size)
            masked = ids == self.mask_id
            token, confidence = dmax_kernels.top1_confidence(logits)
            ids.copy_(torch.where(unmask(confidence, masked, self.threshold), token, ids))
            return (~masked.any(dim=1)).tolist()

    return DmaxLowConfidence


def joint_threshold() -> type:
    """SGLang's `JointThreshold`: unmask, and edit tokens that a different one beats clearly."""
    (base, _) = engine_objects(
        "SGLang", f"{PACKAGE}.joint_threshold", "JointThreshold", "JointThreshold.init_step_state"
    )

    class DmaxJointThreshold(base):  # type: ignore[misc, valid-type]
        def step(self, forward_batch: Any, logits_output: Any, states: list[Any]) -> list[bool]:
            done = [state["finished"] for state in states]
            if all(done):
                return done
            ids, logits = block_views(forward_batch, logits_output, self.block_size)
            if self.penalty_lambda > 0:  # written into the logits, as SGLang does
                penalty = logits.new_full((), -self.penalty_lambda).expand(ids[:, :-1, None].shape)
                logits[:, 1:].scatter_add_(2, ids[:, :-1, None], penalty)
            host = [
                [
                    not s["finished"],
                    s["post_edit_steps"] < self.max_post_edit_steps,
                    *s["prompt_mask"],
                ]
                for s in states
            ]
            flags = torch.tensor(host, dtype=torch.bool, device=ids.device)
            going, may_edit, prompt = flags[:, 0:1], flags[:, 1:2], flags[:, 2:]

            masked = ids == self.mask_id
            filling = masked.any(dim=1, keepdim=True)
            token, confidence = dmax_kernels.top1_confidence(logits)
            edit = (confidence > self.edit_threshold) & (ids != token) & ~masked & ~prompt
            change = (unmask(confidence, masked, self.threshold) | edit) & going
            change &= filling | may_edit
            ids.copy_(torch.where(change, token, ids))

            # One host sync for the batch: the edit budget is kept on the host
            seen = torch.cat([filling, change.any(dim=1, keepdim=True)], dim=1).tolist()
            for state, (was_filling, changed) in zip(states, seen, strict=True):
                if not state["finished"]:
                    state["post_edit_steps"] += not was_filling
                    state["finished"] = not changed
            return done

    return DmaxJointThreshold


def spd() -> type:
    """Soft Parallel Decoding (`spd_step_`) as an SGLang algorithm, soft embeddings included.

    Keys of `--dllm-algorithm-config`: `tau_dec` (0.5), `tau_acc` (0.9), `top_k` (1). A block is
    reported one forward after it converged: that forward puts its plain tokens into the KV cache.
    Needs a version whose `DllmAlgorithm` has `prepare_inputs`, and an unsharded input embedding.
    """
    (base, _) = engine_objects(
        "SGLang", f"{PACKAGE}.base", "DllmAlgorithm", "DllmAlgorithm.prepare_inputs"
    )

    class DmaxSpd(base):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            options = config.algorithm_config or {}
            self.tau_dec = options.get("tau_dec", 0.5)
            self.tau_acc = options.get("tau_acc", 0.9)
            self.top_k = options.get("top_k", 1)

        def max_steps(self, block_size: int) -> int:
            return block_size + 2  # one to the cap below, one for the plain tokens' forward

        def init_step_state(self, forward_batch: Any) -> list[Any]:
            return [{} for _ in range(forward_batch.batch_size)]

        def prepare_inputs(self, model_runner: Any, forward_batch: Any, states: list[Any]) -> None:
            layer = model_runner.model.get_input_embeddings()
            if getattr(layer, "tp_size", 1) != 1:
                raise ValueError(
                    f"DmaxSpd: the input embedding must be unsharded, got tp_size={layer.tp_size}"
                )
            self.embedding = lookup_weight("DmaxSpd", layer)
            ids = forward_batch.input_ids.view(-1, self.block_size)
            for row, state in enumerate(states):
                if "block" not in state:
                    state["block"] = new_block(ids[row : row + 1], self.embedding, self.mask_id)
            block = join([state["block"] for state in states])
            plain = self.embedding[ids]
            embeds = torch.where(block.converged[:, None, None], plain, block.inputs_embeds)
            forward_batch.input_embeds = embeds.flatten(0, 1)

        def step(self, forward_batch: Any, logits_output: Any, states: list[Any]) -> list[bool]:
            ids, logits = block_views(forward_batch, logits_output, self.block_size)
            block = join([state["block"] for state in states])
            done = block.converged.tolist()  # the one host sync
            dmax_kernels.spd_step_(
                logits,
                self.embedding,
                **vars(block),
                mask_token_id=self.mask_id,
                tau_dec=self.tau_dec,
                tau_acc=self.tau_acc,
                top_k=self.top_k,
                suppress_token=self.mask_id,  # a predicted mask would count as a decoded token
            )
            block.converged |= block.step >= self.block_size  # all promoted by then: commit
            ids.copy_(block.token.masked_fill(block.masked, self.mask_id))
            for row, state in enumerate(states):
                own = {name: buffer[row : row + 1] for name, buffer in vars(block).items()}
                state["block"] = BlockState(**own)
            return done

    return DmaxSpd


def block_views(forward_batch: Any, logits_output: Any, block_size: int) -> tuple[Tensor, Tensor]:
    """ids [B, K] and logits [B, K, V]; newer versions wrap the logits, older ones pass them."""
    logits = getattr(logits_output, "full_logits", logits_output)
    ids = forward_batch.input_ids.view(-1, block_size)  # a view: CUDA graphs read this memory
    return ids, logits.view(*ids.shape, logits.shape[-1])


def unmask(confidence: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """Masked positions above the threshold; where a row has none, its most confident one."""
    return or_best(masked & (confidence > threshold), confidence, masked)


def new_block(ids: Tensor, embedding: Tensor, mask_id: int) -> BlockState:
    """One request's block [1, K]; one without a mask is the prompt's and has converged already."""
    editable = ids == mask_id
    return BlockState(
        editable=editable,
        masked=editable.clone(),
        token=ids.long().clone(),
        confidence=(~editable).float(),
        converged=~editable.any(dim=1),
        step=torch.zeros(1, dtype=torch.int32, device=ids.device),
        inputs_embeds=embedding[ids],
    )


def join(blocks: list[BlockState]) -> BlockState:
    """The requests' rows as one batch (copies)."""
    return BlockState(
        **{name: torch.cat([getattr(b, name) for b in blocks]) for name in vars(blocks[0])}
    )
