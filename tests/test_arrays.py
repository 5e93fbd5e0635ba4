"""Sources of arrays in memory, and splits of any source."""

import pickle

import jax.numpy as jnp
import numpy as np
import pytest
from image_files import assert_same_record, pixels
from PIL import Image

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.split import Subset, split_source

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), np.uint8)
Z = np.random.default_rng(1).standard_normal((5, 4), np.float32)


def test_arrays_are_records():
    captions = [f"{number}: ö" for number in range(5)]
    source = ArraySource(IMAGES, captions, [0, 1, 2, 1, 0], z_image=Z, weight=np.arange(5))
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 5 and source.class_names is None
    for number, record in enumerate(source):
        expected = {"image": IMAGES[number], "caption": captions[number], "label": np.int32([0, 1, 2, 1, 0][number])}
        assert_same_record(record, expected | {"z_image": Z[number], "weight": np.int64(number)})
    batch = next(make_loader(source, batch_size=4, seed=0))
    assert (
        batch["image"].shape == (4, 8, 9, 3) and batch["label"].dtype == np.int32 and batch["z_image"].shape == (4, 4)
    )


def test_labels_may_be_strings_or_have_names():
    source = ArraySource(IMAGES, labels=["dog", "cat", "dog", "ape", "cat"])
    assert source.class_names == ("ape", "cat", "dog") and [r["label"] for r in source] == [2, 1, 2, 0, 1]
    source = ArraySource(IMAGES, labels=["b", "a", "b", "a", "a"], class_names=("b", "a"))
    assert source.class_names == ("b", "a") and [r["label"] for r in source] == [0, 1, 0, 1, 1]
    assert ArraySource(IMAGES, labels=[1, 0, 1, 0, 0], class_names="ab").class_names == ("a", "b")


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        IMAGES / np.float32(255),
        jnp.asarray(IMAGES),
        list(IMAGES),
        [Image.fromarray(image) for image in IMAGES],
        np.concatenate([IMAGES, np.full((5, 8, 9, 1), 255, np.uint8)], -1),
    ],
    ids=["uint8", "float32", "JAX", "list", "PIL", "alpha"],
)
def test_all_forms_of_images_give_the_same_pixels(images):
    for number, record in enumerate(ArraySource(images)):
        np.testing.assert_array_equal(record["image"], IMAGES[number], strict=True)


def test_grey_images_need_no_axis_of_channels():
    for number, record in enumerate(ArraySource(IMAGES[..., 0])):
        np.testing.assert_array_equal(record["image"], np.repeat(IMAGES[number, ..., :1], 3, -1))


def test_images_may_differ_in_size():
    images = pixels(3)
    for image, record in zip(images, ArraySource(images), strict=True):
        np.testing.assert_array_equal(record["image"], image)


