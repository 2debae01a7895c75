"""Where there is no GPU: Triton kernels run under Triton's interpreter, `gpu` tests are skipped.

Every draw is seeded, and the last lines say what ran: versions, instruction sets, what was skipped.
"""

import importlib.metadata
import importlib.util
import os
import platform
import random
from collections import Counter

# The test processes share the cores, but each has at least two threads, since one thread takes
# different paths; waiting threads sleep instead of spinning. Read when torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 1) // workers)))

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test module


# The same examples in each run; `make fuzz` looks for new ones. `make gpu` may have no hypothesis.
# On a GPU, whose minutes are few and where each try may compile a kernel, a failing example is not
# shrunk.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import Phase, settings

    settings.register_profile(
        "ours",
        derandomize="DMAX_FUZZ_EXAMPLES" not in os.environ,
        phases=[Phase.explicit, Phase.reuse, Phase.generate] + [Phase.shrink] * (not HAS_GPU),
    )
    settings.load_profile("ours")


def seed():
    random.seed(0)
    torch.manual_seed(0)


def pytest_collectstart(collector):
    seed()  # a module may draw when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed()  # fixtures


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed()  # the same draws, whichever tests and shared fixtures came before


@pytest.fixture(scope="module")
def one_thread():
    """For modules whose tensors are tiny: a second thread only costs its synchronisation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_configure(config):
    """Triton 3.6's interpreter turns one-element arrays into Python ints, which numpy 2.4 made an
    error (triton-lang/triton issue 9171; 3.7 squeezes them): said once, not by every test."""
    if HAS_GPU:
        return
    triton, numpy = (version_of(package) for package in ("triton", "numpy"))
    if triton and (3, 0) <= triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError(
            f"Triton {triton[0]}.{triton[1]}'s interpreter does not run with numpy "
            f"{numpy[0]}.{numpy[1]}: install triton>=3.7 or numpy<2.4"
        )


def version_of(package):
    """(major, minor), or () where it is not installed."""
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return ()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):  # minutes long: only when asked for
        slow = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(slow)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU (make gpu)")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# After such an error no call of this process reaches the GPU any more
LOST_GPU = ("CUDA error", "device-side assert", "cudaErrorIllegal", "Triton Error [CUDA]")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """One of several test processes that lost its GPU ends; a new one takes over its tests."""
    if HAS_GPU and report.failed and any(text in str(report.longrepr) for text in LOST_GPU):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)


def pytest_terminal_summary(terminalreporter):
    """What ran and what did not, in the last lines."""
    stats, line = terminalreporter.stats, terminalreporter.write_line
    packages = ("torch", "triton", "transformers", "numpy")
    line(f"versions: Python {platform.python_version()}, {', '.join(map(installed, packages))}")
    if sets := instruction_sets(stats.get("passed", ())):
        line(f"instruction sets of the CPU that ran: {'; '.join(sets)}")
    skipped = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in stats.get("skipped", ()))
    for reason, count in skipped.most_common():
        line(f"NOT RUN, {count} test{'s' * (count > 1)}: {reason}")


def installed(package):
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def instruction_sets(passed):
    """This process's, and those that test_instruction_sets.py ran in processes of their own."""
    try:
        from dmax_kernels import libraries
    except ImportError:  # not built: every test has said it
        return []
    lower = [
        report.nodeid.partition("[")[2].rstrip("]")
        for report in passed
        if "test_instruction_sets.py::" in report.nodeid and report.when == "call"
    ]
    return [*lower, libraries.instruction_set()]
