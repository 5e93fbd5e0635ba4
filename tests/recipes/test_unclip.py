"""configs/unclip.py: the table of docs/unclip.md by eval_shape, and closed forms of its sizes."""

import functools
import math
import re
from pathlib import Path

import jax
import pytest

from ddpm_jax.cli import load_recipe
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.training.abstract import AbstractStages

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe(str(ROOT / "configs" / "unclip.py"))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def sizes():
    """The table of docs/unclip.md: (variant, network) -> (millions here, the published size or None)."""
    text = (ROOT / "docs" / "unclip.md").read_text()
    rows = re.findall(r"^\| unclip\.py:?(\w*) \| (\w+) \| ([\d.]+) \| (-|[\d.]+[BM]) \|", text, re.M)
    units = {"B": 1e9, "M": 1e6}
    published = lambda text: None if text == "-" else float(text[:-1]) * units[text[-1]]
    return {(variant, name): (float(here) * 1e6, published(paper)) for variant, name, here, paper in rows}


@functools.cache
def unclip(variant):
    """Return the shapes of the networks of a variant that the table has; the paper's are traced like those of a run."""
    config = RECIPE.get_config(variant)
    config.data.path, config.priors = "zeros:image=64x64,captions", "both"
    abstract = AbstractStages(RECIPE.stages(config), make_mesh({"data": -1}, devices=jax.devices()[:1]))
    if variant == "":
        for stage in abstract.stages.values():
            abstract.check(stage)
    names = [name for own, name in sizes() if own == variant]
    return {name: abstract.state(abstract.stages[name]).params["params"] for name in names}


@pytest.mark.parametrize("variant", ["", "l14", "karlo", "medium"])
def test_full_size_networks_have_the_parameters_of_the_table(variant):
    networks = unclip(variant)
    table = {name: row for (own, name), row in sizes().items() if own == variant}
    stages = {"clip", "prior", "ar_prior", "decoder", *RECIPE.get_config(variant).upsamplers}
    assert set(table) == ({"clip"} if variant == "l14" else stages)  # whose other networks are those of the paper
    if variant in ("l14", "karlo"):
        assert count(networks["clip"]) == 427_616_513  # OpenAI's ViT-L/14, with its scale of logits
    for name, (here, published) in table.items():
        assert abs(count(networks[name]) - here) <= 0.05e6, name
        if published is not None and (variant, name) not in ROUNDED:
            assert abs(count(networks[name]) / published - 1) <= 0.03, name


# Where the published numbers give another size than the published one: rounded to a digit, see docs/unclip.md.
ROUNDED = {("", "prior"): (0.5e9, 1.5e9), ("", "ar_prior"): (0.5e9, 1.5e9), ("", "up_256"): (650e6, 750e6)}
ROUNDED |= {("", "up_1024"): (250e6, 350e6), ("karlo", "up_256"): (650e6, 750e6)}


@pytest.mark.parametrize("variant", ["", "karlo"])
def test_sizes_that_are_not_within_3_percent_round_to_the_published_digit(variant):
    for (own, name), (least, most) in ROUNDED.items():
        if own == variant:
            assert least < count(unclip(variant)[name]) < most, name


def test_the_full_size_transformers_have_the_parameters_of_their_closed_form():
    """A pre-norm block of width w has 12 w^2 + 13 w: qkv, out, two layers of the MLP with biases, two norms."""
    block = lambda w: 12 * w * w + 13 * w
    tower = lambda w, n: 49408 * w + 77 * w + n * block(w) + 2 * w
    shapes = unclip("")
    assert count(shapes["clip"]["text"]) == tower(1024, 24)
    positions = (256 // 16) ** 2 + 1
    # patches without bias, class token, positions, norms before and after the blocks
    assert count(shapes["clip"]["vision"]) == (3 * 16 * 16 + 1 + positions) * 1280 + 4 * 1280 + 32 * block(1280)
    projections = count(shapes["clip"]["image_projection"]) + count(shapes["clip"]["text_projection"])
    assert projections == (1280 + 1024) * 1024
    assert count(shapes["prior"]["transformer"]) == 24 * block(2048)
    assert shapes["prior"]["position"].shape == (77 + 4, 2048)
    assert count(shapes["ar_prior"]["transformer"]) == 24 * block(1664)
    assert shapes["ar_prior"]["position"].shape == (77 + 2 + 319 - 1, 1664)
    assert shapes["ar_prior"]["code"]["embedding"].shape == (1024, 1664)
    # The encoder of 24 x 2048 alone, which the paper's table has in the columns of both priors, is more than 1B.
    assert count(shapes["decoder"]["text_encoder"]) == tower(2048, 24) > 1.3e9


def block_of_adm(here, out, emb):
    """A residual block: two norms, two convolutions, the scale and shift of the embedding, and the skip connection."""
    skip = 0 if here == out else here * out + out
    return 2 * here + (9 * here * out + out) + (emb * 2 * out + 2 * out) + 2 * out + (9 * out * out + out) + skip


def unet_without_attention(channels, mult, depth, inputs, outputs):
    """The closed form of ADM's U-Net with BigGAN's blocks between levels and none of attention."""
    emb, width = 4 * channels, [channels * m for m in mult]
    total = channels * emb + emb + emb * emb + emb + 9 * inputs * channels + channels
    here, skips = channels, [channels]
    for level, w in enumerate(width):
        for _ in range(depth):
            total, here = total + block_of_adm(here, w, emb), w
            skips.append(w)
        if level + 1 < len(width):
            total += block_of_adm(w, w, emb)
            skips.append(w)
    total += 2 * block_of_adm(here, here, emb)
    for level, w in reversed(list(enumerate(width))):
        for _ in range(depth + 1):
            total, here = total + block_of_adm(here + skips.pop(), w, emb), w
        total += block_of_adm(w, w, emb) if level else 0
    return total + 2 * here + 9 * here * outputs + outputs


def test_the_upsamplers_have_the_parameters_of_their_closed_form():
    """From the channels, multipliers and depth of the paper's table."""
    shapes = unclip("")
    assert count(shapes["up_256"]) == unet_without_attention(320, (1, 2, 3, 4), 3, 6, 3)
    assert count(shapes["up_1024"]) == unet_without_attention(192, (1, 1, 2, 2, 4, 4), 2, 6, 3)
