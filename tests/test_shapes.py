import collections
import hashlib
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ddpm_jax.data.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Scene,
    ShapesSource,
    coverage,
    place_of,
    relation_of,
    render,
    scene_from,
)

OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


def scenes(split, count=1500, seed=0):
    return [scene_from(seed, i, split=split) for i in range(count)]


def pairs(scene):
    return {(thing.colour, thing.shape) for thing in scene.objects}


def relation(scene):
    return (scene.objects[0].shape, scene.relation, scene.objects[1].shape)


def test_palette_is_well_apart():
    palette = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert len(COLOURS) == len(SHAPES) == 8 and len(BACKGROUNDS) == 4
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(palette, 2)) >= 90


def test_held_out_sets():
    assert len(HELD_OUT_PAIRS) == 8
    assert {c for c, _ in HELD_OUT_PAIRS} == set(COLOURS) and {s for _, s in HELD_OUT_PAIRS} == set(SHAPES)
    assert len(HELD_OUT_RELATIONS) == 32  # an eighth of 8 * 4 * 8
    assert all((b, OPPOSITE[r], a) in HELD_OUT_RELATIONS for a, r, b in HELD_OUT_RELATIONS)
    # Every shape is met in every relation, on both sides, in training too.
    allowed = set(itertools.product(SHAPES, RELATIONS, SHAPES)) - HELD_OUT_RELATIONS
    assert {t[:2] for t in allowed} == {t[:2] for t in HELD_OUT_RELATIONS} == set(itertools.product(SHAPES, RELATIONS))


@pytest.mark.parametrize("split", SPLITS)
def test_splits_yield_what_they_promise(split):
    drawn = scenes(split)
    counts = {len(scene.objects) for scene in drawn}
    assert counts == {"train": {1, 2}, "single": {1}, "held_out": {1}}.get(split, {2})
    seen_pairs = set().union(*map(pairs, drawn))
    if split == "held_out":
        assert seen_pairs == HELD_OUT_PAIRS
    else:
        assert seen_pairs == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT_PAIRS
    two = [scene for scene in drawn if len(scene.objects) == 2]
    if split == "two_held_out":
        assert {relation(scene) for scene in two} == HELD_OUT_RELATIONS
    else:
        assert not {relation(scene) for scene in two} & HELD_OUT_RELATIONS
    assert all(len(pairs(scene)) == 2 for scene in two)


def test_train_mix_and_uniform_attributes():
    drawn = scenes("train", 4000)
    two = np.mean([len(scene.objects) == 2 for scene in drawn])
    assert abs(two - 0.4) < 4 * np.sqrt(0.24 / 4000)
    one = scenes("single", 4000)
    for values, options in (
        ([s.background for s in one], BACKGROUNDS),
        ([s.place for s in one], PLACES),
        ([s.objects[0].size for s in one], SIZES),
    ):
        counts = collections.Counter(values)
        assert set(counts) == set(options)
        rate = 1 / len(options)
        assert max(abs(c / 4000 - rate) for c in counts.values()) < 4.5 * np.sqrt(rate / 4000)
    assert all(len(scene_from(0, i, two_fraction=1.0).objects) == 2 for i in range(50))
    assert all(len(scene_from(0, i, two_fraction=0.0).objects) == 1 for i in range(50))


def test_geometry_single():
    for scene in scenes("single") + scenes("held_out"):
        (thing,) = scene.objects
        radius = SIZES[thing.size]
        assert radius + 0.03 <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 0.97 - radius
        assert place_of(thing.x, thing.y) == scene.place and scene.relation is None
        # 1.5 pixels at 32 to the next place's region
        for dx, dy in itertools.product((-0.045, 0.045), repeat=2):
            assert place_of(thing.x + dx, thing.y + dy) == scene.place


def test_geometry_two():
    for scene in scenes("two") + scenes("two_held_out"):
        first, second = scene.objects
        assert scene.place is None
        assert relation_of((first.x, first.y), (second.x, second.y)) == scene.relation
        vertical = scene.relation in ("above", "below")
        dx, dy = first.x - second.x, first.y - second.y
        along, across = (dy, dx) if vertical else (dx, dy)
        assert (along < 0) == (scene.relation in ("above", "left of"))
        assert abs(along) > 2.5 * abs(across)
        gap = abs(along) - SIZES[first.size] - SIZES[second.size]
        assert gap * 32 > 2.5
        for thing in scene.objects:
            radius = SIZES[thing.size]
            assert radius + 0.03 <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 0.97 - radius


def test_places_and_relations_between_the_named_ones():
    assert place_of(0.5, 0.2) is None and place_of(0.2, 0.5) is None
    assert all(place_of(*centre) == name for name, centre in PLACES.items())
    assert relation_of((0.5, 0.2), (0.4, 0.7)) == "above" and relation_of((0.9, 0.2), (0.4, 0.5)) == "right of"


