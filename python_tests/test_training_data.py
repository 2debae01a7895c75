"""Conversations to batches: what is read, skipped or refused, and which tokens are learnt."""

import json
import re
import sys
from itertools import islice
from types import ModuleType

import pytest
import torch

from dmax_kernels.files import read_jsonl
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.data import batches, repeated_examples, ring_walk_examples
from dmax_kernels.ring_walk.export import build_tokenizer
from dmax_kernels.training.data import (
    Example,
    Examples,
    collate,
    conversation,
    encode,
    epochs,
    read_dataset,
    read_examples,
)
from dmax_kernels.training.oput import IGNORE

CPU = torch.device("cpu")
EOS = task.EOS_ID
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] == 'u' and 's1 ' or 's2 ' }}{{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}s2 {% endif %}"
)
WALK = {"prompt": "start 4 =", "response": "answer 5"}


def read(path, **options):
    arguments = {"eos_token_id": EOS, "vocab_size": 46, "max_length": None, "progress": False}
    tokenizer = options.pop("tokenizer", None) or build_tokenizer()
    return read_examples(read_jsonl(path), tokenizer, **{**arguments, **options})


def write(path, *lines):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="latin1")  # "ÿ" is not UTF-8 then
    return path


def words(ids):
    return " ".join(task.decode(ids))


# Records


def test_prompt_and_response_without_a_chat_template(tmp_path):
    examples, skipped = read(write(tmp_path / "d.jsonl", WALK, "", WALK))
    assert len(examples) == 2
    assert skipped == {}
    assert words(examples[1].prompt) == "start 4 ="
    assert words(examples[1].response) == "answer 5 <eos>"
    assert examples[1].name == f"{tmp_path / 'd.jsonl'}:3"  # blank lines count


def test_the_chat_template_marks_the_last_answer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "user", "content": "start 4 ="},
        {"role": "assistant", "content": "so 4"},
        {"role": "user", "content": "start 5 ="},
        {"role": "assistant", "content": "answer 5"},
    ]
    example = encode(messages, tokenizer, EOS)
    assert words(example.prompt) == "s1 start 4 = s2 so 4 <eos> s1 start 5 = s2"
    assert words(example.response) == "answer 5 <eos>"  # the template's own eos, once
    assert encode(messages[:3], tokenizer, EOS).response == ()
    # as the decoder's prompt: what add_generation_prompt gives
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert list(example.prompt) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


def test_skipped_records_are_counted(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        WALK,
        {"prompt": "start 4 =", "response": "  "},
        {"messages": [{"role": "user", "content": "start 4 ="}]},
        {"prompt": "start 4 =", "response": "answer " * 9},
        "{",
    )
    examples, skipped = read(path, max_length=8, skip_malformed=True)
    assert len(examples) == 1
    assert skipped == {"malformed": 1, "no response": 2, "too long": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "start"', r"must be JSON \(.*\)"),
        ('{"prompt": "ÿ", "response": "so"}', r"must be UTF-8 text"),
        ('{"prompt": ' + "1" * 4301 + "}", r"must be JSON with numbers of at most 4,300 digits"),
        ("[" * 99999 + "]" * 99999, r"must be JSON that is not nested so deeply"),
        ({"prompt": "half \ud83d", "response": "so"}, r"text must be Unicode .* '.ud83d'"),
        ({"prompt": "start", "response": "half \ude00"}, r"text must be Unicode .* '.ude00'"),
        ({"messages": [{"role": "assistant", "content": "so"}]}, r"the answer must follow"),
        ({"messages": [[[[0] * 999] * 99] * 9]}, r"each message needs a text 'role'"),
        ({"a\nb": 1}, r'needs "messages", or "prompt" and "response", got a b'),
        ("[1]", r"must be an object, got list"),
        ({"text": "start"}, r'needs "messages", or "prompt" and "response", got text'),
        ({"messages": []}, r"messages must be a list of at least one"),
        ({"messages": ["start"]}, r"each message needs a text 'role'"),
        ({"messages": [{"role": "user"}]}, r"each message needs a text 'content'"),
        ({"prompt": 3, "response": "so"}, r"each message needs a text 'content'"),
    ],
)
def test_a_malformed_record_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", WALK, line)
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: {message}.*\(--skip-malformed skips it\)"):
        read(path)
    examples, skipped = read(path, skip_malformed=True)
    assert len(examples) == skipped["malformed"] == 1


