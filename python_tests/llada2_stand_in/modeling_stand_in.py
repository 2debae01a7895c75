"""A stand-in for LLaDA2's remote code: its interface and parts, small, for the tests.

Grouped-query attention with normed queries and keys and partial rotary embeddings, a dense first
layer, then mixtures of experts with sigmoid scores, groups and a shared expert; no shift between
positions and logits. It leans on transformers 4.5x in the places where the real code does.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_stand_in import StandInConfig

HAS_FX = is_torch_fx_available()


class RotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_init_fn = ROPE_INIT_FUNCTIONS["default"]
        inv_freq, self.attention_scaling = self.rope_init_fn(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.original_inv_freq = self.inv_freq

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x, cos, sin):
    """Rotates the first part of each head, as wide as cos; the rest passes."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.size = config.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.size
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=False)
        self.query_layernorm = nn.RMSNorm(self.size, eps=config.rms_norm_eps)
        self.key_layernorm = nn.RMSNorm(self.size, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def forward(self, x, mask, rotary, cache):
        batch, length, _ = x.shape
        heads = self.query_key_value(x).view(batch, length, -1, self.size).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query = rotate(self.query_layernorm(query), *rotary)
        key = rotate(self.key_layernorm(key), *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, {"cos": rotary[0]})
        assert mask.shape == (batch, 1, length, key.shape[2]), mask.shape
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
        )
        return self.dense(out.transpose(1, 2).reshape(batch, length, -1))


class Mlp(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoe(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.moe_intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.expert_bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        self.experts = nn.ModuleList(Mlp(config, width) for _ in range(config.num_experts))
        self.shared_experts = Mlp(config, width * config.num_shared_experts)

    def forward(self, x):
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat).float().sigmoid()
        choice = scores + self.expert_bias
        # The best groups, each by its two best experts; then the best experts in them
        groups = choice.view(len(flat), c.n_group, -1)
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(c.topk_group, dim=-1).indices
        allowed = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1).bool()
        choice = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        chosen = choice.topk(c.num_experts_per_tok, dim=-1).indices
        weight = scores.gather(1, chosen)
        weight = weight / weight.sum(dim=-1, keepdim=True) * c.routed_scaling_factor
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.nonzero(chosen == index, as_tuple=True)
            out[token] += expert(flat[token]) * weight[token, slot, None].to(x.dtype)
        return out.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = Mlp(config, config.intermediate_size) if dense else SparseMoe(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x, mask, rotary, cache):
        x = x + self.attention(self.input_layernorm(x), mask, rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class StandInPreTrainedModel(PreTrainedModel):
    config_class = StandInConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=self.config.initializer_range)


class StandInModel(StandInPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def set_input_embeddings(self, value):
        self.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rotary = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, rotary, past_key_values if use_cache else None)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


class StandInModelLM(StandInPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = StandInModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.word_embeddings

    def set_input_embeddings(self, value):
        self.model.word_embeddings = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, **kwargs):
        out = self.model(input_ids=input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state).float()
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
