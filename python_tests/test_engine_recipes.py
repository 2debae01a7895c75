"""The changes of engines' files in docs/integrations.md, applied to the files of their wheels."""

import ast
import re
import sys
import textwrap
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_stand_ins import install
from sglang_wheel import sglang_wheel

import dmax_kernels

ROOT = Path(__file__).parent.parent
ENGINES = ROOT / "build/engines"
PAGE = ROOT / "docs/integrations.md"


def recipe(path):
    """The hunks of the page's change of a file: (old text, new text) each."""
    blocks = re.findall(r"```diff\n--- (\S+)\n@@\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (text,) = [block for name, block in blocks if name == path]
    hunks = []
    for hunk in text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " -+" for line in lines), lines
        sides = ("".join(line[1:] for line in lines if line[0] in " " + side) for side in "-+")
        hunks.append(tuple(sides))
    return hunks


def sources(engine, path):
    """The file as it was released, and changed; or skip."""
    file = ENGINES / engine / path
    if not file.is_file():
        pytest.skip(f"{engine}'s wheel is not unpacked here: `make test-engines` does it")
    changed = released = file.read_text()
    for old, new in recipe(path):
        assert changed.count(old) == 1, f"{path} no longer has:\n{old}"
        changed = changed.replace(old, new)
    ast.parse(changed)
    return released, changed


# ---- SGLang's Gemma4Renoise

B, L, VOCAB, DIM = 3, 5, 40, 6
OPTIONS = {"max_denoising_steps": 9, "stopping_config": {"confidence_threshold": 0.4}}


@pytest.fixture
def renoise(monkeypatch):
    """The classes (released, changed); the modules that they import names from are stand-ins."""
    before = set(sys.modules)
    sglang_wheel()
    names = {
        "sglang.srt.arg_groups.model_override_base": ["attention_backends_of", "model_config_of"],
        "sglang.srt.arg_groups.overrides": ["declare_resolution", "resolving_view"],
        "sglang.srt.distributed": ["tensor_model_parallel_all_reduce"],
        "sglang.srt.layers.vocab_parallel_embedding": ["VocabParallelEmbedding"],
        "sglang.srt.model_executor.cuda_graph_config": ["Backend", "Phase", "with_phase"],
    }
    for module, contents in names.items():
        install(monkeypatch, module, **{name: type(name, (), {}) for name in contents})
    classes = []
    for source in sources("sglang", "sglang/srt/dllm/algorithm/gemma4_renoise.py"):
        module = types.ModuleType("gemma4_renoise")
        exec(source.replace("@torch.compile", ""), vars(module))
        classes.append(module.Gemma4Renoise)
    yield classes
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "sglang":
            del sys.modules[name]


class Rounds:
    """Logits that get surer from round to round and do not depend on what was drawn."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        shape = (B, L, VOCAB)
        self.base, self.noise = (torch.randn(shape, generator=self.generator) for _ in range(2))

    def __call__(self, step):
        return (self.base * (2 + 4 * step) + self.noise * 2 * 0.5**step).flatten(0, 1)


def denoise(renoise_class, seed, fdfo):
    """Every step's state of every request, to the end."""
    config = SimpleNamespace(
        block_size=L, mask_id=VOCAB - 1, algorithm_config=OPTIONS, capture_input_preparation=False,
        first_done_first_out_mode=fdfo,
    )  # fmt: skip
    decoder = renoise_class(config)
    decoder.vocab_size = VOCAB
    weight = torch.randn(VOCAB, DIM, generator=torch.Generator().manual_seed(1))
    decoder.embed_tokens = SimpleNamespace(weight=weight, embed_scale=1.5)
    batch = SimpleNamespace(
        batch_size=B, input_ids=torch.zeros(B * L, dtype=torch.int64), rids=["a", "b", "c"]
    )
    states = decoder.init_step_state(batch)
    states[1]["step"] = 4  # a request that began before: another temperature
    logits, trace = Rounds(seed), []
    for step in range(9):
        done = decoder.step(batch, logits(step), states)
        trace.append([{k: v for k, v in state.items() if k != "generator"} for state in states])
        if all(done):
            return trace
    pytest.fail("not all requests ended")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fdfo", [False, True])