STRICT = (
    "{% if messages|length % 2 != add_generation_prompt %}{{ raise_exception('must\nalternate') }}"
    "{% endif %}" + CHAT_TEMPLATE
)
SUMMING = "{{ messages[1]['content'] + 1 }}"
UNORDERED = "{{ messages|length }} {{ messages[-1]['content'] }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, "the chat template refuses the messages (TemplateError: must alternate)"),
        (SUMMING, "the chat template refuses the messages (UndefinedError: "),
        (UNORDERED, "the chat template does not write the prompt first"),
    ],
)
def test_what_the_chat_template_refuses_names_file_and_line(tmp_path, template, message):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    roles = ("user", "user", "assistant") if template == STRICT else ("user", "assistant")
    record = {"messages": [{"role": role, "content": "so"} for role in roles]}
    path = write(tmp_path / "d.jsonl", record)
    with pytest.raises(ValueError, match=rf"d\.jsonl:1: {re.escape(message)}.* skips it\)$"):
        read(path, tokenizer=tokenizer)
    if template == STRICT:
        examples, skipped = read(
            write(path, WALK, record, WALK), tokenizer=tokenizer, skip_malformed=True
        )
        assert (len(examples), skipped) == (2, {"malformed": 1})


def test_lines_end_at_line_feeds_alone(tmp_path):
    # \u2028 and \u0085 are line ends to str.splitlines; files are joined with their marks
    answers = ["s1\u2028s2", "s1\u0085s2", "s1"]
    records = [
        json.dumps({"prompt": "so", "response": text}, ensure_ascii=False) for text in answers
    ]
    path = tmp_path / "d.jsonl"
    path.write_bytes(("\ufeff" + "\r\n\ufeff".join(records) + "\r\n \r\n").encode())
    assert [(place, record["response"]) for place, record in read_jsonl(path)] == [
        (f"{path}:{number}", text) for number, text in enumerate(answers, 1)
    ]


def test_a_response_ends_at_any_end_token():
    tokenizer, record = build_tokenizer(), conversation({"prompt": "so", "response": "s1 s2 s1"})
    s1, s2 = (task.ID_OF[word] for word in ("s1", "s2"))
    assert encode(record, tokenizer, [EOS, s2]).response == (s1, s2)
    assert encode(record, tokenizer, [s2, s1]).response == (s1,)
    assert encode(record, tokenizer, [EOS, task.PAD_ID]).response == (s1, s2, s1, EOS)


def test_data_that_cannot_be_used_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="data must be a file, got no file"):
        read(tmp_path / "none.jsonl")
    path = write(tmp_path / "d.jsonl", {"prompt": "so", "response": ""})
    with pytest.raises(ValueError, match="at least one usable record, got 1 no response"):
        read(path)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: token ids .* vocabulary of 5, got \d+"):
        read(write(tmp_path / "d.jsonl", WALK), vocab_size=5)
    messages = [{"role": "user", "content": "so"}] * 2 + [{"role": "assistant", "content": "so"}]
    path = write(tmp_path / "d.jsonl", {"messages": messages})
    with pytest.raises(ValueError, match=r"d\.jsonl:1: .* no chat template, got 2 messages"):
        read(path)
    with pytest.raises(ValueError, match=r"got 1 malformed; the first .*d\.jsonl:1: messages"):
        read(path, skip_malformed=True)
    with pytest.raises(ValueError, match="data must be a file, got the folder"):
        read(tmp_path)


def test_a_dataset_is_read_through_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match="dataset needs the Python package 'datasets'"):
        next(read_dataset("walks", None, "train"))
    package = ModuleType("datasets")
    package.load_dataset = lambda name, config, split: [{**WALK, "id": split}, WALK]
    monkeypatch.setitem(sys.modules, "datasets", package)
    records = list(read_dataset("walks", None, "train"))
    assert [name for name, _ in records] == ["walks[0]", "walks[1]"]
    assert conversation(records[0][1])[1] == {"role": "assistant", "content": "answer 5"}


