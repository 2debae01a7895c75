"""The tiny model: its attention, its cache, its two kinds of input, and its Hugging Face form."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DynamicCache

from dmax_kernels.models.checkpoint import SHIPPED, SHIPPED_DIR, load_checkpoint, write_like
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.export import save_checkpoint, save_tokenizer
from dmax_kernels.ring_walk.model import TinyDlmConfig, TinyDlmForCausalLM

BLOCK = 8

# float32 sums in a different order: 1e-5 is some ten times what is seen with logits near 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TinyDlmForCausalLM(TinyDlmConfig(block_length=BLOCK)).eval()
    for parameter in model.parameters():  # a new model's zero projections would hide every mistake
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(46, (3, 4 * BLOCK), generator=torch.Generator().manual_seed(1))


def test_a_new_model_is_uniform():
    model = TinyDlmForCausalLM(TinyDlmConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 202_496
    assert not model(input_ids=torch.arange(46)[None]).logits.any()


@torch.no_grad()
def test_embeddings_are_the_same_as_ids(model, tokens):
    embedded = model.get_input_embeddings()(tokens)
    assert model(inputs_embeds=embedded).logits.equal(model(input_ids=tokens).logits)


@torch.no_grad()
def test_hidden_states_through_the_head_are_the_logits(model, tokens):
    out = model(input_ids=tokens, output_hidden_states=True)
    hidden = model.model(input_ids=tokens).last_hidden_state
    assert hidden.equal(out.hidden_states[0])
    assert model.get_output_embeddings()(hidden).equal(out.logits)


@torch.no_grad()
def test_attention_is_within_the_block_and_to_earlier_ones(model, tokens):
    before = model(input_ids=tokens).logits
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 46
        moved = (model(input_ids=changed).logits - before).abs().amax((0, 2)) > 0
        first = position // BLOCK * BLOCK
        assert not moved[:first].any()
        assert moved[first:].all()


@torch.no_grad()
@pytest.mark.parametrize("additive", [False, True])
def test_a_given_mask_is_obeyed(model, tokens, additive):
    length = tokens.shape[1]
    visible = torch.eye(length, dtype=torch.bool)[None, None]  # each position sees itself only
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf) if additive else visible
    together = model(input_ids=tokens, attention_mask=mask).logits
    for position in (0, 13):
        alone = model(
            input_ids=tokens[:, position : position + 1], position_ids=torch.tensor([position])
        ).logits
        torch.testing.assert_close(together[:, position : position + 1], alone, **TOLERANCE)


# The name since transformers 5.24, and the one before: the model takes both under any version
@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_gives_what_the_whole_sequence_gives(model, tokens, name):
    whole = model(input_ids=tokens).logits
    cache = None
    for start in range(0, tokens.shape[1], BLOCK):
        block = tokens[:, start : start + BLOCK]
        if cache is not None:  # read only: what a denoising step does
            logits = model(input_ids=block, **{name: cache}).logits
            torch.testing.assert_close(logits, whole[:, start : start + BLOCK], **TOLERANCE)
            assert cache.get_seq_length() == start
        out = model(input_ids=block, use_cache=True, **{name: cache})
        torch.testing.assert_close(out.logits, whole[:, start : start + BLOCK], **TOLERANCE)
        cache = out["cache" if "cache" in out.keys() else "past_key_values"]  # noqa: SIM118
        assert isinstance(cache, DynamicCache)
        assert cache.get_seq_length() == start + BLOCK


@torch.no_grad()
def test_only_relative_positions_matter(model, tokens):
    positions = torch.arange(tokens.shape[1])
    shifted = model(input_ids=tokens, position_ids=positions + 5 * BLOCK).logits
    torch.testing.assert_close(shifted, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    spread = model(input_ids=tokens, position_ids=positions // BLOCK * BLOCK + positions).logits
    assert (spread - shifted).abs().max() > 1e-2


def test_errors(model, tokens):
    with pytest.raises(
        ValueError, match=r"input_ids or inputs_embeds must be given .* got neither"
    ):
        model()
    with pytest.raises(ValueError, match="got both"):
        model(input_ids=tokens, inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(ValueError, match=r"cache or past_key_values must be given .* got both"):
        model(input_ids=tokens, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[3 or 1, 1, 32, 32\].* \[3, 32\]"
    ):
        model(input_ids=tokens, attention_mask=torch.ones(3, 32))
    with pytest.raises(ValueError, match=r"attention_mask must be bool .* got torch.int64"):
        model(input_ids=tokens, attention_mask=torch.ones(1, 1, 32, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="hidden_size must be a multiple"):
        TinyDlmConfig(hidden_size=60, num_attention_heads=8)


PLAIN_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokens, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert "dmax_kernels" not in sys.modules
assert tokenizer.mask_token_id == model.config.mask_token_id
with torch.no_grad():
    torch.save(model(input_ids=torch.load(tokens)).logits, logits)
"""


