"""The rules' formulas: cases worked by hand, the rules' own words, and what all share."""

import math

import pytest
import torch

from dmax_kernels.decoding import (
    Autoregressive,
    EntropyBound,
    Factor,
    Hierarchical,
    LocalLeap,
    Margin,
    ParallelForced,
    Prophet,
    Random,
    SchED,
    Seen,
    TopN,
    Uniform,
)
from dmax_kernels.decoding.extra import Canvas
from dmax_kernels.decoding.extra.nap import CanvasRule
from dmax_kernels.decoding.rules import ABLATIONS

NAN = math.nan
THRESHOLD = ABLATIONS["threshold"]


pytestmark = pytest.mark.usefixtures("one_thread")


def promote(rule, confidence, masked, tau_dec=0.5, **statistics):
    seen = Seen(masked, confidence=confidence, tau_dec=tau_dec, **statistics)
    return rule.promote(seen)


def positions(promoted):
    return torch.nonzero(promoted).flatten().tolist()


def mask_of(pattern):
    """'xx.x' -> [True, True, False, True]"""
    return torch.tensor([mark == "x" for mark in pattern])


def f32(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_threshold_by_hand():
    c, masked = f32(0.9, 0.96, 0.99, 0.5, NAN), mask_of("xx.xx")
    assert positions(promote(THRESHOLD, c, masked, 0.95)) == [1]
    assert positions(promote(THRESHOLD, c, masked, 0.4)) == [0, 1, 3]
    assert positions(promote(THRESHOLD, c, masked, 0.5)) == [0, 1]  # above, not at it
    assert positions(promote(THRESHOLD, c, masked, 0.96)) == [1]  # none above: the best
    two_rows = promote(THRESHOLD, c.expand(2, -1), masked, torch.tensor([[0.95], [0.4]]))
    assert [positions(row) for row in two_rows] == [[1], [0, 1, 3]]


def test_factor_by_hand():
    # (n + 1)(1 - c_(n)) = 2 * 0.02, 3 * 0.1, 4 * 0.2, 5 * 0.5
    c, masked = f32(0.9, 0.5, 0.98, 1.0, 0.8), mask_of("xxx.x")
    for factor, expected in ((0.01, [2]), (0.04, [2]), (0.2, [2]), (0.31, [0, 2])):
        assert positions(promote(Factor(factor), c, masked)) == expected
    assert positions(promote(Factor(1.0), c, masked)) == [0, 2, 4]
    assert positions(promote(Factor(3.0), c, masked)) == [0, 1, 2, 4]
    assert positions(promote(Factor(1.5), f32(0.5, 0.5), mask_of("xx"))) == [0]  # 1.5 < 1.5


def test_hierarchical_by_hand():
    # Runs of masked positions: 0-2, 4-5, 7
    c = f32(0.5, 0.6, 0.3, 0.9, 0.3, 0.35, 1.0, 0.1)
    masked = mask_of("xxx.xx.x")
    assert positions(promote(Hierarchical(0.2), c, masked, 0.95)) == [1, 5]
    assert positions(promote(Hierarchical(0.0), c, masked, 0.95)) == [1, 5, 7]
    assert positions(promote(Hierarchical(0.2), c, masked, 0.45)) == [0, 1, 5]
    assert positions(promote(Hierarchical(0.7), c, masked, 0.95)) == [1]  # the row's best
    tied = promote(Hierarchical(0.2), f32(0.5, 0.5, 0.5, 0.5), mask_of("xx.x"), 0.9)
    assert positions(tied) == [0, 3]
    tied = promote(Hierarchical(0.5), f32(0.5, 0.5, 0.5, 0.5), mask_of("xx.x"), 0.9)
    assert positions(tied) == [0]
    torn = promote(Hierarchical(0.2), f32(NAN, 0.4, NAN, NAN), mask_of("xx.x"), 0.9)
    assert positions(torn) == [1]


def test_top_n_by_hand():
    c, masked = f32(0.2, 0.9, 0.2, 0.7, NAN), mask_of("x.xxx")
    for n, expected in ((1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 2, 3]), (9, [0, 2, 3])):
        assert positions(promote(TopN(n), c, masked)) == expected


