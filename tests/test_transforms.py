"""Transforms of images: sizes, filters against float64, and randomness that depends on the seed and the record."""

import numpy as np
import pytest

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.transforms import AverageDown, CenterCrop, RandomCrop, RandomFlip, Resize, Select

RNG = np.random.default_rng(0)


def image(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    """An image without noise, so that rounding between passes of a filter stays below one level."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.rint(127 + 100 * np.sin(np.stack([7 * x + y, 5 * y, 9 * x * y], -1))).astype(np.uint8)


def bicubic_matrix(old, new):
    """Keys's kernel with a = -1/2, as wide as the scale when it shrinks, cut at the borders and normalised; float64."""
    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres) / width
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


def bicubic(pixels, height, width):
    rows, columns = bicubic_matrix(pixels.shape[0], height), bicubic_matrix(pixels.shape[1], width)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(np.float64)).clip(0, 255)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((40, 60), 20, (20, 30)), ((60, 41), 20, (29, 20)), ((30, 30), 64, (64, 64)), ((10, 25), 13, (13, 33)),
     ((12, 700), 8, (8, 467))],
)  # fmt: skip
def test_resize_is_the_antialiased_bicubic_filter(shape, size, expected):
    pixels = smooth(*shape)
    resized = Resize(size)({"image": pixels, "key": "a"})
    assert resized["key"] == "a" and resized["image"].dtype == np.uint8 and resized["image"].shape == (*expected, 3)
    np.testing.assert_allclose(resized["image"], bicubic(pixels, *expected), atol=1.2)  # rounded after each pass


def test_resize_does_not_alias():
    """Stripes of one pixel become grey; without antialiasing they would become other stripes."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = Resize(15)({"image": stripes})["image"].astype(float)
    assert np.abs(small[:, 2:-2] - 127.5).max() < 12


def test_resize_leaves_the_size_it_wants_and_refuses_lines():
    record = {"image": image(8, 30)}
    assert Resize(8)(record)["image"] is record["image"]
    with pytest.raises(ValueError, match="an image of 1 x 101 pixels is too long to be resized to 8"):
        Resize(8)({"image": image(1, 101)})
    assert Resize(2)({"image": image(1, 100)})["image"].shape == (2, 200, 3)


def adm(pixels, size):
    """The centre crop of ADM in float64: halving by means, then the filter, then the cut."""
    pixels = pixels.astype(np.float64)
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        assert pixels.shape[:2] == (2 * height, 2 * width)
        pixels = pixels.reshape(height, 2, width, 2, 3).mean((1, 3))
    scale = size / min(pixels.shape[:2])
    pixels = bicubic(pixels, *(round(side * scale) for side in pixels.shape[:2]))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("shape", "size"),
    [((96, 96), 24), ((128, 176), 24), ((100, 60), 24), ((20, 31), 24), ((24, 41), 24), ((40, 44), 7)],
)
def test_center_crop_halves_filters_and_cuts_as_adm(shape, size):
    pixels = smooth(*shape)
    cropped = CenterCrop(size)({"image": pixels})["image"]
    assert cropped.shape == (size, size, 3) and cropped.dtype == np.uint8
    np.testing.assert_allclose(cropped, adm(pixels, size), atol=3)  # rounded after each of up to six passes


def test_center_crop_takes_the_middle():
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    np.testing.assert_array_equal(CenterCrop(32)({"image": pixels})["image"], pixels[:, 32:64])
    square = {"image": image(16, 16)}
    assert CenterCrop(16)(square)["image"] is square["image"]
    assert CenterCrop(64)({"image": image(1, 9000)})["image"].shape == (64, 64, 3)


def test_a_flip_mirrors_from_left_to_right():
    record, rng = {"image": image(4, 6), "label": 1}, np.random.default_rng(0)
    flipped = RandomFlip(1.0).random_map(record, rng)
    np.testing.assert_array_equal(flipped["image"], np.stack([record["image"][:, 5 - i] for i in range(6)], 1))
    assert flipped["label"] == 1 and flipped["image"].flags["C_CONTIGUOUS"]
    assert RandomFlip(0.0).random_map(record, rng) is record


def test_select_takes_the_named_entries():
    record = {"a": 1, "b": 2, "c": 3}
    assert Select(("c", "a"))(record) == {"c": 3, "a": 1}
    with pytest.raises(ValueError, match="a record has no d, only a, b, c"):
        Select(("a", "d"))(record)


@pytest.mark.parametrize("transform", [Resize, CenterCrop, RandomCrop])
@pytest.mark.parametrize("size", [0, -1, 2.5, "8"])
def test_sizes_are_positive_integers(transform, size):
    with pytest.raises(ValueError, match=f"size must be a positive integer, got {size!r}"):
        transform(size)


def test_other_arguments():
    for probability in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"probability must be in \[0, 1\]"):
            RandomFlip(probability)
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        AverageDown(0)


POSITIONS = np.broadcast_to(np.stack(np.mgrid[:9, :9], -1), (64, 9, 9, 2)).astype(np.uint8)
SAME = np.concatenate([POSITIONS, np.zeros((64, 9, 9, 1), np.uint8)], -1)  # 64 times one image, whose pixels say where


def random_choices(count, **options):
    """Return the number of each record, the row and column of its crop, and whether it was flipped."""
    source = ArraySource(SAME, number=np.arange(64))
    options = {"batch_size": 32, "seed": 0, "transforms": [RandomCrop(2), RandomFlip()]} | options
    loader = make_loader(source, **options)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    images = np.concatenate([batch["image"] for batch in batches]).astype(int)
    flipped = images[:, 0, 0, 1] > images[:, 0, 1, 1]
    numbers = np.concatenate([batch["number"] for batch in batches])
    return np.stack([numbers, images[:, 0, 0, 0], images[:, 0, :, 1].min(1), flipped], 1)


def test_the_same_image_gets_other_random_numbers_at_every_position():
    choices = random_choices(64)
    assert choices.shape == (2048, 4)
    # Within 5 standard deviations of uniform and independent: rows and columns in 0..7, flips, and their pairs.
    for column, size in ((1, 8), (2, 8), (3, 2)):
        counts = np.bincount(choices[:, column], minlength=size)
        assert np.abs(counts - 2048 / size).max() < 5 * np.sqrt(2048 / size)
    correlations = np.corrcoef(choices[:, 1:].T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(2048)
    first, second = choices[:64], choices[64:128]  # two epochs
    first, second = first[np.argsort(first[:, 0])], second[np.argsort(second[:, 0])]
    np.testing.assert_array_equal(first[:, 0], second[:, 0])
    assert (first[:, 1:] == second[:, 1:]).all(1).mean() < 0.1


def test_random_numbers_depend_on_the_seed_and_the_position_alone():
    choices = random_choices(6)
    np.testing.assert_array_equal(random_choices(6, num_threads=4), choices)
    np.testing.assert_array_equal(random_choices(12, batch_size=16), choices)
    assert (random_choices(6, seed=1)[:, 1:] != choices[:, 1:]).any(1).mean() > 0.9
    hosts = [random_choices(6, shard_index=host, shard_count=2).reshape(6, 16, 4) for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(hosts, 1).reshape(-1, 4), choices)
