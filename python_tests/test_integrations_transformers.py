"""DiffusionGemma's denoising step: the engine's own next to ours, and its rules in plain Python."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from engine_stand_ins import install

import dmax_kernels.integrations.transformers as adapter

BATCH, CANVAS, VOCAB = 3, 8, 23


@pytest.fixture(scope="module")
def engine():
    return pytest.importorskip(
        adapter.MODULE,
        reason="the installed transformers has no DiffusionGemma",
        exc_type=ImportError,
    )


@pytest.fixture(autouse=True)
def no_cuda_graphs(monkeypatch):
    """Marking a step for CUDA graphs imports all of Inductor: seconds, for nothing on a CPU."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)


class Denoiser:
    """A model whose logits settle: fading noise, plus a little of the canvas and the feedback."""

    def __init__(self, seed, fade, dtype=torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.target = torch.randn(BATCH, CANVAS, VOCAB, generator=self.generator) * 4
        # rows settle at different times
        self.target *= torch.tensor([1.0, 3.0, 6.0]).view(BATCH, 1, 1)
        self.fade, self.dtype, self.calls = fade, dtype, 0

    def __call__(self, *, decoder_input_ids, self_conditioning_logits, **inputs):
        self.inputs = inputs
        noise = torch.randn(BATCH, CANVAS, VOCAB, generator=self.generator)
        logits = self.target + noise * 3 * self.fade**self.calls
        logits = logits + 0.5 * torch.nn.functional.one_hot(decoder_input_ids, VOCAB)
        if self_conditioning_logits is not None:
            logits = logits + 0.1 * self_conditioning_logits
        self.calls += 1
        return SimpleNamespace(logits=logits.to(self.dtype))


def model_of(engine):
    decoder = SimpleNamespace(embed_tokens=torch.nn.Embedding(VOCAB, 2))

    class Model(engine.DiffusionGemmaGenerationMixin):
        config = SimpleNamespace(
            text_config=SimpleNamespace(vocab_size=VOCAB), canvas_length=CANVAS
        )
        model = SimpleNamespace(decoder=decoder)

    return Model()


def denoise(
    engine, model, *, seed, steps=12, fade=0.5, stability=1, confidence=0.4, bound=0.3, forward=None
):
    """The engine's loop over denoising steps: every step's four results."""
    config = engine.EntropyBoundSamplerConfig(entropy_bound=bound)
    sampler = engine.EntropyBoundSampler(config, CANVAS, VOCAB, steps)
    stop = None
    if stability is not None:
        stop = engine.StableAndConfidentStoppingCriteria(stability, confidence)
    processor = engine.LinearTemperatureScheduleLogitsProcessor(0.4, 0.8, steps)
    torch.manual_seed(seed)
    forward = forward or Denoiser(seed, fade)
    named = inspect.signature(engine.DiffusionGemmaGenerationMixin._denoising_step).parameters
    cache = "cache" if "cache" in named else "past_key_values"  # renamed in transformers 5.24
    canvas = sampler.initialize_canvas(BATCH, torch.device("cpu"))
    argmax, conditioning = canvas, None
    finished = torch.zeros(BATCH, dtype=torch.bool)
    results = []
    for step in reversed(range(1, steps + 1)):
        canvas, argmax, conditioning, finished = model._denoising_step(
            decoder_forward=forward,
            current_canvas=canvas,
            argmax_canvas=argmax,
            input_ids=None,
            decoder_position_ids=None,
            self_conditioning_logits=conditioning,
            mask_mapping=None,
            **{cache: None},
            finished_denoising=finished,
            cur_step=step,
            sampler=sampler,
            logits_processor=lambda ids, logits, cur_step: processor(ids, logits, cur_step),
            diffusion_stopping_criteria=stop,
        )
        results.append(
            [canvas, argmax, conditioning, finished.clone(), sampler.accepted_token_mask]
        )
        if finished.all():
            break
    return results


# Stopping off, at once, and after one or two stable steps; bounds that accept few and nearly all
@pytest.mark.parametrize("stability", [None, 0, 1, 2])
@pytest.mark.parametrize("bound", [0.02, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_same_tokens_as_the_engine(engine, seed, stability, bound):
    model = model_of(engine)
    options = {"seed": seed, "stability": stability, "bound": bound}
    expected = denoise(engine, model, **options)
    adapter.enable(model, sampling="torch")
    got = denoise(engine, model, **options)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its)
    if stability in (1, 2):  # the case is not trivial: rows ended, and not all in one step
        ends = [result[3].sum().item() for result in expected]
        assert ends[-1] > 0
        assert len(set(ends)) > 1


def accepted_rule(logits, bound):
    """The k positions of least entropy such that the k - 1 least sum to at most the bound."""
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    accepted = torch.zeros(entropy.shape, dtype=torch.bool)
    for row in range(BATCH):
        total = 0.0
        for position in sorted(range(CANVAS), key=lambda i: entropy[row, i].item()):
            accepted[row, position] = total <= bound
            total += entropy[row, position].item()
    return accepted


def test_fused_follows_the_rules_and_its_seed(engine):
    """Acceptance and greedy canvas by the rule; every drawn token is one the row can give."""
    model = model_of(engine)
    adapter.enable(model)
    results = denoise(engine, model, seed=5, stability=None)
    again = denoise(engine, model, seed=5, stability=None)
    for step, (canvas, argmax, logits, _, accepted) in enumerate(results):
        assert torch.equal(accepted, accepted_rule(logits, 0.3))
        assert torch.equal(argmax, logits.argmax(dim=-1))
        probability = logits.softmax(dim=-1).gather(-1, canvas.unsqueeze(-1)).squeeze(-1)
        assert (probability[accepted] > 1e-6).all()
        assert torch.equal(canvas, again[step][0])
    assert accepted.any()
    assert not torch.equal(canvas, denoise(engine, model, seed=6, stability=None)[-1][0])


def test_no_softmax_is_left(engine, monkeypatch):
    """One row_statistics and one sample_tokens per step, nothing else over the vocabulary."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a softmax over all logits")

    model = model_of(engine)
    adapter.enable(model)
    for owner, name in (
        (torch, "softmax"),
        (torch, "multinomial"),
        (torch, "argmax"),
        (torch.distributions, "Categorical"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    denoise(engine, model, seed=1)
    adapter.disable(model)
    with pytest.raises(AssertionError, match="a softmax over all logits"):
        denoise(engine, model, seed=1)


def test_the_cache_goes_on_under_the_engines_name(engine):
    """Which transformers 5.24 changed: the decoder gets what the engine's own step gives it."""
    model, seen = model_of(engine), []
    for switch_on in (lambda: None, lambda: adapter.enable(model)):
        switch_on()
        forward = Denoiser(0, 0.5)
        denoise(engine, model, seed=0, steps=1, forward=forward)
        seen.append(forward.inputs)
    assert seen[0] == seen[1]
    assert seen[0].keys() & {"cache", "past_key_values"}


def test_other_samplers_run_the_engines_step(engine, monkeypatch):
    model = model_of(engine)
    adapter.enable(model)
    other = type("Other", (engine.StableAndConfidentStoppingCriteria,), {})
    monkeypatch.setattr(engine, "StableAndConfidentStoppingCriteria", other)
    monkeypatch.setattr(adapter, "fused_denoising_step", None)  # calling it would fail
    denoise(engine, model, seed=0)


def test_errors_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="sampling must be one of .* got 'gumbel'"):
        adapter.enable(None, sampling="gumbel")
    stand_in = install(monkeypatch, "stand_in_for_transformers")
    monkeypatch.setattr(adapter, "MODULE", "stand_in_for_transformers")
    with pytest.raises(ImportError, match="must have DiffusionGemmaGenerationMixin, which this"):
        adapter.enable(None)
    step = {"_denoising_step": None}
    stand_in.DiffusionGemmaGenerationMixin = type("Mixin", (), step)
    stand_in.EntropyBoundSampler = type("Sampler", (), {"initialize_canvas": None})
    stand_in.StableAndConfidentStoppingCriteria = object
    with pytest.raises(TypeError, match="must be a DiffusionGemma model, got str"):
        adapter.enable("model")
