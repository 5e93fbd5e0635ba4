"""Every Python block of the README and of docs/ runs as it stands, in order, after its page's earlier blocks."""

import re
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Return the Python blocks of a page, each after as many empty lines as make tracebacks name the page's line."""
    text = (ROOT / page).read_text()
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in BLOCK.finditer(text)]


PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def run(page):
    """Return the names that a page's blocks leave behind."""
    names = {"__name__": page}
    for code in blocks(page):
        with jax.numpy_rank_promotion("allow"):  # a user's own network may broadcast
            exec(compile(code, str(ROOT / page), "exec"), names)
    return names


def test_the_readme():
    (code,) = blocks("README.md")
    assert run("README.md")["x0"].shape == (16, 2)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14


def test_the_samplers():
    """Both networks are exact for data of deviation 1, which a few steps miss by some hundredths."""
    names = run("docs/samplers.md")
    for x0 in (names["x0"], names["x0_edm"]):
        assert x0.shape == (16, 16, 16, 3) and abs(np.std(x0) - 1.0) < 0.1


def test_the_design():
    names = run("docs/design.md")
    assert names["state"].step == 2 and names["metrics"]["finite"]
    assert names["images"].shape == (8, 16, 16, 3) and np.isfinite(names["images"]).all()


def test_links_and_images_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)
