"""The host executor itself: correct kernels must pass, and every planted bug must be caught.

A kernel of csrc/simt/planted_bugs.cuh comes in a right and in a wrong version. The executor catches
misuse of barriers and masks; poisoned shared memory shows a missing barrier as NaN;
AddressSanitizer, UBSan and ThreadSanitizer catch the rest, each in a process of its own.
"""

import re

import pytest
from simt_build import load, run_sanitized

ORDERS = (("in order", 0), ("reversed", 0), ("random", 0), ("random", 1))
RESIDENT = (1, 2, 4)
REVERSED_INPUT = [float(64 - i) for i in range(64)]


@pytest.fixture
def simt():
    module = load()
    yield module
    module.set_options("in order", 0, 1)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("resident", RESIDENT)
def test_right_kernels(simt, order, seed, resident):
    simt.set_options(order, seed, resident)
    assert simt.run_planted("collectives", True) == [528.0] * 32 + [1552.0] * 32
    assert simt.run_planted("missing_syncthreads", True) == REVERSED_INPUT
    assert simt.run_planted("leaves_cluster_early", True, 4, 4)[:4] == [2.0, 3.0, 4.0, 1.0]
    assert simt.run_planted("leaves_cluster_early", True, 6, 2)[:6] == [2.0, 1.0] * 3
    writes = ("writes_to_a_block_before_it_begins", True)
    assert simt.run_planted(*writes, 4, 4)[:4] == [4.0, 1.0, 2.0, 3.0]
    assert simt.run_planted(*writes, 6, 2)[:6] == [2.0, 1.0] * 3
    pushes = ("pushes_without_release", True)
    assert simt.run_planted(*pushes, 4, 4)[:4] == [4.0, 1.0, 2.0, 3.0]
    pushes = ("pushes_again_too_early", True)
    assert simt.run_planted(*pushes, 4, 4)[:4] == [8.0, 2.0, 4.0, 6.0]
    # the sum of 1..7, and a counter that has reset itself
    assert simt.run_last_block_sums(2, 7) == (28.0, 0)


def test_random_order_repeats_with_its_seed(simt):
    """A kernel with a race gives the same wrong answer for the same seed."""
    answers = []
    for seed in (3, 3, 4, 5, 6):
        simt.set_options("random", seed, 1)
        answers.append(repr(simt.run_planted("missing_syncthreads", False)))
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


def test_missing_syncthreads_reads_poison(simt):
    wrong = 0
    for order, seed in ORDERS:
        simt.set_options(order, seed, 1)
        wrong += any(x != x for x in simt.run_planted("missing_syncthreads", False))
    assert wrong >= 2  # some orders happen to be right, which is why several run


def test_block_that_leaves_its_cluster_too_early(simt):
    simt.set_options("in order", 0, 4)
    out = simt.run_planted("leaves_cluster_early", False, 4, 4)[:4]
    assert any(x != x for x in out)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
@pytest.mark.parametrize("resident", RESIDENT)
def test_write_to_a_block_before_it_begins(simt, order, seed, resident):
    simt.set_options(order, seed, resident)
    with pytest.raises(RuntimeError, match="map_shared_rank before the cluster's first barrier"):
        simt.run_planted("writes_to_a_block_before_it_begins", False, 4, 2)


# name -> what the report must say, with the file and the line; which lane comes first may differ
MISUSE = {
    "divergent_syncthreads": "wait at different __syncthreads",
    "barrier_after_exit": "threads 32-63 have left the kernel",
    "wrong_shuffle_mask": "not in its own mask|outside mask 0xffff",
    "shuffle_from_outside_the_mask": "reads lane 16, which is outside mask 0xffff",
    "lane_missing_from_syncwarp": "deadlock: nothing can end these waits",
}


@pytest.mark.parametrize("name", MISUSE)
@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_misuse_is_reported(simt, name, order, seed):
    simt.set_options(order, seed, 2)
    simt.run_planted(name, True)
    with pytest.raises(RuntimeError) as error:
        simt.run_planted(name, False)
    text = str(error.value)
    assert re.search(MISUSE[name], text)
    assert re.search(r"planted_bugs\.cuh:\d+", text)


def test_deadlock_report_names_every_group_of_threads(simt):
    with pytest.raises(RuntimeError) as error:
        simt.run_planted("lane_missing_from_syncwarp", False)
    text = str(error.value)
    assert re.search(r"threads 0-4 wait in __syncwarp with mask 0xffffffff \(.*:\d+\)", text)
    assert re.search(r"threads 5-5 wait at __syncthreads \(.*:\d+\)", text)
    assert re.search(r"threads 32-63 wait at __syncthreads", text)


@pytest.mark.parametrize(
    ("blocks", "cluster"), [(0, 1), (3, 2)], ids=["no blocks", "part of a cluster"]
)
def test_impossible_grid(simt, blocks, cluster):
    with pytest.raises(RuntimeError, match="no such grid"):
        simt.run_planted("collectives", True, blocks, cluster)


# name -> what the sanitizer prints
BAD_ADDRESSES = {
    "static_shared_off_by_one": r"index 64 out of bounds for type 'float \[64\]'",
    "global_out_of_bounds": r"heap-buffer-overflow(.|\n)*planted_bugs\.cuh:\d+",
    "dynamic_shared_overrun": r"use-after-poison(.|\n)*planted_bugs\.cuh:\d+",
    "misaligned_vector": r"misaligned address",
}


@pytest.mark.parametrize("name", BAD_ADDRESSES)
def test_bad_addresses_under_asan_and_ubsan(name):
    right = run_sanitized("asan", "simt_planted_child.py", name, "1", "in order")
    assert right.returncode == 0, right.stderr
    wrong = run_sanitized("asan", "simt_planted_child.py", name, "0", "in order")
    assert wrong.returncode != 0
    assert re.search(BAD_ADDRESSES[name], wrong.stderr), wrong.stderr


# (kernel, version, blocks and cluster size if not 1): a missing fence, a fence in a thread that
# neither wrote nor counts, no barrier; in a cluster, an arrival without release, and no barrier
# between the reads of one value and the write of the next
RACES = (
    ("last_block_sums", "0"),
    ("last_block_sums", "1"),
    ("missing_syncthreads", "0"),
    ("pushes_without_release", "0", "4", "4"),
    ("pushes_again_too_early", "0", "4", "4"),
)
NO_RACES = (
    ("last_block_sums", "2"),
    ("missing_syncthreads", "1"),
    ("collectives", "1"),
    ("pushes_without_release", "1", "4", "4"),
    ("pushes_again_too_early", "1", "4", "4"),
)


@pytest.mark.parametrize("order", ["in order", "random"])
def test_races_under_tsan(order):
    for name, version, *grid in RACES:
        wrong = run_sanitized("tsan", "simt_planted_child.py", name, version, order, *grid)
        assert "data race" in wrong.stderr, (name, version, wrong.stderr)
        assert wrong.returncode != 0
    for name, version, *grid in NO_RACES:
        right = run_sanitized("tsan", "simt_planted_child.py", name, version, order, *grid)
        assert right.returncode == 0, (name, version, right.stderr)
