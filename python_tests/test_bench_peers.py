"""Peers on a CPU do the op's work, ratios are to the best of them, and a run keeps going."""

import time

import pytest
import torch
from test_bench import SMALL, flat

from bench.cases import CANDIDATES, FILTERED, Case, cases_of, is_quick, key_cases
from bench.cpu_peers import CPU_PEERS, add_cpu_peers
from bench.loops import ModelClock, busy_core, loop_shares, share_outside
from bench.peer_checks import why_off
from bench.run import Budget, print_table, run_cases
from dmax_kernels.bench import timer
from dmax_kernels.bench.draws import sorted_and_masked
from dmax_kernels.bench.timer import Machine
from dmax_kernels.bench.workload import OURS, WORKLOADS, Inputs

DRAWS = ("sample_tokens", "sample_partial", "linear_sample_tokens", "draw_with_entropy", *FILTERED)


@pytest.mark.parametrize("name", sorted({each.workload for each in CPU_PEERS} - {*DRAWS}))
def test_peers_do_the_same_work(name):
    """Results, or what is left in the tensors by a function that works in place."""
    work = WORKLOADS[name].work(Inputs(torch.float32), SMALL[name])
    add_cpu_peers(work, name, compiled=False)
    peers = sorted(set(work.candidates) - {"eager", *OURS})
    assert peers
    found = {}
    for candidate in ("fused", *peers):
        if work.restore:
            work.restore()
        results = work.candidates[candidate]()
        found[candidate] = [x.clone() for x in flat(results)] if results is not None else []
        if work.restore:
            found[candidate] += [x.clone() for x in work.given.values() if torch.is_tensor(x)]
    for candidate in peers:
        for result, expected in zip(found[candidate], found["fused"], strict=True):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DRAWS)
def test_peers_draw_by_the_probabilities(name):
    """4,000 rows of the same logits: how often each token came, and what is reported of the row."""
    rows = 4000
    sizes = {"sample_partial": (1, 8, 2), "linear_sample_tokens": (1, 4, 8)}.get(name, (1, 8))
    work = WORKLOADS[name].work(Inputs(torch.float32), sizes)
    given = work.given
    if "shards" in given:
        logits = torch.cat([part for part, _ in given["shards"]], dim=-1)
        given["shards"] = [(part.repeat(rows, 1), start) for part, start in given["shards"]]
    elif "hidden" in given:
        logits = given["hidden"] @ given["weight"].t()
        given["hidden"] = given["hidden"].repeat(rows, 1)
    else:
        logits = given["logits"]
        given["logits"] = logits.repeat(rows, 1)
    probability = torch.softmax(logits[0], dim=-1)
    if "options" in given:
        row = sorted_and_masked(logits[:1], **given["options"])
        probability = torch.softmax(row[0], dim=-1)
    before = set(work.candidates)
    add_cpu_peers(work, name, compiled=False)
    for candidate in sorted(set(work.candidates) - before):
        results = work.candidates[candidate]()
        if name == "draw_with_entropy":
            largest, token, told = results
            assert (largest == logits.argmax()).all()
            expected = torch.special.entr(probability).sum().expand(rows)
        else:
            token, told = results
            expected = probability[token]
        share = token.bincount(minlength=8) / rows
        torch.testing.assert_close(share, probability, rtol=0, atol=0.035)
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sample_tokens", "linear_sample_tokens", *FILTERED])
def test_a_gpu_peers_draws_are_checked(name):
    """Ours pass; the most probable tokens alone, and tokens by no law at all, do not."""
    sizes = (64, 16, 500) if name == "linear_sample_tokens" else (64, 500)
    work = WORKLOADS[name].work(Inputs(torch.float32), sizes)
    given = work.given
    token = work.candidates["fused"]()[0]
    assert why_off(name, given, None, token.int()) == ""
    logits = given["logits"] if "logits" in given else given["hidden"] @ given["weight"].t()
    wrong = (logits.argmax(-1), torch.arange(64) * 7, token + 500, token - 500)
    assert all(why_off(name, given, None, each) for each in wrong)


@pytest.mark.parametrize("name", ["top1_confidence", "linear_top1_confidence", "topk_confidence"])
def test_a_gpu_peers_rows_are_checked(name):
    work = WORKLOADS[name].work(Inputs(torch.float32), SMALL[name])
    eager = work.candidates["eager"]()
    token, confidence = work.candidates["fused"]()
    assert why_off(name, work.given, eager, (confidence, token.int())) == ""
    assert why_off(name, work.given, eager, (eager[0], eager[1].roll(1, 0)))
    assert why_off(name, work.given, eager, (eager[0] * 1.1, eager[1]))


@pytest.mark.parametrize("name", ["oput_loss", "linear_oput_loss"])
def test_a_gpu_peers_gradients_are_checked(name):
    work = WORKLOADS[name].work(Inputs(torch.float32), SMALL[name])
    eager = work.candidates["eager"]()
    assert why_off(name, work.given, eager, work.candidates["fused"]()) == ""
    assert why_off(name, work.given, eager, eager[:-1])
    assert why_off(name, work.given, eager, (*eager[:-1], eager[-1] * 0.9))


