"""vLLM's dLLM plug-in: the `RemaskingPolicy` protocol on the ops.

    policy = remasking_policy()            # the plug-in's own rule, without a Python list of logits

One block of DRAFT_SIZE positions per call; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.integrations import engine_objects

RULES = ("threshold", "spd")
MODULE = "vllm_dllm_plugin.remasking"
CONFIG_NAMES = (
    "DRAFT_SIZE",
    "LLADA2_DEFAULT_MASK_TOKEN_ID",
    "LLADA2_DEFAULT_COMMIT_CONFIDENCE_THRESHOLD",
    "LLADA2_DEFAULT_DENOISE_STEPS",
)


def remasking_policy(rule: str = "threshold", *, tau_dec: float = 0.5, tau_acc: float = 0.9) -> Any:
    """A `RemaskingPolicy` whose statistics are one pass over the logits [DRAFT_SIZE, V].

    Args:
        rule: "threshold" is the plug-in's `Llada2DefaultRemaskingPolicy`, with the same
            `remasking_config` keys and the same ids. "spd" is the promotion, revision and
            convergence of Algorithm 1 on token ids; the protocol has no place for soft embeddings,
            so the next pass reads plain tokens (the paper's hard-prefix ablation). The mask token
            is never predicted.
        tau_dec, tau_acc: the thresholds of "spd".

    Raises:
        ImportError: the plug-in is not importable or lacks what is needed.
        ValueError: unknown rule; from `apply`: a draft or logits of the wrong shape.
    """
    if rule not in RULES:
        raise ValueError(f"remasking_policy: rule must be one of {RULES}, got {rule!r}")
    result, validate = engine_objects(
        "vLLM dLLM plug-in", MODULE, "RemaskStepResult", "validate_remask_step_result"
    )
    engine_objects("vLLM dLLM plug-in", "vllm_dllm_plugin.config", *CONFIG_NAMES)
    config = import_module("vllm_dllm_plugin.config")

    class DmaxRemaskingPolicy:
        def apply(
            self,
            *,
            input_draft: Sequence[int],
            logits: Tensor | None = None,
            remasking_config: Mapping[str, Any] | None = None,
        ) -> Any:
            """Committed ids (none before the block is complete) and the next input block."""
            options = dict(remasking_config or {})
            size = config.DRAFT_SIZE
            if len(input_draft) != size:
                raise ValueError(f"apply: input_draft must hold {size} ids, got {len(input_draft)}")
            if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != size:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"apply: logits must be a tensor [{size}, V], got {got}")
            mask_id = int(options.get("mask_token_id", config.LLADA2_DEFAULT_MASK_TOKEN_ID))
            draft = torch.tensor(input_draft, device=logits.device)
            masked = draft == mask_id
            # A predicted mask would count as a decoded token. The plug-in's own rule allows it
            suppressed = mask_id if rule == "spd" else -1
            token, confidence = dmax_kernels.top1_confidence(logits, suppress_token=suppressed)
            if rule == "spd":
                update, complete = spd_update(draft, masked, token, confidence, tau_dec, tau_acc)
                next_token = torch.where(update | complete, token, draft)
            else:
                default = config.LLADA2_DEFAULT_COMMIT_CONFIDENCE_THRESHOLD
                threshold = float(options.get("commit_confidence_threshold", default))
                count = transfer_count(options, config)
                update = threshold_update(masked, confidence, threshold, count)
                next_token = torch.where(update, token, draft)
                complete = ~(next_token == mask_id).any()
            # The one transfer to the host: the protocol speaks tuples of Python ints
            *ids, done = torch.cat([next_token, complete.long().reshape(1)]).tolist()
            step = result(
                committed_token_ids=tuple(ids) if done else (),
                next_input_block=(mask_id,) * size if done else tuple(ids),
            )
            validate(step)
            return step

    return DmaxRemaskingPolicy()


def transfer_count(options: Mapping[str, Any], config: Any) -> int:
    """How many positions a step moves at least: the block spread evenly over the steps."""
    if "num_transfer" in options:
        count = int(options["num_transfer"])
        if count < 0:
            raise ValueError(f"apply: num_transfer must be at least 0, got {count}")
        return count
    steps = int(options.get("denoise_steps", config.LLADA2_DEFAULT_DENOISE_STEPS))
    if steps <= 0:
        raise ValueError(f"apply: denoise_steps must be positive, got {steps}")
    index = min(max(int(options.get("denoise_step_index", 0)), 0), steps - 1)
    return config.DRAFT_SIZE // steps + (index < config.DRAFT_SIZE % steps)


def threshold_update(masked: Tensor, confidence: Tensor, threshold: float, count: int) -> Tensor:
    """Masked positions above the threshold, or the `count` most confident if those are more."""
    passed = masked & (confidence > threshold)
    ranking = confidence.masked_fill(~masked, -torch.inf).argsort(descending=True, stable=True)
    best = torch.zeros_like(masked).index_fill_(0, ranking[:count], True) & masked
    return torch.where(passed.sum() >= count, passed, best)


def spd_update(
    draft: Tensor,
    masked: Tensor,
    token: Tensor,
    confidence: Tensor,
    tau_dec: float,
    tau_acc: float,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 on ids: (positions that take their top-1, whether the block is accepted)."""
    promoted = dmax_kernels.prefix_promote(confidence, masked, tau_dec)
    repeated = (~masked & (token == draft)).all()
    return promoted | ~masked, repeated | (confidence > tau_acc).all()
