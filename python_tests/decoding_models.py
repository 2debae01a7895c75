"""Two small models with the interface that `spd_generate` asks for, for the tests of the loop."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

VOCABULARY, MASK, EOS, PAD = 23, 22, 1, 0


def make_config(**changes):
    fields = {
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "max_position_embeddings": 256,
    }
    return SimpleNamespace(**{**fields, **changes})


class RandomModel(nn.Module):
    """Two random attention layers, sharp enough that confidences spread over [0, 1]."""

    def __init__(self, seed: int = 0, hidden: int = 16, layers: int = 2, sharpness: float = 3.0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = make_config()
        self.words = nn.Embedding(VOCABULARY, hidden)
        self.places = nn.Embedding(256, hidden)
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        self.sharpness = sharpness
        self.positions_forwarded: list[int] = []  # one entry per pass

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def forward(
        self,
        inputs_embeds,
        attention_mask,
        position_ids,
        past_key_values=None,
        use_cache=False,
    ):
        self.positions_forwarded.append(inputs_embeds.shape[1])
        cache = DynamicCache() if past_key_values is None else past_key_values
        x = inputs_embeds + self.places(position_ids)
        for layer, qkv in enumerate(self.qkv):
            query, key, value = qkv(x).unsqueeze(1).chunk(3, dim=-1)
            if use_cache:
                key, value = cache.update(key, value, layer)
            x = x + F.scaled_dot_product_attention(
                3 * query, key, value, attn_mask=attention_mask
            ).squeeze(1)
        logits = self.sharpness * self.head(x)
        return SimpleNamespace(logits=logits, past_key_values=cache if use_cache else None)


class ScriptedModel:
    """Plays logits [passes, B, K, V] back whatever its inputs are, and records those inputs.

    Rows may leave the batch between passes: row r is known by its block's first token, 2 + r.
    """

    def __init__(self, script: Tensor, hidden: int = 6, **config):
        self.script = script
        self.config = make_config(**config)
        generator = torch.Generator().manual_seed(7)
        self.words = nn.Embedding.from_pretrained(
            torch.randn(script.shape[-1], hidden, generator=generator)
        )
        self.inputs: list[dict[int, Tensor]] = []  # per pass and row: [K, D]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.words

    def __call__(self, inputs_embeds, use_cache, **_):
        assert not use_cache, "a scripted model has no cache"
        rows = torch.cdist(inputs_embeds[:, 0], self.words.weight).argmin(dim=-1) - 2
        logits = self.script[len(self.inputs), rows]
        self.inputs.append(dict(zip(rows.tolist(), inputs_embeds.clone(), strict=True)))
        return SimpleNamespace(logits=logits)


def random_prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    """Prompts without special tokens, [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, MASK, (rows, length), generator=generator)


class ExactModel(RandomModel):
    """A `RandomModel` that computes in float64 and rounds its logits to float32.

    How a matrix product rounds depends on how many rows it has, so in float32 a row's logits may
    differ between batches, and occasionally a token with them. Here the last rounding removes such
    differences, so that whatever else a batch changes shows.
    """

    def __init__(self, **arguments):
        super().__init__(**arguments)
        for part in (self.places, self.qkv, self.head):
            part.double()

    def forward(self, inputs_embeds, attention_mask, position_ids, **arguments):
        output = super().forward(
            inputs_embeds.double(), attention_mask.double(), position_ids, **arguments
        )
        output.logits = output.logits.float()
        return output
