"""A tiny block-diffusion language model for transformers. Ships as remote code.

A pre-norm transformer whose attention is bidirectional within a block of `config.block_length`
positions and causal between blocks. There is no shift: the logits at a position are for the token
at that position. Shapes: B rows, T positions, S cached positions, H heads, E head size, V words.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_tiny_dlm import TinyDlmConfig

# transformers calls the KV cache of an output `cache` since 5.24, and before `past_key_values`
CACHE_FIELD = (
    "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
)


def the_cache(cache, past_key_values):
    """The KV cache, by its name since transformers 5.24 or by the one before; None for no cache."""
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "TinyDlmModel: cache or past_key_values must be given (they are the same), got both"
        )
    return past_key_values if cache is None else cache


def rms_norm(x, eps):
    """x / sqrt(mean(x^2) + eps) over the last dimension; no learned scale."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rotary_tables(position_ids, head_dim, base, dtype):
    """cos and sin of the rotary angles, [B or 1, 1, T, E / 2].

    Computed at each call: a non-persistent buffer would come back uninitialised where
    `from_pretrained` builds the model on the meta device.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[:, None, :, None].float() * base ** (-exponent / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotates the pairs (x[i], x[i + E / 2]); x is [B, H, T, E]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def cached_keys_values(cache, layer_index):
    """Keys and values of one layer of a cache, [B, H, S, E] each, or None if the layer is empty."""
    if hasattr(cache, "layers"):
        if layer_index >= len(cache.layers) or cache.layers[layer_index].keys is None:
            return None
        return cache.layers[layer_index].keys, cache.layers[layer_index].values
    # transformers before 4.56 keeps two lists.
    if layer_index >= len(cache.key_cache):
        return None
    return cache.key_cache[layer_index], cache.value_cache[layer_index]


@functools.cache
def compiled_flex_attention():
    """Uncompiled, FlexAttention holds all scores, which is what it is there to avoid."""
    return torch.compile(flex_attention)


class Attention(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        size = config.hidden_size
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.eps = config.rms_norm_eps
        # Zero output projections: each layer starts as the identity, and the model as uniform.
        self.o_proj.zero_init = True

    def forward(self, x, cos, sin, mask, cache, use_cache):
        batch, length, size = x.shape
        heads = (batch, length, self.num_heads, self.head_dim)
        query = rotate(rms_norm(self.q_proj(x).view(heads), self.eps).transpose(1, 2), cos, sin)
        key = rotate(rms_norm(self.k_proj(x).view(heads), self.eps).transpose(1, 2), cos, sin)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        if use_cache:
            key, value = cache.update(key, value, self.layer_index)
        elif cache is not None:
            past = cached_keys_values(cache, self.layer_index)
            if past is not None:
                key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        if isinstance(mask, BlockMask):
            attend = compiled_flex_attention() if x.is_cuda else flex_attention
            out = attend(query, key, value, block_mask=mask)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, size))


class Layer(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        self.attention = Attention(config, layer_index)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.down_proj.zero_init = True
        self.eps = config.rms_norm_eps

    def forward(self, x, cos, sin, mask, cache, use_cache):
        x = x + self.attention(rms_norm(x, self.eps), cos, sin, mask, cache, use_cache)
        return x + self.down_proj(F.gelu(self.up_proj(rms_norm(x, self.eps))))


class TinyDlmPreTrainedModel(PreTrainedModel):
    config_class = TinyDlmConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flex_attn = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            if getattr(module, "zero_init", False):
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)


class TinyDlmModel(TinyDlmPreTrainedModel):
    """Embedding, layers and final norm: everything but the head."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        past_key_values=None,
        **kwargs,
    ):
        """States after the final norm, [B, T, D]. Arguments: see `TinyDlmForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(
                f"TinyDlmModel: input_ids or inputs_embeds must be given (one of them), got {got}"
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        cache = the_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache()
        cached = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(cached, cached + length, device=x.device)[None]
        elif position_ids.dim() == 1:
            position_ids = position_ids[None]
        mask = self._mask(attention_mask, position_ids, cached, batch, x.dtype)
        cos, sin = rotary_tables(position_ids, self.config.head_dim, self.config.rope_base, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache, bool(use_cache))
        hidden = rms_norm(x, self.config.rms_norm_eps)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_FIELD: cache})

    def _mask(self, attention_mask, position_ids, cached, batch, dtype):
        """The given mask, checked; or a block-causal one over positions, [B or 1, 1, T, S + T]."""
        length = position_ids.shape[1]
        if attention_mask is None:
            block = position_ids // self.config.block_length
            mask = block[:, None, :, None] >= block[:, None, None, :]
            # What is cached are committed blocks: visible to all.
            return F.pad(mask, (cached, 0), value=True)
        if isinstance(attention_mask, BlockMask):
            return attention_mask
        expected = (1, length, cached + length)
        shape = tuple(attention_mask.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:] != expected:
            raise ValueError(
                f"TinyDlmModel: attention_mask must be [{batch} or 1, 1, {length}, "
                f"{cached + length}] (rows, 1, queries, cached and new keys), got {list(shape)}"
            )
        if attention_mask.dtype == torch.bool:
            return attention_mask
        if not attention_mask.is_floating_point():
            raise ValueError(
                "TinyDlmModel: attention_mask must be bool (True: attend) or floating point "
                f"(added to the scores), got {attention_mask.dtype}"
            )
        return attention_mask.to(dtype)


class TinyDlmForCausalLM(TinyDlmPreTrainedModel):
    """The model with its head: `model` gives hidden states, `lm_head` makes logits of them."""

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyDlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.zero_init = True
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=False,
        past_key_values=None,
        **kwargs,
    ):
        """Logits [B, T, V] for the token at each position (not the next one).

        Args:
            input_ids: int64 [B, T]; or `inputs_embeds` [B, T, D].
            attention_mask: bool (True: attend) or additive floating point, [B or 1, 1, T, S + T],
                or FlexAttention's BlockMask of that shape.
                None: block-causal over `position_ids`, all cached positions visible.
            position_ids: int64 [B or 1, T] or [T]; by default S, S + 1, ...
            cache: a `DynamicCache` of S positions. With `use_cache=True` the new keys and values
                are appended; otherwise the cache is read and left as it is, which is what the
                denoising steps of a block need.
            past_key_values: the name of `cache` before transformers 5.24.
            output_hidden_states: also return the states after the final norm, as a tuple of one.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=the_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        hidden = out.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.lm_head(hidden),
            hidden_states=(hidden,) if output_hidden_states else None,
            **{CACHE_FIELD: getattr(out, CACHE_FIELD)},
        )
