"""NAP in miniature: its texts, one tiny run of an arm, and what the tables and verdicts say."""

import json
import pickle
import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from dmax_kernels.decoding.extra import commit_steps, nap_generate
from dmax_kernels.files import save_json
from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.nap import arms, claims, command, data, report, scorer

PROBLEMS = task.evaluation_problems(40, data.NUM_MOVES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arm", data.ARMS)
def test_every_response_fills_its_length_and_names_the_right_place(arm):
    for problem in PROBLEMS:
        words = data.response_words(arm, problem, "a")
        assert len(words) == data.RESPONSE
        assert data.final_place(data.encode(words)) == str(problem.places[-1])
        if arm in data.PATHS:
            canvas = data.canvas_of(data.PATHS[arm])
            ids = torch.tensor(data.encode(words))
            tags = canvas.slot < 0
            assert canvas.length == data.RESPONSE
            assert torch.equal(ids[tags], canvas.token[tags])  # what decoding clamps
            assert not set(data.TAGS) & {data.WORDS[i] for i in ids[~tags].tolist()}


def test_all_arms_tell_the_same_traces():
    for problem in PROBLEMS[:10]:
        said = {arm: data.response_words(arm, problem, "a") for arm in data.ARMS}
        slots = data.canvas_of(3).read(data.encode(said["nap_3"]))
        traces = [[data.WORDS[i] for i in slot if i != task.EOS_ID] for slot in slots]
        chained = [word for trace in traces for word in trace]
        assert said["long_chain"][: len(chained)] == chained
        first = data.canvas_of(1).read(data.encode(said["nap_1"]))[0]
        assert [data.WORDS[i] for i in first if i != task.EOS_ID] == traces[0]
        assert task.grade(problem, said["base"]).strict


def test_a_tenth_of_the_traces_slips_and_stays_wrong():
    rng = random.Random(0)
    wrong = total = 0
    for problem in PROBLEMS * 10:
        for trace in data.draw_traces(problem, rng):
            total += 1
            wrong += not task.grade(problem, [*trace, task.EOS]).strict
    assert wrong / total == pytest.approx(data.NOISY, abs=0.03)
    problem = PROBLEMS[0]
    slipped = data.SlippedProblem(**vars(problem), at=2, by=3)
    off = [(b - a) % 10 for a, b in zip(problem.places, slipped.places, strict=True)]
    assert off == [0, 0, 0, 3, 3, 3]


def test_training_problems_are_distinct_and_never_held_out():
    examples = data.training_examples("nap_2", 64, 0)
    assert len({example.prompt for example in examples}) == 64
    assert examples == data.training_examples("nap_2", 64, 0)
    assert examples != data.training_examples("nap_2", 64, 1)
    for example in examples:
        problem = task.parse_prompt(" ".join(data.WORDS[i] for i in example.prompt))
        assert not task.is_held_out(problem.start, problem.moves)
        assert len(example.prompt) + len(example.response) == arms.BLOCK


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s1 4 u2 is 6 ; answer 6 <eos> 3", "6"),
        ("<think1> answer 6 </think1> <summary> done with 7 <eos> 1 </summary> 2", "7"),
        ("answer 6 <eos> <summary> 8 </summary> 2", "8"),
        ("<summary> <eos> 3", None),
        ("so the", None),
    ],
)
def test_the_answer_is_the_last_place_of_the_summary_or_of_the_text(text, place):
    assert data.final_place(data.encode(text.split())) == place


def test_the_model_starts_from_the_shipped_one():
    """Old words have the logits of the shipped model, new ones 0: their rows of the head are 0."""
    model, shipped = arms.new_model(), arms.load_checkpoint("base")[0]
    ids = torch.randint(4, len(task.WORDS), (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids).logits for each in (model, shipped))
    torch.testing.assert_close(ours[..., : len(task.WORDS)], theirs)
    assert (ours[..., len(task.WORDS) :] == 0).all()


