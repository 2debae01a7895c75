"""Diffulex: its DMax sampler, and the token merge in its LLaDA2 model.

    register()                            # before the engine builds its sampler
    merge_tokens(model)                   # an LLaDA2ForDiffusionLM or LLaDA2Model

K positions per block, V vocabulary, D hidden size, N tokens of a forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.integrations import engine_objects, lookup_weight

ACCEPT = 0.9  # fixed inside Diffulex's sampler
SAMPLER = "diffulex.sampler.llada2"
MODELS = ("llada2", "llada2_moe", "llada2_mini", "llada2dot1_mini", "llada2_mini_dmax")


def register() -> None:
    """Make Diffulex build `dmax_sampler` for its LLaDA2 models when they decode with "dmax".

    With any other decoding strategy it builds what it did before.

    Raises:
        ImportError: Diffulex is not importable, or this version lacks what is needed.
    """
    (build,) = engine_objects("Diffulex", SAMPLER, "build_llada2_sampler")
    auto, _ = engine_objects(
        "Diffulex", "diffulex.sampler.auto_sampler", "AutoSampler", "AutoSampler.register"
    )
    sampler = dmax_sampler()

    def build_sampler(config: Any = None) -> Any:
        if getattr(config, "decoding_strategy", None) == "dmax":
            return sampler(config)
        return build(config)

    for name in MODELS:
        auto.register(name, build_sampler, exist_ok=True, use_full_config=True)


def dmax_sampler(base: type | None = None) -> type:
    """A subclass of Diffulex's `LLaDA2DMaxSampler`: the statistics of a block are one op.

    All blocks of all requests come to the host in one copy. The maps it builds are the base
    class's. Requests with a temperature, and `iter_smooth_topk` merging, run the base class's code.

    Raises:
        ImportError: Diffulex is not importable, or this version lacks what is needed.
    """
    if base is None:
        base, *_ = engine_objects(
            "Diffulex",
            SAMPLER,
            "LLaDA2DMaxSampler",
            "LLaDA2DMaxSampler._build_block_writes_map",
            "LLaDA2DMaxSampler._build_dmax_block_outputs",
            "LLaDA2DMaxSampler._extract_block_logits",
            "LLaDA2DMaxSampler._build_manual_token_merge_descriptor",
        )

    class DmaxSampler(base):  # type: ignore[misc, valid-type]
        def _build_block_writes_map(
            self,
            reqs: Any,
            split_logits: Any,
            temperatures: Any,
            sample_output: Any,
            attn_metadata: Any,
            **kwargs: Any,
        ) -> dict[str, dict[str, dict[int, int]]]:
            """The base class's loop over blocks, with every block's top-1 already on the host."""
            values = temperatures.tolist() if torch.is_tensor(temperatures) else temperatures
            exact_topk = self._enable_token_merge and self._token_merge_mode != "dmax_topk"
            work = {
                id(block): self._extract_block_logits(req, logits, block, prefill)
                for req, logits, prefill, temperature in zip(
                    reqs, split_logits, attn_metadata.is_prefill, values, strict=True
                )
                for block in req.dllm_blocks
                if block.is_active and first_editable(block) < int(block.block_size)
                if temperature == 0 and not exact_topk
            }
            work = {key: logits for key, logits in work.items() if logits is not None}
            self._top1 = dict(zip(work, top1_lists(list(work.values())), strict=True))
            return super()._build_block_writes_map(
                reqs, split_logits, temperatures, sample_output, attn_metadata, **kwargs
            )

        def _build_dmax_block_outputs(
            self, block: Any, block_tokens: Tensor, block_logits: Tensor, temperature: float
        ) -> tuple[dict[int, int], dict[int, dict | None], dict]:
            """(ids to write, merge descriptors, state), each by position in the block."""
            if id(block) not in self._top1:
                return super()._build_dmax_block_outputs(
                    block, block_tokens, block_logits, temperature
                )
            token, confidence = self._top1[id(block)]
            before, mask_id = [int(old) for old in block.token_ids], int(block.mask_token_id)
            if self._fast_prob_path:  # committed tokens count as certain
                confidence = [
                    c if old == mask_id else 1.0 for c, old in zip(confidence, before, strict=True)
                ]
            threshold = float(block.thresholds.accept_threshold)
            after = promote(before, token, confidence, mask_id, threshold)
            editable = range(first_editable(block), len(after))
            writes = {i: after[i] for i in editable if after[i] != before[i]}
            merges = {
                i: self._build_manual_token_merge_descriptor(
                    token=after[i], confidence=confidence[i], mask_id=mask_id
                )
                for i in editable
                if self._enable_token_merge and after[i] != mask_id
            }
            return writes, merges, block_state(before, after, confidence, mask_id)

    return DmaxSampler


def first_editable(block: Any) -> int:
    """A prompt's tail inside the block comes before this position."""
    return int(getattr(block, "editable_start", 0) or 0)