def nan(array, number):
    array = np.array(array, np.float32)
    array[number].flat[3] = np.nan
    return array


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": nan(IMAGES / 255, 3)}, r"images\[3\] has values that are not finite"),
        ({"images": IMAGES / 255 * 2 - 1}, r"images\[0\] has float values from -.*; they must be in \[0, 1\]"),
        ({"images": IMAGES[0]}, r"images must be an array \[N, H, W, C\] or \[N, H, W\], got shape \(8, 9, 3\)"),
        ({"images": []}, "images must hold at least one image"),
        ({"images": IMAGES[:0]}, "images must hold at least one image"),
        ({"images": ["a.png"]}, r"images\[0\] must be a PIL image or an array, got str 'a.png'"),
        ({"z_image": nan(Z, 2)}, r"z_image\[2\] has values that are not finite"),
        ({"z_image": Z[:4]}, r"z_image must have 5 entries, as many as images, got the shape \(4, 4\)"),
        ({"z_image": [None] * 5}, "z_image must be an array of numbers, got object"),
        ({"key": np.arange(5)}, "key must not be the name of another array"),
        ({"captions": ["a"] * 4}, "captions must be 5, as many as images, got 4"),
        ({"captions": "aaaaa"}, "captions must be 5 strings, got one"),
        ({"captions": ["a", "b", None, "d", "e"]}, r"captions\[2\] must be a string, got None"),
        ({"labels": [0, 1, -1, 0, 0]}, r"labels\[2\] must be in \[0, 2147483648\), got -1"),
        ({"labels": [0, 1, 2, 0, 0], "class_names": "ab"}, r"labels\[2\] must be in \[0, 2\), got 2"),
        ({"labels": [0.0] * 5}, "labels must be integers or strings, got float64"),
        ({"labels": [0] * 4}, r"labels must have the shape \(5,\)"),
        ({"labels": list("abcab"), "class_names": "ab"}, "labels has 'c', which is not one of class_names"),
        ({"class_names": "ab"}, "class_names needs labels"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ArraySource(**{"images": IMAGES} | arguments)


def test_the_fingerprint_is_that_of_the_values():
    def mark(images=IMAGES, **options):
        return ArraySource(images, **{"captions": list("abcde"), "labels": [0] * 5, "z": Z} | options).fingerprint()

    assert mark() == mark(IMAGES.copy()) == mark(np.asfortranarray(IMAGES)) == mark(IMAGES / 255)
    assert mark(z=Z.astype(">f4")) == mark()
    changed = IMAGES.copy()
    changed[4, 7, 8, 2] ^= 1
    others = [mark(changed), mark(IMAGES[::-1]), mark(captions=list("abcdf")), mark(labels=[0, 0, 0, 0, 1])]
    others += [mark(z=-Z), mark(z=Z.astype(np.float64)), mark(captions=None), mark(labels=None)]
    others += [mark(IMAGES.reshape(5, 9, 8, 3)), ArraySource(IMAGES, list("abcde"), [0] * 5, y=Z).fingerprint()]
    assert len({mark(), *others}) == 11


@pytest.mark.parametrize(("validation", "count"), [(1, 1), (7, 7), (0.3, 30), (0.001, 1), (99, 99), (0.999, 99)])
def test_a_split_has_every_record_once(validation, count):
    source = ArraySource(np.zeros((100, 2, 2, 3), np.uint8), number=np.arange(100))
    train, held_out = split_source(source, validation)
    assert (len(train), len(held_out)) == (100 - count, count)
    numbers = [[int(record["number"]) for record in part] for part in (train, held_out)]
    assert sorted(sum(numbers, [])) == list(range(100)) and all(part == sorted(part) for part in numbers)


def test_a_split_is_the_same_everywhere_and_grows():
    source = ArraySource(np.zeros((1000, 2, 2, 3), np.uint8), labels=np.arange(1000) % 2, class_names="ab")
    small, large = (split_source(source, count)[1] for count in (10, 100))
    # The finalizer of SplitMix64, one number at a time, in Python's integers.

    def mix(value):
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    order = sorted(range(1000), key=lambda number: mix((number + mix(0)) % 2**64))
    np.testing.assert_array_equal(small._indices, sorted(order[:10]))
    assert set(small._indices) < set(large._indices) and large.class_names == ("a", "b")
    assert set(split_source(source, 100, seed=1)[1]._indices) != set(large._indices)
    # Both parts hold even and odd records, early and late ones: within 5 standard deviations of a random choice.
    numbers = large._indices
    assert abs((numbers % 2).mean() - 0.5) < 5 * 0.5 / 10 and abs(numbers.mean() / 1000 - 0.5) < 5 * 0.29 / 10


def test_the_fingerprint_of_a_part_is_that_of_its_records():
    source = ArraySource(IMAGES)
    first, second = Subset(source, [0, 1]), Subset(source, np.array([0, 1]))
    assert first.fingerprint() == second.fingerprint()
    others = {source.fingerprint(), Subset(source, [1, 0]).fingerprint(), Subset(source, [0, 2]).fingerprint()}
    others |= {Subset(ArraySource(IMAGES[:4]), [0, 1]).fingerprint()}
    assert len(others) == 4 and first.fingerprint() not in others
    record = pickle.loads(pickle.dumps(Subset(source, [3])))[0]
    np.testing.assert_array_equal(record["image"], IMAGES[3])
    with pytest.raises(IndexError, match=r"index must be in \[0, 2\), got 2"):
        first[2]


@pytest.mark.parametrize("validation", [0, 5, -1, 0.0, 1.0, float("nan"), 17])
def test_a_split_needs_records_on_both_sides(validation):
    with pytest.raises(ValueError, match="validation must"):
        split_source(ArraySource(IMAGES), validation)


def test_wrong_parts():
    source = ArraySource(IMAGES)
    for indices in ([], [[0]], [5], [-1]):
        with pytest.raises(ValueError, match="indices must be"):
            Subset(source, indices)
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^64\), got -1"):
        split_source(source, 1, seed=-1)
    with pytest.raises(ValueError, match="source must have at most 268435456 records to be split"):
        split_source(range(2**28 + 1), 100)
