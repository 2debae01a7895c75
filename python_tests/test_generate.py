"""`python -m dmax_kernels generate` and the loading of models with LLaDA2's interface.

The model is a stand-in with LLaDA2's parts and interface, saved as a folder with its own code and
loaded as a checkpoint is: AutoModelForCausalLM with trust_remote_code.
"""

import json
import re
import shutil
from argparse import Namespace
from dataclasses import fields

import pytest
import torch
from stand_in import EOS, MASK, save_stand_in
from transformers import modeling_rope_utils

from dmax_kernels.__main__ import main
from dmax_kernels.cli.generate import read_prompts
from dmax_kernels.decoding import DecodeConfig, spd_generate
from dmax_kernels.models.checkpoint import SHIPPED, checkpoint_folder, load_checkpoint
from dmax_kernels.models.pretrained import KNOWN, load_pretrained, model_defaults
from dmax_kernels.models.remote_code import repair_loaded_model, unscaled_rotary_frequencies
from dmax_kernels.ops.spd_step import SEMANTICS
from dmax_kernels.ring_walk import task

PROMPTS = ["w5 w6", "w7 w8 w9 w10", " ".join(f"w{i}" for i in range(3, 73))]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("stand_in") / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_pretrained(str(folder))


def random_ids(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 110, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("tau_dec", [0.9, 0.3, 0.0])
def test_reference_and_fused_give_the_same_tokens(loaded, tau_dec, semantics):
    prompts = random_ids([5, 33, 64, 70])
    settings = {"max_new_tokens": 60, "tau_dec": tau_dec, "semantics": semantics}
    reference = spd_generate(loaded.model, prompts, ops="reference", **settings)
    fused = spd_generate(loaded.model, prompts, ops="fused", **settings)
    assert fused.answers == reference.answers
    assert fused.promotions == reference.promotions


def test_the_cache_gives_what_whole_sequences_give(loaded):
    prompts = random_ids([5, 33, 64, 70])
    cached = spd_generate(loaded.model, prompts, max_new_tokens=60)
    whole = spd_generate(loaded.model, prompts, max_new_tokens=60, use_cache=False)
    assert cached.answers == whole.answers
    assert len({tuple(answer) for answer in cached.answers}) == 4


def test_rotary_frequencies_are_whole_after_loading(loaded):
    """transformers 5 leaves what is not in the checkpoint uninitialised; the shim restores it."""
    rotary = loaded.model.model.rotary_emb
    dim = 4  # half of a head of 8
    expected = torch.tensor([10000.0 ** (-2 * i / dim) for i in range(dim // 2)])
    torch.testing.assert_close(rotary.inv_freq, expected)
    torch.testing.assert_close(rotary.original_inv_freq, expected)
    scaled, factor = unscaled_rotary_frequencies(loaded.model.config)
    torch.testing.assert_close(scaled, expected)
    assert factor == 1.0
    # Positions come from nowhere else: the frequencies reach the logits
    inputs = {
        "input_ids": random_ids([9])[0][None],
        "attention_mask": torch.zeros(1, 1, 9, 9),
        "position_ids": torch.arange(9)[None],
    }
    with torch.no_grad():
        before = loaded.model(**inputs).logits
        rotary.inv_freq.zero_()
        try:
            assert not torch.allclose(loaded.model(**inputs).logits, before)
        finally:
            repair_loaded_model(loaded.model)
        assert torch.equal(loaded.model(**inputs).logits, before)


def test_loading_remote_code_leaves_transformers_as_it_was(folder):
    """Models of transformers would take their rotary frequencies from what the shim adds."""
    before = dict(modeling_rope_utils.ROPE_INIT_FUNCTIONS)
    load_checkpoint(folder)
    assert before == modeling_rope_utils.ROPE_INIT_FUNCTIONS
    assert unscaled_rotary_frequencies not in before.values()


def test_known_models_and_what_a_config_leaves_out(folder, loaded):
    for name, known in KNOWN.items():
        assert (known.mask_token_id, known.eos_token_id) == (156895, 156892), name
        assert 0 <= known.tau_dec <= 1
    assert (loaded.defaults.mask_token_id, loaded.defaults.eos_token_id) == (MASK, EOS)
    loaded.model.config.mask_token_id = None
    try:
        assert model_defaults("elsewhere", loaded.model.config).mask_token_id == 156895
    finally:
        loaded.model.config.mask_token_id = MASK


def generate(capsys, *arguments):
    status = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_prints_json_that_is_the_loops_output(folder, loaded, capsys):
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    common = ("--model", folder, *prompts, "--max-new-tokens", 50, "--tau-dec", 0.3, "--json", "-")
    status, out, err = generate(capsys, *common)
    assert status == 0
    report = json.loads(out)
    # The stand-in's chat template puts w1 before the prompt and w2 after it
    ids = [[1, *(int(word[1:]) for word in prompt.split()), 2] for prompt in PROMPTS]
    expected = spd_generate(loaded.model, ids, max_new_tokens=50, tau_dec=0.3)
    assert [record["token_ids"] for record in report["answers"]] == expected.answers
    for row, record in enumerate(report["answers"]):
        assert record["prompt"] == PROMPTS[row]
        assert record["answer"] == " ".join(f"w{i}" for i in expected.answers[row] if i != EOS)
        assert record["forwards"] == expected.num_forwards[row]
        assert record["promotions"] == expected.promotions[row]
        assert record["batch"]["tokens"] == expected.num_tokens.sum()
    assert re.search(r"\d+ tokens in \d+ denoising passes = ", err)
    # One at a time, on the reference, is the same
    _, out, _ = generate(capsys, *common, "--batch-size", 1, "--ops", "reference")
    again = json.loads(out)["answers"]
    assert [each["token_ids"] for each in again] == expected.answers


def test_every_option_of_the_loop_is_one_of_the_command(folder, loaded, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    help_text = capsys.readouterr().out
    for item in fields(DecodeConfig):
        assert f"--{item.name.replace('_', '-')}" in help_text
    options = ("--max-steps-per-block", 1, "--no-use-cache", "--convergence", "confidence")
    common = ("--model", folder, "--prompt", PROMPTS[0], "--max-new-tokens", 40, "--json", "-")
    record = json.loads(generate(capsys, *common, *options)[1])["answers"][0]
    expected = spd_generate(
        loaded.model,
        [[1, *(int(word[1:]) for word in PROMPTS[0].split()), 2]],
        max_new_tokens=40,
        max_steps_per_block=1,
        use_cache=False,
        convergence="confidence",
    )
    assert record["token_ids"] == expected.answers[0]
    assert record["forwards"] == expected.num_blocks[0]


def test_command_samples_and_reports_log_probabilities(folder, loaded, capsys):
    common = ("--model", folder, "--prompt", PROMPTS[0], "--max-new-tokens", 40, "--json", "-")
    given = {"temperature": 1.5, "sample_top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 7}
    arguments = [each for n, v in given.items() for each in (f"--{n.replace('_', '-')}", v)]
    record = json.loads(generate(capsys, *common, *arguments, "--logprobs")[1])["answers"][0]
    ids = [[1, *(int(word[1:]) for word in PROMPTS[0].split()), 2]]
    expected = spd_generate(loaded.model, ids, max_new_tokens=40, logprobs=True, **given)
    length = len(expected.answers[0])
    assert record["token_ids"] == expected.answers[0]
    assert record["logprobs"] == expected.logprobs[0, :length].tolist()
    assert record["step_map"] == expected.step_map[0, :length].tolist()
    greedy = json.loads(generate(capsys, *common)[1])["answers"][0]
    assert greedy["token_ids"] != record["token_ids"]
    assert not {"logprobs", "step_map"} & set(greedy)


def test_command_penalizes_and_biases(folder, loaded, capsys):
    common = ("--model", folder, "--prompt", PROMPTS[0], "--max-new-tokens", 70, "--json", "-")
    given = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.25}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    arguments += ["--logit-bias", "7=-100", "--logit-bias", "9=2.5"]
    record = json.loads(generate(capsys, *common, *arguments)[1])["answers"][0]
    ids = [[1, *(int(word[1:]) for word in PROMPTS[0].split()), 2]]
    given["logit_bias"] = {7: -100, 9: 2.5}
    expected = spd_generate(loaded.model, ids, max_new_tokens=70, **given)
    assert record["token_ids"] == expected.answers[0]
    plain = json.loads(generate(capsys, *common)[1])["answers"][0]
    assert plain["token_ids"] != record["token_ids"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["7"], "--logit-bias must be ID=NUMBER, got 7"),
        (["7=a"], "--logit-bias must be ID=NUMBER, got 7=a"),
        (["w7=1"], "--logit-bias must be ID=NUMBER, got w7=1"),
        (["7=1", "7=2"], "--logit-bias must be given once for each token, got 7 twice"),
    ],
    ids=str,
)
def test_a_bias_of_another_form_is_refused(folder, capsys, texts, message):
    biases = [argument for text in texts for argument in ("--logit-bias", text)]
    status, _, err = generate(capsys, "--model", folder, "--prompt", "w5", *biases)
    assert status == 1
    assert message in err


def test_raw_prompts_from_files(folder, loaded, capsys, tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n\n".join(PROMPTS[:2]))
    lines.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS[:2]))
    ids = [[int(word[1:]) for word in prompt.split()] for prompt in PROMPTS[:2]]
    expected = spd_generate(loaded.model, ids, max_new_tokens=20)
    for file in (text, lines):
        _, out, _ = generate(
            capsys, "--model", folder, "--prompt-file", file, "--raw", "--max-new-tokens", 20
        )
        printed = re.split(r"^\[\d\] .*$", out, flags=re.MULTILINE)[1:]
        words = [[f"w{i}" for i in answer if i != EOS] for answer in expected.answers]
        assert [block.split() for block in printed] == words


PROMPT_FILES = {
    "a line end only to Python": ("a.jsonl", '{"prompt": "a\u2028b"}', ["a\u2028b"]),
    "another": ("b.JSONL", '{"prompt": "a\u0085b"}\r\n{"prompt": "c"}\r\n', ["a\u0085b", "c"]),
    "in a text": ("c.txt", "a\u2028b\x0cc\n d ", ["a\u2028b\x0cc", " d "]),
    "byte-order mark": ("d.jsonl", '\ufeff{"prompt": "a"}', ["a"]),
    "byte-order mark, text": ("e.txt", "\ufeffWhat is 2+2?\n", ["What is 2+2?"]),
}


@pytest.mark.parametrize("what", PROMPT_FILES)
def test_prompt_files_are_read_as_they_were_written(what, tmp_path):
    name, text, prompts = PROMPT_FILES[what]
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(Namespace(prompt=["first"], prompt_file=tmp_path / name)) == [
        "first",
        *prompts,
    ]


@pytest.mark.parametrize("line", ["{", "[" * 99999, "1" * 4301, "[]", '{"prompt": 1}', "\udcff"])
def test_a_bad_line_of_a_prompt_file_is_named(line, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "w1"}\n\n' + line.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"p\.jsonl:3: must be ") as caught:
        read_prompts(Namespace(prompt=[], prompt_file=path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_chat_template_that_refuses_the_prompt_is_one_line(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no\nuser') }}")
    _, _, err = generate(capsys, "--model", tmp_path / "model", "--prompt", "w1")
    expected = "prompt 1: the chat template refuses the messages (TemplateError: no user)"
    assert err == f"dmax_kernels generate: {expected}\n"


def test_streamed_text_is_the_answer(folder, capsys):
    command = ("--model", folder, "--prompt", PROMPTS[0], "--max-new-tokens", 70)
    _, whole, _ = generate(capsys, *command)
    _, streamed, _ = generate(capsys, *command, "--stream")
    assert streamed == whole
    assert len(whole.split()) > 32  # more than one block
    _, streamed, _ = generate(capsys, *command, "--prompt", PROMPTS[2], "--stream")
    lines = [line for line in streamed.splitlines() if line.startswith("[1] ")]
    assert " ".join(line[4:].removesuffix(" (end)") for line in lines) == whole.strip()


def test_trace_page_has_every_step(folder, loaded, capsys, tmp_path):
    page = tmp_path / "trace.html"
    command = ("--model", folder, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
    generate(capsys, *command, "--max-new-tokens", 40, "--raw", "--trace", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])
    ids = [[int(word[1:]) for word in prompt.split()] for prompt in PROMPTS[:2]]
    expected = spd_generate(loaded.model, ids, max_new_tokens=40, trace=True)
    rows = expected.trace.to_dict()["rows"]
    assert [run["blocks"] for run in data["runs"]] == [row["blocks"] for row in rows]
    assert data["runs"][1]["prompt"] == PROMPTS[1].split()
    assert [run["forwards"] for run in data["runs"]] == expected.num_forwards.tolist()
    assert data["eos"] == [EOS]
    shown = {
        token for row in rows for b in row["blocks"] for s in b["steps"] for token in s["token"]
    }
    assert set(data["words"]) == set(map(str, shown))


def test_a_shipped_checkpoint_solves_its_task(capsys):
    problem = task.evaluation_problems(1)[0]
    prompt = " ".join(task.render_prompt(problem))
    status, out, _ = generate(
        capsys, "--model", "oput", "--prompt", prompt, "--max-new-tokens", 96, "--device", "cpu"
    )
    assert status == 0
    assert task.grade(problem, out.split()).answer


MISTAKES = {
    "no prompt": ([], "--prompt or --prompt-file must give at least one prompt, got none"),
    "batch size": (
        ["--prompt", "w1", "--batch-size", "0"],
        "--batch-size must be at least 1, got 0",
    ),
    "empty prompt": (
        ["--prompt", "", "--raw"],
        (
            "spd_generate: input_ids must be at least one prompt token per row, "
            "got an empty prompt (row 0)"
        ),
    ),
    "threshold": (
        ["--prompt", "w1", "--tau-dec", "2"],
        "spd_generate: tau_dec must be in [0, 1], got 2.0",
    ),
    "mask id": (
        ["--prompt", "w1", "--mask-token-id", "120"],
        "spd_generate: mask_token_id must be in [0, 120), the model's vocabulary, got 120",
    ),
    "ops": (
        ["--prompt", "w1", "--ops", "cuda"],
        "spd_generate: ops must be one of 'fused', 'reference', got 'cuda'",
    ),
    "semantics": (
        ["--prompt", "w1", "--semantics", "dinfer"],
        "spd_generate: semantics must be one of 'settled', 'paper', 'released', got 'dinfer'",
    ),
    "context": (
        ["--prompt", "w1", "--raw", "--max-new-tokens", "500"],
        (
            "spd_generate: a prompt of 1 tokens and max_new_tokens=500 need 512 positions in whole "
            "blocks of 32, but the model's context is 256 (config.max_position_embeddings)"
        ),
    ),
    "temperature": (
        ["--prompt", "w1", "--temperature", "-1"],
        "spd_generate: temperature must be 0 or in [1e-30, 1e30], got -1.0",
    ),
    "log-probabilities of nothing": (
        ["--prompt", "w1", "--logprobs"],
        "--logprobs must come with --json, which it adds to, got no --json",
    ),
    "stream and json": (
        ["--prompt", "w1", "--stream", "--json", "-"],
        "--json must name a file where --stream prints to stdout, got -",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_reads_as_one_line(folder, mistake, capsys):
    arguments, sentence = MISTAKES[mistake]
    status, out, err = generate(capsys, "--model", folder, *arguments)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == f"dmax_kernels generate: {sentence}"


def test_places_that_are_not_there(folder, tmp_path, capsys):
    status, _, err = generate(capsys, "--model", tmp_path, "--prompt", "w1")
    assert status == 1
    need = f"load_checkpoint: name must be one of {', '.join(SHIPPED)}, a folder with a config.json"
    assert err.startswith(f"dmax_kernels generate: {need}, or OWNER/NAME on the Hugging Face hub")
    assert err.endswith(f", got {str(tmp_path)!r}\n")
    status, _, err = generate(capsys, "--model", folder, "--prompt-file", tmp_path / "none.txt")
    assert status == 1
    assert "none.txt" in err
    assert len(err.splitlines()) == 1
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w1"}\n{"text": "w1"}\n')
    _, _, err = generate(capsys, "--model", folder, "--prompt-file", tmp_path / "bad.jsonl")
    assert 'bad.jsonl:2: must be a JSON object with a text field "prompt", got' in err
    (tmp_path / "half.jsonl").write_text(json.dumps({"prompt": "half \ud83d"}))
    _, _, err = generate(capsys, "--model", folder, "--prompt-file", tmp_path / "half.jsonl")
    assert "prompt 1: text must be Unicode characters, got half of a surrogate pair" in err
    assert len(err.splitlines()) == 1
    for option in ("--json", "--trace"):  # before the decoding whose result would be lost
        _, _, err = generate(capsys, "--model", folder, "--prompt", "w1", option, tmp_path)
        assert f"{option} must be a file in a folder that exists, got {tmp_path}" in err
    if not torch.cuda.is_available():
        _, _, err = generate(capsys, "--model", folder, "--prompt", "w1", "--device", "cuda")
        assert "--device must be cpu on this machine, which has no GPU, got cuda" in err


def test_a_copy_of_a_shipped_checkpoint_answers_alike_when_told_to_pad(tmp_path, capsys):
    # Only the shipped names are known to want padding; without it the copy answers otherwise
    copy = tmp_path / "own"
    shutil.copytree(checkpoint_folder("oput"), copy)
    prompt = ["--prompt", "s4 u1 s1 u1 s6 d1 s2 d1 s3 u2 s5 d1 start 2 =", "--max-new-tokens", "32"]
    answers = []
    for arguments in (["oput"], [str(copy), "--pad-prompts"], [str(copy)]):
        assert main(["generate", "--model", *arguments, *prompt]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