def top1_lists(blocks: list[Tensor]) -> list[tuple[list[int], list[float]]]:
    """top1_confidence of each block's logits [K, V], on the host after one copy for all blocks."""
    if not blocks:
        return []
    # float64 represents every token id and every float32 exactly
    packed = [torch.stack([c.double() for c in dmax_kernels.top1_confidence(b)]) for b in blocks]
    lists, start = torch.cat(packed, dim=1).tolist(), 0
    result = []
    for block in blocks:
        end = start + block.shape[0]
        result.append(([int(token) for token in lists[0][start:end]], lists[1][start:end]))
        start = end
    return result


def promote(
    before: list[int], token: list[int], confidence: list[float], mask_id: int, threshold: float
) -> list[int]:
    """Token positions take their top-1; of the masked ones the prefix that passes, at least one.

    In float64, which holds the threshold as Diffulex compares with it.
    """
    masked = torch.tensor([old == mask_id for old in before])
    passes = ~(torch.tensor(confidence, dtype=torch.float64) < threshold)
    promoted = dmax_kernels.prefix_promote(passes.float(), masked, 0.5)
    return torch.where(~masked | promoted, torch.tensor(token), torch.tensor(before)).tolist()


def block_state(
    before: list[int], after: list[int], confidence: list[float], mask_id: int
) -> dict[str, Any]:
    """What Diffulex's scheduler asks about a block: whether to commit it, and how settled it is."""
    same, sure = before == after, all(c >= ACCEPT for c in confidence)
    kept = [old == new for old, new in zip(before, after, strict=True) if mask_id not in (old, new)]
    return {
        "committable": same or sure,
        "same_as_previous": same,
        "same_token_ratio": sum(kept) / len(kept) if kept else 1.0,
        "all_confident": sure,
    }


def merge_tokens(model: Any) -> None:
    """Make an LLaDA2 model's token merge one `hybrid_embedding` (float32 inside, one rounding).

    Merging without renormalisation, `iter_smooth_topk` and a sharded embedding stay with the
    engine's code.

    Raises:
        ImportError: Diffulex is not importable, or this version lacks what is needed.
        TypeError: the model has no token merge.
        ValueError: the input embedding does more than look up rows of its weight.
    """
    (fetch,) = engine_objects("Diffulex", "diffulex.attention", "fetch_attn_metadata")
    model = getattr(model, "model", model)
    if not hasattr(type(model), "_maybe_apply_token_merge"):
        name = type(model).__name__
        raise TypeError(f"merge_tokens: model must have _maybe_apply_token_merge, got {name}")
    engine_merge = type(model)._maybe_apply_token_merge

    def merge(self: Any, hidden_states: Tensor) -> Tensor:
        metadata = fetch()
        if not metadata.token_merge_enabled:
            return hidden_states
        mask, ids = metadata.token_merge_mask, metadata.token_merge_topk_ids
        probs, mask_id = metadata.token_merge_topk_probs, metadata.token_merge_mask_token_id
        fused = metadata.token_merge_renormalize and metadata.token_merge_mode == "dmax_topk"
        complete = not any(value is None for value in (mask, ids, probs, mask_id))
        unsharded = getattr(self.word_embeddings, "tp_size", 1) == 1
        if not (fused and complete and unsharded):
            return engine_merge(self, hidden_states)
        device = hidden_states.device
        mask = mask.to(device, torch.bool)
        soft = dmax_kernels.hybrid_embedding(
            self.word_embeddings.weight,
            ids.to(device),
            probs.to(device, torch.float32),
            torch.zeros_like(mask),
            int(mask_id),
        )
        return torch.where(mask.unsqueeze(-1), soft, hidden_states)

    if getattr(model.word_embeddings, "tp_size", 1) == 1:
        lookup_weight("merge_tokens", model.word_embeddings)
    model._maybe_apply_token_merge = MethodType(merge, model)
