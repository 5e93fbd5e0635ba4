"""Images as users have them: every form gives the pixels that it means, or is refused in a sentence that names it."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_jax.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    all_true_center_crop,
    as_images,
    clip_pixels,
    resize_center_crop,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), np.uint8)
GREY = RGB[:, :, 0]
ALPHA = RNG.integers(0, 256, (6, 9, 1), np.uint8)
SHARE = ALPHA / 255.0
ON_WHITE = RGB * SHARE + 255 * (1 - SHARE)  # Porter and Duff's "over", in float64
GREY_ON_WHITE = np.repeat(GREY[:, :, None] * SHARE + 255 * (1 - SHARE), 3, axis=2)
GREY3 = np.repeat(GREY[:, :, None], 3, axis=2)
DEEP = RNG.integers(0, 65536, (6, 9), np.uint16)
DEEP3 = np.repeat(DEEP[:, :, None] / 65535 * 255, 3, axis=2)
MASK = GREY > 127
PALETTE = Image.fromarray(RGB).quantize(8)
CUT_OUT = Image.fromarray(np.where(MASK, 1, 0).astype(np.uint8), "P")
CUT_OUT.putpalette([10, 20, 30, 200, 100, 50])
CUT_OUT.info["transparency"] = 0
WITH_CUT_OUT = np.where(MASK[:, :, None], [200, 100, 50], 255)


def saved(image, **options):
    """Return an image after a file: PNG, or JPEG for CMYK and for EXIF."""
    file = io.BytesIO()
    image.save(file, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def turned():
    """An image that a camera stored on its side: EXIF says to turn it by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(RGB), format="PNG", exif=exif)


FORMS = {
    "uint8": (RGB, RGB),
    "grey": (GREY, GREY3),
    "grey with an axis": (GREY[:, :, None], GREY3),
    "grey and alpha": (np.dstack([GREY, ALPHA]), GREY_ON_WHITE),
    "RGBA": (np.dstack([RGB, ALPHA]), ON_WHITE),
    "float64": (RGB / 255.0, RGB),
    "float32 RGBA": (np.float32(np.dstack([RGB, ALPHA]) / 255.0), ON_WHITE),
    "float16": ((RGB / 255.0).astype(np.float16), RGB),
    "bfloat16": (jnp.asarray(MASK, jnp.bfloat16), MASK[:, :, None] * [255, 255, 255]),
    "JAX": (jnp.asarray(RGB), RGB),
    "int64": (RGB.astype(np.int64), RGB),
    "uint16": (DEEP, DEEP3),
    "uint16, big-endian": (DEEP.astype(">u2"), DEEP3),
    "bool": (MASK, MASK[:, :, None] * [255, 255, 255]),
    "not contiguous": (np.asfortranarray(RGB)[::-1], RGB[::-1]),
    "PIL RGB": (Image.fromarray(RGB), RGB),
    "PIL L": (Image.fromarray(GREY), GREY3),
    "PIL LA": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), GREY_ON_WHITE),
    "PIL RGBA": (Image.fromarray(np.dstack([RGB, ALPHA]), "RGBA"), ON_WHITE),
    "PIL 1": (Image.fromarray(MASK), MASK[:, :, None] * [255, 255, 255]),
    "PIL P": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "PIL P, transparent": (saved(CUT_OUT, format="PNG"), WITH_CUT_OUT),
    "PIL CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB),
    "PIL I;16": (saved(Image.fromarray(DEEP), format="PNG"), DEEP3),
    "PIL I;16, dark": (
        saved(Image.fromarray(DEEP % 256), format="PNG"),
        np.repeat((DEEP % 256 > 128)[..., None], 3, 2),
    ),
    "PIL I": (Image.fromarray(DEEP.astype(np.int32)), DEEP3),
    "PIL F": (Image.fromarray(np.float32(GREY / 255.0)), GREY3),
    "PIL, turned by EXIF": (turned(), np.rot90(RGB, -1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_pixels_that_it_means(form):
    image, wanted = FORMS[form]
    (found,) = as_images(image)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.51)  # the nearest level, or either of two as near


def test_one_image_a_list_an_array_of_them_and_an_iterator():
    batch = np.stack([RGB, RGB[::-1]])
    for images in (batch, list(batch), tuple(batch), iter(batch), [Image.fromarray(x) for x in batch], batch / 255.0):
        found = as_images(images)
        assert len(found) == 2
        np.testing.assert_array_equal(found, batch)
    sizes = [x.shape for x in as_images([RGB, Image.fromarray(GREY[:4]), np.zeros((1, 2, 4), np.float32)])]
    assert sizes == [(6, 9, 3), (4, 9, 3), (1, 2, 3)]


FINE = RGB / 255.0
REFUSED = {
    "no list": ([], "images must hold at least one image"),
    "no array": (np.zeros((0, 4, 4, 3), np.uint8), "images must hold at least one image"),
    "None": (None, "images must be PIL images or arrays, got NoneType None"),
    "a path": ("cat.png", "images must be PIL images or arrays, got str 'cat.png'"),
    "a path in a list": (["cat.png"], r"images\[0\] must be a PIL image or an array, .* open a file with PIL.Image"),
    "numbers": (RGB.tolist(), r"images\[0\] must be a PIL image or an array, got list"),
    "[-1, 1]": (2 * FINE - 1, r"images\[0\] has float values from -1 to .*must be in \[0, 1\]; give those .* / 2"),
    "[0, 255]": ([FINE, RGB.astype(float)], r"images\[1\] has float values from .* give those of \[0, 255\] as uint8"),
    "NaN": ([FINE, FINE, np.where(RGB < 9, np.nan, FINE)], r"images\[2\] has values that are not finite"),
    "infinity": (np.full((2, 2, 3), np.inf), r"images\[0\] has values that are not finite"),
    "int64": (RGB.astype(int) - 1, r"images\[0\] has int64 values from -1 to 2.*; they must be in \[0, 255\]"),
    "uint16 of 8 bits": (RGB.astype(np.uint16), "is uint16, whose white is 65535, but its largest value is 2"),
    "channels first": (RGB.transpose(2, 0, 1), r"got shape \(3, 6, 9\); move its channels to the last axis"),
    "five channels": (np.zeros((6, 9, 5), np.uint8), r"with 1 to 4 channels, got shape \(6, 9, 5\)$"),
    "five axes": ([np.zeros((1, 6, 9, 3), np.uint8)], r"images\[0\] must be an array .*got shape \(1, 6, 9, 3\)$"),
    "no pixels": ([np.zeros((0, 9, 3), np.uint8)], r"got shape \(0, 9, 3\)$"),
    "strings": (np.array([["a"]]), r"images\[0\] must hold numbers, got dtype <U1"),
    "complex": (FINE.astype(complex), r"images\[0\] must hold numbers, got dtype complex128"),
    "mode I of 8 bits": (Image.fromarray(GREY.astype(np.int32)), "is uint16, whose white is 65535, but its largest"),
    "32 bits": (Image.fromarray(DEEP.astype(np.int32) * 9), r"cannot be read: the values of mode I must be in"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("take", [as_images, lambda images: clip_pixels(images, 8)], ids=["as_images", "clip_pixels"])
def test_anything_else_is_refused_in_a_sentence(case, take):
    images, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        take(images)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_cut_file_is_refused():
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    with pytest.raises(ValueError, match=r"images\[1\] cannot be read: image file is truncated"):
        as_images([RGB, Image.open(io.BytesIO(file.getvalue()[:2000]))])


def test_what_clip_pixels_returned_is_recognised():
    """Prepared twice is prepared once: bit for bit, whole, in a list, alone, after a file's float64."""
    images = [RGB, np.zeros((5, 5, 3), np.uint8), np.full((5, 5, 3), 255, np.uint8), GREY]
    once = clip_pixels(images, 8)
    assert once.dtype == np.float32 and once.shape == (4, 8, 8, 3)
    for again in (once, list(once), once.astype(np.float64), jnp.asarray(once)):
        np.testing.assert_array_equal(clip_pixels(again, 8), once)
    np.testing.assert_array_equal(clip_pixels(once[1], 8), once[1:2])
    square = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(clip_pixels(clip_pixels(square, 16), 8), clip_pixels(square, 8))
    with pytest.raises(ValueError, match="has float values from -.*must be in"):
        as_images(once + np.float32(0.01))


def test_forms_of_one_image_are_prepared_alike():
    wanted = clip_pixels([RGB], 8)
    for image in (Image.fromarray(RGB), RGB / 255.0, np.dstack([RGB, np.full_like(ALPHA, 255)]), jnp.asarray(RGB)):
        np.testing.assert_array_equal(clip_pixels(image, 8), wanted)


def test_the_resize_is_pillows_and_the_middle_is_taken():
    image = Image.fromarray(RNG.integers(0, 256, (40, 31, 3), np.uint8))
    wanted = ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC)  # crops first: another rounding at the border
    found = resize_center_crop(image, 16)
    assert found.shape == (1, 16, 16, 3) and np.abs(found[0].astype(int) - np.asarray(wanted)).mean() < 6
    np.testing.assert_array_equal(resize_center_crop(RGB[:6, :6], 6)[0], RGB[:6, :6])
    pixels = clip_pixels(image, 16)
    np.testing.assert_allclose((pixels[0] * CLIP_STD + CLIP_MEAN) * 255, found[0], atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 300_000), (300_000, 2), (1, 1), (1, 41)])
