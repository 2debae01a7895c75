"""Hugging Face transformers: DiffusionGemma's denoising step on `row_statistics`.

    enable(model); model.generate(...); disable(model)

B canvases, L canvas length, V vocabulary.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.integrations import engine_objects

SAMPLING = ("fused", "torch")
MODULE = "transformers.models.diffusion_gemma.generation_diffusion_gemma"


def enable(model: Any, *, sampling: str = "fused") -> None:
    """Replace `model._denoising_step`: one pass over the logits in place of three softmaxes.

    The greedy canvas and the entropies of the entropy-bound sampler and of the
    stable-and-confident stop come from one `row_statistics` of the processed logits [B, L, V].

    Args:
        model: a DiffusionGemma model (anything with `DiffusionGemmaGenerationMixin`).
        sampling: "fused" draws the canvas with `sample_tokens`, from a seed that torch's generator
            gives once per step: repeatable with `torch.manual_seed`, but not the engine's draws.
            "torch" keeps the engine's softmax and `torch.multinomial`, hence its draws.

    A sampler or stopping criterion other than the engine's own two runs the engine's step.

    Raises:
        ImportError: transformers is absent or has no DiffusionGemma.
        TypeError: a different kind of model.
        ValueError: unknown sampling.
    """
    if sampling not in SAMPLING:
        raise ValueError(f"enable: sampling must be one of {SAMPLING}, got {sampling!r}")
    mixin, sampler_type, stop_type, _, _ = engine_objects(
        "transformers",
        MODULE,
        "DiffusionGemmaGenerationMixin",
        "EntropyBoundSampler",
        "StableAndConfidentStoppingCriteria",
        "DiffusionGemmaGenerationMixin._denoising_step",
        "EntropyBoundSampler.initialize_canvas",
    )
    if not isinstance(model, mixin):
        raise TypeError(f"enable: model must be a DiffusionGemma model, got {type(model).__name__}")
    engine_step = type(model)._denoising_step

    def denoising_step(self: Any, **inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stop = inputs["diffusion_stopping_criteria"]
        if type(inputs["sampler"]) is not sampler_type or type(stop) not in (stop_type, type(None)):
            return engine_step(self, **inputs)
        return fused_denoising_step(self, sampling, **inputs)

    model._denoising_step = MethodType(denoising_step, model)


def disable(model: Any) -> None:
    """Undo `enable`."""
    vars(model).pop("_denoising_step", None)


def fused_denoising_step(
    model: Any,
    sampling: str,
    *,
    decoder_forward: Any,
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | None,
    mask_mapping: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any | None,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The engine's step: (canvas, argmax canvas, self-conditioning logits, finished rows).

    model_kwargs: what goes to the decoder alone, among it the KV cache, under the name that this
    version of the engine has for it (`cache` since transformers 5.24, before `past_key_values`).
    """
    # As in the engine: a step number in a tensor does not recompile, and a compiled
    # forward may reuse the memory of its last outputs
    step = torch.tensor(cur_step, device=current_canvas.device, dtype=torch.int32)
    torch.compiler.cudagraph_mark_step_begin()
    raw_logits = decoder_forward(
        decoder_input_ids=current_canvas,
        self_conditioning_logits=self_conditioning_logits,
        decoder_attention_mask=mask_mapping,
        decoder_position_ids=decoder_position_ids,
        **model_kwargs,
    ).logits
    logits = logits_processor(input_ids, raw_logits, cur_step=step)

    # One pass for the greedy canvas and both entropies, one for the draw
    statistics = dmax_kernels.row_statistics(logits)
    drawn = draw(logits, sampling)
    accepted = entropy_bound_mask(statistics.entropy, sampler.entropy_bound)
    sampler.accepted_token_mask = accepted
    noise = sampler.initialize_canvas(current_canvas.shape[0], current_canvas.device)
    canvas, argmax = torch.where(accepted, drawn, noise), statistics.token

    if diffusion_stopping_criteria is not None:
        # A finished row keeps its results. This is a host sync, as in the engine, which saves a
        # copy of all logits in every step before the first row ends
        if finished_denoising.any():
            assert self_conditioning_logits is not None  # a row finishes after its first step
            row = finished_denoising[:, None]
            argmax = torch.where(row, argmax_canvas, argmax)
            canvas = torch.where(row, current_canvas, canvas)
            logits = torch.where(row[:, None], self_conditioning_logits, logits)
        finished_denoising |= stable_and_confident(
            diffusion_stopping_criteria, argmax, statistics.entropy
        )
    self_conditioning = logits.to(model.model.decoder.embed_tokens.weight.dtype)
    return canvas, argmax, self_conditioning, finished_denoising


def draw(logits: Tensor, sampling: str) -> Tensor:
    """One token per position of logits [B, L, V], int64 [B, L]."""
    if sampling == "torch":
        probability = torch.softmax(logits, dim=-1, dtype=torch.float32)
        return torch.multinomial(probability.flatten(0, 1), num_samples=1).view(logits.shape[:-1])
    seed = torch.randint(torch.iinfo(torch.int64).max, (2,), device=logits.device)
    return dmax_kernels.sample_tokens(logits, seed).token


def entropy_bound_mask(entropy: Tensor, bound: float) -> Tensor:
    """Accept the k surest positions of [B, L] whose entropies, less the largest, sum to <= bound.

    The sum bounds the mutual information of the accepted tokens (arXiv 2505.24857). This is the
    rule `EntropyBound` with nothing decoded yet, but it subtracts after summing, as the engine
    does: the two round differently, and the adapter accepts exactly what the engine does.
    """
    ascending, order = entropy.sort(dim=-1)
    accepted = ascending.cumsum(dim=-1) - ascending <= bound
    return torch.zeros_like(accepted).scatter(-1, order, accepted)


def stable_and_confident(criterion: Any, argmax: Tensor, entropy: Tensor) -> Tensor:
    """Rows [B] whose greedy canvas has not changed for some steps and whose mean entropy is low.

    The history lives in the engine's criterion, whose `reset` starts a new canvas.
    """
    confident = entropy.mean(dim=-1) < criterion.confidence_threshold
    if criterion.stability_threshold == 0:
        return confident
    history = criterion.argmax_canvas_history
    if history is None:
        history = argmax.new_full((criterion.stability_threshold, *argmax.shape), -1)
    criterion.argmax_canvas_history = torch.cat([history[1:], argmax.unsqueeze(0)])
    return (history == argmax).all(dim=-1).all(dim=0) & confident
