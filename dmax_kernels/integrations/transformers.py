"""Hugging Face transformers: DiffusionGemma's denoising step on the ops.

    enable(model); model.generate(...); disable(model)

B canvases, L canvas length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

import dmax_kernels
from dmax_kernels.integrations import engine_objects

CHOICES = ("fused", "torch")
MODULE = "transformers.models.diffusion_gemma.generation_diffusion_gemma"


def enable(model: Any, *, sampling: str = "fused", self_conditioning: str = "fused") -> None:
    """Replace `model._denoising_step`, and the softmax of the self-conditioning in its decoder.

    The greedy canvas and the entropies of the entropy-bound sampler and of the
    stable-and-confident stop come from one `row_statistics` of the logits [B, L, V], the canvas
    from `sample_tokens`, and the self-conditioning from `soft_embedding`. Nothing of them is read
    on the host, no copy of the logits is made, and no logits are kept from step to step.

    Canvases of one batch may have different temperatures: in a schedule of the engine's,
    `LinearTemperatureScheduleLogitsProcessor(t_min, t_max, max_denoising_steps)`, each of the three
    may be a tensor [B, 1, 1], and so may `cur_step` in a loop of your own over
    `model._denoising_step`.

    Args:
        model: a DiffusionGemma model (anything with `DiffusionGemmaGenerationMixin`).
        sampling: "fused" draws the canvas with `sample_tokens`, from a seed that torch's generator
            gives once per step: repeatable with `torch.manual_seed`, but not the engine's draws.
            "torch" keeps the engine's softmax and `torch.multinomial`, hence its draws.
        self_conditioning: "fused" computes softmax(logits / T) @ embedding as soon as the logits
            are there, and hands it to the next step. "torch" keeps the logits and leaves the
            product to the engine, which rounds logits and probabilities to the embedding's dtype.

    Left to the engine: a sampler or stopping criterion other than its own two (the whole step), and
    the self-conditioning of a compiled decoder.

    Raises:
        ImportError: transformers is absent or has no DiffusionGemma.
        TypeError: a different kind of model.
        ValueError: unknown sampling or self_conditioning; in `generate`, a streamer that takes
            logits, which "fused" does not keep.
    """
    for name, choice in (("sampling", sampling), ("self_conditioning", self_conditioning)):
        if choice not in CHOICES:
            raise ValueError(f"enable: {name} must be one of {CHOICES}, got {choice!r}")
    mixin, sampler_type, stop_type, schedule_type, _, _ = engine_objects(
        "transformers",
        MODULE,
        "DiffusionGemmaGenerationMixin",
        "EntropyBoundSampler",
        "StableAndConfidentStoppingCriteria",
        "LinearTemperatureScheduleLogitsProcessor",
        "DiffusionGemmaGenerationMixin._denoising_step",
        "EntropyBoundSampler.initialize_canvas",
    )
    if not isinstance(model, mixin):
        raise TypeError(f"enable: model must be a DiffusionGemma model, got {type(model).__name__}")
    disable(model)
    engine_step, engine_generate = type(model)._denoising_step, type(model).generate
    conditioning = Conditioning(model) if self_conditioning == "fused" else None
    step = DenoisingStep(model, sampling == "fused", conditioning, schedule_type)

    def denoising_step(self: Any, **inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stop = inputs["diffusion_stopping_criteria"]
        if type(inputs["sampler"]) is not sampler_type or type(stop) not in (stop_type, type(None)):
            return engine_step(self, **inputs)
        return step(**inputs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(engine_generate).bind(self, *args, **kwargs).arguments
        streamer = arguments.get("streamer")
        if conditioning is not None and getattr(streamer, "_takes_logits", False):
            raise ValueError(
                "enable: self_conditioning must be 'torch' for a streamer that takes logits, "
                f"which 'fused' does not keep, got {type(streamer).__name__}"
            )
        return engine_generate(self, *args, **kwargs)

    model._denoising_step = MethodType(denoising_step, model)
    model.generate = MethodType(generate, model)


def disable(model: Any) -> None:
    """Undo `enable`."""
    for name in ("_denoising_step", "generate"):
        vars(model).pop(name, None)


class Conditioning:
    """The next step's soft embeddings, and the way they take into the decoder.

    The decoder computes them from the logits and hands them to its module `self_conditioning`. Here
    it gets no logits, and the module gets ours instead of the zeros that stand for none.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def decoder(self) -> Any:
        return self.model.model.decoder

    def of(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """[B, L, D] in the embedding's dtype, without the embedding's scale."""
        weight = self.decoder.embed_tokens.weight.detach()
        return dmax_kernels.soft_embedding(logits.detach(), weight, temperature=temperature)

    @contextmanager
    def given(self, soft: Tensor | None) -> Iterator[None]:
        """Within, the decoder is conditioned on these; on None as in its first step."""
        if soft is None:
            yield
            return
        scaled = soft * self.decoder.embed_tokens.embed_scale.to(soft.dtype)
        hook = self.decoder.self_conditioning.register_forward_pre_hook(
            lambda module, inputs: (inputs[0], scaled)
        )
        try:
            yield
        finally:
            hook.remove()


@dataclass
class DenoisingStep:
    """The engine's step: (canvas, argmax canvas, self-conditioning, finished rows).

    What it returns third comes back in the next step as `self_conditioning_logits`: logits, or with
    `conditioning` the soft embeddings.
    """

    model: Any
    fused_sampling: bool
    conditioning: Conditioning | None
    schedule_type: type

    def __call__(
        self,
        *,
        decoder_forward: Any,
        current_canvas: Tensor,
        argmax_canvas: Tensor,
        input_ids: Tensor,
        decoder_position_ids: Tensor,
        self_conditioning_logits: Tensor | None,
        mask_mapping: Any,
        finished_denoising: Tensor,
        cur_step: int | Tensor,
        sampler: Any,
        logits_processor: Any,
        diffusion_stopping_criteria: Any | None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """model_kwargs: what goes to the decoder alone, among it the KV cache, under the name that
        this version of the engine has for it (`cache` since 5.24, before `past_key_values`).
        """
        # As in the engine: a step number in a tensor does not recompile, and a compiled
        # forward may reuse the memory of its last outputs
        step = torch.as_tensor(cur_step, device=current_canvas.device, dtype=torch.int32)
        torch.compiler.cudagraph_mark_step_begin()
        conditioning = self.conditioning
        if hasattr(decoder_forward, "_torchdynamo_orig_callable"):
            conditioning = None  # compiled code does not see the hook
        forward_inputs = {
            "decoder_input_ids": current_canvas,
            "self_conditioning_logits": self_conditioning_logits,
            "decoder_attention_mask": mask_mapping,
            "decoder_position_ids": decoder_position_ids,
            **model_kwargs,
        }
        if conditioning is None:
            raw_logits = decoder_forward(**forward_inputs).logits
        else:
            with conditioning.given(self_conditioning_logits):
                forward_inputs["self_conditioning_logits"] = None
                raw_logits = decoder_forward(**forward_inputs).logits

        logits = raw_logits
        temperature = self.temperature(logits_processor, cur_step, raw_logits)
        if temperature is None or conditioning is None:
            logits, temperature = logits_processor(input_ids, raw_logits, cur_step=step), 1.0
        statistics = dmax_kernels.row_statistics(logits, temperature=temperature)
        drawn = draw(logits, temperature) if self.fused_sampling else engine_draw(logits)
        accepted = entropy_bound_mask(statistics.entropy, sampler.entropy_bound)
        sampler.accepted_token_mask = accepted
        noise = sampler.initialize_canvas(current_canvas.shape[0], current_canvas.device)
        canvas, argmax = torch.where(accepted, drawn, noise), statistics.token
        following = logits if conditioning is None else conditioning.of(logits, temperature)

        if diffusion_stopping_criteria is not None:
            row = finished_denoising[:, None]  # a finished row keeps its results
            argmax = torch.where(row, argmax_canvas, argmax)
            canvas = torch.where(row, current_canvas, canvas)
            # Logits are copied only if a row has finished: a host sync, as in the engine, which
            # soft embeddings, a hundredth of the size, do without
            if self_conditioning_logits is not None and (
                conditioning is not None or finished_denoising.any()
            ):
                following = torch.where(row[:, None], self_conditioning_logits, following)
            finished_denoising |= stable_and_confident(
                diffusion_stopping_criteria, argmax, statistics.entropy
            )
        following = following.to(self.model.model.decoder.embed_tokens.weight.dtype)
        return canvas, argmax, following, finished_denoising

    def temperature(
        self, logits_processor: Any, cur_step: int | Tensor, logits: Tensor
    ) -> float | Tensor | None:
        """What the engine's schedule divides the logits by, where it is all that processes them:
        a number, or float32 [B, L] from a schedule of tensors.

        The ops divide inside, which saves a copy of all logits. Not where the engine's own draws
        are wanted: it rounds the quotients, and its draws depend on every bit.
        """
        alone = isinstance(logits_processor, list) and len(logits_processor) == 1
        if not (self.fused_sampling and alone and type(logits_processor[0]) is self.schedule_type):
            return None
        schedule: Any = logits_processor[0]
        share = cur_step / schedule.max_denoising_steps
        temperature = schedule.t_min + (schedule.t_max - schedule.t_min) * share
        if not isinstance(temperature, Tensor):
            return float(temperature) if temperature >= 1e-30 else None
        if temperature.dim() > 0 and temperature.shape[-1] != 1:
            return None  # it differs from token to token
        per_row = temperature.to(logits.device, torch.float32).expand(*logits.shape[:-1], 1)
        return per_row.squeeze(-1)


def draw(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """One token per position of logits [B, L, V], int64 [B, L]."""
    seed = torch.randint(torch.iinfo(torch.int64).max, (2,), device=logits.device)
    return dmax_kernels.sample_tokens(logits, seed, temperature=temperature).token


def engine_draw(logits: Tensor) -> Tensor:
    probability = torch.softmax(logits, dim=-1, dtype=torch.float32)
    return torch.multinomial(probability.flatten(0, 1), num_samples=1).view(logits.shape[:-1])


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
