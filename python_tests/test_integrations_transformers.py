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


pytestmark = pytest.mark.usefixtures("one_thread")


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
    engine, model, *, seed, steps=12, fade=0.5, stability=1, confidence=0.4, bound=0.3,
    forward=None, processor=None, behind=0,
):  # fmt: skip
    """The engine's loop over denoising steps: every step's four results. The canvases are `behind`
    steps behind the loop's.
    """
    config = engine.EntropyBoundSamplerConfig(entropy_bound=bound)
    sampler = engine.EntropyBoundSampler(config, CANVAS, VOCAB, steps)
    stop = None
    if stability is not None:
        stop = engine.StableAndConfidentStoppingCriteria(stability, confidence)
    if processor is None:
        linear = engine.LinearTemperatureScheduleLogitsProcessor(0.4, 0.8, steps)
        processor = lambda ids, logits, cur_step: linear(ids, logits, cur_step)  # noqa: E731
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
            cur_step=step + behind,
            sampler=sampler,
            logits_processor=processor,
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
    adapter.enable(model, sampling="torch", self_conditioning="torch")
    got = denoise(engine, model, **options)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its)
    if stability in (1, 2):  # the case is not trivial: rows ended, and not all in one step
        ends = [result[3].sum().item() for result in expected]
        assert ends[-1] > 0
        assert len(set(ends)) > 1


def per_canvas(*values):
    return torch.tensor(values).view(BATCH, 1, 1)


def schedules(engine, case):
    """A batch's schedule and its canvases' steps behind; and those of each canvas alone."""

    def schedule(*arguments):
        return [engine.LinearTemperatureScheduleLogitsProcessor(*arguments)]

    if case == "steps of their own":
        one, behind = schedule(0.1, 1.5, 21), (0, 4, 9)
        return one, per_canvas(*behind), [(one, each) for each in behind]
    given = ((0.1, 0.4, 0.7), (0.5, 0.9, 2.0), (12, 20, 40))  # t_min, t_max, steps
    alone = [(schedule(*own), 0) for own in zip(*given, strict=True)]
    return schedule(*(per_canvas(*each) for each in given)), 0, alone


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # the engine's, of cur_step
@pytest.mark.parametrize("case", ["schedules of their own", "steps of their own"])
@pytest.mark.parametrize("sampling", ["torch", "fused"])
@pytest.mark.parametrize("seed", range(3))
def test_canvases_have_their_own_temperatures(engine, sampling, seed, case):
    """Each canvas's ids are those of a batch at its temperature alone; draws depend on the place,
    so it stays where it is.
    """
    model, processors = model_of(engine), pytest.importorskip("transformers").LogitsProcessorList

    def run(processor, behind):
        return denoise(
            engine, model, seed=seed, stability=None, processor=processors(processor), behind=behind
        )

    mixed, behind, alone = schedules(engine, case)
    expected = run(mixed, behind)
    adapter.enable(model, sampling=sampling, self_conditioning="torch")
    got = run(mixed, behind)
    if sampling == "torch":
        for ours, theirs in zip(got, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))
    own = [run(*each) for each in alone]
    for row, results in enumerate(own):
        for ours, theirs in zip(got, results, strict=True):
            assert torch.equal(ours[0][row], theirs[0][row])  # the canvas
            assert torch.equal(ours[1][row], theirs[1][row])  # the greedy one
    assert not torch.equal(own[0][-1][0], own[2][-1][0])  # the temperatures show


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
    adapter.enable(model, self_conditioning="torch")
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
    adapter.enable(model, self_conditioning="torch")
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
    for switch_on in (lambda: None, lambda: adapter.enable(model, self_conditioning="torch")):
        switch_on()
        forward = Denoiser(0, 0.5)
        denoise(engine, model, seed=0, steps=1, forward=forward)
        seen.append(forward.inputs)
    assert seen[0] == seen[1]
    assert seen[0].keys() & {"cache", "past_key_values"}