def test_autoregressive_by_hand():
    c = f32(NAN, 0.1, 0.9, NAN, 0.3)
    assert positions(promote(Autoregressive(1), c, mask_of("xx.xx"))) == [0]
    assert positions(promote(Autoregressive(2), c, mask_of("xx.xx"))) == [0, 1]
    assert positions(promote(Autoregressive(4), c, mask_of("xx.xx"))) == [0, 1]  # NaN at 3
    assert positions(promote(Autoregressive(2), c, mask_of("...xx"))) == [3, 4]


def test_entropy_bound_by_hand():
    # Ascending: 0.01 (3), 0.04 (0), 0.06 (4), 0.5 (1); sums before: 0, 0.01, 0.05, 0.11
    entropy, masked = f32(0.04, 0.5, 0.0, 0.01, 0.06, NAN), mask_of("xx.xxx")
    for bound, expected in ((0.0, [3]), (0.01, [0, 3]), (0.1, [0, 3, 4]), (9.0, [0, 1, 3, 4])):
        assert positions(promote(EntropyBound(bound), None, masked, entropy=entropy)) == expected
    assert positions(promote(EntropyBound(9.0), None, mask_of("xx"), entropy=f32(0.1, NAN))) == [0]


def test_margin_by_hand():
    c, runner_up = f32(0.5, 0.5, 0.9, NAN), f32(0.1, 0.45, 0.05, NAN)
    masked = mask_of("xxxx")
    assert positions(promote(Margin(), c, masked, 0.3, runner_up=runner_up)) == [0, 2]
    assert positions(promote(Margin(), c, mask_of(".x.x"), 0.3, runner_up=runner_up)) == [1]


def test_local_leap_by_hand():
    c = f32(0.7, 0.6, 0.95, 0.3, 0.7, 0.7, 0.7, NAN)
    for radius, expected in ((0, [2]), (1, [2]), (2, [0, 2, 4]), (3, [0, 2, 4, 5])):
        assert positions(promote(LocalLeap(0.6, radius), c, mask_of("xxxxxxxx"), 0.9)) == expected
    # A token is no anchor, and without one the best goes alone
    assert positions(promote(LocalLeap(0.6, 9), c, mask_of("xx.xxxxx"), 0.9)) == [0]


def gap_of(confidence, gap):
    """The runner-up's probability at a difference of logits."""
    return confidence * math.exp(-gap)


def exit_of(rule, gaps, pattern, step=0, editable="xxxx"):
    c = f32(0.4, 0.6, 0.5, 0.3)
    runner_up = f32(*(gap_of(p, gap) for p, gap in zip(c.tolist(), gaps, strict=True)))
    statistics = {
        "runner_up": runner_up,
        "step": torch.tensor(step, dtype=torch.int32),
        "editable": mask_of(editable),
    }
    return positions(promote(rule, c, mask_of(pattern), **statistics))


def test_prophet_by_hand():
    # Four positions, one per step: the bars of the steps are 7.5, 5, 2.5 and 2.5
    for step, bar in enumerate((7.5, 5, 2.5, 2.5)):
        wide, narrow = [bar - 1, bar + 1.01, bar, bar], [bar - 1, bar + 0.99, bar, bar]
        assert exit_of(Prophet(), wide, "xx.x", step) == [0, 1, 3]
        assert exit_of(Prophet(), narrow, "xx.x", step) == [1]
    # The mean is over editable positions; they alone are steps
    assert exit_of(Prophet(), [9, 9, 9, 0], "xx..", 0, "xxx.") == [0, 1]
    assert exit_of(Prophet(), [0, 5.1, 5.1, 0], ".xx.", 0, ".xx.") == [1, 2]  # t / T = 1 / 2
    assert exit_of(Prophet(2), [4, 4, 4, 4], "xxxx", 0) == [1, 2]  # the same: 5 is not reached
    assert exit_of(Prophet(2), [2.6] * 4, "xxxx", 1) == [0, 1, 2, 3]
    assert exit_of(Prophet(early=1), [1.1, 1.1, 1.1, NAN], "xxxx") == [1]