def test_extreme_sizes_cost_little(shape):
    """2 x 300 000 pixels would be 224 x 33 600 000, 22 GB; of a constant image every part is the same."""
    found = resize_center_crop(np.full((*shape, 3), 77, np.uint8), 224)
    assert found.shape == (1, 224, 224, 3) and (found == 77).all()
    stripes = np.zeros((2, 300_001, 3), np.uint8)
    stripes[:, 150_000 - 5 : 150_000 + 6] = 255
    assert (resize_center_crop(stripes, 4) == 255).all()


@pytest.mark.parametrize("shape,size", [((13, 16), 6), ((9, 7), 12), ((8, 8), 8)])
def test_a_pixel_of_a_mask_is_true_if_all_under_it_are(shape, size):
    """By the overlap of every pixel of the square with every pixel of the mask, in integers."""
    mask = np.random.default_rng(0).random(shape) > 0.1
    new = [size * side // min(shape) for side in shape]
    expected = np.ones((size, size), bool)
    for i, j in np.ndindex(size, size):
        row, column = (round((n - size) / 2) + place for n, place in zip(new, (i, j)))
        for y, x in np.argwhere(~mask):
            apart = (y + 1) * new[0] <= row * shape[0] or y * new[0] >= (row + 1) * shape[0]
            apart |= (x + 1) * new[1] <= column * shape[1] or x * new[1] >= (column + 1) * shape[1]
            expected[i, j] &= apart
    assert 0 < expected.sum() < size**2
    np.testing.assert_array_equal(all_true_center_crop(mask, size), expected)


def test_single_unknown_pixels_do_not_vanish():
    mask = np.ones((1024, 1024), bool)
    mask[::31, ::29] = False
    blocks = {(row // 16, column // 16) for row in range(0, 1024, 31) for column in range(0, 1024, 29)}
    assert (~all_true_center_crop(mask, 64)).sum() == len(blocks)
