"""Saves the LLaDA2 stand-in as a Hugging Face folder with remote code, tokenizer and weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dmax_kernels.models.remote_code import code_for_transformers_4, dropped_rotary

CODE = Path(__file__).parent / "llada2_stand_in"
AUTO_MAP = {
    "AutoConfig": "configuration_stand_in.StandInConfig",
    "AutoModelForCausalLM": "modeling_stand_in.StandInModelLM",
}
MASK, EOS = 115, 112
CHAT_TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}w2"


def save_stand_in(folder: Path, *, seed: int = 0, ids: bool = True, **config) -> Path:
    """ids: name mask and eos in the config, which the real LLaDA2 checkpoints do not."""
    folder.mkdir(parents=True)
    for code in CODE.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    named = {"mask_token_id": MASK, "eos_token_id": EOS} if ids else {}
    fields = {"model_type": "llada2_moe", "auto_map": AUTO_MAP, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**fields, **named, **config}))
    model = new_model(folder, seed)
    state = {name: each.contiguous() for name, each in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    words["<eos>"], words["<mask>"] = words.pop(f"w{EOS}"), words.pop(f"w{MASK}")
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>", unk_token="w0"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def new_model(folder: Path, seed: int):
    """Random weights under which decoding settles as a trained model's does.

    Sharp logits, so that confidences cross the thresholds; attention that tells positions apart;
    and experts that add little, since otherwise a rounding could change the expert and with it the
    token.
    """
    with code_for_transformers_4():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(seed)
    with code_for_transformers_4(), dropped_rotary(config):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dense.weight"):
                weight.mul_(2.0)
            if name.endswith("down_proj.weight"):
                weight.mul_(0.2)
        model.lm_head.weight.mul_(108.0)
    return model
