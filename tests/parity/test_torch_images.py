"""PyTorch tensors as images."""

import numpy as np
import torch

from ddpm_jax.data.transforms import as_images

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def test_a_tensor():
    np.testing.assert_array_equal(as_images([torch.tensor(RGB)])[0], RGB)
    np.testing.assert_array_equal(as_images(torch.tensor(RGB)[None])[0], RGB)


def test_a_tensor_that_needs_a_gradient_and_one_of_bfloat16():
    fractions = torch.tensor(RGB / np.float32(255.0))
    np.testing.assert_array_equal(as_images(fractions.requires_grad_())[0], RGB)
    half = as_images(fractions.bfloat16())[0]
    assert np.abs(half.astype(int) - RGB).max() <= 1  # 8 bits of precision