# Batches


@pytest.mark.parametrize("eos_tail", ["block", "released"])
def test_labels_are_the_response_and_its_tail(eos_tail):
    # response lengths that end inside a block, on its edge, and one past it; block of 4
    examples = [Example((5, 6, 7), (9,) * (n - 1) + (EOS,)) for n in (3, 5, 6)]
    batch = collate(examples, 4, EOS, eos_tail)
    assert batch.tokens.shape == (3, 12)
    stored = Examples()
    for example in examples:
        stored.append(example, "")
    assert stored.longest_row(4, eos_tail) == 12
    for row, example in enumerate(examples):
        begin, end = 3, 3 + len(example.response)
        ids = [*example.prompt, *example.response]
        assert batch.tokens[row].tolist() == ids + [EOS] * (12 - end)
        # the first eos is at end - 1: to its block's end, or one block of them
        learnt = -(-end // 4) * 4 if eos_tail == "block" else end - 1 + 4
        expected = [IGNORE] * begin + ids[begin:] + [EOS] * (learnt - end)
        assert batch.target[row].tolist() == expected + [IGNORE] * (12 - learnt)
        whole = -(-learnt // 4) * 4
        assert batch.editable[row].tolist() == [begin <= i < whole for i in range(12)]
    assert [example.num_tokens for example in examples] == [6, 8, 9]


def test_rows_keep_only_the_blocks_they_edit():
    examples = [Example((5,) * 9, (9, EOS)), Example((5,) * 2, (9, EOS)), Example((), (EOS,))]
    batch = collate(examples, 4, EOS, "block")
    rows = batch.rows([0], CPU)
    assert (rows.start, rows.tokens.shape) == (8, (1, 12))
    rows = batch.rows([1, 2], CPU)
    assert rows.start == 0
    assert rows.tokens.equal(batch.tokens[1:, :4])
    assert rows.target.equal(batch.target[1:, :4])


def test_every_example_comes_once_an_epoch_and_a_stream_starts_anywhere():
    examples = [Example((i,), (EOS,)) for i in range(10)]
    stream = epochs(examples, batch_size=4, seed=0)
    whole = list(islice(stream(0), 10))  # batch 2 spans two epochs
    drawn = [example.prompt[0] for batch in whole for example in batch]
    epoch = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(ids) == list(range(10)) for ids in epoch)
    assert epoch[0] != epoch[1]
    assert list(islice(stream(3), 7)) == whole[3:]
    assert list(islice(epochs(examples, 4, seed=1)(0), 1)) != whole[:1]


def test_examples_are_stored_as_they_came():
    stored, examples = Examples(), [Example((1, 2), (3,), "a"), Example((), (4, 5), "b")]
    for example in examples:
        stored.append(example, example.name)
    assert list(stored) == examples
    before = stored.fingerprint
    stored.append(examples[0], "c")
    assert stored.fingerprint != before


# The recipe's own batches


def test_ring_walk_batches_have_one_shape():
    stream = batches(ring_walk_examples(4, 16, 0), 16, 8)
    for examples in islice(stream, 20):
        batch = collate(examples, 16, EOS, "block")
        assert batch.tokens.shape[0] == 8
        assert batch.editable.sum(1).unique().numel() == 1
        assert batch.tokens[batch.editable].ne(EOS).any()
        for row in batch.tokens[:, 16:].tolist():
            end = row.index(EOS)
            assert len(row) - end <= 16, "a block beyond the one with the first eos is not learnt"
            assert set(row[end:]) == {EOS}


def test_repeated_examples_come_once_an_epoch():
    examples = [Example((i,), (EOS,)) for i in range(10)]
    stream = repeated_examples(examples, seed=0)
    epoch = [[next(stream).prompt[0] for _ in range(10)] for _ in range(2)]
    assert sorted(epoch[0]) == sorted(epoch[1]) == list(range(10))
    assert epoch[0] != epoch[1]