def test_sglangs_renoise_takes_the_same_steps(renoise, seed, fdfo):
    released, changed = (denoise(each, seed, fdfo) for each in renoise)
    assert len(changed) == len(released)
    for step, (ours, theirs) in enumerate(zip(changed, released, strict=True)):
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine["argmax"], other["argmax"])
            assert (mine["finished"], mine["step"]) == (other["finished"], other["step"])
            soft = mine["self_conditioning"], other["self_conditioning"]
            assert (soft[0] is None) == (soft[1] is None)
            if soft[0] is not None:
                torch.testing.assert_close(*soft, rtol=2e-6, atol=2e-6)
            assert step or not torch.equal(mine["current"], mine["argmax"])
    last = changed[-1]
    assert all(torch.equal(state["current"], state["argmax"]) for state in last)


def test_sglangs_renoise_draws_from_the_softmax(renoise):
    """With every position accepted, the canvas is a draw at the request's own temperature."""
    config = SimpleNamespace(
        block_size=20000,
        mask_id=2,
        algorithm_config={"sampler_config": {"entropy_bound": 1e9}},
        capture_input_preparation=False,
        first_done_first_out_mode=True,
    )
    decoder = renoise[1](config)
    decoder.vocab_size = 3
    decoder.embed_tokens = SimpleNamespace(weight=torch.eye(3), embed_scale=1.0)
    batch = SimpleNamespace(
        batch_size=2, input_ids=torch.zeros(40000, dtype=torch.int64), rids=["a", "b"]
    )
    states = decoder.init_step_state(batch)
    states[1]["step"] = 2
    temperatures = [decoder._temperature(state["step"]) for state in states]
    row = torch.tensor([0.0, 0.3, -0.5])
    decoder.step(batch, row.expand(40000, 3), states)
    for state, temperature in zip(states, temperatures, strict=True):
        share = torch.bincount(state["current"], minlength=3) / 20000
        expected = torch.softmax(row / temperature, dim=0)
        torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


# ---- vLLM's compiled step


def function_of(source, name):
    """A function of the source without its decorators, which compile it."""
    tree = ast.parse(source)
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    function.decorator_list = []
    module = ast.Module([*ast.parse("from __future__ import annotations").body, function], [])
    namespace = {"torch": torch}
    exec(compile(ast.fix_missing_locations(module), name, "exec"), namespace)
    return namespace[name]


def vllm_state(generator, slots, width):
    def canvas(*shape):
        return torch.randint(0, VOCAB, (slots, *shape), generator=generator)

    return {
        "canvas": canvas(width),
        "argmax_canvas": canvas(width),
        "step_tensor": torch.tensor([0, 3, 8, 1]),
        "is_encoder_phase": torch.tensor([False, False, False, True]),
        "confident_tensor": torch.zeros(slots, dtype=torch.bool),
        "sc_embeds": torch.zeros(slots, width, DIM),
        "history": canvas(2, width),
        "history_len_tensor": torch.tensor([0, 2, 3, 1]),
        "max_steps_tensor": torch.full((slots,), 9, dtype=torch.int32),
        "pin_mask": torch.rand(slots, width, generator=generator) < 0.2,
        "seed_canvas": canvas(width),
        "read_only": torch.tensor([False, True, False, False]),
        "sampled": torch.zeros(slots, width, dtype=torch.int64),
        "num_sampled": torch.zeros(slots, dtype=torch.int64),
        "draft_tokens": canvas(width),
    }


VLLM_MODEL = "vllm/model_executor/models/diffusion_gemma.py"


def vllm_sampler(monkeypatch):
    """The file of vLLM's statistics; its kernel cannot be called."""
    install(monkeypatch, "vllm.triton_utils", tl=SimpleNamespace(constexpr=int),
            triton=SimpleNamespace(jit=lambda function: function))  # fmt: skip
    sampler = types.ModuleType("sampler")
    exec((ENGINES / "vllm" / VLLM_MODEL.replace(".py", "_sampler.py")).read_text(), vars(sampler))
    return sampler


