"""The demo's page, opened in a real browser: it draws each cell, steps, plays, asks for nothing."""

import html
import json
import re
import shutil
import subprocess

import pytest

from dmax_kernels.decoding import spd_generate
from dmax_kernels.models.checkpoint import load_checkpoint
from dmax_kernels.ring_walk import page, task
from dmax_kernels.ring_walk.page import trace_runs, write_trace_page

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    names = {"oput": "oput", "base": "base", "control": "control", "uniform": "uniform-200"}
    models = {label: load_checkpoint(name)[0] for label, name in names.items()}
    problem = task.evaluation_problems(1)[0]
    path = tmp_path_factory.mktemp("page") / "dmax_demo.html"
    page.write_page(models, problem, "fused", path)
    return path


@pytest.fixture(scope="module")
def data(page_file):
    text = page_file.read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def render(path, tmp_path, fragment="", script=""):
    """The page's DOM as the browser has it after its scripts, and a further one, have run."""
    copy = tmp_path / "page.html"
    copy.write_text(path.read_text("utf-8") + f"<script>{script}</script>", "utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=60000",
        "--dump-dom",
        f"{copy.as_uri()}{fragment}",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return dom[dom.index("<body") : dom.index('id="data"')]


def cells(dom):
    """(classes, word) of every cell of the blocks; the legend's have no word."""
    found = re.findall(
        r'<div class="cell(?: ([^"]*))?".*?<span class="word[^"]*">(.*?)</span>', dom
    )
    return [(set(classes.split()), html.unescape(word)) for classes, word in found]


def status(dom):
    return re.search(r'<div id="status"[^>]*>(.*?)</div>', dom)[1]


def key_script(*keys):
    return "".join(
        f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}));"
        for key in keys
    )


def test_the_page_is_one_file_that_asks_for_nothing(page_file):
    text = page_file.read_text("utf-8")
    assert not re.search(r"https?:|src=|<link|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert len(text) < 1_000_000


def test_data_cannot_end_its_script_element(data, page_file):
    assert "<eos>" in data["words"]  # a "<" in the data
    assert page_file.read_text("utf-8").count("</script>") == 2


@needs_browser
def test_every_cell_is_drawn_before_the_first_step(page_file, data, tmp_path):
    drawn = cells(render(page_file, tmp_path))
    blocks = data["runs"][0]["blocks"]
    assert len(drawn) == 32 * len(blocks)
    assert all("masked" in classes and word == "·" for classes, word in drawn)


@needs_browser
def test_a_step_shows_promoted_and_masked_positions(page_file, data, tmp_path):
    dom = render(page_file, tmp_path, script=key_script("ArrowRight"))
    step = data["runs"][0]["blocks"][0]["steps"][0]
    drawn = cells(dom)[:32]
    assert [word for _, word in drawn] == [data["words"][token] for token in step["token"]]
    assert {j for j, (c, _) in enumerate(drawn) if "promoted" in c} == set(step["promoted"])
    assert [int("masked" in c) for c, _ in drawn] == step["masked"]
    assert status(dom).startswith("forward pass 1 of")


@needs_browser
def test_the_last_step_shows_the_committed_response(page_file, data, tmp_path):
    dom = render(page_file, tmp_path, script=key_script("End"))
    run, drawn = data["runs"][0], cells(dom)
    tokens = [token for block in run["blocks"] for token in block["steps"][-1]["token"]]
    assert [word for _, word in drawn] == [data["words"][token] for token in tokens]
    assert all("committed" in classes for classes, _ in drawn)
    assert sum("after" not in classes for classes, _ in drawn) == run["tokens"]
    assert f"done, {run['tokens']} tokens in {run['forwards']} passes" in status(dom)


@needs_browser
def test_a_link_opens_a_run_at_a_revising_step(page_file, data, tmp_path):
    """#run=..&step=.. leads to a step; its revised cells show the word they had."""
    places = [
        (r, 1 + sum(len(b["steps"]) for b in run["blocks"][:n]) + s, n, s)
        for r, run in enumerate(data["runs"])
        for n, block in enumerate(run["blocks"])
        for s, step in enumerate(block["steps"])
        if step["revised"]
    ]
    r, frame, n, s = places[0]
    dom = render(page_file, tmp_path, fragment=f"#run={r + 1}&step={frame}")
    block = data["runs"][r]["blocks"][n]
    drawn = cells(dom)[32 * n : 32 * (n + 1)]
    assert {j for j, (c, _) in enumerate(drawn) if "revised" in c} == set(
        block["steps"][s]["revised"]
    )
    old = [html.unescape(word) for word in re.findall(r'<span class="old">(.*?)</span>', dom)]
    before = block["steps"][s - 1]["token"]
    assert old == [data["words"][before[j]] for j in sorted(block["steps"][s]["revised"])]
    pressed = re.findall(r'aria-pressed="(true|false)"', dom)
    assert pressed.index("true") == r
    assert pressed.count("true") == 1


@needs_browser
def test_play_runs_to_the_end_and_stops(page_file, data, tmp_path):
    dom = render(page_file, tmp_path, script="document.getElementById('play').click();")
    assert "done, " in status(dom)
    assert re.search(r'<button id="play">(.*?)</button>', dom)[1] == "▶ play"


@needs_browser
def test_pause_slider_and_run_keys(page_file, data, tmp_path):
    space = key_script(" ", " ")  # play, pause: no step is taken
    assert status(render(page_file, tmp_path, script=space)).startswith("forward pass 0")
    slide = (
        "const s = document.getElementById('slider'); s.value = 2;"
        "s.dispatchEvent(new Event('input'));"
    )
    assert status(render(page_file, tmp_path, script=slide)).startswith("forward pass 2 of")
    dom = render(page_file, tmp_path, script=key_script("5", "End", "ArrowLeft"))
    last = data["runs"][4]["forwards"]
    assert status(dom).startswith(f"forward pass {last - 1} of {last}")


@needs_browser
def test_a_trace_of_ones_own_prompts_has_no_grades(tmp_path):
    model, tokenizer = load_checkpoint("oput")
    problems = task.evaluation_problems(2)
    prompts = [task.encode_prompt(problem, 32) for problem in problems]
    output = spd_generate(model, prompts, max_new_tokens=64, trace=True)
    path = tmp_path / "trace.html"
    write_trace_page(trace_runs(output, prompts, tokenizer), [task.EOS_ID], path)
    dom = render(path, tmp_path, fragment="#run=2", script=key_script("End"))
    words = [word for _, word in cells(dom)]
    assert words[: len(output.answers[1])] == [task.WORDS[t] for t in output.answers[1]]
    tokens, forwards = int(output.num_tokens[1]), int(output.num_forwards[1])
    assert f"done, {tokens} tokens in {forwards} passes" in status(dom)
    assert "right answer" not in dom
    assert "derivation" not in dom
    shown = re.search(r'<div class="prompt".*?</div>', dom, re.DOTALL)[0]
    assert [html.unescape(w) for w in re.findall(r"<span[^>]*>(.*?)</span>", shown)] == [
        task.WORDS[t] for t in prompts[1]
    ]