def test_an_arm_is_trained_decoded_and_kept(tmp_path, monkeypatch):
    """Two steps and two problems: the record of each decoding, which a second call reads back."""
    monkeypatch.setattr(arms, "BUDGETS", (64,))
    monkeypatch.setattr(arms, "ORDERED", 1)
    settings = arms.Settings(2, 2, 2, 8, 2, "cpu")
    arms.train(settings, arms.Task("base", 0), tmp_path)
    outcome = arms.run_task(settings, tmp_path, arms.Task("nap_3", 5))
    assert [(c["order"], c["tokens_per_step"]) for c in outcome["cells"]] == [
        ("parallel", 64),
        ("ao", 64),
    ]
    for cell in outcome["cells"]:
        assert len(cell["right"]) == 2
        decoded = [j for step in cell["first_order"] for j in step]
        slots = data.canvas_of(3).slot
        due = [j for j in range(data.RESPONSE) if cell["order"] == "ao" or slots[j] >= 0]
        assert sorted(decoded) == due
        steps = 3 if cell["order"] == "ao" else 4  # 156 in the paths, then 6 in the summary
        assert cell["forwards"] == len(cell["first_order"]) == steps
        assert 0 < cell["fair_arness"] <= cell["arness"] <= 1
    before = (tmp_path / "outcomes/nap_3-5.json").read_text()
    assert json.loads(before) == arms.run_task(settings, tmp_path, arms.Task("nap_3", 5))
    with pytest.raises(ValueError, match="nap_3-5.json must belong to a run with steps = 3"):
        arms.run_task(replace(settings, steps=3), tmp_path, arms.Task("nap_3", 5))


def test_commits_are_those_of_the_trace():
    model, canvas = arms.new_model(), data.canvas_of(3)
    prompts = [torch.tensor(data.prompt_ids(problem)) for problem in PROBLEMS[:2]]
    output = nap_generate(model, prompts, canvas, tokens_per_step=40, logprobs=True, trace=True)
    traced = [commit_steps(row) for row in output.trace.to_dict()["rows"]]
    moved = [[[j - arms.LENGTH for j in step] for step in row] for row in traced]
    assert arms.commits(output) == moved


