"""Arguments as other libraries give them: tokenizers' mappings, NumPy's numbers, cache names."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding_models import EOS, MASK, RandomModel, random_prompts
from torch import nn
from transformers import BatchEncoding

from dmax_kernels.decoding import (
    RULES,
    EntropyBound,
    ParallelForced,
    Random,
    spd_generate,
)
from dmax_kernels.decoding.extra import Canvas, global_arness, nap_generate
from dmax_kernels.training.config import TrainConfig
from dmax_kernels.training.corrupt import block_mask, uniform_mask

K = 8


pytestmark = pytest.mark.usefixtures("one_thread")


def decode(model, prompts, **changes):
    return spd_generate(model, prompts, **{"block_length": K, "max_new_tokens": 19, **changes})


def padded():
    """Two prompts of 9 and 6 tokens, the second padded on the left: ids, mask, and the prompts."""
    ids = random_prompts(2, 9)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    return ids, mask, [ids[0], ids[1, 3:]]


@pytest.mark.parametrize("as_lists", [False, True])
@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_what_a_tokenizer_returns(kind, as_lists):
    ids, mask, prompts = padded()
    expected = decode(RandomModel(), prompts)
    encoding = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask}
    if as_lists:
        encoding = {name: value.tolist() for name, value in encoding.items()}
    assert torch.equal(decode(RandomModel(), kind(encoding)).sequences, expected.sequences)
    # An explicit mask takes precedence over the mapping's
    encoding["attention_mask"] = (1 - mask).tolist()
    output = decode(RandomModel(), kind(encoding), attention_mask=mask)
    assert torch.equal(output.sequences, expected.sequences)
    whole = kind({"input_ids": encoding["input_ids"]})
    assert torch.equal(decode(RandomModel(), whole).sequences, decode(RandomModel(), ids).sequences)


def test_a_canvas_behind_what_a_tokenizer_returns():
    ids, mask, _ = padded()
    canvas = Canvas.build([[2], [3]], [np.int64(3), 3], [4], 2)
    with pytest.raises(ValueError, match=r"of one length .* got lengths \[6, 9\]"):
        nap_generate(RandomModel(), {"input_ids": ids, "attention_mask": mask}, canvas)
    mask[0, :3] = 0
    got = nap_generate(RandomModel(), {"input_ids": ids, "attention_mask": mask}, canvas)
    expected = nap_generate(RandomModel(), ids[:, 3:], canvas)
    assert torch.equal(got.sequences, expected.sequences)


NUMBERS = {
    "max_new_tokens": 19,
    "block_length": K,
    "top_k": 2,
    "max_steps_per_block": 5,
    "poll_lag": 1,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": 3,
    "tau_dec": 0.5,
    "tau_acc": 0.75,
}


@pytest.mark.parametrize("of", [np.asarray, torch.tensor, lambda number: np.array([number])[0]])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_and_torch(name, of):
    model, prompts = RandomModel(), random_prompts(2, 11)
    number = of(NUMBERS[name])
    expected = decode(model, prompts, **{name: NUMBERS[name]})
    assert torch.equal(decode(model, prompts, **{name: number}).sequences, expected.sequences)


def test_several_ends_in_an_array():
    model, prompts = RandomModel(), random_prompts(4, 11)
    ends = list(range(2, 8))
    expected = decode(model, prompts, eos_token_id=ends)
    assert expected.num_tokens.min() < 19
    for several in (np.array(ends), torch.tensor(ends), [np.int32(end) for end in ends]):
        output = decode(model, prompts, eos_token_id=several)
        assert output.num_tokens.tolist() == expected.num_tokens.tolist()


def test_options_are_kept_as_pythons_numbers():
    rules = (
        Random(np.int64(2), np.uint64(2**63)),
        ParallelForced(torch.tensor(2), np.int32(3)),
        EntropyBound(np.float32(0.25)),
        EntropyBound(2),
    )
    kept = [tuple(vars(rule).values()) for rule in rules]
    assert kept == [(2, 2**63), (2, 3), (0.25,), (2.0,)]
    assert {type(value) for values in kept for value in values} == {int, float}
    config = TrainConfig(batch_size=np.int64(4), learning_rate=np.float32(0.5), steps=np.int16(2))
    assert (config.batch_size, config.learning_rate, config.steps) == (4, 0.5, 2)
    assert type(config.as_dict()["batch_size"]) is int
    assert global_arness([0, 1, 2], np.int64(1)) == 1


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Random(2.0), "Random: tokens_per_step must be a positive integer, got 2.0"),
        (lambda: Random(seed=True), r"Random: seed must be an integer in \[0, 2\^64\), got True"),
        (lambda: EntropyBound("1"), "entropy_bound must be a number, at least 0, got '1'"),
        (lambda: Canvas.build([[2]], [2.0], [3], 1), "must be a positive integer, got 2.0"),
        (lambda: global_arness([0], 1.0), "k must be a positive integer, got 1.0"),
        (lambda: TrainConfig(batch_size=2.5), "batch_size must be an integer, got 2.5"),
        (lambda: TrainConfig(keep=True), "keep must be an integer, got True"),
        (lambda: TrainConfig(epochs="2"), "epochs must be a number, got '2'"),
    ],
)
def test_what_is_no_such_number_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other_default_dtype(request):
    """A function that switches it on, so that a test can compute what it compares with first."""
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_the_default_dtype_changes_nothing(rule, other_default_dtype):
    model, prompts = RandomModel(), random_prompts(2, 11)
    options = {"rule": rule, "tau_dec": 0.3, "top_k": 2, "trace": True, "logprobs": True}
    expected = decode(model, prompts, **options)
    other_default_dtype()
    output = decode(model, prompts, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.logprobs.dtype == torch.float32
    assert torch.equal(output.logprobs, expected.logprobs)
    assert output.trace.to_dict() == expected.trace.to_dict()


@pytest.fixture
def default_device_elsewhere():
    """As `torch.set_default_device("cuda")` is for what has to be on the host."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


