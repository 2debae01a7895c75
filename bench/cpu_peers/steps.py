"""Peers for a decoding step: promotion, embeddings, the whole of it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from bench.cpu_peers.registry import expert
from bench.cpu_peers.rows import argmax_and_logsumexp


@expert("prefix_promote", "cumulative product", compiled=True)
def promote(confidence, masked, threshold):
    passes = (confidence > threshold) | ~masked
    prefix = masked & passes.cumprod(dim=-1).bool()
    first = masked & (masked.cumsum(dim=-1) == 1)
    return torch.where(prefix.any(dim=-1, keepdim=True), prefix, first)


@expert("prefix_promote", "numpy")
def _(confidence, masked, threshold):
    confidence, masked = confidence.numpy(), masked.numpy()
    prefix = masked & np.logical_and.accumulate((confidence > threshold) | ~masked, axis=-1)
    first = masked & (masked.cumsum(axis=-1) == 1)
    return torch.from_numpy(np.where(prefix.any(axis=-1, keepdims=True), prefix, first))


@expert("hybrid_embedding", "lerp of gathered rows", compiled=True)
def hybrid(embedding, token, confidence, masked, mask_token_id):
    mask_row = embedding[mask_token_id].float()
    rows, share = F.embedding(token, embedding).float(), confidence.unsqueeze(-1)
    mix = torch.lerp(mask_row, rows, share)
    norm = torch.lerp(mask_row.norm(), rows.norm(dim=-1, keepdim=True), share)
    mix = mix * (norm / mix.norm(dim=-1, keepdim=True))
    return torch.where(masked.unsqueeze(-1), mask_row, mix).to(embedding.dtype)


@expert("hybrid_embedding", "lerp of the rows that are tokens")
def _(embedding, token, confidence, masked, mask_token_id):
    out = embedding[mask_token_id].repeat(len(token), 1)
    live = (~masked).nonzero().squeeze(-1)
    some = torch.zeros(len(live), dtype=torch.bool)
    out[live] = hybrid(embedding, token[live], confidence[live], some, mask_token_id)
    return out


def gradient_of_embedding(function, given):
    forward = {name: value for name, value in given.items() if name != "grad"}
    return lambda: torch.autograd.grad(function(**forward), given["embedding"], given["grad"])


expert(
    "hybrid_embedding_backward", "lerp of gathered rows", compiled=True, call=gradient_of_embedding
)(hybrid)


@expert("spd_step_", "argmax and logsumexp, the rules on small tensors", compiled=True)
def _(
    logits, embedding, editable, masked, token, confidence, converged, step, inputs_embeds,
    mask_token_id, tau_dec, tau_acc,
):  # fmt: skip
    y, c = argmax_and_logsumexp(logits)
    repeated = (y == token) & ~masked
    stable = (step >= 1) & (repeated | ~editable).all(dim=-1)
    done = stable | ((c > tau_acc) | ~editable).all(dim=-1)
    next_masked = masked & ~promote(c, masked, tau_dec) & ~done.unsqueeze(-1)
    next_token = torch.where(editable, y, token)
    mixed = hybrid(embedding, y, c, next_masked, mask_token_id)
    embeds = torch.where((editable | next_masked).unsqueeze(-1), mixed, embedding[next_token])
    active = ~converged.unsqueeze(-1)
    inputs_embeds.copy_(torch.where(active.unsqueeze(-1), embeds, inputs_embeds))
    token.copy_(torch.where(active, next_token, token))
    confidence.copy_(torch.where(active & editable, c, confidence))
    masked.copy_(torch.where(active, next_masked, masked))
    step.add_((~converged).to(step.dtype))
    converged.logical_or_(done)


@expert("edit_step_", "argmax and logsumexp, the rules on small tensors", compiled=True)
def _(
    logits, editable, token, prediction, confidence, post_edit_steps, done, mask_token_id,
    threshold, edit_threshold, rule,
):  # fmt: skip
    assert rule == "joint_threshold"
    y, c = argmax_and_logsumexp(logits)
    masked = editable & (token == mask_token_id)
    filling = masked.any(dim=-1)
    steps = post_edit_steps + ~filling
    score = torch.where(masked, c, -torch.inf)
    best = torch.zeros_like(masked).scatter(-1, score.argmax(dim=-1, keepdim=True), True)
    passed = masked & (c > threshold)
    fill = torch.where(passed.any(dim=-1, keepdim=True), passed, best & masked)
    may_edit = (filling | (steps <= 16)).unsqueeze(-1)
    edit = editable & ~masked & (c > edit_threshold) & (y != token) & may_edit
    active = ~done.unsqueeze(-1)
    token.copy_(torch.where(active & (fill | edit), y, token))
    prediction.copy_(torch.where(active & editable, y, prediction))
    confidence.copy_(torch.where(active & editable, c, confidence))
    post_edit_steps.copy_(torch.where(done, post_edit_steps, steps))
    done.logical_or_(~filling & ~edit.any(dim=-1))