def test_a_peer_whose_results_are_off_is_not_timed(monkeypatch):
    from bench import peers

    work = WORKLOADS["top1_confidence"].work(Inputs(torch.float32), (3, 64))
    work.candidates = {"eager": work.candidates["eager"]}
    listed = [
        peers.Peer("x", "right", "torch", lambda logits: lambda: logits.softmax(-1).max(-1)),
        peers.Peer("x", "wrong", "torch", lambda logits: lambda: logits.softmax(-1).min(-1)),
        peers.Peer("x", "failing", "torch", lambda logits: lambda: 1 / 0),
    ]
    monkeypatch.setattr(peers, "PEERS", listed)
    absent = peers.add_peers(work, "x")
    assert sorted(absent) == ["failing", "wrong"]
    assert absent["wrong"].startswith("off: probability result differs by")
    assert sorted(work.candidates) == ["eager", "right"]
    work.candidates = {}
    assert peers.add_peers(work, "x", absent) == absent  # known already: not called again
    assert sorted(work.candidates) == ["right"]


def test_ratio_to_the_best_peer():
    """By the medians and by the least times; neither the op itself nor its ways are peers."""

    def row(us, least):
        return {"us": us, "least us": least}

    rows = {
        "eager": row(8.0, 6.0),
        "numpy": row(3.0, 2.9),
        "compiled": row(4.0, 2.0),
        "top1_confidence": row(0.1, 0.1),
        "fused": row(2.0, 1.0),
    }
    found = timer.ratios(rows)
    assert found == {
        "best peer": "numpy",
        "to best peer": 1.5,
        "to best peer, least times": 2.0,
    }
    assert rows["fused"]["speed-up"] == 4.0
    assert timer.ratios({"fused": row(1.0, 1.0)}) == {}


def test_candidates_that_fail_are_named_and_not_timed():
    failed = {}
    candidates = {"eager": lambda: None, "fused": lambda: None, "peer": lambda: 1 / 0}
    assert set(timer.compare(candidates, repetitions=3, failed=failed)) == {"eager", "fused"}
    assert failed == {"peer": "failed: ZeroDivisionError: division by zero"}
    with pytest.raises(ZeroDivisionError):
        timer.compare({"fused": lambda: 1 / 0}, failed=failed)


def test_a_run_saves_every_case_and_goes_on_after_one_that_fails(capsys):
    cases = [
        Case("top1_confidence", (3, 64)),
        Case("topk_confidence", (3, 64, 65)),  # k exceeds the vocabulary
        Case("prefix_promote", (3, 8), "float32"),
    ]
    saved = []
    rows = run_cases(
        cases, Machine(), repetitions=3, compiled=(),
        save=lambda rows, left_out: saved.append((len(rows), len(left_out))),
    )  # fmt: skip
    assert saved == [(1, 2), (2, 1), (3, 0)]
    assert ["failed" in row for row in rows] == [False, True, False]
    print_table(rows)
    printed = capsys.readouterr().out
    assert "of 2 cells are below 1.0 times the best peer" in printed
    assert "geometric mean over the best peer" in printed
    assert run_cases(cases, Machine(), budget=Budget(0)) == []


def test_threads_are_set_for_each_cell_and_put_back():
    before = torch.get_num_threads()
    rows = run_cases(
        [Case("prefix_promote", (3, 8), "float32")], Machine(),
        repetitions=3, compiled=(), threads=(2, 1),
    )  # fmt: skip
    assert [row["threads"] for row in rows] == [2, 1]
    assert torch.get_num_threads() == before


def test_cells_are_every_op_dtype_rows_and_values():
    for name in ("top1_confidence", "spd_step_", "oput_loss"):
        assert len({case.name for case in cases_of([name])}) == 2 * 3 * 2
    assert len({case.name for case in cases_of(["linear_top1_confidence"])}) == 2 * 3
    quick = {case.workload for case in cases_of() if is_quick(case)}
    assert quick == {case.workload for case in cases_of() if "linear" not in case.workload} - {
        "oput_step",
        "spd_generate",
        "soft_embedding",
    }
    assert len(key_cases()) == 10


def test_a_core_taken_by_another_process():
    rows = busy_core(vocab=4096, repetitions=3)
    assert [set(row["busy"]) for row in rows] == [set(CANDIDATES)] * 2
    assert {row["held"] for row in rows} <= {True, False}


def test_share_of_a_loop_outside_the_model():
    """Forward and backward are counted; a wait after them counts as outside."""
    model = torch.nn.Linear(8, 8)

    def run():
        model(torch.ones(2, 8)).sum().backward()
        time.sleep(0.05)

    with ModelClock(model) as clock:
        run()
    assert clock.forward > 0
    assert clock.backward > 0
    assert not model._forward_hooks
    run()
    outside = share_outside(model, run, repetitions=3)["share outside the model"]
    assert 0.5 < outside <= 1


def test_the_loops_shares_are_shares():
    rows = loop_shares(prompts=2, repetitions=1)
    assert {(row["loop"], row["ops"]) for row in rows} == {
        (loop, ops) for loop in ("decoding", "training") for ops in ("reference", "fused")
    }
    assert all(0 < row["share outside the model"] < 1 for row in rows)