def test_sched_by_hand():
    half = {"linear": 4.0, "cosine": 4.0, "exponential": 2 + 4 * math.exp(-1)}
    for schedule, bar in half.items():
        rule = SchED(schedule=schedule, high=6, low=2, rate=2)
        assert exit_of(rule, [bar + 0.01] * 4, "xxxx", 1) == [0, 1, 2, 3]
        assert exit_of(rule, [bar - 0.01] * 4, "xxxx", 1) == [1]
    quarter = {"linear": 5.0, "cosine": 2 + 2 * (1 + math.sqrt(0.5))}
    for schedule, bar in quarter.items():
        rule = SchED(schedule=schedule, high=6, low=2)
        assert exit_of(rule, [bar + 0.01] * 4, "x.xx", 0) == [0, 2, 3]
        assert exit_of(rule, [bar - 0.01] * 4, "x.xx", 0) == [2]


def test_sched_reads_the_masked_positions_alone():
    rule = SchED(schedule="linear", high=6, low=2)
    assert exit_of(rule, [5.1, 0, 5.1, 5.1], "x.xx", 0) == [0, 2, 3]
    assert exit_of(rule, [4.9, 99, 4.9, 4.9], "x.xx", 0) == [2]


def test_defaults_are_those_of_the_methods_own_code():
    assert Prophet() == Prophet(1, 7.5, 5.0, 2.5)
    assert SchED() == SchED(1, "cosine", 7.5, 2.5, 4.0)
    assert LocalLeap() == LocalLeap(0.75, 4)


def test_a_vanishing_runner_up_is_a_gap_of_87():
    """Its probability underflows: the mean must not become infinite."""
    runner_up = f32(0, 0.3, 0.3, 0.3)
    seen = {"runner_up": runner_up, "editable": mask_of("xxxx"), "step": torch.tensor(0)}
    c = f32(1, 0.3, 0.3, 0.3)
    assert positions(promote(Prophet(early=21.8), c, mask_of("xxxx"), **seen)) == [0, 1, 2, 3]
    assert positions(promote(Prophet(early=21.9), c, mask_of("xxxx"), **seen)) == [0]


def test_uniform_by_hand():
    c = f32(0.1, NAN, 0.0, 0.9)
    assert positions(promote(Uniform(), c, mask_of("xxx."))) == [0, 2]
    assert positions(promote(Uniform(), c, mask_of(".x.."))) == [1]


def test_parallel_forced_by_hand():
    c = f32(1, 0.2, 0.9, 1, 0.1, 0.5, 0.3, 0.99, 0.98)

    def forced(n, c, masked, editable="xxxxxxxxx", slots=2):
        rule = ParallelForced(n, slots)
        return positions(promote(rule, c, mask_of(masked), editable=mask_of(editable)))

    # Two equal slots of 4 and 5 positions, in turns
    assert [forced(n, c, "xxxxxxxxx") for n in (1, 2, 3)] == [[0], [0, 7], [0, 3, 7]]
    # The first slot has had two turns: two go to the second, and then they alternate
    assert forced(1, c, ".xx.xxxxx") == [7]
    assert forced(3, c, ".xx.xxxxx") == [2, 7, 8]
    assert forced(5, c, ".xx.xxxxx") == [1, 2, 5, 7, 8]
    # A slot that is full leaves its turns to the other one; a prompt's tail had none
    assert forced(3, c, "....xx.xx") == [5, 7, 8]
    assert forced(1, c, "..xxxxxxx", editable="..xxxxxxx") == [3]
    # A NaN waits for all numbers
    torn = f32(NAN, NAN, 0.2, 0.1, 0.1, NAN)
    editable = "xxxxxx"
    assert forced(9, torn, "xxxxxx", editable, slots=3) == [2, 3, 4]
    assert forced(9, torn, "xx...x", editable, slots=3) == [0]


