"""The command line: info, help, and mistakes."""

import json
import subprocess
import sys

import dmax_kernels
from dmax_kernels.__main__ import main


def test_info_lists_every_op(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for op in filter(str.islower, dmax_kernels.ops.__all__):  # RowStatistics is a result
        assert op in text
    assert "CPU instruction set" in text


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dmax_kernels"] == dmax_kernels.__version__
    assert facts["backends"]["top1_confidence"]["cpu"] == "c++"
    assert facts["CPU instruction set"] in ("avx512", "avx2", "portable")


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
