"""`python -m dmax_kernels distill`: its training data, resuming, several processes, mistakes."""

import json
import random

import pytest
from stand_in import save_stand_in

from dmax_kernels.__main__ import main
from dmax_kernels.decoding import spd_generate
from dmax_kernels.models.pretrained import load_pretrained
from dmax_kernels.models.prompt_file import messages_of
from dmax_kernels.ring_walk import task
from dmax_kernels.training import distill
from dmax_kernels.training.loop import Metrics

BUDGET = 44  # some of the responses to PROBLEMS end within it, and some do not


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(0)
    return [task.draw_problem(rng, 4 if i % 2 else 6) for i in range(7)]


@pytest.fixture
def data(tmp_path, problems):
    records = [{**task.record_of(problem), "id": i} for i, problem in enumerate(problems)]
    return write(tmp_path / "prompts.jsonl", records)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arguments(data, output, *more):
    return [
        *("distill", "--model", "oput", "--data", str(data), "--output", str(output)),
        *("--max-new-tokens", str(BUDGET), "--batch-size", "3", "--device", "cpu", *more),
    ]


def one_line(capsys):
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_the_output_is_what_the_model_answers(data, tmp_path, problems, capsys):
    output = tmp_path / "train.jsonl"
    assert main(arguments(data, output)) == 0
    model, tokenizer = (loaded := load_pretrained("oput")).model, loaded.tokenizer
    ids = [task.encode_prompt(problem, 32) for problem in problems]
    options = {"rule": "threshold", "tau_dec": 0.95, "max_new_tokens": BUDGET}
    answers = spd_generate(model, ids, **options).answers
    complete = [i for i, answer in enumerate(answers) if answer[-1] == task.EOS_ID]
    assert 0 < len(complete) < len(problems)
    records = read(output)
    assert [record["id"] for record in records] == complete  # other fields stay
    for record in records:
        text = tokenizer.decode(answers[record["id"]], skip_special_tokens=True)
        assert record["response"] == text
        assert record["prompt"] == " ".join(task.render_prompt(problems[record["id"]]))
    printed = capsys.readouterr().out
    dropped = len(problems) - len(complete)
    assert f"{len(complete)} of 7 prompts; dropped {dropped} incomplete, 0 too long" in printed
    assert f"{sum(map(len, answers))} tokens in" in printed


def test_samples_depend_on_the_prompt_and_its_seed_alone(data, tmp_path):
    """Whatever the batch is; equal prompts are answered differently."""
    records = read(data)
    write(data, [records[1]] * 5 + records[2:5])

    def responses(name, *more):
        options = ("--temperature", "2.0", "--sample-top-k", "40", "--max-new-tokens", "96", *more)
        output = tmp_path / name
        assert main(arguments(data, output, *options)) == 0
        log = output.with_name(name + ".parts")
        return [answer.response for answer in distill.AnswerLog(log, read_settings(log)).answers()]

    def read_settings(log):
        return json.loads((log / "run.json").read_text())

    sampled = responses("a.jsonl", "--seed", "7")
    assert len(set(sampled[:5])) > 1
    assert responses("b.jsonl", "--seed", "7", "--batch-size", "2") == sampled
    assert responses("c.jsonl", "--seed", "100") != sampled


