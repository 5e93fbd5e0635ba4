"""Image files: every format and mode becomes RGB in 8 bits, and damaged ones are refused in one sentence."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.decode import MAX_PIXELS, DecodeError, decode_image, encode_png
from ddpm_jax.data.transforms import as_images

RGB = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(depth, colour_type, rows, *chunks, size=None):
    """Return a PNG file, written by hand; its header says `size`, (width, height), if that is given."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    width = len(rows[0]) * 8 // (depth * channels)
    header = struct.pack(">IIBBBBB", *(size or (width, len(rows))), depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def composite(colour, alpha, background):
    """Return the image over a colour, in float64."""
    alpha = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(colour) * alpha + np.asarray(background) * (1 - alpha)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_the_pixels(kind, options):
    image = decode_image(encode(RGB, kind, **options))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels(kind):
    smooth = np.indices((16, 24)).sum(0)[..., None] * np.array([6, 3, 1]) + [0, 20, 60]
    image = decode_image(encode(smooth.astype(np.uint8), kind, quality=95))
    assert image.shape == (16, 24, 3) and np.abs(image.astype(int) - smooth).max() < 16


def test_what_is_encoded_is_decoded():
    np.testing.assert_array_equal(decode_image(encode_png(RGB)), RGB)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode_image(data), np.full((3, 4, 3), (255, 0, 0)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_exif_orientation_is_applied(kind, orientation):
    # EXIF 2.32, tag 0x0112: where row 0 and column 0 of the stored image are in the image as it is seen.
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),  # row 0 is the left side, column 0 the top
        6: RGB[:, ::-1].transpose(1, 0, 2),  # row 0 is the right side, column 0 the top
        7: RGB[::-1, ::-1].transpose(1, 0, 2),  # row 0 is the right side, column 0 the bottom
        8: RGB[::-1].transpose(1, 0, 2),  # row 0 is the left side, column 0 the bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(np.ascontiguousarray(stored), kind, exif=exif, **options)
    np.testing.assert_array_equal(decode_image(data), RGB)


def test_palettes_grey_bits_and_cmyk_become_rgb():
    palette = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decode_image(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decode_image(encode(palette, "GIF")), np.asarray(palette.convert("RGB")))
    grey = decode_image(encode(RGB[..., 0], "PNG"))
    np.testing.assert_array_equal(grey, np.repeat(RGB[..., :1], 3, -1))
    bits = decode_image(png(1, 0, [b"\xa5"]))
    np.testing.assert_array_equal(bits[0, :, 1], [255, 0, 255, 0, 0, 255, 0, 255])
    cmyk = np.full((8, 8, 4), (255, 0, 0, 51), np.uint8)
    image = decode_image(encode(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(image[4, 4], [0, 204, 204], atol=3)  # (1 - ink) (1 - black), 255 times


def test_16_bits_become_8():
    values = np.array([[0, 128, 129, 257, 25700, 65535]], np.uint16)
    image = decode_image(png(16, 0, [row.astype(">u2").tobytes() for row in values]))
    np.testing.assert_array_equal(image[..., 0], np.rint(values / 257))
    colours = np.array([[0, 1, 2, 255, 256, 65535]], np.uint16)
    image = decode_image(png(16, 2, [row.astype(">u2").tobytes() for row in colours]))
    assert np.abs(image.reshape(1, 6).astype(float) - colours / 257).max() <= 1


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 90)])
def test_transparent_parts_are_composited_on_the_background(background):
    alpha = np.random.default_rng(1).integers(0, 256, (12, 20), dtype=np.uint8)
    rgba = np.concatenate([RGB, alpha[..., None]], -1)
    expected = composite(RGB, alpha, background)
    image = decode_image(encode(rgba, "PNG"), background=background)
    np.testing.assert_allclose(image, expected, atol=0.51)
    grey = np.stack([RGB[..., 0], alpha], -1)
    image = decode_image(png(8, 4, [row.tobytes() for row in grey]), background=background)
    np.testing.assert_allclose(image, composite(RGB[..., :1], alpha, background), atol=0.51)