def test_other_samplers_run_the_engines_step(engine, monkeypatch):
    model = model_of(engine)
    adapter.enable(model, self_conditioning="torch")
    other = type("Other", (engine.StableAndConfidentStoppingCriteria,), {})
    monkeypatch.setattr(engine, "StableAndConfidentStoppingCriteria", other)
    monkeypatch.setattr(adapter.DenoisingStep, "__call__", None)  # calling it would fail
    denoise(engine, model, seed=0)


@pytest.fixture(scope="module")
def tiny(engine):
    """A DiffusionGemma model with random weights, whose canvases settle row by row."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        global_head_dim=16,
        num_global_key_value_heads=1,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        initializer_range=0.3,
        **sizes,
    )
    vision = transformers.Gemma4VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, **sizes
    )
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=CANVAS
    )
    torch.manual_seed(0)
    return transformers.DiffusionGemmaForBlockDiffusion(config).eval()


def generate(engine, model, seed, bound, stability=1, **options):
    prompt = torch.randint(3, VOCAB, (BATCH, 5), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    output = model.generate(
        prompt,
        max_new_tokens=2 * CANVAS,
        max_denoising_steps=8,
        sampler_config=engine.EntropyBoundSamplerConfig(entropy_bound=bound),
        stability_threshold=stability,
        **({"confidence_threshold": 2.0, "t_min": 0.01, "t_max": 0.05} | options),
    )
    return output.sequences, output.tokens_per_forward


@pytest.mark.parametrize("self_conditioning", ["torch", "fused"])
@pytest.mark.parametrize("bound", [1.0, 5.0])
def test_generate_gives_the_engines_ids(engine, tiny, bound, self_conditioning):
    """A whole model, two canvases after one another: the ids and the number of forwards."""
    forwards = set()
    for seed in range(2):
        adapter.disable(tiny)
        expected = generate(engine, tiny, seed, bound)
        adapter.enable(tiny, sampling="torch", self_conditioning=self_conditioning)
        got = generate(engine, tiny, seed, bound)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        forwards |= set(expected[1].tolist())
    adapter.disable(tiny)
    assert len(forwards) > 1  # canvases ended at different steps


@pytest.mark.parametrize("sampling", ["torch", "fused"])
def test_generate_with_a_schedule_per_canvas(engine, tiny, sampling):
    """The engine's ids with its own draws; else those of a batch at each canvas's schedule."""
    from transformers import LogitsProcessorList

    t_max = (0.05, 0.3, 2.0)

    def ids(seed, *highest):
        given = highest[0] if len(highest) == 1 else per_canvas(*highest)
        schedule = engine.LinearTemperatureScheduleLogitsProcessor(0.01, given, 8)
        options = {"logits_processor": LogitsProcessorList([schedule]), "t_min": None}
        options |= {"t_max": None, "confidence_threshold": 1e-30}
        return generate(engine, tiny, seed, 5.0, **options)[0]

    for seed in range(2):
        adapter.disable(tiny)
        expected = ids(seed, *t_max)
        adapter.enable(tiny, sampling=sampling)
        got = ids(seed, *t_max)
        if sampling == "torch":
            assert torch.equal(got, expected)
        alone = [ids(seed, each) for each in t_max]
        for row, own in enumerate(alone):  # padded to the end of the batch's longest
            both = min(got.shape[1], own.shape[1])
            assert torch.equal(got[row, :both], own[row, :both])
            assert not got[row, both:].any()
        first, _, last = (own[:, : 5 + CANVAS] for own in alone)
        assert not torch.equal(first, last)  # the temperatures show
    adapter.disable(tiny)


def test_the_decoder_is_conditioned_on_softmax_times_embedding(engine, tiny, monkeypatch):
    """What its module gets is, step by step, what the engine's own product gives it."""
    seen = []
    module = tiny.model.decoder.self_conditioning
    engine_forward = type(module).forward

    def recording(self, inputs_embeds, signal):
        seen.append(signal.detach().clone())
        return engine_forward(self, inputs_embeds, signal)

    monkeypatch.setattr(type(module), "forward", recording)
    runs = []
    for choice in ("torch", "fused"):
        adapter.enable(tiny, sampling="torch", self_conditioning=choice)
        generate(engine, tiny, 3, 0.3, stability=3)
        runs.append(seen.copy())
        seen.clear()
    adapter.disable(tiny)
    assert len(runs[0]) == len(runs[1]) > 4
    assert (runs[0][0] == 0).all()
    assert any((signal != 0).any() for signal in runs[0])
    for signal, expected in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(signal, expected, rtol=1e-4, atol=1e-4)
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("own", [False, True])
def test_a_step_reads_nothing_on_the_host(engine, tiny, own):
    """And makes one pass over the logits for each of its three ops, none besides; with a
    temperature per canvas too.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            reads = not function.is_view and "new_" not in function.name()
            if reads and any(x.shape[-1:] == (VOCAB,) for x in tensors):
                passes.append(function.name())
            assert function.name() != "aten::_local_scalar_dense"
            return result

    logits = torch.randn(BATCH, CANVAS, VOCAB)
    t_max, steps = (per_canvas(0.8, 0.5, 2.4), per_canvas(3, 5, 1)) if own else (0.8, 3)
    model, passes = model_of(engine), []
    model.model.decoder = tiny.model.decoder
    adapter.enable(model)
    config = engine.EntropyBoundSamplerConfig(entropy_bound=0.3)
    inputs = {
        "decoder_forward": lambda **inputs: SimpleNamespace(logits=logits),
        "current_canvas": torch.zeros(BATCH, CANVAS, dtype=torch.int64),
        "argmax_canvas": torch.zeros(BATCH, CANVAS, dtype=torch.int64),
        "self_conditioning_logits": torch.zeros(BATCH, CANVAS, 32),
        "finished_denoising": torch.tensor([False, True, False]),
        "sampler": engine.EntropyBoundSampler(config, CANVAS, VOCAB, 5),
        "logits_processor": [engine.LinearTemperatureScheduleLogitsProcessor(0.4, t_max, 5)],
        "diffusion_stopping_criteria": engine.StableAndConfidentStoppingCriteria(1, 0.5),
        "cur_step": steps,
    }
    others = ("input_ids", "decoder_position_ids", "mask_mapping")
    with Recorder():
        *_, soft, finished = model._denoising_step(**inputs, **dict.fromkeys(others))
    assert sorted(passes) == [
        f"dmax::{op}" for op in ("row_statistics", "sample_tokens", "soft_embedding")
    ]
    assert (soft[1] == 0).all()  # a finished row keeps its own
    weight = tiny.model.decoder.embed_tokens.weight
    for row, temperature in ((0, 0.4 + 0.4 * 3 / 5), (2, 0.8 if own else 0.4 + 0.4 * 3 / 5)):
        expected = torch.softmax(logits[row] / temperature, dim=-1) @ weight
        torch.testing.assert_close(soft[row], expected, rtol=1e-4, atol=1e-5)
    assert finished[1]


def test_a_compiled_decoder_keeps_the_engines_conditioning(engine, tiny):
    """Compiled code does not see the hook: the step gives and takes logits."""
    model = model_of(engine)
    model.model.decoder = tiny.model.decoder
    adapter.enable(model)
    forward = Denoiser(0, 0.5)
    forward._torchdynamo_orig_callable = None
    results = denoise(engine, model, seed=0, steps=2, forward=forward)
    assert results[-1][2].shape == (BATCH, CANVAS, VOCAB)


def test_streamers_of_logits_are_refused(engine, tiny):
    streamer = SimpleNamespace(_takes_logits=True, put=lambda value: None, end=lambda: None)
    adapter.enable(tiny)
    with pytest.raises(ValueError, match="self_conditioning must be 'torch' for a streamer that"):
        tiny.generate(torch.ones(1, 3, dtype=torch.int64), streamer=streamer)
    adapter.disable(tiny)


def test_errors_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="self_conditioning must be one of .* got 'none'"):
        adapter.enable(None, self_conditioning="none")
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
    stand_in.LinearTemperatureScheduleLogitsProcessor = object
    with pytest.raises(TypeError, match="must be a DiffusionGemma model, got str"):
        adapter.enable("model")
