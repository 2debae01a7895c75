"""Every mistake in the arguments of `spd_generate` gives one sentence that names it."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from decoding_models import RandomModel, make_config, random_prompts

from dmax_kernels.decoding import DecodeConfig, spd_generate

pytestmark = pytest.mark.usefixtures("one_thread")


MISTAKES = {
    "tau_dec above 1": ({"tau_dec": 1.5}, "tau_dec must be in [0, 1], got 1.5"),
    "tau_acc below 0": ({"tau_acc": -0.1}, "tau_acc must be in [0, 1], got -0.1"),
    "tau_dec is NaN": ({"tau_dec": float("nan")}, "tau_dec must be in [0, 1], got nan"),
    "rule": (
        {"rule": "soft"},
        "rule must be one of 'spd', 'hybrid', 'hard_prefix', 'hard', 'threshold', 'factor', "
        "'hierarchical', 'top_n', 'autoregressive', 'random', 'entropy_bound', 'margin', "
        "'uniform', 'parallel_forced', 'local_leap', 'prophet', 'sched', 'credit', 'edit', or a "
        "Rule, got 'soft'",
    ),
    "semantics": (
        {"semantics": "dinfer"},
        "semantics must be one of 'settled', 'paper', 'released', got 'dinfer'",
    ),
    "ops": ({"ops": "cuda"}, "ops must be one of 'fused', 'reference', got 'cuda'"),
    "convergence": (
        {"convergence": "none"},
        "convergence must be one of 'both', 'consistency', 'confidence', got 'none'",
    ),
    "released with another rule": (
        {"semantics": "released", "rule": "hard"},
        (
            "semantics must be 'settled' or 'paper' unless rule is 'spd' and convergence is "
            "'both', got 'released' with rule 'hard' and convergence 'both'"
        ),
    ),
    "block_length": (
        {"block_length": 0},
        "block_length must be a positive integer, got 0",
    ),
    "max_new_tokens": (
        {"max_new_tokens": 0},
        "max_new_tokens must be a positive integer, got 0",
    ),
    "max_new_tokens is a float": (
        {"max_new_tokens": 2.5},
        "max_new_tokens must be a positive integer, got 2.5",
    ),
    "top_k": ({"top_k": 9}, "top_k must be an integer in [1, 8], got 9"),
    "max_steps_per_block": (
        {"max_steps_per_block": 0},
        "max_steps_per_block must be a positive integer or None, got 0",
    ),
    "mask id": (
        {"mask_token_id": 23},
        "mask_token_id must be in [0, 23), the model's vocabulary, got 23",
    ),
    "context": (
        {"max_new_tokens": 250},
        (
            "a prompt of 11 tokens and max_new_tokens=250 need 264 positions in whole blocks of 8, "
            "but the model's context is 256 (config.max_position_embeddings)"
        ),
    ),
    "input_ids is 1-D": (
        {"input_ids": torch.zeros(4).long()},
        "input_ids must be 2-D [B, T], got 1-D",
    ),
    "input_ids is float": (
        {"input_ids": torch.zeros(1, 4)},
        "input_ids must be integer token ids, got torch.float32",
    ),
    "no rows": (
        {"input_ids": torch.zeros(0, 4).long()},
        "input_ids must be at least one row, got 0 rows",
    ),
    "empty prompt": (
        {"input_ids": torch.zeros(2, 0).long()},
        "input_ids must be at least one prompt token per row, got an empty prompt (row 0)",
    ),
    "token outside the vocabulary": (
        {"input_ids": torch.full((1, 4), 99)},
        "input_ids must be in [0, 23), the model's vocabulary, got 99",
    ),
    "a prompt of the list is empty": (
        {"input_ids": [[3, 4], []]},
        "input_ids must be at least one prompt token per row, got an empty prompt (row 1)",
    ),
    "a prompt of the list is nested": (
        {"input_ids": [[[3, 4]]]},
        "each row of input_ids must be 1-D, got 2-D",
    ),
    "nothing but padding": (
        {"attention_mask": torch.tensor([[1] * 11, [0] * 11])},
        "input_ids must be at least one prompt token per row, got an empty prompt (row 1)",
    ),
    "padding inside a prompt": (
        {"attention_mask": torch.tensor([[1] * 11, [1] * 4 + [0] + [1] * 6])},
        "attention_mask must be one run of ones per row, got a gap in row 1",
    ),
    "attention_mask of another shape": (
        {"attention_mask": torch.ones(2, 10)},
        "attention_mask must be as long as input_ids, [11, 11], got [10, 10]",
    ),
    "attention_mask of fewer rows": (
        {"attention_mask": [[1] * 11]},
        "attention_mask must be as long as input_ids, [11, 11], got [11]",
    ),
    "text": (
        {"input_ids": ["one prompt"]},
        "input_ids must be integer token ids: a tensor [B, T] or a list of rows, "
        "got a row that is str",
    ),
    "one text": (
        {"input_ids": "one prompt"},
        "input_ids must be integer token ids: a tensor [B, T] or a list of rows, got str",
    ),
    "no input_ids": (
        {"input_ids": None},
        "input_ids must be integer token ids: a tensor [B, T] or a list of rows, got NoneType",
    ),
    "a mapping without input_ids": (
        {"input_ids": {"inputs_embeds": 1}},
        "input_ids must be a mapping with 'input_ids', got ['inputs_embeds']",
    ),
    "one prompt that is not in a list": (
        {"input_ids": [3, 4]},
        "each row of input_ids must be 1-D, got 0-D",
    ),
    "eos_token_id is text": (
        {"eos_token_id": "</s>"},
        "eos_token_id must be a token id or several, got '</s>'",
    ),
    "eos_token_id is a float": (
        {"eos_token_id": 2.0},
        "eos_token_id must be a token id or several, got 2.0",
    ),
    "pad_token_id": ({"pad_token_id": 0.0}, "pad_token_id must be a token id, got 0.0"),
    "pad_token_id below the vocabulary": (
        {"pad_token_id": -1},
        "pad_token_id must be in [0, 23), the model's vocabulary, got -1",
    ),
    "pad_token_id above the vocabulary": (
        {"pad_token_id": 23},
        "pad_token_id must be in [0, 23), the model's vocabulary, got 23",
    ),
    "max_new_tokens is text": (
        {"max_new_tokens": "8"},
        "max_new_tokens must be a positive integer, got '8'",
    ),
    "max_new_tokens is a bool": (
        {"max_new_tokens": True},
        "max_new_tokens must be a positive integer, got True",
    ),
    "max_new_tokens is a tensor of a bool": (
        {"max_new_tokens": torch.tensor(True)},
        "max_new_tokens must be a positive integer, got True",
    ),
    "tau_dec is text": ({"tau_dec": "0.5"}, "tau_dec must be in [0, 1], got '0.5'"),
    "thresholds' shape": (
        {"thresholds": [[0.5, 0.9]]},
        "thresholds must be [2, 2]: (tau_dec, tau_acc) of each row, got [1, 2]",
    ),
    "a row's threshold": (
        {"thresholds": [[0.5, 0.75], [0.5, 1.5]]},
        "thresholds must be in [0, 1], got 1.5",
    ),
    "poll_lag": ({"poll_lag": -1}, "poll_lag must be a non-negative integer, got -1"),
    "cuda_graph on a CPU": (
        {"cuda_graph": True},
        "cuda_graph must be False or None unless the model is on a GPU, got True on cpu",
    ),
    "negative token": (
        {"input_ids": torch.full((1, 4), -3)},
        "input_ids must be in [0, 23), the model's vocabulary, got -3",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_names_the_mistake(mistake):
    changes, sentence = MISTAKES[mistake]
    arguments = {
        "input_ids": random_prompts(2, 11),
        "block_length": 8,
        "max_new_tokens": 8,
        "ops": "reference",
        **changes,
    }
    with pytest.raises(ValueError, match=r"^spd_generate: ") as error:
        spd_generate(RandomModel(), **arguments)
    assert str(error.value) == f"spd_generate: {sentence}"


def test_a_model_without_mask_token():
    model = RandomModel()
    model.config = SimpleNamespace()
    with pytest.raises(ValueError, match=r"^spd_generate: the model has no mask token"):
        spd_generate(model, random_prompts(1, 8), max_new_tokens=8, ops="reference")


def test_a_config_without_eos_and_context_decodes_to_the_end():
    model = RandomModel()
    model.config = make_config(eos_token_id=None, pad_token_id=None)
    del model.config.max_position_embeddings
    output = spd_generate(
        model, random_prompts(2, 8), block_length=8, max_new_tokens=20, ops="reference"
    )
    assert output.num_tokens.tolist() == [20, 20]


@pytest.mark.parametrize("use_cache", [True, False])
def test_ids_of_a_config_that_are_outside_the_vocabulary(use_cache):
    """A padding of -1 stands for none, and an end token that cannot be predicted ends nothing."""
    model, prompts = RandomModel(), [[3] * 16, [4] * 7]
    options = {"block_length": 8, "max_new_tokens": 20, "ops": "reference", "use_cache": use_cache}
    model.config = make_config(eos_token_id=[40, -1], pad_token_id=-1)
    output = spd_generate(model, prompts, **options)
    assert output.num_tokens.tolist() == [20, 20]
    assert output.sequences[1, :9].eq(model.config.mask_token_id).all()
    model.config = make_config(eos_token_id=[40, 2], pad_token_id=-1)
    assert spd_generate(model, prompts, **options).sequences[1, :9].eq(2).all()


def test_a_model_that_does_not_use_the_cache():
    class Uncached(RandomModel):
        def forward(self, *args, use_cache, **kwargs):
            return super().forward(*args, **kwargs, use_cache=False)

    with pytest.raises(ValueError, match="did not; pass use_cache=False"):
        spd_generate(Uncached(), random_prompts(1, 8), max_new_tokens=8, ops="reference")


def run_once(model):
    spd_generate(model, random_prompts(1, 8), block_length=8, max_new_tokens=8, ops="reference")


def test_a_quantised_embedding():
    model = RandomModel()
    table = SimpleNamespace(weight=(model.words.weight.data * 50).to(torch.int8))
    model.get_input_embeddings = lambda: table
    need = "a float32, bfloat16 or float16 table [V, D]; load it without quantising the embedding"
    got = "Tensor of torch.int8, [23, 16]"
    with pytest.raises(ValueError, match=r"^spd_generate: ") as error:
        run_once(model)
    assert (
        str(error.value) == f"spd_generate: the model's input embedding must be {need}, got {got}"
    )
    del table.weight  # some quantised modules keep it under a different name
    with pytest.raises(ValueError, match="without quantising the embedding, got no weight"):
        run_once(model)


def test_a_tied_head_and_a_quantised_one_decode():
    """The head belongs to the model's own forward: only its logits matter."""
    tied = RandomModel()
    tied.head.weight = tied.words.weight
    run_once(tied)
    quantised = RandomModel()
    weight = (quantised.head.weight.data * 100).round().to(torch.int8)
    quantised.head = torch.nn.Identity()
    quantised.head.forward = lambda x: torch.nn.functional.linear(x, weight.float() / 100)
    run_once(quantised)


