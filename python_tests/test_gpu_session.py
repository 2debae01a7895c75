"""What a session on a GPU does around its kernels, run without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_session
from bench.fake_gpu import FakeGpu
from bench.gpu_calls import SPLITS
from bench.gpu_session import LIBRARIES, Session
from bench.session_logs import outcomes, sanitizer_verdict
from dmax_kernels.bench import gpu_timer
from dmax_kernels.bench.timer import Machine, measure
from dmax_kernels.bench.workload import Work

ROOT = Path(__file__).parent.parent


def test_dry_run_walks_the_stages_and_keeps_their_files(tmp_path):
    command = [sys.executable, "bench/gpu_session.py", "--dry-run", "build", "smoke", "key"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "session.json").read_text())["stages"]
    assert list(stages) == ["build", "smoke", "key"]
    assert stages["smoke"]["found"] == "every op as on the CPU"
    assert stages["key"]["found"] == {"cases": 10, "failed": []}
    record = json.loads((tmp_path / "gpu-no-gpu.json").read_text())
    assert {"read GB/s", "copy GB/s", "matrix TFLOP/s", "left out"} <= set(record)
    row = record["results"][0]
    assert row["empty kernel"]["calls"] == gpu_timer.NODES
    assert {"us", "least us", "cold us", "hot us", "run", "peak bytes"} <= set(
        row["candidates"]["fused"]
    )
    assert "not installed" in row["without a time"].values()


def session(tmp_path, monkeypatch, **options):
    monkeypatch.setenv("OUT", str(tmp_path))
    facts = {"device": "no GPU", "compute capability": "9.0"}
    return Session(facts, **{"seconds": 60, "dry_run": True, "carried": False, **options})


def test_only_a_failed_build_ends_the_session(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    ran = []

    def stage(name, code):
        def run(self):
            ran.append(name)
            if code is None:
                raise OSError("broken")
            return code, name

        monkeypatch.setattr(Session, name, run)

    for name in gpu_session.STAGES:
        stage(name, 0)
    stage("key", None)
    stage("test", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--dry-run"])
    assert gpu_session.main() == 1
    assert ran == list(gpu_session.STAGES)
    stages = json.loads((tmp_path / "session.json").read_text())["stages"]
    assert stages["key"]["found"] == "OSError: broken"
    assert "failed: key, test" in capsys.readouterr().out
    ran.clear()
    stage("build", 1)
    assert gpu_session.main() == 1
    assert ran == ["build"]


def test_a_command_is_ended_when_the_time_is_over(tmp_path, monkeypatch):
    """A command is ended with what it started; what it had printed is kept."""
    short = session(tmp_path, monkeypatch, seconds=1)
    script = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    assert short.run("x.log", [sys.executable, "-c", script]) == gpu_session.TIMED_OUT
    assert short.text("x.log") == "begun\n"


def test_the_bench_begins_anew_where_a_case_took_the_gpu(tmp_path, monkeypatch):
    short = session(tmp_path, monkeypatch)
    codes = iter([gpu_session.LOST_CONTEXT, gpu_session.LOST_CONTEXT, 0])
    commands = []

    def run(log, arguments):
        commands.append(arguments)
        (tmp_path / log).write_text("")
        return next(codes)

    monkeypatch.setattr(short, "run", run)
    assert short.bench()[0] == 0
    assert len(commands) == 3
    assert all("--append" in arguments for arguments in commands)


def test_every_way_to_split_rows_is_timed(tmp_path, monkeypatch):
    code, found = session(tmp_path, monkeypatch).tune()
    assert code == 0
    assert set(found["top1_confidence 32"]) == {"chosen", "cluster"} | set(map(str, SPLITS))
    assert "cluster" not in found["spd_step_ 512"]


def test_libraries_are_carried_or_built(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "LIBRARIES", tmp_path)
    assert gpu_session.libraries_serve("9.0", carried=True) == ""
    for name in ("libdmax_cuda.so", "libdmax_cpu.so"):
        (tmp_path / name).touch()
    (tmp_path / "libdmax_cuda.json").write_text('{"architectures": ["80", "90a"]}')
    assert gpu_session.libraries_serve("9.0", carried=False).endswith("sm_80 90a")
    assert gpu_session.libraries_serve("10.0", carried=True) == ""
    os.utime(tmp_path / "libdmax_cuda.so", (0, 0))  # older than the sources
    assert gpu_session.libraries_serve("9.0", carried=False) == ""
    assert gpu_session.libraries_serve("9.0", carried=True)
    assert LIBRARIES.name == "lib"


def test_outcomes_of_a_log_that_was_cut_off():
    log = """python_tests/test_x.py::test_a[b c] PASSED        [ 10%]
