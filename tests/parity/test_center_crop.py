"""The centre crop, bit for bit as guided-diffusion's."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.transforms import CenterCrop


@pytest.fixture(scope="module")
def center_crop_arr():
    """The published function; its module imports MPI, which only its loader needs."""
    for name in ("mpi4py", "blobfile"):
        sys.modules.setdefault(name, types.ModuleType(name)).__dict__.setdefault("MPI", None)
    from guided_diffusion.image_datasets import center_crop_arr

    return center_crop_arr


@pytest.mark.parametrize("size", [7, 32, 64, 256])
def test_it_is_that_of_guided_diffusion(center_crop_arr, size):
    rng = np.random.default_rng(size)
    for height, width in [*rng.integers(30, 600, (20, 2)), (64, 64), (128, 64), (500, 375), (13, 250), (256, 1025)]:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = center_crop_arr(Image.fromarray(pixels), size)
        np.testing.assert_array_equal(CenterCrop(size)({"image": pixels})["image"], expected, strict=True)