def test_logits_that_the_step_cannot_read():
    class Raw(RandomModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = self.change(output.logits)
            return output

    model = Raw()
    model.change = lambda logits: logits.double()
    with pytest.raises(ValueError, match=r"^spd_generate: the model's logits must be one of "):
        run_once(model)
    model.change = lambda logits: logits[..., :20]
    need = "over the 23 tokens of its input embedding, got 20"
    with pytest.raises(ValueError, match=need):
        run_once(model)


def test_eager_attention_of_llada2_reads_the_mask_otherwise():
    model = RandomModel()
    model.config.model_type, model.config._attn_implementation = "llada2_moe", "eager"
    with pytest.raises(ValueError, match="the model's attention must be 'sdpa' .* got 'eager'"):
        run_once(model)


WINDOWS = {
    "every layer": {"sliding_window": 16},
    "some layers": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "chunks": {"attention_chunk_size": 16, "layer_types": ["chunked_attention"]},
    "of the text model": {"get_text_config": lambda: make_config(sliding_window=16)},
}
NO_WINDOWS = {
    "turned off": {"sliding_window": 16, "use_sliding_window": False},
    "used by no layer": {"sliding_window": 16, "layer_types": ["full_attention"]},
    "none": {"sliding_window": None},
    "longer than the sequence": {"sliding_window": 24},
}


@pytest.mark.parametrize("case", [*WINDOWS, *NO_WINDOWS])
def test_a_window_that_the_mask_would_drop_is_refused(case):
    model, prompts = RandomModel(), random_prompts(1, 9)
    model.config = make_config(**{**WINDOWS, **NO_WINDOWS}[case])
    arguments = {"block_length": 8, "max_new_tokens": 8, "ops": "reference"}
    if case in NO_WINDOWS:
        spd_generate(model, prompts, **arguments)
        return
    sentence = (
        r"need 24 positions in whole blocks of 8, but some of the model's layers attend to a "
        r"window of 16 positions, which the mask of block-wise decoding does not have$"
    )
    with pytest.raises(ValueError, match=sentence):
        spd_generate(model, prompts, **arguments)
    spd_generate(model, prompts[:, 1:], **arguments)  # 16 positions: no key is out of the window


def test_a_configuration_is_its_options():
    prompts = random_prompts(2, 11)
    options = {"max_new_tokens": 19, "block_length": 8, "tau_dec": 0.3}
    expected = spd_generate(RandomModel(), prompts, **options)
    config = DecodeConfig(**options)
    got = spd_generate(RandomModel(), prompts, config)
    assert torch.equal(got.sequences, expected.sequences)
    changed = spd_generate(RandomModel(), prompts, config, tau_dec=0.95, rule="threshold")
    other = spd_generate(
        RandomModel(), prompts, **{**options, "tau_dec": 0.95, "rule": "threshold"}
    )
    assert torch.equal(changed.sequences, other.sequences)
    assert not torch.equal(changed.block_forwards, got.block_forwards)
    for item in fields(DecodeConfig):
        assert f"{item.name}: {item.metadata['help']}" in DecodeConfig.__doc__


def test_options_that_do_not_exist_and_one_that_is_needed():
    with pytest.raises(TypeError, match="an option must be one of max_new_tokens, .* got tau$"):
        spd_generate(RandomModel(), random_prompts(1, 8), max_new_tokens=8, tau=0.5)
    with pytest.raises(TypeError, match="max_new_tokens must be a positive integer, got none"):
        spd_generate(RandomModel(), random_prompts(1, 8))
