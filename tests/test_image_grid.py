"""Grids of images with captions, and PNG files that are whole or absent."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import image_grid


def test_grid_places_images_and_writes_captions():
    images = np.stack([np.full((16, 16, 3), 40 * n, np.uint8) for n in range(5)])
    captions = ["", "a small green star above a large red ring on a gray background", "b", "c", "d" * 80]
    with_captions = image_grid.grid(images, captions, columns=2)
    bare = image_grid.grid(images, columns=2)
    # 16 pixels are repeated 6 times to reach 96, with 6 pixels between the images.
    assert bare.size == (2 * 96 + 3 * 6, 3 * 96 + 4 * 6)
    assert bare.getpixel((6, 6)) == (0, 0, 0) and bare.getpixel((108 + 95, 6)) == (40, 40, 40)
    assert bare.getpixel((6, 210)) == (160, 160, 160)
    assert with_captions.width == bare.width and with_captions.height > bare.height
    under_first, under_second = (np.asarray(with_captions)[103:140, x : x + 96] for x in (6, 108))
    assert (under_first == 255).all() and (under_second < 128).any()


def test_wrap_breaks_between_words():
    assert image_grid.wrap("aa bb cc", 5, len) == ["aa bb", "cc"]
    assert image_grid.wrap("abcdefgh ij", 3, len) == ["abc", "def", "gh", "ij"]
    assert image_grid.wrap("", 3, len) == []


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)]
)
def test_grid_refuses_what_is_not_images(images):
    with pytest.raises(ValueError, match=r"images must be uint8\[N, H, W, 3\]"):
        image_grid.grid(images)


def test_grid_refuses_another_number_of_captions():
    with pytest.raises(ValueError, match="there are 1 captions for 2 images"):
        image_grid.grid(np.zeros((2, 8, 8, 3), np.uint8), ["one"])


def test_save_png_is_whole_or_absent(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image_grid.save_png(tmp_path / "new" / "a.png", image)
    image_grid.save_png(tmp_path / "new" / f"{'n' * 251}.png", image)  # the longest name of most file systems
    (tmp_path / "new" / f"{'n' * 251}.png").unlink()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write the image: .*a.png"):
        image_grid.save_png(tmp_path / "file" / "a.png", image)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "file", "new"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_save_png_on_a_full_disk(tmp_path, monkeypatch):
    def full(self, target, format):
        Path(target).write_bytes(b"half")
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="could not write the image: No space left on device"):
        image_grid.save_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())
