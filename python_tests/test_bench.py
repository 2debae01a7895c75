"""The benchmarks: candidates do the same work; the command, the page and the pictures."""

import json

import pytest
import torch

from bench import report
from bench.cases import CANDIDATES, cases_of
from bench.run import earlier_record, run_cases
from dmax_kernels.__main__ import main
from dmax_kernels.bench.timer import Machine
from dmax_kernels.bench.workload import WORKLOADS, Inputs

# Sizes small enough to run at once, for every workload there is
SMALL = {
    "spd_generate": (2, 32),
    "oput_step": (2,),
    "prefix_promote": (3, 8),
    "hybrid_embedding": (5, 16, 40),
    "hybrid_embedding_backward": (5, 16, 40),
    "soft_embedding": (3, 16, 100),
    "spd_step_": (2, 4, 64, 16),
    "edit_step_": (2, 4, 64),
    "linear_top1_confidence": (3, 16, 100),
    "linear_sample_tokens": (3, 16, 100),
    "linear_token_logprobs": (3, 16, 100, 4),
    "linear_oput_loss": (3, 16, 100),
    "oput_loss": (3, 64),
    "oput_loss_and_grad_": (3, 64),
    "draw_with_entropy": (3, 64),
    "top1_confidence": (3, 64),
    "topk_confidence": (3, 64, 2),
    "row_statistics": (3, 64),
    "token_logprobs": (3, 64, 4),
    "sample_tokens": (3, 64),
    "top1_partial": (3, 64, 4),
    "sample_partial": (3, 256, 4),
    "top_p_cut": (3, 64),
    "sample_top_k": (3, 64),
    "sample_top_p": (3, 64),
    "sample_filtered": (3, 64),
    "penalties": (3, 64),
    "transform_logits_": (3, 64),
    "sample_top_k_top_p": (3, 64),
}
RANDOM = {
    "sample_tokens",
    "linear_sample_tokens",
    "draw_with_entropy",
    "sample_top_k",
    "sample_top_p",
    "sample_filtered",
    "sample_top_k_top_p",
}  # eager draws from a different generator


def flat(result):
    """A candidate's tensors, tokens ahead of probabilities (eager returns them as max does)."""
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    return sorted(tensors, key=lambda x: x.is_floating_point())