def outcome_of(arm, seed, shares, problems=200):
    """A made-up outcome: the first share of problems is right in each decoding."""
    cells = []
    for how in arms.decodings(arm):
        share, arness = shares[arm, how.order]
        right = [i < share * problems for i in range(problems)]
        cells.append(
            {
                "order": how.order,
                "tokens_per_step": how.tokens_per_step,
                "right": right,
                "forwards": -(-170 // how.tokens_per_step),
                "arness": arness,
                "fair_arness": arness / 2,
                "first_order": [[0], [1]],
            }
        )
    return {"arm": arm, "seed": seed, "cells": cells}


SHARES = {
    ("base", "ao"): (0.5, 0.6),
    ("base", "parallel"): (0.2, 0.1),
    ("base", "random"): (0.1, 0.02),
    ("base", "ar"): (0.5, 1.0),
    ("long_chain", "ao"): (0.6, 0.7),
    ("long_chain", "random"): (0.6, 0.02),
    ("long_chain", "ar"): (0.6, 1.0),
    ("nap_1", "parallel"): (0.9, 0.3),
    ("nap_2", "parallel"): (0.85, 0.2),
    ("nap_3", "parallel"): (0.8, 0.1),
    ("nap_3", "ao"): (0.8, 0.5),
}
SCORED = {
    "steps": 1,
    "problems": 4,
    **{
        kind: {name: [value, 0.01] for name in ("per_token", "seq_dep", "first_gain", "last_gain")}
        for kind, value in (("chain", 0.4), ("parallel", 0.1))
    },
}


def test_tables_and_verdicts_say_what_the_outcomes_say():
    outcomes = [outcome_of("base", 0, SHARES)]
    outcomes += [outcome_of(arm, seed, SHARES) for seed in (1, 0) for arm in data.ARMS[1:]]
    found = report.report(outcomes, SCORED)
    cells = {(c["arm"], c["order"], c["tokens_per_step"]): c for c in found["measured"]}
    assert cells["nap_3", "parallel", 4]["answer"] == 0.8
    assert cells["nap_3", "parallel", 4]["problems"] == 400  # two seeds
    assert cells["nap_3", "parallel", 4]["by_seed"] == [0.8, 0.8]
    assert cells["base", "ao", 1]["problems"] == 200
    assert cells["base", "ao", 1]["fair_arness"] == 0.3
    verdicts = {(c["where"], c["claim"].split(" ")[0]): c["verdict"] for c in found["claims"]}
    assert verdicts == {
        ("Table 3", "NAP"): "holds",
        ("Table 3", "what"): "undecided",  # the same gain at every budget
        ("Table 4", "without"): "holds",
        ("Table 4", "with"): "undecided",  # equal
        ("Table 5", "three"): "fails",
        ("Figure 2", "a"): "holds",
        ("Table 1", "AO"): "holds",
        ("Table 2", "training"): "holds",
        ("Figure 1", "NAP"): "holds",
        ("Figures 3 and 7", "paths"): "holds",
    }
    for table in found["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    accuracy = {row[0]: row[1:] for row in found["tables"][0]["rows"]}
    assert accuracy["NAP, 3 paths, parallel-forced"] == ["80.0 [75.8, 83.6]"] * 6
    assert accuracy["base, random"] == ["10.0 [6.6, 14.9]", *[""] * 5]
    order = {tuple(row[:2]): row[2:] for row in found["tables"][1]["rows"]}
    assert order["NAP, 3 paths, parallel-forced", "4"] == ["0.10", "0.05"]
    text = report.as_text(found)
    assert "[fails] Table 5: three paths are more accurate than one" in text
    assert "-10.0 points (-1" in text
    assert json.loads(json.dumps(found)) == found


def test_a_growing_gain_is_found():
    outcomes = [outcome_of("base", 0, SHARES)]
    outcomes += [outcome_of(arm, 0, SHARES) for arm in data.ARMS[1:]]
    for cell in next(o for o in outcomes if o["arm"] == "long_chain")["cells"]:
        if cell["tokens_per_step"] == 4:
            cell["right"] = [i < 20 for i in range(200)]
    gap = claims.gap_claim(claims.gather(outcomes))
    assert (gap["verdict"], gap["comparisons"][0]["points"]) == ("holds", 50.0)


def test_segments_are_moves_or_paths():
    rng = random.Random(3)
    chain = scorer.segments_of("chain", PROBLEMS[0], rng)
    assert [segment[0] for segment in chain] == ["s1", "s2", "s3", "s4", "s5"]
    assert chain[-1][-1] in task.PLACES
    paths = scorer.segments_of("parallel", PROBLEMS[0], rng)
    assert [path[0] for path in paths] == ["s1"] * 3


def test_the_scorer_measures_both_kinds(monkeypatch):
    monkeypatch.setattr(scorer, "TEXTS", 16)
    monkeypatch.setattr(scorer, "BATCH", 8)
    monkeypatch.setattr(scorer, "SCORED", 3)
    found = scorer.measure(2, "cpu")
    for kind in scorer.KINDS:
        assert all(len(found[kind][name]) == 2 for name in ("seq_dep", "per_token", "last_gain"))


def test_other_processes_can_receive_the_work(tmp_path):
    """What a process runs must not come from __main__, which it cannot import."""
    settings = arms.Settings(1, 1, 1, 1, 1, "cpu")
    setup = pickle.loads(pickle.dumps(partial(command.work, settings, tmp_path, 1)))
    save_json(tmp_path / "kept.json", {"steps": 1, "kept": True})
    (tmp_path / "outcomes").mkdir()
    (tmp_path / "kept.json").rename(tmp_path / "outcomes" / "scorer.json")
    assert setup(0)(command.SCORER)["kept"]
