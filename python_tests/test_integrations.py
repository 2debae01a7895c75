"""docs/integrations.md runs as it stands, on stand-ins; importing an adapter imports no engine."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_contracts import DIFFULEX, DINFER
from engine_stand_ins import install

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs/integrations.md").read_text()
ADAPTERS = sorted(
    path.stem for path in (ROOT / "dmax_kernels/integrations").glob("*.py") if path.stem[0] != "_"
)
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
ENGINES = ("dinfer", "sglang", "diffulex", "transformers")


def test_importing_an_adapter_imports_no_engine():
    imports = "".join(f"import dmax_kernels.integrations.{name}\n" for name in ADAPTERS)
    code = f"import sys\n{imports}print(sorted(set({ENGINES}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_adapters_keep_the_contracts_of_repositories():
    """The parameters of every method that replaces an engine's, and the commit in the docs."""
    from dmax_kernels.integrations.diffulex import dmax_sampler
    from dmax_kernels.integrations.dinfer import spd_decoder

    for contract, adapter in ((DINFER, spd_decoder(base=Base)), (DIFFULEX, dmax_sampler(Base))):
        assert f"`{contract['commit']}`" in DOCS
        assert contract["repository"] in DOCS
        for method, parameters in contract["methods"].items():
            name = method.rpartition(".")[2]
            ours = list(inspect.signature(vars(adapter)[name]).parameters)
            assert ours == ["self", *parameters]


def test_the_docs_show_every_adapter():
    shown = re.findall(r"dmax_kernels\.integrations(?:\.| import )(\w+)", "".join(BLOCKS))
    assert sorted(set(shown)) == ADAPTERS


class Base:
    """Any engine's class, as far as switching on reads it."""

    def __init__(self, *args, **kwargs):
        pass

    decode_uniform = prepare_inputs = validate_request = _prompt_mask = _denoising_step = None
    _build_block_writes_map = _build_dmax_block_outputs = _extract_block_logits = None
    _build_manual_token_merge_descriptor = _maybe_apply_token_merge = initialize_canvas = None
    word_embeddings = torch.nn.Embedding(2, 2)

    device = "cpu"

    def generate(self, input_ids, **options):
        assert "_denoising_step" in vars(self)  # switched on
        return input_ids


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(monkeypatch, block):
    import dmax_kernels.integrations.transformers as diffusion_gemma

    monkeypatch.setattr(diffusion_gemma, "MODULE", "stand_in_for_diffusion_gemma")
    algorithms, sglang = {}, "sglang.srt.dllm.algorithm"
    built = {}
    samplers = SimpleNamespace(register=lambda name, build, **options: built.update({name: build}))
    for module, names in {
        "dinfer.decoding.parallel_strategy": {"ThresholdParallelDecoder": Base},
        sglang: {"algo_name_to_cls": algorithms},
        f"{sglang}.base": {"DllmAlgorithm": Base},
        f"{sglang}.low_confidence": {"LowConfidence": Base},
        f"{sglang}.joint_threshold": {"JointThreshold": Base},
        "diffulex.sampler.llada2": {
            "LLaDA2DMaxSampler": Base,
            "build_llada2_sampler": lambda config: "the engine's",
        },
        "diffulex.sampler.auto_sampler": {"AutoSampler": samplers},
        "diffulex.attention": {"fetch_attn_metadata": None},
        "transformers": {"LogitsProcessorList": list},
        "transformers.models.diffusion_gemma.generation_diffusion_gemma": {
            "LinearTemperatureScheduleLogitsProcessor": Base,
        },
        "stand_in_for_diffusion_gemma": {
            "DiffusionGemmaGenerationMixin": Base,
            "EntropyBoundSampler": Base,
            "StableAndConfidentStoppingCriteria": Base,
            "LinearTemperatureScheduleLogitsProcessor": Base,
        },
    }.items():
        install(monkeypatch, module, **names)
    model = Base()
    namespace = {
        **{"torch": torch, "model": model, "config": SimpleNamespace(), "input_ids": [1]},
        **{"enable": diffusion_gemma.enable, "disable": diffusion_gemma.disable},
    }
    exec(compile(block, "integrations.md", "exec"), namespace)
    if "sglang.register()" in block:
        assert sorted(algorithms) == ["DmaxJointThreshold", "DmaxLowConfidence", "DmaxSpd"]
        assert all(name in DOCS for name in algorithms)
    if "merge_tokens" in block:
        assert "_maybe_apply_token_merge" in vars(model)
        assert isinstance(built["llada2"](SimpleNamespace(decoding_strategy="dmax")), Base)
    assert isinstance(namespace.get("decoder", model), Base)
    assert "_denoising_step" not in vars(model)
