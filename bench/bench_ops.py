"""``pytest bench --benchmark-enable``: every candidate of every CPU case by pytest-benchmark.

It times each candidate alone and keeps its own statistics, to compare two states of one op:
``--benchmark-autosave``, then ``--benchmark-compare``. Ratios to quote come from bench/run.py.
"""

import pytest

from bench.cases import CANDIDATES, CPU_CASES

PARAMETERS = [
    pytest.param(case, candidate, id=f"{case.name}-{candidate}")
    for case in CPU_CASES
    for candidate in CANDIDATES
]


@pytest.mark.parametrize(("case", "candidate"), PARAMETERS)
def test_benchmark(benchmark, case, candidate):
    work = case.work()
    benchmark.group = case.name

    def setup():
        if work.restore:
            work.restore()

    benchmark.pedantic(work.candidates[candidate], setup=setup, rounds=10, warmup_rounds=1)
