"""Small random models and conversations for the training tests."""

import json
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.export import save_checkpoint
from dmax_kernels.ring_walk.model import TinyDlmConfig, TinyDlmForCausalLM

BLOCK = 4
MASK = 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_model(block_length=BLOCK):
    torch.manual_seed(0)
    config = TinyDlmConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, block_length=block_length
    )
    model = TinyDlmForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_llama():
    """A model of the transformers library, with a mask token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=46, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        eos_token_id=2, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    config.mask_token_id = MASK
    return LlamaForCausalLM(config)


def save_random_model(path):
    save_checkpoint(random_model(), path)
    return path


def write_walks(path, count=12):
    """Prompts and responses of several lengths."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        problem = task.draw_problem(rng, rng.choice((1, 2, 3)))
        words = task.render_response(problem, rng)[:-1]
        record = {"prompt": " ".join(task.render_prompt(problem)), "response": " ".join(words)}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return path
