"""Configuration of the tiny block-diffusion language model. Ships as remote code."""

from transformers import PretrainedConfig


class TinyDlmConfig(PretrainedConfig):
    """Sizes and special tokens of a `TinyDlmForCausalLM`.

    `block_length` is the number of positions denoised together: attention is bidirectional within
    a block and causal between blocks.
    """

    model_type = "tiny_dlm"

    def __init__(
        self,
        vocab_size=46,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=512,
        rope_base=1000.0,
        rms_norm_eps=1e-6,
        block_length=32,
        mask_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if hidden_size % (2 * num_attention_heads) != 0:
            raise ValueError(
                "TinyDlmConfig: hidden_size must be a multiple of 2 * num_attention_heads "
                f"(rotary halves), got {hidden_size} and {num_attention_heads}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_base = rope_base
        self.rms_norm_eps = rms_norm_eps
        self.block_length = block_length
        self.mask_token_id = mask_token_id
        # What follows from the others: a saved configuration brings them along.
        kwargs.pop("num_key_value_heads", None)
        kwargs.pop("head_dim", None)
        super().__init__(
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
