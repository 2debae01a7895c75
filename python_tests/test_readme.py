"""The README's code runs as it stands, and its links and commands exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].grad.shape == (32, 157184)
    assert (namespace["output"].num_tokens > namespace["output"].num_forwards).all()


def test_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_pictures_and_links_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_map_names_what_is_there():
    tree = re.search(r"## Map\n+```\n(.*?)```", README, re.DOTALL)[1]
    for line in tree.splitlines():
        for path in line.split("  ")[0].split(", "):
            assert (ROOT / path.replace("<op>", "top1_confidence")).exists(), path