def test_a_saved_model_loads_here_and_in_plain_transformers(model, tokens, tmp_path):
    save_checkpoint(model, tmp_path / "model")
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    ours, tokenizer = load_checkpoint(tmp_path / "model")
    assert not ours.training
    assert ours.config.block_length == BLOCK
    assert ours.dtype == torch.float32
    assert tokenizer.mask_token_id == ours.config.mask_token_id
    with torch.no_grad():
        assert ours(input_ids=tokens).logits.equal(expected)

    torch.save(tokens, tmp_path / "tokens.pt")
    paths = [tmp_path / name for name in ("model", "tokens.pt", "logits.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    loaded = subprocess.run(
        [sys.executable, "-c", PLAIN_TRANSFORMERS, *map(str, paths)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    torch.testing.assert_close(torch.load(paths[2]), expected, **TOLERANCE)


def test_saving_replaces_a_checkpoint_and_leaves_nothing_else(model, tmp_path):
    save_checkpoint(model, tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("from before")
    save_checkpoint(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale.txt").exists()


def test_saving_leaves_a_users_own_folder_alone(model, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"path must be free or a checkpoint's, got .*work"):
        save_checkpoint(model, tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_the_tokenizer_has_the_words_of_the_task(model, tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == task.ID_OF
    problem = task.evaluation_problems(1)[0]
    text = " ".join(task.render_prompt(problem))
    padded = tokenizer(text, padding=True, pad_to_multiple_of=32).input_ids
    assert padded == task.encode_prompt(problem, 32)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id)
    assert ids == (task.PAD_ID, task.MASK_ID, task.EOS_ID)
    assert tokenizer("fish").input_ids == [task.UNK_ID]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoints(name):
    folder = SHIPPED_DIR / name
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    assert not list(folder.glob("*.py"))  # the model's code is in ring_walk/model, once
    model, tokenizer = load_checkpoint(name)
    assert isinstance(model, TinyDlmForCausalLM)
    assert model.config.block_length == 32
    assert tokenizer.get_vocab() == task.ID_OF
    weights = load_file(folder / "model.safetensors")
    if name in json.loads((SHIPPED_DIR / "ladder.json").read_text())["arms"]:
        # float16 in the file, and computed with in float32
        assert {value.dtype for value in weights.values()} == {torch.float16}
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
        return
    log = json.loads((SHIPPED_DIR / "training_log.json").read_text())
    assert log["command"].startswith("python -m dmax_kernels train")
    assert name in log["stages"]
    assert name in log["evaluation"]


def test_a_shipped_model_written_anew_brings_its_code(tmp_path):
    model, tokenizer = load_checkpoint("oput")
    write_like(SHIPPED_DIR / "oput", model, tokenizer, model.state_dict(), tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert code == {"configuration_tiny_dlm.py", "modeling_tiny_dlm.py"}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_tiny_dlm.TinyDlmConfig",
        "AutoModelForCausalLM": "modeling_tiny_dlm.TinyDlmForCausalLM",
    }


def test_an_unknown_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"one of base, oput, control, oput-200, .* got 'best'"):
        load_checkpoint("best")
    with pytest.raises(ValueError, match=r"a folder with a config\.json"):
        load_checkpoint(tmp_path)
