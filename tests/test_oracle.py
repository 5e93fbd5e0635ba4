import dataclasses
import itertools

import numpy as np
import pytest
from scipy import ndimage

from ddpm_jax.data.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Scene,
    render,
    scene_from,
)
from ddpm_jax.evaluation.faithfulness import (
    ATTRIBUTES,
    compare,
    comparison_table,
    judge,
    score,
    table,
    wilson_interval,
)
from ddpm_jax.evaluation.oracle import read


def all_right(scene, image):
    return judge(scene, read(image))["all"]


def degrade(image, rng, blur=0.0, noise=0.0):
    values = ndimage.gaussian_filter(image.astype(np.float64), (blur, blur, 0)) + rng.normal(0, 1, image.shape) * noise
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def one(shape, colour="blue", size="large", background="white", x=0.5, y=0.5):
    return Scene((Object(shape, colour, size, x, y),), background, place="center")


def paint(distance, radius, resolution=32):
    """A blue image on white of {distance < 0}, coordinates in units of the radius."""
    grid = ((np.arange(resolution) + 0.5) / resolution - 0.5) / radius
    alpha = np.clip(0.5 - distance(grid[None, :], grid[:, None]) * radius * resolution, 0, 1)[..., None]
    white, blue = np.array(BACKGROUNDS["white"]), np.array(COLOURS["blue"])
    return np.rint(white + alpha * (blue - white)).astype(np.uint8)


def test_exact_on_every_combination_at_32():
    # All shape x colour x size x background (2048 with the two sizes), held out or not, at random sub-pixel positions.
    rng = np.random.default_rng(0)
    combinations = itertools.product(SHAPES, COLOURS, SIZES, BACKGROUNDS)
    wrong = []
    for (shape, colour, size, background), place in zip(combinations, itertools.cycle(PLACES.items())):
        (x, y), name = place[1], place[0]
        dx, dy = rng.uniform(-0.045, 0.045, 2)
        scene = Scene((Object(shape, colour, size, x + dx, y + dy),), background, place=name)
        if not all_right(scene, render(scene, 32)):
            wrong.append(scene)
    assert not wrong


@pytest.mark.parametrize(("resolution", "count"), [(32, 250), (64, 40), (128, 6)])
@pytest.mark.parametrize("split", SPLITS)
def test_exact_on_clean_renders(split, resolution, count):
    drawn = [scene_from(11, i, split=split) for i in range(count)]
    assert not [scene for scene in drawn if not all_right(scene, render(scene, resolution))]


@pytest.mark.parametrize(("blur", "noise"), [(0.5, 0.0), (0.0, 8.0), (0.5, 8.0)])
def test_at_least_99_percent_on_blurred_and_noisy_renders(blur, noise):
    rng = np.random.default_rng(1)
    drawn = [scene_from(12, i, split=split) for split in SPLITS for i in range(70)]
    right = [all_right(scene, degrade(render(scene, 32), rng, blur, noise)) for scene in drawn]
    assert np.mean(right) >= 0.99


def test_centres_are_read_to_a_fraction_of_a_pixel():
    for i in range(200):
        scene = scene_from(13, i, split="single")
        reading = read(render(scene, 32)).objects[0]
        assert abs(reading.x - scene.objects[0].x) * 32 < 0.25 and abs(reading.y - scene.objects[0].y) * 32 < 0.25
        assert reading.residual < 0.03


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.9, 1.1])
def test_a_slightly_wrong_size_or_colour_is_still_read(shape, scale):
    for size, radius in SIZES.items():
        image = paint(lambda x, y: SHAPES[shape](x / scale, y / scale) * scale, radius)
        found = read(image).objects[0]
        assert (found.shape, found.size, found.colour) == (shape, size, "blue")
    tinted = np.clip(render(one(shape), 32).astype(int) + [12, -12, -12], 0, 255).astype(np.uint8)
    assert judge(one(shape), read(tinted))["all"]


def test_a_stray_pixel_is_tolerated_and_a_blob_is_an_object():
    image = render(one("circle"), 32)
    image[3, 3] = image[2, 27] = COLOURS["red"]
    assert all_right(one("circle"), image)
    image[1:4, 1:4] = COLOURS["red"]
    verdict = judge(one("circle"), read(image))
    assert not verdict["count"] and not verdict["all"] and verdict["shape"] and verdict["position"]


NOT_SHAPES = {
    "half disc": lambda x, y: np.maximum(np.hypot(x, y) - 1, -y),
    "bar": lambda x, y: np.maximum(np.abs(x) - 1, np.abs(y) - 0.4),
    "turned star": lambda x, y: SHAPES["star"](x, -y),
    "triangle on its side": lambda x, y: SHAPES["triangle"](y, x),
    "turned triangle": lambda x, y: SHAPES["triangle"](x, -y),
    "saltire": lambda x, y: SHAPES["cross"]((x + y) / 2**0.5, (x - y) / 2**0.5),
    "ell": lambda x, y: np.maximum(np.maximum(np.abs(x), np.abs(y)) - 0.9, np.minimum(x + 0.2, 0.2 - y)),
}


@pytest.mark.parametrize("name", NOT_SHAPES)
def test_what_is_no_shape_is_not_read_as_one(name):
    (found,) = read(paint(NOT_SHAPES[name], SIZES["large"])).objects
    assert found.shape is None and found.size == "large" and found.colour == "blue"