def test_a_budget_is_carried_over_between_slots():
    """Two tokens per step for three slots of 4: 1 and 2, then 3 and 1, then 2 and 3, and so on."""
    masked, editable = mask_of("xxxxxxxxxxxx"), mask_of("xxxxxxxxxxxx")
    generator = torch.Generator().manual_seed(0)
    slots = []
    for _ in range(6):
        c = torch.rand(12, generator=generator)  # new at each step, as predictions are
        promoted = promote(ParallelForced(2, 3), c, masked, editable=editable)
        slots += sorted(j // 4 for j in positions(promoted))
        masked = masked & ~promoted
    assert slots == [0, 1, 0, 2, 1, 2] * 2
    assert not masked.any()


def test_a_canvas_by_hand():
    # Header, slot 0 (2 positions), header, slot 1 (3 positions), summary (2 positions)
    canvas = Canvas.build([[5], [6]], [2, 3], [], 2)
    c = f32(1, 0.2, 0.9, 1, 0.1, 0.5, 0.3, 0.99, 0.98)
    reasoning = mask_of(".xx.xxxxx")

    def forced(c, masked, tokens_per_step, row=1):
        # Two prompts: the other one's canvas has one path, of 8 positions
        other = Canvas.build([[]], [8], [], 1)
        rule = CanvasRule.lay_out([other, canvas], [0, 0], 9, tokens_per_step, masked.device)
        seen = {"editable": reasoning[None], "row": torch.tensor([row])}
        return positions(promote(rule, c[None], masked[None], **seen)[0])

    assert [forced(c, reasoning, n) for n in (1, 2, 3)] == [[2], [2, 5], [1, 2, 5]]
    assert forced(c, reasoning, 4) == [1, 2, 5, 6]
    assert forced(c, reasoning, 9) == [1, 2, 4, 5, 6]  # and not the summary
    assert forced(c, mask_of("....x..xx"), 2) == [4]
    assert forced(c, mask_of(".......xx"), 1) == [7]
    assert forced(c, mask_of(".......xx"), 2) == [7, 8]
    assert forced(c, reasoning, 2, row=0) == [2, 7]
    torn = f32(1, NAN, NAN, 1, 0.1, NAN, 0.3, 1, 1)
    assert forced(torn, reasoning, 3) == [4, 6]
    assert forced(torn, mask_of(".xx..x.xx"), 3) == [1]


def draw(c, masked, n, seed=0, step=0, token=None):
    """Rows of `step` many draws, or one draw."""
    step = torch.as_tensor(step, dtype=torch.int32)
    masked = masked.expand(*step.shape, -1)
    token = torch.zeros(masked.shape, dtype=torch.int64) if token is None else token
    return promote(Random(n, seed), c.expand(masked.shape), masked, step=step, token=token)


def test_random_repeats_itself_and_draws_uniformly():
    masked, c = mask_of("xxxxx.xx"), torch.full((8,), 0.5)
    draws = draw(c, masked, 2, step=torch.arange(2000))
    assert torch.equal(draws, draw(c, masked, 2, step=torch.arange(2000)))
    assert torch.equal(draws[7], draw(c, masked, 2, step=7))
    assert (draws.sum(dim=-1) == 2).all()
    counts = draws.sum(dim=0).tolist()
    assert counts.pop(5) == 0
    # 2 of 7 positions: 571 times each, with a standard deviation of 20
    assert all(abs(count - 4000 / 7) < 100 for count in counts), counts


def test_random_differs_by_seed_step_and_the_rows_predictions():
    masked, c = torch.ones(64, dtype=torch.bool), torch.full((64,), 0.5)
    token = torch.arange(64)
    drawn = [
        positions(draw(c, masked, 8, seed, step, salt))
        for seed, step, salt in (
            (0, 0, token),
            (1, 0, token),
            (2**40, 0, token),
            (0, 1, token),
            (0, 0, token + 1),
        )
    ]
    assert len(set(map(tuple, drawn))) == len(drawn)


def test_random_never_takes_a_nan_while_others_are_masked():
    c = torch.where(torch.arange(8) < 6, NAN, 0.5)
    masked = mask_of("xxxxxxxx")
    for step in range(20):
        assert positions(draw(c, masked, 3, step=step)) == [6, 7]
        assert positions(draw(c, mask_of(".xxx...."), 3, step=step)) == [1]