@pytest.mark.parametrize("name", WORKLOADS)
def test_candidates_do_the_same_work(name):
    work = WORKLOADS[name].work(Inputs(torch.float32), SMALL[name])
    assert next(iter(work.candidates)) == CANDIDATES[0]
    assert "fused" in work.candidates
    results = {}
    for candidate, run in work.candidates.items():
        if work.restore:
            work.restore()
        results[candidate] = run()
    if name in RANDOM or results["eager"] is None:  # in place: tested elsewhere
        return
    if name == "oput_loss_and_grad_":  # eager returns gradients, ours the losses
        return
    for eager, fused in zip(flat(results["eager"]), flat(results["fused"]), strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_name_workloads(device):
    cases = cases_of(device=device)
    assert len({case.name for case in cases}) == len(cases)
    assert {case.workload for case in cases} <= set(WORKLOADS)


def test_peers_that_cannot_run_are_named_and_not_timed(monkeypatch):
    """An absent package and a call that fails each give a reason and no candidate."""
    from bench import peers

    assert {each.workload for each in peers.PEERS} <= {*WORKLOADS, "linear_oput_loss"}
    work = WORKLOADS["top1_confidence"].work(Inputs(torch.float32), (3, 64))
    before = set(work.candidates)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    absent = peers.add_peers(work, "top1_confidence")
    assert len(absent) == 3
    assert set(absent.values()) == {"not installed"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(peers, "PEERS", [peers.Peer("x", "x", "x", lambda **_: 1 / 0)])
    assert peers.add_peers(work, "x") == {"x": "failed: ZeroDivisionError: division by zero"}
    assert set(work.candidates) == before


def test_row_count_of_the_dispatch():
    from bench.linear_ways import CHUNKED, FUSED, least_chunked_rows

    def rows(*faster):
        return [
            {
                "case": "linear_top1_confidence float32",
                "op": "linear_top1_confidence",
                "sizes": (2**i,),
                "candidates": {way: {"us": 1 if way == fast else 2} for way in (FUSED, CHUNKED)},
            }
            for i, fast in enumerate(faster)
        ]

    def least(dtype, *faster):
        return least_chunked_rows(rows(*faster), "linear_top1_confidence", dtype)

    assert least("float32", FUSED, CHUNKED, FUSED, CHUNKED, CHUNKED) == 8
    assert least("float32", CHUNKED, FUSED) is None
    assert least("float32", CHUNKED, CHUNKED) == 1
    assert least("bfloat16", CHUNKED, CHUNKED) is None
    assert least_chunked_rows(rows(CHUNKED), "linear_sample_tokens", "float32") is None


def test_a_record_is_continued_only_at_its_commit_and_on_its_machine(tmp_path):
    machine = {"commit": "1a", "GPU": "", "CPU": "this one"}
    record = {"machine": machine, "results": [{"case": "x"}], "scaling": [1]}
    path = tmp_path / "record.json"
    assert earlier_record(path, machine) == {}
    path.write_text(json.dumps(record))
    assert earlier_record(path, machine | {"date": "later"}) == record
    for key in machine:
        assert earlier_record(path, machine | {key: "another"}) == {}


def test_command_prints_a_table_and_writes_json(capsys, tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--shape", "3x64", "--repetitions", "5", "--json", str(path)]
    assert main(["bench", "top1_confidence", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "top1_confidence, 3 x 64 (rows x vocab), bfloat16, flat" in printed
    assert "speed-up" in printed
    result = json.loads(path.read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert set(result["candidates"]) == set(CANDIDATES)
    assert main(["bench"]) == 0
    assert "rows x vocab = 32x157184" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["softmax"], "no benchmark of 'softmax'; there are: "),
        (["top1_confidence", "--shape", "3y4"], "--shape must be positive numbers below"),
        (["top1_confidence", "--shape", "0x4"], "--shape must be positive numbers below"),
        (["top1_confidence", "--shape", "1x" + "9" * 19], "--shape must be positive numbers below"),
        (["top1_confidence", "--shape", "1x2x3"], "has the sizes rows x vocab, got 1x2x3"),
        (["top1_confidence", "--repetitions", "2"], "--repetitions must be at least 5, got 2"),
    ],
)
def test_mistakes_read_as_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pictures_and_page(tmp_path):
    from bench.cases import Case
    from bench.pictures import draw

    case = Case("top1_confidence", (8, 65536), speedup_target=1e9, bandwidth_target=1e-9)
    rows = run_cases([case], Machine(), repetitions=5, compiled=())
    rows[0]["share of bandwidth"] = 0.5  # whatever this machine does just now
    machine = {"CPU": "a CPU", "CPU threads": 2, "GPU": "none", "commit": "abc", "date": "today",
               "torch": "2", "triton": "3", "python": "3.11",
               "CPU instruction set": "avx2"}  # fmt: skip
    scaling = [{"op": "top1_confidence", "axis": "rows",
                "points": [{"rows": n, "eager": 2.0 * n, "fused": n} for n in (1, 4)]}]  # fmt: skip
    record = {"machine": machine, "results": rows, "scaling": scaling}
    paths = list(draw(record, tmp_path / "x"))
    assert [path.name for path in paths] == ["x-speedup.png", "x-roofline.png", "x-scaling.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    page = report.render({"x.json": record})
    assert "No GPU figure is measured so far" in page
    assert "speed-up 1e+09: missed by 100%; share of bandwidth 1e-09: met" in page


def test_picture_of_memory(tmp_path):
    from bench.pictures import draw_memory

    record = next(record for record in report.records().values() if "memory" in record)
    draw_memory(record, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_page_is_up_to_date():
    assert (report.RESULTS / "README.md").read_text() == report.render(report.records())
