"""The demo: its numbers, its words, its files, and the mistakes a user can make."""

import json

import pytest

from dmax_kernels.__main__ import main
from dmax_kernels.models.checkpoint import SHIPPED_DIR, load_checkpoint
from dmax_kernels.ring_walk import claims, evaluate, page, record, rules_table, tables, task
from dmax_kernels.ring_walk.evaluate import TAUS, Cell, Result
from dmax_kernels.ring_walk.export import build_model, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One whole run on two problems: exit code, printed text, and the folder with its files."""
    folder = tmp_path_factory.mktemp("demo")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        # The real sizes take seconds and half a gigabyte; the ratio itself is not under test
        patch.setattr("dmax_kernels.cli.demo.STEP_SIZES", (1, 32, 3000, 16))
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        out = ["--output-dir", str(folder), "--json", str(folder / "figures.json")]
        code = main(["demo", "--problems", "2", "--workers", "1", "--show", "1", *out])
    return code, "\n".join(printed), folder


def test_a_run_writes_its_files(demo):
    code, printed, folder = demo
    assert code == 0
    for name in ("dmax_demo.png", "dmax_demo_ladder.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "dmax_demo.html (problem 1, step by step)" in printed
    report = json.loads((folder / "figures.json").read_text())
    assert (report["problems"], report["steps"]) == (2, 200)
    assert len(report["cells"]) == len(evaluate.all_cells())
    assert set(report["claims"]) == {"answer", "strict"}
    assert min(report["step_speedup"].values()) > 0


def test_the_printed_tables_hold_the_figures(demo):
    """Each row of Table 3 is there at each threshold, with the figures of the JSON report."""
    _, printed, folder = demo
    cells = json.loads((folder / "figures.json").read_text())["cells"]
    found = {(c["model"], c["rule"], c["tau_dec"], c["convergence"]): c for c in cells}
    text = printed[printed.index("Table 3 (") : printed.index("Table 4")]
    blocks = text.split("tau_dec ")[1:]
    assert len(blocks) == len(TAUS)
    for tau, block in zip(TAUS, blocks, strict=True):
        lines = [line for line in block.splitlines() if line.startswith("  ")]
        assert len(lines) == len(tables.ABLATION) == 6
        for (_, model, rule), line in zip(tables.ABLATION, lines, strict=True):
            cell = found[model, rule, tau, "both"]
            columns = line.split("|")
            assert columns[1].split() == [
                f"{cell['tokens_per_forward_authors']:.2f}",
                f"{cell['forwards_per_block']:.2f}",
            ]
            assert columns[2].replace("*", " ").split()[0] == f"{100 * cell['answer']:.1f}"
            assert columns[3].replace("*", " ").split()[0] == f"{100 * cell['strict']:.1f}"


def test_how_the_models_were_trained_stands_beside_the_tables(demo):
    _, printed, _ = demo
    words = " ".join(printed.split())
    assert "200 steps of 32" in words
    assert "Muon" in words
    assert "greedy rollout" in words
    for number, claim in enumerate(claims.CLAIMS, 1):
        assert f"{number}. {claim.where}: {claim.text}." in printed


def test_rules_prints_a_table_of_its_own(tmp_path, capsys, monkeypatch):
    """Four rules on one model; random decoding is the one far from left to right."""
    wanted = ("random", "threshold", "hierarchical", "spd")
    few = [row for row in rules_table.RULES if row[1] in wanted]
    monkeypatch.setattr(rules_table, "RULES", tuple(few))
    monkeypatch.setattr(evaluate, "MODELS", ("oput",))
    out = ["--output-dir", str(tmp_path), "--json", str(tmp_path / "rules.json")]
    assert main(["demo", "--rules", "--problems", "3", "--workers", "1", *out]) == 0
    cells = json.loads((tmp_path / "rules.json").read_text())["cells"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert len(cells) == len(few) == len(printed) - 1
    for cell, words in zip(cells, printed[1:], strict=True):
        assert words[-1] == f"{cell['arness']:.2f}"
        assert words[-5] == f"{100 * cell['answer']:.1f}"
    scores = {cell["rule"]: cell["arness"] for cell in cells}
    assert scores["random"] == min(scores.values()) < 0.3
    assert scores["SPD 0.5"] == 1  # the prefix rule commits from left to right
    assert [path.name for path in tmp_path.iterdir()] == ["rules.json"]


def test_the_recipes_checkpoints_show_the_papers_pattern():
    """On fewer problems, and with slack for their noise."""
    problems = task.evaluation_problems(48, seed=1)
    models = {name: load_checkpoint(name)[0] for name in evaluate.MODELS}

    def strict(model, rule, tau):
        cell = Cell(model, rule, tau)
        return Result.of(evaluate.evaluate_cell(models[model], problems, cell, "fused"))

    base = strict("base", "threshold", 0.95)
    assert base.strict >= 0.9
    assert strict("base", "threshold", 0.5).strict <= 0.75
    assert strict("control", "spd", 0.5).strict <= 0.05
    for tau in (0.5, 0.0):
        ours = strict("oput", "spd", tau)
        assert ours.strict >= 0.85
        assert ours.tokens_per_forward >= 3 * base.tokens_per_forward


def test_the_record_holds_what_the_shipped_trainings_decode():
    """Decoded anew, the first problems of a few cells agree with the record up to their noise."""
    rows = record.shipped_record()["rows"]
    problems = task.evaluation_problems(100, seed=record.PROBLEM_SEED)
    for name, rule, tau in (
        ("oput-200", "spd", 0.5),
        ("certainty-200", "threshold", 0.8),
        ("control-200", "threshold", 0.5),
        ("uniform-200", "uniform", 0.0),
    ):
        (row,) = (
            row
            for row in rows
            if (row["arm"], row["rule"], row["tau_dec"], row["convergence"])
            == (name, rule, tau, "both")
        )
        model, _ = load_checkpoint(name)
        outcome = evaluate.evaluate_cell(model, problems, Cell(name, rule, tau), "fused")
        for measure in evaluate.MEASURES:
            share = row[measure]
            noise = 4 * (share * (1 - share) / outcome.problems) ** 0.5 + 0.02
            assert outcome.share(measure) == pytest.approx(share, abs=noise)
        rate = row["tokens_per_forward_authors"]
        assert outcome.tokens_per_forward(count_eos=False) == pytest.approx(rate, rel=0.15)


def test_shipped_trainings_have_their_logs():
    arms = record.shipped_record()["arms"]
    for method in evaluate.METHODS[1:]:
        arm = arms[f"{method}-200"]
        assert (arm["method"], arm["steps"], arm["optimizer"]) == (method, 200, "muon")
        assert (SHIPPED_DIR / f"{method}-200" / "model.safetensors").stat().st_size < 420_000


def test_a_cells_figures_are_those_of_its_decoding():
    model, _ = load_checkpoint("oput")
    problems = task.evaluation_problems(evaluate.FIRST_PROBLEMS + 6)
    cell = Cell("oput", "threshold", 0.5)
    result = Result.of(evaluate.evaluate_cell(model, problems, cell, "fused"))
    output = evaluate.decode(model, problems, cell, "reference")
    grades = [
        task.grade(problem, task.decode(row))
        for problem, row in zip(problems, output.sequences[:, 32:].tolist(), strict=True)
    ]
    assert result.problems == len(problems)
    assert result.answer == pytest.approx(sum(g.answer for g in grades) / len(grades))
    assert result.strict == pytest.approx(sum(g.strict for g in grades) / len(grades))
    lengths = [
        row.index(task.EOS_ID) + 1 if task.EOS_ID in row else len(row)
        for row in output.sequences[:, 32:].tolist()
    ]
    per_problem = [n / f for n, f in zip(lengths, output.num_forwards.tolist(), strict=True)]
    assert result.tokens_per_forward == pytest.approx(sum(per_problem) / len(per_problem))
    passes = int(output.num_forwards.sum())
    assert result.forwards_per_block == pytest.approx(passes / int(output.num_blocks.sum()))
    assert not result.collapsed


def test_a_collapsed_cell_stops_after_the_first_problems():
    model, _ = load_checkpoint("base")
    problems = task.evaluation_problems(evaluate.FIRST_PROBLEMS + 6)
    result = Result.of(evaluate.evaluate_cell(model, problems, Cell("base", "hard", 0.0), "fused"))
    assert result.collapsed
    assert result.problems == evaluate.FIRST_PROBLEMS
    assert result.strict == 0


def test_processes_give_the_results_of_one():
    cells = [Cell("oput", "spd", tau) for tau in TAUS]
    arguments = cells, {"oput": "oput"}, task.evaluation_problems(4), "fused"
    alone = dict(evaluate.evaluate_cells(*arguments, workers=1))
    for cell, outcome in evaluate.evaluate_cells(*arguments, workers=2):
        outcome.seconds = alone[cell].seconds
        assert outcome == alone[cell]
    assert list(alone) == cells


def test_the_page_picks_a_right_decoding_with_revisions():
    model, _ = load_checkpoint("oput")
    problems = task.evaluation_problems(20)
    index = page.most_revised(model, problems, "fused")
    run = page.trace_run(model, problems[index], page.SHOWN[0], "fused")
    assert run["strict"]
    assert any(step["revised"] for block in run["blocks"] for step in block["steps"])


MISTAKES = {
    "no problems": (["--problems", "0"], "--problems must be at least 1, got 0"),
    "show": (["--problems", "3", "--show", "3"], "--show must be in [0, 3), got 3"),
    "steps": (["--steps", "600"], "--steps must be 200 without --checkpoints, got 600"),
    "workers": (["--workers", "0"], "--workers must be at least 1, got 0"),
    "checkpoints": (["--checkpoints", "no/such/folder"], "folder with a config.json"),
    "output is a file": (["--output-dir", __file__], "File exists"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, sentence = MISTAKES[mistake]
    assert main(["demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("dmax_kernels demo: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_untrained_checkpoint_is_decoded_too(tmp_path):
    """--checkpoints takes any folder; a model that knows nothing gives zeros, not an error."""
    save_checkpoint(build_model(32), tmp_path / "oput")
    model, _ = load_checkpoint(tmp_path / "oput")
    problems = task.evaluation_problems(2)
    result = evaluate.evaluate_cell(model, problems, Cell("oput", "spd", 0.5), "fused")
    assert result.share("strict") == 0


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--problems",
        "--output-dir",
        "--checkpoints",
        "--steps",
        "--ops",
        "--seed",
        "control",
        "strict",
    ):
        assert word in text
