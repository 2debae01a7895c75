"""The task: right derivations pass the grader, wrong ones fail, held-out walks stay held out."""

import random
from itertools import islice

import pytest

from dmax_kernels.ring_walk import task
from dmax_kernels.ring_walk.data import ring_walk_examples
from dmax_kernels.ring_walk.distill import draw_problems
from dmax_kernels.ring_walk.stages import BASE, BASE_BLOCK16, DISTILLATION
from dmax_kernels.ring_walk.task import Problem, grade, render_prompt, render_response

PROBLEM = Problem(start=9, moves=("u2", "d1"), order=(1, 0))
RIGHT = "s1 9 u2 goes to 1 ; s2 then we 1 d1 is 0 . so the answer is 0 <eos>"


def test_a_prompt_lists_the_moves_in_its_order_and_is_padded_on_the_left():
    assert " ".join(render_prompt(PROBLEM)) == "s2 d1 s1 u2 start 9 ="
    words = task.decode(task.encode_prompt(PROBLEM, 16))
    assert words == ["?"] * 9 + render_prompt(PROBLEM)


@pytest.mark.parametrize("num_moves", [1, 4, 6, 8])
def test_what_the_renderer_writes_the_grader_accepts(num_moves):
    rng = random.Random(0)
    for _ in range(200):
        problem = task.draw_problem(rng, num_moves)
        response = render_response(problem, rng)
        assert grade(problem, response) == task.Grade(answer=True, strict=True)
        assert task.decode(task.encode(response)) == response


@pytest.mark.parametrize(
    ("response", "answer", "strict"),
    [
        (RIGHT, True, True),
        (RIGHT + " s1 garbage after the end", True, True),
        (RIGHT.replace(" <eos>", ""), True, False),  # not ended
        (RIGHT.replace("to 1 ;", "to 2 ;"), True, False),  # a place wrong, the answer right
        (RIGHT.replace("we 1 d1", "we 2 d1"), True, False),  # the place before a move wrong
        (RIGHT.replace("d1 is", "u1 is"), True, False),  # not the problem's move
        (RIGHT.replace("is 0 <", "is 1 <"), False, False),  # the answer wrong
        (RIGHT.replace("s1", "s2", 1), True, False),  # label out of order
        (RIGHT.replace("goes to", "goes"), True, False),  # half a phrase
        (RIGHT.replace("goes to", "goes to to"), True, False),
        (RIGHT.replace(" ; ", " "), True, False),  # no separator
        (RIGHT.replace("so the answer is", "so answer is"), True, False),
        (RIGHT.replace("0 <eos>", "0 0 <eos>"), True, False),
        ("0 <eos>", True, False),  # the answer alone
        ("<eos>", False, False),
        ("", False, False),
    ],
)
def test_the_grader_sees_every_kind_of_mistake(response, answer, strict):
    assert grade(PROBLEM, response.split()) == task.Grade(answer=answer, strict=strict)


def test_a_derivation_of_another_problem_is_refused():
    rng = random.Random(1)
    for _ in range(100):
        problem = task.draw_problem(rng, 6)
        other = Problem((problem.start + 1) % 10, problem.moves, problem.order)
        assert not grade(problem, render_response(other, rng)).strict


def test_held_out_walks_occur_in_no_training_data():
    evaluated = {(p.start, p.moves) for n in (4, 6) for p in task.evaluation_problems(300, n)}
    assert len(evaluated) == 600
    assert all(task.is_held_out(*walk) for walk in evaluated)
    for problem in draw_problems(DISTILLATION):
        assert not task.is_held_out(problem.start, problem.moves)
    for stage in (BASE_BLOCK16, BASE):
        config = stage.config
        stream = ring_walk_examples(stage.num_moves, config.block_length, config.seed)
        for example in islice(stream, 3000):
            words = [word for word in task.decode(example.prompt) if word != "?"]
            pairs = dict(zip(words[:-3:2], words[1:-3:2], strict=True))
            moves = tuple(pairs[f"s{i + 1}"] for i in range(stage.num_moves))
            assert (int(words[-2]), moves) not in evaluated


def test_the_same_seed_gives_the_same_problems():
    assert task.evaluation_problems(20) == task.evaluation_problems(20)
    assert task.evaluation_problems(20) != task.evaluation_problems(20, seed=1)
    # Written out to catch a change of the generator, which would void the shipped figures.
    first = task.evaluation_problems(1)[0]
    assert " ".join(render_prompt(first)) == "s4 u1 s1 u1 s6 d1 s2 d1 s3 u2 s5 d1 start 2 ="


def test_phrases_are_drawn_with_the_probabilities_of_the_tables():
    for table in (
        task.CONNECTIVES,
        task.VERBS,
        task.SEPARATORS,
        task.FINALS,
    ):
        assert sum(probability for _, probability in table) == pytest.approx(1)
    rng = random.Random(2)
    drawn = [render_response(PROBLEM, rng)[-3] for _ in range(4000)]
    # "... answer 0 <eos>" with probability 0.5; four standard errors are 0.032.
    assert drawn.count("answer") / 4000 == pytest.approx(0.5, abs=0.032)


def test_errors():
    with pytest.raises(ValueError, match=r"encode: words must be in the vocabulary.*'fish'"):
        task.encode(["s1", "fish"])
    with pytest.raises(ValueError, match=r"num_moves must be in 1\.\.8, got 9"):
        task.draw_problem(random.Random(0), 9)
    with pytest.raises(ValueError, match=r"count must be at most \d+ for 1 moves, got 41"):
        task.evaluation_problems(41, 1)
