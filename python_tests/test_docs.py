"""The code in README.md and docs/ runs as it stands; what the pages name exists; docs build."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page",
    # integrations.md needs engines: test_integrations.py runs it on stand-ins
    [page for page in PAGES if python_blocks(page) and page.stem != "integrations"],
    ids=lambda page: page.name,
)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write files
    namespace = {}
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), namespace)
    if page == README:
        assert namespace["logits"].grad.shape == (32, 157184)
        assert (namespace["output"].num_tokens > namespace["output"].num_forwards).all()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page):
    from dmax_kernels.__main__ import COMMANDS

    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in re.findall(r"python -m dmax_kernels (\w+)", page.read_text()):
        assert command in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pictures_and_links_exist(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.stem != "reproduction"], ids=lambda p: p.name
)
def test_lines_are_wrapped(page):
    """At 100 characters, except for tables; reproduction.md is made of recorded figures."""
    lines = enumerate(page.read_text().splitlines(), 1)
    long = [number for number, line in lines if len(line) > 100 and not line.startswith("|")]
    assert not long, f"{page.name}: lines {long}"


def test_contributing_names_what_is_there():
    text = CONTRIBUTING.read_text()
    tree = re.search(r"```\n(csrc/schemas.*?)```", text, re.DOTALL)[1]
    paths = [line.split("  ")[0] for line in tree.splitlines()]
    paths += re.findall(r"`((?:csrc|dmax_kernels|python_tests|bench)/[\w./<>]+)`", text)
    missing = [path for path in paths if not (ROOT / path.replace("<family>", "top1")).exists()]
    assert not missing, f"CONTRIBUTING.md must name what is there, got {', '.join(missing)}"


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"\.PHONY:((?:.*\\\n)*.*)", makefile)[1].replace("\\", "").split()
    command = ["make", "--no-print-directory"]  # without a target
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parts = {"browser", "configure"}  # of other targets
    assert {line.split()[1] for line in listed.splitlines()} == set(targets) - parts


def test_docs_build(tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "top1_confidence" in (tmp_path / "api.html").read_text()