def test_wrong_things_are_wrong():
    scene = scene_from(0, 0, split="two")
    first, second = scene.objects
    image = render(scene, 32)
    changes = {
        "shape": dataclasses.replace(first, shape=next(s for s in SHAPES if s not in (first.shape, second.shape))),
        "colour": dataclasses.replace(first, colour=next(c for c in COLOURS if c not in (first.colour, second.colour))),
        "size": dataclasses.replace(first, size="small" if first.size == "large" else "large"),
    }
    for attribute, changed in changes.items():
        verdict = judge(dataclasses.replace(scene, objects=(changed, second)), read(image))
        assert [name for name in (*ATTRIBUTES, "all") if not verdict[name]] == [attribute, "all"]
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}[scene.relation]
    verdict = judge(dataclasses.replace(scene, relation=opposite), read(image))
    assert [name for name in (*ATTRIBUTES, "all") if not verdict[name]] == ["position", "all"]
    other = "black" if scene.background != "black" else "white"
    verdict = judge(dataclasses.replace(scene, background=other), read(image))
    assert [name for name in (*ATTRIBUTES, "all") if not verdict[name]] == ["background", "all"]


def test_swapped_attributes_are_wrong():
    # A blue star above a red ring is not a red star above a blue ring, although all the words occur.
    objects = Object("star", "blue", "large", 0.5, 0.26), Object("ring", "red", "large", 0.5, 0.76)
    scene = Scene(objects, "white", "above")
    swapped = tuple(dataclasses.replace(t, colour=c) for t, c in zip(scene.objects, ("red", "blue"), strict=True))
    verdict = judge(dataclasses.replace(scene, objects=swapped), read(render(scene, 32)))
    assert not verdict["all"] and not (verdict["shape"] and verdict["colour"])


def test_missing_and_merged_objects_are_wrong():
    scene = scene_from(0, 1, split="two")
    alone = dataclasses.replace(scene, objects=scene.objects[:1])
    verdict = judge(scene, read(render(alone, 32)))
    assert not any(verdict[name] for name in ("count", "shape", "colour", "size", "position", "all"))
    assert verdict["background"]
    empty = np.full((32, 32, 3), BACKGROUNDS["white"], np.uint8)
    assert read(empty).objects == () and not judge(one("star"), read(empty))["all"]


def test_noise_images_and_strange_backgrounds_are_unreadable():
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        assert not judge(one("star"), read(noise))["all"]
    lime = np.full((32, 32, 3), (120, 255, 0), np.uint8)
    assert read(lime).background is None
    two_tone = render(one("circle", background="white"), 32)
    lower = two_tone[16:]
    lower[(lower == BACKGROUNDS["white"]).all(-1)] = BACKGROUNDS["black"]
    assert not all_right(one("circle"), two_tone)


def test_two_coloured_objects_have_no_colour():
    image = render(one("square", "blue"), 32)
    half = (np.abs(image[:, :16].astype(int) - COLOURS["blue"]).sum(-1) == 0)[..., None]
    image[:, :16] = np.where(half, COLOURS["yellow"], image[:, :16])
    (found,) = read(image).objects
    assert found.colour is None


def test_read_refuses_what_it_cannot_read():
    for bad in (np.zeros((32, 32, 3), np.float32), np.zeros((32, 16, 3), np.uint8), np.zeros((32, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"image must be uint8\[R, R, 3\]"):
            read(bad)
    with pytest.raises(ValueError, match="at least 32 pixels wide"):
        read(np.zeros((16, 16, 3), np.uint8))


def test_score_and_table():
    drawn = [scene_from(0, i, split="single") for i in range(20)]
    images = np.stack([render(scene, 32) for scene in drawn])
    images[:5] = np.array(BACKGROUNDS["tan"], np.uint8)
    result = score(images, drawn)
    assert result["n"] == 20 and result["rates"]["all"] == 0.75
    np.testing.assert_array_equal(result["examples"]["all"], [False] * 5 + [True] * 15)
    assert set(result["rates"]) == set(result["examples"]) == {*ATTRIBUTES, "all"}
    lines = table({"single": result, "again": result}).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    # 15 of 20: Wilson's interval worked out by hand from its formula is 53.1 % to 88.8 %.
    assert "| single | 20 |" in lines[2] and "| 75.0 % | 53.1-88.8 % |" in lines[2]
    with pytest.raises(ValueError, match="got 20 and 3"):
        score(images, drawn[:3])


def test_what_an_image_follows_is_counted_where_two_scenes_differ():
    said = [one("star"), one("star"), one("ring"), one("ring", size="small")]
    shown = [one("heart"), one("star", colour="red"), one("heart"), one("ring")]
    images = [render(said[0], 32), render(shown[1], 32), render(one("cross"), 32), render(said[3], 32)]
    found = compare(np.stack(images), said, shown)
    assert found["n"] == {"shape": 2, "colour": 1, "size": 1, "background": 0, "position": 0}
    assert found["caption"]["shape"] == 0.5 and found["embedding"]["shape"] == 0.0  # of the two, one shows neither
    assert found["caption"]["colour"] == 0.0 and found["embedding"]["colour"] == 1.0
    assert found["caption"]["size"] == 1.0 and np.isnan(found["caption"]["background"])
    rows = comparison_table(found).splitlines()
    assert (
        rows[2].startswith("| what the caption says | 50.0 % | 0.0 % | 100.0 % |")
        and "| 2 | 1 | 1 | 0 | 0 |" in rows[4]
    )


def test_wilson_interval_solves_its_equation():
    # The bounds p are the roots of (rate - p)^2 = z^2 p (1 - p) / n.
    for successes, n in ((15, 20), (490, 512), (3, 7)):
        for p in wilson_interval(successes, n):
            assert (successes / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n)
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0) and wilson_interval(0, 10)[0] == pytest.approx(0.0)
