"""The demo: its numbers, its words, its files, and the mistakes a user can make."""

import json
import re

import pytest
import torch

from dmax_kernels.__main__ import main
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.ring_walk import evaluate, page, tables, task
from dmax_kernels.ring_walk.evaluate import TAUS, Cell, Result
from dmax_kernels.ring_walk.export import build_model, save_checkpoint


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The model is tiny: a second thread only costs its synchronisation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert (folder / "dmax_demo.png").read_bytes().startswith(b"\x89PNG")
    assert "dmax_demo.html (problem 1, step by step)" in printed
    report = json.loads((folder / "figures.json").read_text())
    assert report["problems"] == 2
    assert len(report["cells"]) == len(evaluate.all_cells())
    assert min(report["step_speedup"].values()) > 0


def test_the_printed_table_holds_the_figures(demo):
    """Every row of the recipe's table is there, and each cell is the one in the JSON report."""
    _, printed, folder = demo
    cells = json.loads((folder / "figures.json").read_text())["cells"]
    rows, model = {}, None
    for line in printed.splitlines():
        columns = [column.strip() for column in line.split("|")]
        if len(columns) == 1 + len(TAUS) and re.match(r"[\d.]+ +[\d.]+", columns[1]):
            named = re.match(r"(base|OPUT|control)?\s*(.*)", columns[0])
            model = named[1] or model
            rows[model, named[2]] = columns[1:]
    assert len(rows) == len(list(evaluate.ablation_rows())) == 13
    for cell in cells:
        if cell["convergence"] == "both" and cell["tau_dec"] in TAUS:
            key = tables.MODEL_NAMES[cell["model"]], tables.RULE_NAMES[cell["rule"]]
            figures = rows[key][TAUS.index(cell["tau_dec"])].replace("*", " ").split()
            assert figures == [
                f"{100 * cell['answer']:.1f}",
                f"{100 * cell['strict']:.1f}",
                f"{cell['tokens_per_forward']:.2f}",
                f"{cell['forwards_per_block']:.2f}",
            ]


def test_rules_prints_a_table_of_its_own(tmp_path, capsys, monkeypatch):
    """Four rules on one model; random decoding is the one far from left to right."""
    few = [row for row in tables.RULES if row[1] in ("random", "threshold", "hierarchical", "spd")]
    monkeypatch.setattr(tables, "RULES", tuple(few))
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


def test_shipped_checkpoints_show_the_papers_pattern():
    """The figures that the demo must show, on fewer problems and with slack for their noise."""
    problems = task.evaluation_problems(48, seed=1)
    models = {name: load_checkpoint(name)[0] for name in evaluate.MODELS}

    def strict(model, rule, tau):
        return evaluate.evaluate_cell(models[model], problems, Cell(model, rule, tau), "fused")

    base = strict("base", "threshold", 0.95)
    assert base.strict >= 0.9
    assert strict("base", "threshold", 0.5).strict <= 0.75
    assert strict("control", "spd", 0.5).strict <= 0.05
    for tau in (0.5, 0.0):
        ours = strict("oput", "spd", tau)
        assert ours.strict >= 0.85
        assert ours.tokens_per_forward >= 3 * base.tokens_per_forward


def test_a_cells_figures_are_those_of_its_decoding():
    model, _ = load_checkpoint("oput")
    problems = task.evaluation_problems(evaluate.FIRST_PROBLEMS + 6)
    cell = Cell("oput", "threshold", 0.5)
    result = evaluate.evaluate_cell(model, problems, cell, "fused")
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
    result = evaluate.evaluate_cell(model, problems, Cell("base", "hard", 0.0), "fused")
    assert result.collapsed
    assert result.problems == evaluate.FIRST_PROBLEMS
    assert result.strict == 0


