"""The command line: info, help, and mistakes."""

import json
import subprocess
import sys

import pytest
import torch

import dmax_kernels
from dmax_kernels import _gpus, _library
from dmax_kernels.__main__ import main


def test_info_lists_every_op(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for op in filter(str.islower, dmax_kernels.ops.__all__):  # RowStatistics is a result
        assert op in text or not hasattr(torch.ops.dmax, op)  # which is composed of ops
    assert "CPU instruction set" in text


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dmax_kernels"] == dmax_kernels.__version__
    assert facts["backends"]["top1_confidence"]["cpu"] == "c++"
    sets = ("avx512, amx", "avx512, bf16", "avx512", "avx2", "portable")
    assert facts["CPU instruction set"] in sets


@pytest.mark.parametrize(
    ("gpus", "served_by_triton"),
    [([(7, 5)], True), ([(9, 0)], True), ([(8, 9)], False), ([(9, 0), (8, 0)], False), ([], False)],
)
def test_a_library_for_other_gpus_leaves_them_to_triton(
    gpus, served_by_triton, tmp_path, monkeypatch
):
    """Built for sm_80 alone; the GPUs are made up, and loading is only recorded."""
    library = tmp_path / _library.CUDA_LIBRARY
    library.write_bytes(b"")
    library.with_suffix(".json").write_text(json.dumps({"architectures": ["80"]}))
    loaded = []
    monkeypatch.setattr(_gpus, "capabilities", lambda: gpus)
    monkeypatch.setattr(_library, "_find", lambda name: library)
    monkeypatch.setattr(_library.torch.ops, "load_library", loaded.append)
    libraries = _library.Libraries()
    _library._load_cuda(libraries)
    assert loaded == ([] if served_by_triton else [str(library)])
    assert (libraries.cuda is None) == served_by_triton
    if served_by_triton:
        here = f"sm_{gpus[0][0]}{gpus[0][1]}"
        assert libraries.cuda_reason == (
            f"built for sm_80, but the GPU here is {here}: install again on this machine"
        )


# A major version's code runs from its minor version up; "a" names one version alone
@pytest.mark.parametrize(
    ("architecture", "runs"),
    [("80", {(8, 0), (8, 6), (8, 9)}), ("86", {(8, 6), (8, 9)}), ("90a", {(9, 0)}),
     ("90", {(9, 0)}), ("100", {(10, 0), (10, 3)}), ("120", {(12, 0)})],
)  # fmt: skip
def test_architectures_that_a_gpu_runs(architecture, runs):
    every = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}
    assert {each for each in every if _gpus.runs_on(architecture, each)} == runs


def test_asking_for_gpus_does_not_initialise_cuda():
    code = (
        "import torch; from dmax_kernels import _gpus; gpus = _gpus.capabilities();"
        "print(isinstance(gpus, list) and not torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_mistakes_end_in_one_line():
    for arguments in (["decode"], ["info", "--wrong"], []):
        result = subprocess.run(
            [sys.executable, "-m", "dmax_kernels", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert "error:" in result.stderr