def test_a_transparent_colour_is_the_background():
    """The chunk tRNS of PNG: alphas of a palette, or the one colour that is transparent."""
    data = png(8, 3, [b"\0\1"], (b"PLTE", bytes([9, 8, 7, 100, 48, 0])), (b"tRNS", b"\xff\x33"))
    np.testing.assert_array_equal(decode_image(data, background=(0, 0, 50))[0], [(9, 8, 7), (20, 10, 40)])
    data = png(8, 2, [bytes([1, 2, 3, 4, 5, 6])], (b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    np.testing.assert_array_equal(decode_image(data)[0], [(255, 255, 255), (4, 5, 6)])
    for depth, scale in ((8, 1), (16, 257)):
        row = (np.array([1, 2, 3]) * scale).astype(f">u{depth // 8}").tobytes()
        data = png(depth, 0, [row], (b"tRNS", struct.pack(">H", 3 * scale)))
        np.testing.assert_array_equal(decode_image(data, background=(90, 90, 90))[0, :, 0], [1, 2, 90])


def test_a_transparent_colour_has_the_depth_of_its_file():
    """Row of 2 bits: levels 0 to 3, of which 1 is transparent; of 4 bits: levels 1 and 11; of 16: 0x0203, 0x0303."""
    for depth, row, level, wanted in (
        (2, 0b00011011, 1, [0, 9, 170, 255]),
        (4, 0x1B, 11, [17, 9]),
        (1, 1, 1, [0] * 7 + [9]),
    ):
        data = png(depth, 0, [bytes([row])], (b"tRNS", struct.pack(">H", level)))
        np.testing.assert_array_equal(decode_image(data, background=(9, 9, 9))[0, :, 0], wanted)
        opened = Image.open(io.BytesIO(data))  # the second time it is read already
        for _ in range(2):
            np.testing.assert_array_equal(as_images(opened)[0][0, :, 0], [255 if x == 9 else x for x in wanted])
    row = struct.pack(">HHHHHH", 0x0203, 0x0405, 0x0607, 0x0303, 0x0405, 0x0607)
    data = png(16, 2, [row], (b"tRNS", row[:6]))
    np.testing.assert_array_equal(decode_image(data, background=(9, 8, 7))[0], [(9, 8, 7), (3, 4, 6)])


def test_dark_16_bits_are_not_taken_for_8():
    for values in ([0, 1, 128, 129, 200], [255, 0, 0, 1, 2]):
        data = png(16, 0, [np.array(values, ">u2").tobytes()])
        np.testing.assert_array_equal(decode_image(data)[0, :, 0], np.rint(np.array(values) / 257))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("tag", [0x0100, 0x011A, 0x0128])  # ImageWidth, XResolution and ResolutionUnit, stored as ASCII
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_only_the_orientation_of_exif_counts(kind, tag):
    def exif(*entries):
        rows = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
        return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + rows + bytes(4)

    turned = (0x0112, 3, 1, b"\x06\0\0\0")
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = decode_image(encode(RGB, kind, **options))
    damaged_exif = exif(*sorted([turned, (tag, 2, 3, b"72\0")]))
    image = decode_image(encode(RGB, kind, exif=damaged_exif, **options))
    np.testing.assert_array_equal(image, np.rot90(upright, -1))
    image = decode_image(encode(RGB, kind, exif=damaged_exif[:24] + b"\xff" * 9, **options))
    assert image.shape in (upright.shape, (20, 12, 3))


def damaged():
    yield pytest.param(png(8, 3, [b"\0\1"]), "^the image cannot be read: it has no palette$", id="no palette")
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(RGB, kind)
        yield pytest.param(data[: len(data) // 2], "truncated or damaged", id=f"half of {kind}")
        yield pytest.param(data[:9], "truncated or damaged", id=f"nine bytes of {kind}")
    data = bytearray(encode(RGB, "PNG"))
    data[len(data) // 2] ^= 1
    yield pytest.param(bytes(data), "truncated or damaged", id="one bit of PNG")
    yield pytest.param(b"", "^the file is empty$", id="empty")
    yield pytest.param(b"<html></html>", "not that of a JPEG, PNG, WebP or GIF file", id="HTML")
    yield pytest.param(encode(RGB, "TIFF"), "not that of a JPEG, PNG, WebP or GIF file", id="TIFF")
    yield pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not that of a JPEG, PNG, WebP or GIF file", id="EPS")


@pytest.mark.parametrize(("data", "message"), damaged())
def test_damaged_files_are_refused_in_one_sentence(data, message):
    with pytest.raises(DecodeError, match=message) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_any_damage_is_a_decode_error_or_an_image(kind):
    data, rng = encode(RGB, kind), np.random.default_rng(2)
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        try:
            image = decode_image(bytes(changed[: rng.integers(1, len(data) + 1)]), max_pixels=100_000)
        except DecodeError:
            continue
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3


def bomb(kind, width, height):
    """Return a small file whose header says that the image is width x height."""
    if kind == "PNG":
        return png(1, 0, [b"\0"], size=(width, height))
    if kind == "GIF":
        frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02L\x01\0;"
        return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + frame
    if kind == "WebP":
        body = (
            b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(5)
        )
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    data = bytearray(encode(RGB, "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(20_000, 20_000), (16_383, 16_383), (10_000, 10_000)])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WebP", "JPEG"])
def test_bombs_are_refused_before_memory_is_allocated(kind, size):
    if kind == "WebP" and size[0] > 16_383:
        size = (16_384, 16_384)  # the largest that the format has
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match="pixels.* max_pixels=89478485"):
        decode_image(bomb(kind, *size))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB; the pixels are 300 MB and more


def test_max_pixels_counts_width_times_height():
    data = encode(RGB, "PNG")
    assert decode_image(data, max_pixels=240).shape == (12, 20, 3)
    with pytest.raises(DecodeError, match="^the image has 20 x 12 pixels, more than max_pixels=239$"):
        decode_image(data, max_pixels=239)
    assert MAX_PIXELS < 20_000 * 20_000


@pytest.mark.parametrize("background", [(1, 2), (0, 0, 256), (-1, 0, 0), "red", (0.5, 0.5, 0.5), None])
def test_a_background_is_three_integers(background):
    with pytest.raises(ValueError, match=r"background must be three integers in \[0, 255\]"):
        decode_image(encode(RGB, "PNG"), background=background)
    with pytest.raises(ValueError, match="^background must be three integers") as caught:
        decode_image(b"", background=background)
    assert not isinstance(caught.value, DecodeError)