def test_the_output_is_what_train_reads(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Metrics, "draw", lambda self: None)
    output = tmp_path / "train.jsonl"
    assert main(arguments(data, output)) == 0
    run = ["--steps", "2", "--batch-size", "2", "--output", str(tmp_path / "run")]
    assert main(["train", "--model", "oput", "--data", str(output), *run, "--device", "cpu"]) == 0
    assert f"{len(read(output))} examples," in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on(data, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "train.jsonl"
    assert main(arguments(data, whole)) == 0
    decode, calls = distill.decode_batch, []

    def killed(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    monkeypatch.setattr(distill, "decode_batch", killed)
    assert main(arguments(data, output)) == 130
    assert "interrupted; the same command continues from" in one_line(capsys)
    assert not output.exists()
    part = tmp_path / "train.jsonl.parts/part-0000.jsonl"
    assert len(read(part)) == 3
    with part.open("a") as file:  # a line that was cut short
        file.write('{"index": 3, "comp')
    calls.clear()
    calls.append(None)
    calls.append(None)
    # another batch size, as one of two processes, then as the other
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments(data, output, "--batch-size", "2")) == 0
        assert output.exists() == (rank == 0)
    answered = [i for batch in calls[2:] for i in batch]
    assert sorted(answered) == [3, 4, 5, 6]  # each of those that were left, once
    assert output.read_bytes() == whole.read_bytes()
    assert main(arguments(data, output)) == 0  # nothing is left to do
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(i for batch in calls[2:] for i in batch) == [3, 4, 5, 6]


def test_a_run_is_not_continued_as_another(data, tmp_path, capsys):
    output = tmp_path / "train.jsonl"
    assert main(arguments(data, output)) == 0
    before = output.read_bytes()
    other = write(tmp_path / "other.jsonl", [{"prompt": "s1 u1 start 2 ="}])
    cases = [
        (["--tau-dec", "0.5"], "must belong to a run with tau_dec = 0.5, got 0.95"),
        (["--max-new-tokens", "64"], f"max_new_tokens = 64, got {BUDGET}"),
        (["--model", "base"], "model = base, got oput"),
        (["--data", str(other)], "prompts = 1 prompts, crc"),
        (["--no-pad-prompts"], "pad = False, got None"),
        (["--logit-bias", "5=1"], "logit_bias = {'5': 1.0}, got None"),
    ]
    for more, message in cases:
        assert main(arguments(data, output, *more)) == 1
        assert message in one_line(capsys)
    assert output.read_bytes() == before


@pytest.mark.slow
def test_processes_give_the_output_of_one(data, tmp_path):
    outputs = [tmp_path / f"{count}.jsonl" for count in (1, 2)]
    for count, output in enumerate(outputs, 1):
        assert main(arguments(data, output, "--processes", str(count))) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_conversations_and_prompts_that_are_too_long(tmp_path, capsys):
    """A model with LLaDA2's interface, a chat template and a context."""
    model = save_stand_in(tmp_path / "model", max_position_embeddings=96)
    talk = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w9"}]
    records = [
        {"messages": [*talk, {"role": "user", "content": "w7"}, talk[1]], "source": "a"},
        {"question": " ".join(["w3"] * 80)},
        {"question": "w8 w4"},
    ]
    data = write(tmp_path / "prompts.jsonl", records)
    output = tmp_path / "train.jsonl"
    argv = arguments(data, output, "--model", str(model), "--prompt-field", "question")
    assert main([*argv, "--prompt-suffix", " w2", "--tau-dec", "0.3"]) == 0
    assert "1 too long for the model's context" in capsys.readouterr().out
    parts = read(tmp_path / "train.jsonl.parts/part-0000.jsonl")
    assert {part["index"]: part["forwards"] > 0 for part in parts} == {0: True, 1: False, 2: True}
    for record in read(output):
        if "messages" in record:
            user = {"role": "user", "content": "w7 w2"}
            assert record["messages"][:-1] == [*talk, user]  # its answer is left out, not theirs
            assert record["messages"][-1]["role"] == "assistant"
        else:
            assert record["prompt"] == "w8 w4 w2"
            assert record["response"]


def test_a_mistake_is_one_line(data, tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text("mine\n")
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "w5"}, {"messages": []}])
    output = tmp_path / "train.jsonl"
    cases = [
        (arguments(data, own), "--output must be a new file, or one that this command wrote"),
        (arguments(bad, output), 'bad.jsonl:2: must have a text "prompt" or a list'),
        (arguments(tmp_path / "none", output), "--data must be a file, got no file"),
        (arguments(data, output, "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (arguments(data, output, "--processes", "0"), "--processes must be at least 1, got 0"),
        (arguments(data, output, "--model", "none"), "got 'none'"),
        (
            arguments(data, output, "--max-new-tokens", "2048"),
            "--max-new-tokens must be less than the model's context of 512, for the prompt, got",
        ),
        (arguments(data, output, "--tau-dec", "2"), "tau_dec must be in [0, 1], got 2.0"),
        (arguments(data, output, "--device", "auto"), "--device must be one device, got auto"),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for argv, message in cases:
        assert main(argv) == 1
        assert message in one_line(capsys)
        assert {path.name for path in tmp_path.iterdir()} == before
    assert own.read_text() == "mine\n"


def test_a_configuration_file_is_the_options_that_are_not_typed(data, tmp_path, capsys):
    typed, output, config = (tmp_path / name for name in ("typed.jsonl", "file.jsonl", "c.json"))
    more = ("--raw", "--tau-dec", "0.3", "--prompt-suffix", "-w2")
    argv = arguments(data, typed, *more[:3], f"{more[3]}={more[4]}")
    assert main(argv) == 0
    values = {
        **{"model": "oput", "data": [str(data)], "max_new_tokens": BUDGET, "batch_size": 5},
        **{"device": "cpu", "raw": True, "tau_dec": 0.3, "prompt_suffix": "-w2", "threads": None},
    }
    config.write_text(json.dumps(values))
    assert main(["distill", "--config", str(config), "--output", str(output)]) == 0
    assert output.read_text() == typed.read_text()
    overridden = ["distill", "--output", str(tmp_path / "o.jsonl"), f"--config={config}"]
    assert main([*overridden, "--batch-size", "0"]) == 1
    assert "--batch-size must be at least 1, got 0" in one_line(capsys)
    for text, message in (
        ('{"models": "oput"}', f"--config {config}: unrecognized arguments: --models=oput"),
        ('{"batch_size": "a"}', "argument --batch-size: invalid int value: 'a'"),
    ):
        config.write_text(text)
        assert main(["distill", "--config", str(config)]) == 1
        assert message in one_line(capsys)
    assert main(["distill", "--config", str(tmp_path / "none")]) == 1
    assert "--config must be a JSON file, got no file" in one_line(capsys)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (3, "must be an object, got int"),
        ({"prompt": 3}, 'must have a text "prompt"'),
        ({"messages": [{"role": "user"}]}, "each message needs a text 'content'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "one before the assistant's"),
        (ValueError("must be JSON"), "must be JSON"),
    ],
)
def test_a_record_without_a_prompt_says_so(record, message):
    with pytest.raises(ValueError, match=message):
        messages_of(record, "prompt", "")
