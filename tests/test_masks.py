"""Masks and windows of inpainting and outpainting."""

import numpy as np
from PIL import Image
from tiny_pipelines import HIGH, LOW, unclip

from ddpm_jax.pipelines import inpainting
from ddpm_jax.pipelines import manipulation as edit


def test_masks_mean_the_same_in_every_form():
    """From half of white on a pixel is kept, as in the masks of the command: JPEG does not write exact zeros."""
    wanted = np.array([[True, False, True, False]] * 2)
    grey = np.array([[255, 127, 128, 0]] * 2, np.uint8)
    rgb = np.stack([grey, grey, grey], axis=-1)
    for given in (wanted, wanted.astype(int), wanted.astype(np.uint8), grey, rgb, grey / 255.0, Image.fromarray(grey)):
        (found,) = inpainting._as_masks(given, [rgb])
        np.testing.assert_array_equal(found, wanted)
    assert len(inpainting._as_masks([wanted.astype(int), grey], [rgb, rgb])) == 2


def test_the_known_part_is_at_one_place_in_all_stages(monkeypatch):
    """Of all upsamplers it is the enlarged one of the decoder; rounded for each size it was not."""
    seen = {}
    monkeypatch.setattr(
        inpainting,
        "_fill",
        lambda pipeline, images, squares, kept, *rest, **options: seen.update(
            {size: kept(size)[0, ..., 0] & (squares(size)[0] == 200).all(-1) for size in (LOW, HIGH, 5 * LOW)}
        ),
    )
    white = np.full((1, 9, 9, 3), 200, np.uint8)
    for extent, place in ((0.3, "center"), (0.45, "center"), (0.7, "bottom right"), (0.62, (0.3, 0.8))):
        edit.outpaint(unclip(), white, extent=extent, place=place)
        for size, found in seen.items():
            assert 0 < seen[LOW].sum() < LOW**2
            np.testing.assert_array_equal(found, np.kron(seen[LOW], np.ones((size // LOW,) * 2, bool)))
