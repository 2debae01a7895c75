"""How sequential the texts are, by a small autoregressive model (the paper's Figures 3 and 7)."""

from __future__ import annotations

import math
import random
from itertools import chain
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dmax_kernels.decoding.extra import seq_dep
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.nap import data

TEXTS = 8192
BATCH = 64
RATE = 3e-3
SCORED = 200  # held-out problems
IGNORE = -100
# A chain is divided into its moves; side by side, a segment is a whole path
KINDS = ("chain", "parallel")
STARTS = tuple(f"s{i}" for i in range(1, data.NUM_MOVES + 1))


def segments_of(kind: str, problem: task.Problem, rng: random.Random) -> list[list[str]]:
    traces = data.draw_traces(problem, rng)
    if kind == "parallel":
        return traces
    segments: list[list[str]] = []
    for word in traces[0]:
        if word in STARTS:
            segments.append([])
        segments[-1].append(word)
    return segments


def train_scorer(steps: int, device: str) -> Any:
    """A Llama of 0.2 million parameters that reads prompts and some segments of either kind.

    A text goes on from its prompt with a run of segments that begins anywhere: the scorer has to
    know how a later segment looks when nothing stands before it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(data.WORDS),
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=256,
                bos_token_id=None,
                eos_token_id=task.EOS_ID,
                pad_token_id=task.PAD_ID,
            )
        ).to(device)
    rng = random.Random("nap scorer")
    texts = []
    for number in range(TEXTS):
        problem = task.draw_problem(rng, data.NUM_MOVES)
        segments = segments_of(KINDS[number % 2], problem, rng)
        begin = rng.choice([0, rng.randrange(len(segments))])
        words = list(chain(*segments[begin:]))
        texts.append((data.prompt_ids(problem), data.encode(words)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
    )
    for step in range(steps):
        batch = [texts[(step * BATCH + i) % TEXTS] for i in range(BATCH)]
        longest = max(len(prompt) + len(text) for prompt, text in batch)
        ids = torch.full((BATCH, longest), task.PAD_ID)
        target = torch.full((BATCH, longest), IGNORE)
        for row, (prompt, text) in enumerate(batch):
            end = len(prompt) + len(text)
            ids[row, :end] = torch.tensor(prompt + text)
            target[row, len(prompt) : end] = ids[row, len(prompt) : end]
        logits = model(input_ids=ids.to(device)).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten().to(device), ignore_index=IGNORE
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measure(steps: int, device: str) -> dict[str, Any]:
    """SeqDep of both kinds of text, per segment and per token, with standard errors."""
    model = train_scorer(steps, device)
    problems = task.evaluation_problems(SCORED, data.NUM_MOVES)
    outcome: dict[str, Any] = {"steps": steps, "problems": SCORED}
    for kind in KINDS:
        rng = random.Random(f"nap scored {kind}")
        values, per_token, first, last = [], [], [], []
        for problem in problems:
            segments = segments_of(kind, problem, rng)
            scored = seq_dep(
                model, data.prompt_ids(problem), [data.encode(words) for words in segments]
            )
            lengths = [len(words) for words in segments[1:]]
            values.append(scored.value)
            per_token.append(sum(scored.gains) / sum(lengths))
            first.append(scored.gains[0])
            last.append(scored.gains[-1])
        outcome[kind] = {
            "seq_dep": mean_and_error(values),
            "per_token": mean_and_error(per_token),
            "first_gain": mean_and_error(first),
            "last_gain": mean_and_error(last),
        }
    return outcome


def mean_and_error(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return [round(mean, 4), round(math.sqrt(variance / len(values)), 4)]