def test_records_are_pure_functions_of_seed_split_and_index():
    source = ShapesSource(3, 16)
    assert len(source) == 2**31 - 1
    late = source[2**31 - 2]
    again = ShapesSource(3, 16)[2**31 - 2]
    np.testing.assert_array_equal(late["image"], again["image"])
    assert late["caption"] == again["caption"] and late["index"] == 2**31 - 2 and late["index"].dtype == np.int64
    assert source.scene(5) == scene_from(3, 5) != scene_from(4, 5) != scene_from(3, 6)
    # The same scene and words at every resolution, and another stream for every split.
    assert ShapesSource(3, 64)[7]["caption"] == source[7]["caption"]
    assert ShapesSource(3, 64).scene(7) == source.scene(7)
    same = sum(scene_from(3, i, split="single") == scene_from(3, i, two_fraction=0.0) for i in range(50))
    assert same == 0
    np.testing.assert_array_equal(source[5]["image"], render(source.scene(5), 16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [4.16, 13.44])
def test_coverage_is_the_covered_area_of_the_box(shape, radius):
    x, y = np.arange(-20, 21) - 0.3, np.arange(-20, 21) + 0.2
    alpha = coverage(shape, radius, x, y)
    assert alpha.dtype == np.float32 and alpha.min() == 0 and alpha.max() == 1
    # Against a 16 x 16 supersampling of the sign of the distance.
    fine = (np.arange(16) + 0.5) / 16 - 0.5
    sx, sy = (x[:, None] + fine).ravel(), (y[:, None] + fine).ravel()
    inside = SHAPES[shape](sx[None] / radius, sy[:, None] / radius) < 0
    exact = inside.reshape(41, 16, 41, 16).mean((1, 3))
    assert np.abs(alpha - exact).mean() < 0.006 and abs(alpha.sum() / exact.sum() - 1) < 0.04
    # The bounding box is centred and its longer side is 2 r (1.72 r for the square).
    wx, wy = sx[inside.any(0)], sy[inside.any(1)]
    expected = 0.86 if shape == "square" else 1.0
    assert max(np.ptp(wx), np.ptp(wy)) / 2 == pytest.approx(expected * radius, abs=0.1)
    np.testing.assert_allclose([wx.min() + wx.max(), wy.min() + wy.max()], 0, atol=0.15)


def test_render_colours_and_orientation():
    scene = Scene((Object("circle", "red", "large", 0.25, 0.75),), "white", place="bottom left")
    for resolution in (16, 32, 100, 256):
        image = render(scene, resolution)
        assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
        assert tuple(image[resolution * 3 // 4, resolution // 4]) == COLOURS["red"]
        assert (image[: resolution // 2 - 1] == BACKGROUNDS["white"]).all()
        share = (np.abs(image.astype(int) - BACKGROUNDS["white"]).sum(-1) > 0).mean()
        assert share > np.pi * SIZES["large"] ** 2
    triangle = render(Scene((Object("triangle", "blue", "large", 0.5, 0.5),), "white", place="center"), 64)
    widths = (triangle != BACKGROUNDS["white"]).any(-1).sum(1)
    assert widths[40] > widths[30] > 0  # the tip is up


def test_edges_are_antialiased():
    # Moving a shape by a tenth of a pixel changes the image, and the mean brightness stays.
    images = [render(Scene((Object("ring", "blue", "small", x, 0.5),), "white"), 32) for x in (0.5, 0.5 + 0.1 / 32)]
    assert (images[0] != images[1]).any() and abs(images[0].mean() - images[1].mean()) < 0.5


def test_bad_arguments():
    for resolution in (15, 257):
        with pytest.raises(ValueError, match=f"between 16 and 256, got {resolution}"):
            ShapesSource(0, resolution)
    with pytest.raises(ValueError, match="between 16 and 256"):
        render(scene_from(0, 0), 8)
    with pytest.raises(ValueError, match="split must be one of train, single"):
        ShapesSource(0, 32, "test")
    with pytest.raises(ValueError, match="two_fraction"):
        ShapesSource(0, 32, two_fraction=1.5)
    with pytest.raises(ValueError, match="open_fraction"):
        ShapesSource(0, 32, open_fraction=-0.1)
    with pytest.raises(ValueError, match="seed"):
        ShapesSource(-1, 32)
    with pytest.raises(ValueError, match="length"):
        ShapesSource(0, 32, length=0)
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"got {index}"):
            ShapesSource(0, 32, length=10)[index]


def digest(source):
    """Of the first 200 records, images and words."""
    records = [source[i] for i in range(200)]
    return hashlib.sha256(b"".join(r["image"].tobytes() + r["caption"].encode() for r in records)).hexdigest()


def test_another_process_makes_the_same_records_without_heavy_imports():
    code = (
        "import sys; import ddpm_jax; before = set(sys.modules)\n"
        "import ddpm_jax.data.shapes.scenes, ddpm_jax.data.tokenizer, ddpm_jax.data.transforms\n"
        "heavy = {'grain', 'regex', 'ftfy', 'scipy.ndimage', 'PIL', 'tensorflow'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy\n"
        "import test_shapes\n"
        "print(test_shapes.digest(ddpm_jax.data.shapes.scenes.ShapesSource(9, 32)))"
    )
    paths = [str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == digest(ShapesSource(9, 32))
