"""Loading a checkpoint: one model for every command, whole buffers, and what ends an answer."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from stand_in import EOS, MASK, save_stand_in
from tokenizers import processors
from training_models import random_llama, write_walks

from dmax_kernels.__main__ import main
from dmax_kernels.decoding import spd_generate
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.models.end_tokens import end_token_ids
from dmax_kernels.models.pretrained import load_pretrained
from dmax_kernels.models.prompt_ids import prompt_ids
from dmax_kernels.ring_walk.export import build_tokenizer
from dmax_kernels.training.data import conversation
from dmax_kernels.training.data import encode as encode_for_training
from dmax_kernels.training.run import RunOptions, load_model

# A table of sines and a plain tensor, neither of them in the checkpoint nor LLaDA2's by name
TABLES = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class TableConfig(PretrainedConfig):
    model_type = "tables"

    def __init__(self, vocab_size=8, **more):
        self.vocab_size = vocab_size
        super().__init__(**more)

class Positions(nn.Module):
    def __init__(self, dim):
        super().__init__()
        angles = torch.outer(torch.arange(16.0), 0.5 ** torch.arange(dim // 2))
        self.register_buffer("sines", angles.sin(), persistent=False)
        self.scale = torch.linspace(1, 2, dim // 2)

class TableForCausalLM(PreTrainedModel):
    config_class = TableConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.positions = nn.Embedding(config.vocab_size, 4), Positions(4)
        self.lm_head = nn.Linear(4, config.vocab_size)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, **more):
        return CausalLMOutput(logits=self.lm_head(self.embed(input_ids)))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    return save_stand_in(tmp_path_factory.mktemp("stand_in") / "model", ids=False)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A model with its own code, without sdpa attention and without transformers' generate."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "tables.py").write_text(TABLES)
    auto = {"AutoConfig": "tables.TableConfig", "AutoModelForCausalLM": "tables.TableForCausalLM"}
    config = {"model_type": "tables", "auto_map": auto, "eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    shapes = {"embed.weight": (8, 4), "lm_head.weight": (8, 4), "lm_head.bias": (8,)}
    weights = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer().save_pretrained(folder)
    return folder


def fill_freed_memory():
    """What an uninitialised buffer then comes back with."""
    spoiled = [torch.full((64,), 7.0) for _ in range(2000)]
    del spoiled


def test_training_loads_what_generate_loads(stand_in):
    fill_freed_memory()
    # The family's mask token is beyond this vocabulary of 120
    options = RunOptions(model=str(stand_in), dataset="unused", mask_token_id=MASK)
    prepared = load_model(options, attention="sdpa")
    trained, ends = prepared.model, prepared.eos_token_ids
    loaded = load_pretrained(str(stand_in))
    for model in (trained, loaded.model, load_checkpoint(stand_in)[0]):
        assert model.config._attn_implementation == "sdpa"
        rotary = model.model.rotary_emb
        torch.testing.assert_close(rotary.inv_freq, torch.tensor([1.0, 0.01]))
        assert rotary.original_inv_freq.equal(rotary.inv_freq)
        for name, weight in loaded.model.state_dict().items():
            assert model.state_dict()[name].equal(weight), name
    # LLaDA2's config names none: the tokenizer's end token and the family's end an answer
    assert ends == loaded.eos_token_ids == (EOS, 156892)
    assert trained.config.mask_token_id == MASK


def test_tables_of_any_name_are_whole(tables):
    fill_freed_memory()
    model, _ = load_checkpoint(tables)
    angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.5]))
    assert model.positions.sines.equal(angles.sin())
    assert model.positions.scale.equal(torch.tensor([1.0, 2.0]))
    assert model.lm_head.bias.eq(0.5).all()  # and the weights are the checkpoint's
    assert model.config._attn_implementation == "eager"  # it has no sdpa


def test_the_dtype_is_the_checkpoints_unless_given(stand_in, tmp_path):
    for name in (str(stand_in), "base"):
        assert load_pretrained(name).model.dtype == torch.float32
        half = load_pretrained(name, dtype=torch.bfloat16).model
        assert half.dtype == torch.bfloat16
    shutil.copytree(stand_in, tmp_path / "half")
    config = json.loads((stand_in / "config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    rotary = load_pretrained(str(tmp_path / "half")).model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, torch.tensor([1.0, 0.01]))  # still in float32


def test_a_folder_that_cannot_be_loaded_is_one_line(stand_in, tmp_path, capsys):
    def broken(name, file, data):
        shutil.copytree(stand_in, tmp_path / name)
        path = tmp_path / name / file
        path.unlink() if data is None else path.write_bytes(data)

    broken("no weights", "model.safetensors", None)
    broken("cut short", "model.safetensors", (stand_in / "model.safetensors").read_bytes()[:999])
    broken("no tokenizer", "tokenizer.json", None)
    broken("no code", "modeling_stand_in.py", None)
    broken("bad config", "config.json", b"{")
    for folder in sorted(tmp_path.iterdir()):
        for command in (["generate", "--prompt", "w1"], ["train", "--dataset", "walks"]):
            assert main([*command, "--model", str(folder)]) == 1, folder
            error = capsys.readouterr().err.strip().splitlines()
            need = f"dmax_kernels {command[0]}: load_checkpoint: name must be a checkpoint whose"
            assert error[-1].startswith(need), error


# What ends an answer


def test_every_list_of_end_tokens_counts():
    tokenizer, config = SimpleNamespace(eos_token_id=5), SimpleNamespace(eos_token_id=[3, 4])
    generation = SimpleNamespace(eos_token_id=[4, 6])
    model = SimpleNamespace(config=config, generation_config=generation)
    assert end_token_ids(model, tokenizer, 9) == (5, 4, 6, 3, 9)
    assert end_token_ids(model) == (4, 6, 3)
    assert end_token_ids(SimpleNamespace(config=SimpleNamespace()), None) == ()


def test_generation_config_is_read_of_models_without_transformers_generate(tables):
    model, tokenizer = load_checkpoint(tables)
    assert end_token_ids(model) == (4, 3)
    assert end_token_ids(model, tokenizer) == (tokenizer.eos_token_id, 4, 3)


def test_decoding_ends_at_the_tokens_of_the_generation_config():
    model, prompt = random_llama().eval(), torch.tensor([[20, 21, 22]])
    settings = {"block_length": 8, "max_new_tokens": 24, "suppress_mask": True}
    (whole,) = spd_generate(model, prompt, **settings).answers
    model.generation_config.eos_token_id = [2, whole[3]]
    (answer,) = spd_generate(model, prompt, **settings).answers
    assert answer == whole[: whole.index(whole[3]) + 1]
    assert spd_generate(model, prompt, eos_token_id=(), **settings).answers == [whole]


def test_a_trained_checkpoint_ends_where_its_responses_ended(tmp_path):
    model = random_llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = 5
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")  # whose end token is 2
    # As some published models have it; transformers reads it but refuses to save it
    generation = {"eos_token_id": 5, "do_sample": False, "temperature": 0.6}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    data = write_walks(tmp_path / "walks.jsonl")
    command = ["train", "--model", tmp_path / "model", "--data", data, "--output", tmp_path / "run"]
    command += ["--steps", 1, "--batch-size", 2, "--block-length", 8, "--device", "cpu"]
    assert main([str(word) for word in command]) == 0
    trained = load_pretrained(str(tmp_path / "run/checkpoints/step-00000001"))
    assert trained.eos_token_ids == (2, 5)
    assert end_token_ids(trained.model) == (2, 5)  # as spd_generate sees it, without a tokenizer
    assert trained.model.config.eos_token_id == [2, 5]
    assert trained.model.generation_config.temperature == 0.6


# The prompt's token ids


@pytest.mark.parametrize("front", ["", "s1 "])
@pytest.mark.parametrize("behind", ["", " <eos>"])
def test_special_tokens_without_a_chat_template(front, behind):
    tokenizer = build_tokenizer()
    words = (front + "$A" + behind).replace("s1", "s1:0").replace("<eos>", "<eos>:0")
    special = [(word, tokenizer.get_vocab()[word]) for word in ("s1", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=words, special_tokens=special
    )
    ids, _ = prompt_ids(tokenizer, [{"role": "user", "content": "start 4 ="}])
    # a token in front stays; an end token after it is where the answer goes
    assert tokenizer.decode(ids) == f"{front}start 4 ="
    record = conversation({"prompt": "start 4 =", "response": "answer 5"})
    example = encode_for_training(record, tokenizer, tokenizer.eos_token_id)
    assert list(example.prompt) == ids
    assert tokenizer.decode(example.response) == "answer 5 <eos>"
    # an end token that the text itself ends with is kept
    ids, _ = prompt_ids(tokenizer, [{"role": "user", "content": "so <eos>"}])
    assert tokenizer.decode(ids) == f"{front}so <eos>"


def test_with_a_chat_template_the_template_writes_them():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}s1 {{ m['content'] }} {% endfor %}s2"
    messages = [{"role": "user", "content": "start 4 ="}]
    assert tokenizer.decode(prompt_ids(tokenizer, messages)[0]) == "s1 start 4 = s2"
    assert tokenizer.decode(prompt_ids(tokenizer, messages, raw=True)[0]) == "start 4 ="
