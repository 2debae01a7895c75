"""The vLLM dLLM plug-in's remasking policy, against its documented rule in plain Python."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from engine_stand_ins import install

from dmax_kernels.integrations.vllm_dllm import remasking_policy

SIZE, MASK, VOCAB = 8, 1, 12
DEFAULT_THRESHOLD, DEFAULT_STEPS = 0.01, 8


@dataclass(frozen=True)
class StepResult:
    committed_token_ids: tuple
    next_input_block: tuple


@pytest.fixture
def plug_in(monkeypatch):
    checked = []
    install(
        monkeypatch,
        "vllm_dllm_plugin.remasking",
        RemaskStepResult=StepResult,
        validate_remask_step_result=checked.append,
    )
    install(
        monkeypatch,
        "vllm_dllm_plugin.config",
        DRAFT_SIZE=SIZE,
        LLADA2_DEFAULT_MASK_TOKEN_ID=MASK,
        LLADA2_DEFAULT_COMMIT_CONFIDENCE_THRESHOLD=DEFAULT_THRESHOLD,
        LLADA2_DEFAULT_DENOISE_STEPS=DEFAULT_STEPS,
    )
    return checked


def top1(row):
    weights = [math.exp(x - max(row)) for x in row]
    best = row.index(max(row))
    return best, weights[best] / sum(weights)


def default_rule(draft, logits, options):
    """The documented default: high-confidence masks, or the step's budget of the best ones."""
    threshold = options.get("commit_confidence_threshold", DEFAULT_THRESHOLD)
    steps = options.get("denoise_steps", DEFAULT_STEPS)
    budgets = [SIZE // steps + (i < SIZE % steps) for i in range(steps)]
    index = min(max(options.get("denoise_step_index", 0), 0), steps - 1)
    budget = options.get("num_transfer", budgets[index])
    predictions = [top1(row) for row in logits.tolist()]
    masked = [i for i, token in enumerate(draft) if token == MASK]
    moved = [i for i in masked if predictions[i][1] > threshold]
    if len(moved) < budget:
        moved = sorted(masked, key=lambda i: (-predictions[i][1], i))[:budget]
    result = list(draft)
    for i in moved:
        result[i] = predictions[i][0]
    return finished(result) if MASK not in result else StepResult((), tuple(result))


def finished(tokens):
    return StepResult(tuple(tokens), (MASK,) * SIZE)


# Drafts from empty to full; budgets 0 and beyond the block; step indices past the schedule's end;
# logits from a grid of few values, so that confidences tie
@pytest.mark.parametrize("seed", range(60))
def test_threshold_is_the_plug_ins_default(plug_in, seed):
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 4, (SIZE, VOCAB), generator=generator).float()
    draft = [choose.choice([MASK, MASK, 5]) for _ in range(SIZE)]
    if seed % 10 == 0:
        draft = [choose.randrange(2, VOCAB) for _ in range(SIZE)]
    options = {}
    if choose.random() < 0.7:
        options["commit_confidence_threshold"] = choose.choice([0.123, 0.317, 0.9])
    if choose.random() < 0.5:
        options |= {"denoise_steps": choose.choice([1, 3, 8, 20])}
        options |= {"denoise_step_index": choose.choice([-1, 0, 2, 50])}
    if choose.random() < 0.3:
        options["num_transfer"] = choose.choice([0, 2, 99])
    result = remasking_policy().apply(
        input_draft=draft, logits=logits, remasking_config=options or None
    )
    assert result == default_rule(draft, logits, options)
    assert plug_in == [result]  # the plug-in's own check was run on it


def spd_rule(draft, logits, tau_dec, tau_acc):
    predictions = [top1(row) for row in logits.tolist()]
    if all(c > tau_acc for _, c in predictions) or draft == [t for t, _ in predictions]:
        return finished([token for token, _ in predictions])
    result, going, first = list(draft), True, True
    for i, (token, confidence) in enumerate(predictions):
        if draft[i] == MASK:
            going = going and confidence > tau_dec
            if going or first:
                result[i] = token
            first = False
        else:
            result[i] = token
    return StepResult((), tuple(result))


# Flat logits end by repeating themselves, sharp ones by confidence
@pytest.mark.parametrize("sharpness", [3, 30])
@pytest.mark.parametrize("seed", range(15))
def test_spd_decodes_a_block(plug_in, seed, sharpness):
    """From all masks to the commit, the logits drifting less and less."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(SIZE, VOCAB, generator=generator) * sharpness
    base[:, MASK] = -200
    policy, draft = remasking_policy("spd", tau_dec=0.4, tau_acc=0.9), [MASK] * SIZE
    for step in range(4 * SIZE):
        noise = torch.randn(SIZE, VOCAB, generator=generator)
        noise[:, MASK] = 0
        logits = base + noise * max(2 - 0.2 * step, 0)
        result = policy.apply(input_draft=draft, logits=logits)
        assert result == spd_rule(draft, logits, 0.4, 0.9)
        if result.committed_token_ids:
            assert MASK not in result.committed_token_ids
            return
        draft = list(result.next_input_block)
    pytest.fail("the block was never committed")


def test_spd_never_predicts_the_mask(plug_in):
    """The plug-in's own rule does, and so does "threshold", whose results are the plug-in's."""
    logits = torch.randn(SIZE, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, MASK] = 60
    expected = logits.index_fill(1, torch.tensor(MASK), -torch.inf)
    policy, draft = remasking_policy("spd", tau_dec=0.1, tau_acc=0.9), (MASK,) * SIZE
    for _ in range(4 * SIZE):
        result = policy.apply(input_draft=draft, logits=logits)
        if result.committed_token_ids:
            break
        draft = result.next_input_block
    assert result.committed_token_ids == tuple(expected.argmax(dim=-1).tolist())
    default = remasking_policy().apply(input_draft=(MASK,) * SIZE, logits=logits)
    assert default.next_input_block == (MASK,) * SIZE


def test_errors_are_one_sentence(plug_in, monkeypatch):
    policy, logits = remasking_policy(), torch.zeros(SIZE, VOCAB)
    draft = [MASK] * SIZE
    with pytest.raises(ValueError, match="rule must be one of .* got 'random'"):
        remasking_policy("random")
    with pytest.raises(ValueError, match="input_draft must hold 8 ids, got 7"):
        policy.apply(input_draft=draft[1:], logits=logits)
    with pytest.raises(ValueError, match=r"logits must be a tensor \[8, V\], got \(2, 8, 12\)"):
        policy.apply(input_draft=draft, logits=logits.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"logits must be a tensor \[8, V\], got NoneType"):
        policy.apply(input_draft=draft)
    for name, value in (("num_transfer", -1), ("denoise_steps", 0)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            policy.apply(input_draft=draft, logits=logits, remasking_config={name: value})
    install(monkeypatch, "vllm_dllm_plugin.config").__dict__.pop("DRAFT_SIZE")
    with pytest.raises(ImportError, match="vllm_dllm_plugin.config must have DRAFT_SIZE"):
        remasking_policy()