@pytest.mark.parametrize("rule", RULES)
def test_the_default_device_changes_nothing(rule, default_device_elsewhere):
    model, prompts = RandomModel(), random_prompts(2, 11).tolist()
    options = {"rule": rule, "thresholds": [[0.3, 0.9], [0.4, 0.8]], "logprobs": True}
    options |= {"repetition_penalty": [1.2, 1.0], "logit_bias": [{3: 1.0}, None]}
    expected = decode(model, prompts, **options)
    default_device_elsewhere()
    output = decode(model, prompts, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.logprobs, expected.logprobs)


def test_the_default_device_changes_no_canvas(default_device_elsewhere):
    model, prompts = RandomModel(), random_prompts(2, 5).tolist()

    def paths():
        canvas = Canvas.build([[4], [5]], [3, 3], [6], 2)
        output = nap_generate(model, prompts, canvas, block_length=24)
        return [canvas.read(answer) for answer in output.answers]

    expected = paths()
    default_device_elsewhere()
    assert paths() == expected


def test_the_default_dtype_changes_no_corruption(other_default_dtype):
    editable = torch.ones(4, 32, dtype=torch.bool)

    def masks():
        generator = torch.Generator().manual_seed(0)
        return (
            *block_mask(editable, 8, generator),
            *uniform_mask(editable, (0.2, 0.9), generator),
        )

    expected = masks()
    other_default_dtype()
    assert all(torch.equal(got, want) for got, want in zip(masks(), expected, strict=True))


class Renamed(RandomModel):
    """What transformers 5.24 made of its models: a renamed argument, a warning for the old one."""

    def forward(
        self, inputs_embeds, attention_mask, position_ids, cache=None, use_cache=False, **old
    ):
        if "past_key_values" in old:
            warnings.warn("past_key_values is deprecated", FutureWarning, stacklevel=2)
            cache = old["past_key_values"]
        return super().forward(inputs_embeds, attention_mask, position_ids, cache, use_cache)


class Adapter(nn.Module):
    """A wrapper such as PEFT's: whatever it is given goes on to the model inside."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "make", [Renamed, lambda: Adapter(Renamed()), lambda: Adapter(RandomModel())]
)
def test_the_cache_goes_by_the_models_own_name_for_it(make):
    prompts = random_prompts(2, 11)
    expected = decode(RandomModel(), prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(make(), prompts).sequences, expected.sequences)


def test_a_clean_run_prints_nobodys_deprecations():
    """Some of transformers' own are warnings, and some go to its logger, once in a process."""
    command = ["generate", "--model", "oput", "--max-new-tokens", "32", "--prompt"]
    run = subprocess.run(
        [
            *(sys.executable, "-W", "error::FutureWarning", "-m", "dmax_kernels", *command),
            "s2 d1 s1 u1 start 2 =",
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "goes" in run.stdout or "answer" in run.stdout
    assert "deprecat" not in run.stderr
