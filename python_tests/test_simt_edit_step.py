"""The CUDA kernel of edit_step_ under emulation: splits, arrivals, block sizes."""

import pytest
import simt_build
import simt_ops
import torch
from cases import DTYPES
from edit_cases import EDIT_OPTIONS, copy_of, edit_case
from simt_ops import CHOSEN, H200, ONE_MULTIPROCESSOR
from tolerances import assert_close

from dmax_kernels import reference
from dmax_kernels.ops.edit_step import EDIT_RULES

every_rule = pytest.mark.parametrize("rule", EDIT_RULES)


def assert_steps(logits, state, steps=3, gpu=H200, **options):
    """Steps on one state, as a captured graph replays them: counters reset, done rows stay."""
    expected, actual = copy_of(state), copy_of(state)
    options = EDIT_OPTIONS | options
    for _ in range(steps):
        reference.edit_step_(logits, **expected, **options)
        before = simt_build.load().take_launch_count()
        simt_ops.edit_step_(logits, **actual, **options, gpu=gpu)
        assert simt_build.load().take_launch_count() == 1, before
        for name in ("token", "prediction", "post_edit_steps", "done"):
            assert torch.equal(actual[name], expected[name]), name
        assert_close(actual["confidence"], expected["confidence"], 1e-5)
    return actual


@every_rule
@pytest.mark.parametrize("block", [1, 31, 33])
def test_block_sizes(rule, block):
    logits, state = edit_case(4, block, seed=block)
    after = assert_steps(logits, state, rule=rule, max_post_edit_steps=0)
    assert after["done"].sum() >= 2


# More positions than the block of the last phase has threads
@pytest.mark.parametrize("rule", ["joint_threshold", "dinfer_threshold"])
def test_long_block(rule):
    logits, state = edit_case(1, 270)
    assert_steps(logits, state, steps=1, rule=rule, tokens_per_step=5)


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(rule, dtype):
    logits, state = edit_case(3, 6, dtype=dtype, seed=3)
    assert_steps(logits, state, rule=rule)


# Rows split among blocks: three phases, each entered by the last block of the one before. Blocks
# that come late must not decide from what the row's last block has changed.
@every_rule
@pytest.mark.parametrize(
    ("name", "seed", "resident"),
    [("in order", 0, 1), ("reversed", 0, 4), ("random", 0, 4), ("random", 1, 1), ("random", 2, 3)],
)
def test_split_rows_in_any_order(rule, name, seed, resident):
    logits, state = edit_case(3, 4, vocab=16500, dtype=torch.bfloat16, seed=9)
    with simt_ops.order(name, seed, resident):
        assert_steps(logits, state, steps=4, rule=rule)
    assert CHOSEN[-1].splits == 2


def test_without_split():
    logits, state = edit_case(3, 4, vocab=16500, dtype=torch.bfloat16, seed=9)
    assert_steps(logits, state, gpu=ONE_MULTIPROCESSOR, rule="joint_threshold")
    assert CHOSEN[-1].splits == 1


def test_thresholds_per_row():
    logits, state = edit_case(4, 6, seed=5)
    thresholds = torch.tensor([[0.2, 0.4], [0.4, 0.2], [2.0, 2.0], [-1.0, -1.0]])
    for rule in EDIT_RULES:
        assert_steps(logits, state, thresholds=thresholds, rule=rule)
