"""What the README shows runs as it stands."""

import re
from pathlib import Path

import jax

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_with_your_own_network_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    with jax.numpy_rank_promotion("allow"):  # a user's own network may broadcast
        exec(code, names)
    assert names["x0"].shape == (16, 2)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