python_tests/test_x.py::test_a[b d] FAILED        [ 20%]
[gw0] [ 30%] PASSED python_tests/test_y.py::test_b
[gw1] [ 40%] SKIPPED python_tests/test_y.py::test_c[1 2]
[gw1] [ 50%] ERROR python_tests/test_y.py::test_d
python_tests/test_z.py::test_"""
    assert outcomes(log) == {
        "passed": 2,
        "failed": 1,
        "error": 1,
        "skipped": 1,
        "not passed": ["python_tests/test_x.py::test_a[b d]", "python_tests/test_y.py::test_d"],
    }


@pytest.mark.parametrize(
    ("log", "verdict"),
    [
        ("calls: done\n========= ERROR SUMMARY: 0 errors\n", "clean"),
        ("calls: done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", "clean"),
        ("calls: done\n========= ERROR SUMMARY: 2 errors\n", "SUMMARY: 2 errors"),
        ("calls: done\n", "calls: done"),  # no summary: nothing was checked
        ("========= Error: Device not supported\n", "refused by this machine"),
        ("Segmentation fault\n", "cut off or failed"),
    ],
)
def test_verdict_of_the_sanitizer(log, verdict):
    assert verdict in sanitizer_verdict(log)
    assert ("clean" in sanitizer_verdict(log)) == (verdict == "clean")


def test_files_that_a_gpu_runs():
    marked, triton = (set(names) for names in gpu_session.gpu_tests())
    for name in ("gpu_values", "gpu_runtime", "triton_gpu", "fuzz", "decoding_batch"):
        assert f"python_tests/test_{name}.py" in marked
    assert {name for name in triton if "linear" in name}
    assert not marked & triton


def gpu_measure(works, **options):
    made = iter(works)
    return measure(lambda: next(made), Machine("cpu", gpu=FakeGpu()), repetitions=3, **options)


def test_calls_go_round_copies_of_the_inputs(monkeypatch):
    """Twenty calls a graph, each copy in turn; where inputs are overwritten, each copy once."""
    calls = []

    def work(index, restore=None):
        run = {"eager": lambda: None, "fused": lambda: calls.append(index)}
        return Work(run, bytes_moved=64 << 20, restore=restore)

    result = gpu_measure([work(index) for index in range(4)])
    assert result["copies"] == 4
    assert result["candidates"]["fused"]["calls"] == gpu_timer.NODES
    assert calls[-24:-4] != sorted(calls[-24:-4])
    assert [calls.count(index) > 10 for index in range(4)] == [True] * 4
    restored = []
    result = gpu_measure([work(i, restore=lambda i=i: restored.append(i)) for i in range(4)])
    assert result["candidates"]["fused"]["calls"] == 4
    assert set(restored) == set(range(4))


def test_a_candidate_that_fails_on_the_gpu_costs_only_itself():
    work = Work(
        {"eager": lambda: 1 / 0, "numpy": lambda: None, "fused": lambda: None}, bytes_moved=1 << 30
    )
    result = gpu_measure([work])
    assert result["without a time"] == {"eager": "failed: ZeroDivisionError: division by zero"}
    assert result["best peer"] == "numpy"
    assert "speed-up" not in result["candidates"]["fused"]


def test_roofs_of_the_machine_are_of_reads_and_of_copies():
    machine = Machine("cpu", gpu=FakeGpu())
    read, write = (Work({}, bytes_moved=1 << 20, writes=writes) for writes in (False, True))
    assert machine.seconds_to_move(read) == (1 << 20) / machine.read_bandwidth
    assert machine.seconds_to_move(write) == (1 << 20) / machine.copy_bandwidth
    assert machine.matrix_rate(torch.float32) > 0


def test_the_stand_in_has_what_the_timer_calls():
    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_")} - {"flush_bytes"}

    assert public(FakeGpu) == public(gpu_timer.Gpu)