def statistics_of(source, sampler, logits, temp, embed_weight):
    """The names that the file's own lines before a step make: what the step gets."""
    begin = source.index(" " * 16 + "probs_dtype =")
    end = source.index(" " * 16 + "# Only the logprob stash reads the scaled logits.")
    names = {
        "n": len(temp), "W": len(logits) // len(temp), "tile_logits": logits, "compute_sc": True,
        "embed_weight": embed_weight, "temp": temp, "allowed": None, "torch": torch,
        "self": SimpleNamespace(embed_weight=embed_weight), "dmax_kernels": dmax_kernels,
        "sample_row_stats_reference": sampler.sample_row_stats_reference,
    }  # fmt: skip
    exec(textwrap.dedent(source[begin:end]), names)
    return names


def test_vllms_requests_are_drawn_at_their_own_temperatures(monkeypatch):
    """The law of each request's softmax; the best token, and no entropy, at temperature 0."""
    _, changed = sources("vllm", VLLM_MODEL)
    row, temp, width = torch.tensor([0.0, 0.3, -0.5, -torch.inf]), [0.4, 0.0, 1.5], 20000
    logits = row.expand(3 * width, 4)
    torch.manual_seed(0)
    names = statistics_of(
        changed, vllm_sampler(monkeypatch), logits, torch.tensor(temp), torch.eye(4)
    )
    samples, entropies = (names[each].view(3, width) for each in ("sample_rows", "entropy_rows"))
    for sample, entropy, temperature in zip(samples, entropies, temp, strict=True):
        expected = torch.softmax(row.double() / max(temperature, 1e-10), dim=0)
        share = torch.bincount(sample, minlength=4) / width
        torch.testing.assert_close(share.double(), expected, rtol=0, atol=0.015)
        exact = torch.special.entr(expected).sum().float().expand(width)
        torch.testing.assert_close(entropy, exact, rtol=2e-6, atol=1e-6)
    assert (samples[1] == 1).all()


@pytest.mark.parametrize("seed", range(8))
def test_vllms_step_writes_the_same_state(seed, monkeypatch):
    released, changed = sources("vllm", VLLM_MODEL)
    sampler = vllm_sampler(monkeypatch)
    generator = torch.Generator().manual_seed(seed)
    n, width = 4, L
    logits = torch.randn(n * width, VOCAB, generator=generator) * 4
    logits[:, 30:] = -torch.inf  # as vLLM's filters leave them
    temp = torch.rand(n, generator=generator) + 0.2
    embed_weight = torch.randn(VOCAB, DIM, generator=generator)
    state = vllm_state(generator, n, width)
    results, found = [], []
    for source in (released, changed):
        names = statistics_of(source, sampler, logits, temp, embed_weight)
        found.append(names)
        # vLLM's draw in both: ours follows the same law with other numbers
        rows = (found[0]["sample_rows"], names["argmax_rows"], names["entropy_rows"])
        buffers = {name: tensor.clone() for name, tensor in state.items()}
        torch.manual_seed(seed + 1)
        function_of(source, "_compiled_sample_step")(
            *(each.view(n, width) for each in rows), names["probs"],
            decode_slots=torch.arange(n), decode_idx=torch.arange(n), all_slots=torch.arange(n),
            valid_canvas_len=torch.full((n,), width), embed_weight=embed_weight,
            normalizer=torch.tensor(1.5), confidence_threshold=0.5, vocab_size=VOCAB, CL=width,
            ST=2, entropy_bound=0.3, sc_vocab_start=0, sc_vocab_end=VOCAB, tp_size=1,
            tp_group_name="", **buffers,
        )  # fmt: skip
        results.append(buffers)
    theirs, ours = found
    assert torch.equal(ours["argmax_rows"], theirs["argmax_rows"])
    torch.testing.assert_close(ours["entropy_rows"], theirs["entropy_rows"], rtol=5e-6, atol=5e-6)
    theirs, ours = results
    for name in state:
        if name == "sc_embeds":
            assert theirs[name].any()
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=2e-6)
        else:
            assert torch.equal(ours[name], theirs[name]), name