def test_processes_give_the_results_of_one():
    cells = [Cell("oput", "spd", tau) for tau in TAUS]
    arguments = cells, {"oput": "oput"}, task.evaluation_problems(4), "fused"
    alone = dict(evaluate.evaluate_cells(*arguments, workers=1))
    assert dict(evaluate.evaluate_cells(*arguments, workers=2)) == alone
    assert list(alone) == cells


def synthetic(changes):
    """The recipe's pattern as results of 200 problems, with some cells changed."""
    strict = {
        ("base", "threshold"): (98, 54, 0),
        ("oput", "threshold"): (100, 42, 1),
        ("oput", "hard"): (100, 90, 82),
        ("oput", "hybrid"): (100, 95, 92),
        ("oput", "spd"): (100, 98, 92),
        ("control", "threshold"): (100, 70, 37),
    }
    speed = {("base", "threshold"): (1, 2, 23), ("control", "threshold"): (4, 14, 23)}
    results = {}
    for cell in evaluate.all_cells():
        n = TAUS.index(cell.tau_dec) if cell.tau_dec in TAUS else 0
        right = strict.get((cell.model, cell.rule), (0, 0, 0))[n] / 100
        fast = speed.get((cell.model, cell.rule), (3, 8, 8))[n]
        results[cell] = Result(right, right, fast, 32 / fast, 200, collapsed=right == 0)
    for cell, fields in changes.items():
        results[cell] = Result(**{**vars(results[cell]), **fields})
    return results


# Each claim, and one cell that takes it away: the words follow the figures
CLAIMS = [
    ("breaks the base", Cell("base", "threshold", 0.5), {"strict": 0.97}),
    ("collapses without OPUT", Cell("control", "spd", 0.0), {"strict": 0.5}),
    ("keeps the derivations", Cell("oput", "spd", 0.5), {"strict": 0.94}),
    ("keeps the derivations", Cell("oput", "spd", 0.0), {"tokens_per_forward": 2.9}),
    ("makes revision work", Cell("oput", "hard", 0.5), {"strict": 0.44}),
    ("beat hard tokens", Cell("oput", "hybrid", 0.0), {"strict": 0.84}),
    ("contiguous prefix", Cell("oput", "spd", 0.5), {"strict": 1.0}),
]


@pytest.mark.parametrize(("claim", "cell", "fields"), CLAIMS)
def test_a_claim_follows_its_figures(claim, cell, fields):
    def held(changes):
        (finding,) = (f for f in tables.findings(synthetic(changes), 200) if claim in f.claim)
        return finding

    before, after = held({}), held({cell: fields})
    assert before.holds != after.holds
    assert str(before).startswith("[yes]" if before.holds else "[no]")
    assert before.figures != after.figures


def test_the_caveat_names_the_controls_best_threshold():
    words = tables.caveat(synthetic({Cell("control", "threshold", 0.8): {"strict": 0.96}}), 200)
    assert "96.0% of derivations right at 4.00 tokens per forward with an ordinary" not in words
    fast = {"strict": 0.96, "tokens_per_forward": 7.0}
    words = tables.caveat(synthetic({Cell("control", "threshold", 0.8): fast}), 200)
    assert "96.0% of derivations right at 7.00 tokens per forward" in words
    assert "threshold of 0.8;" in words
    assert "most of the gain over the base's 1.00 comes from self-distillation (86% of it)" in words
    assert "OPUT with SPD adds is robustness" in words


def test_the_caveat_without_a_control_that_keeps_95_percent():
    weak = {
        cell: {"strict": 0.5}
        for cell in evaluate.all_cells()
        if (cell.model, cell.rule) == ("control", "threshold")
    }
    weak[Cell("control", "threshold", 0.7)] = {"strict": 0.6, "tokens_per_forward": 2.0}
    words = tables.caveat(synthetic(weak), 200)
    assert "60.0% of derivations right at 2.00" in words
    assert "less than half of the gain" in words


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
    assert result.strict == 0


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "--problems",
        "--output-dir",
        "--checkpoints",
        "--ops",
        "--seed",
        "control",
        "strict",
    ):
        assert word in text
