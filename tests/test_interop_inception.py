"""FID's Inception network: the features that torch-fidelity has with the same weights, and both of its resizes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax.interop.inception import export_inception, load_inception
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.inception import FEATURES, Inception, prepare

REFERENCE = np.load(Path(__file__).parent / "data" / "inception.npz")
IMAGES = jnp.asarray(REFERENCE["images"].transpose(0, 2, 3, 1))


def test_every_feature_equals_the_reference():
    reference = random_weights(json.loads(str(REFERENCE["shapes"])))
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    params = load_inception(reference | counters)
    with jax.default_matmul_precision("highest"):
        found = fast_jit(lambda params: Inception().apply({"params": params}, prepare(IMAGES)))(params)
    assert set(found) == {*FEATURES, "spatial"}
    np.testing.assert_allclose(found["spatial"], REFERENCE["spatial"].transpose(0, 2, 3, 1), atol=2e-5)
    for name in FEATURES:
        theirs = REFERENCE[f"out/{name}"]
        assert theirs.std(0).mean() > 0.01 * np.abs(theirs).mean()  # between images: the features are alive
        np.testing.assert_allclose(found[name], theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()), err_msg=name)
    back = export_inception(params)
    assert set(back) == set(reference)
    for name, array in reference.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_the_two_resizes():
    for name, undo in (("tensorflow", lambda x: x * 128 + 128), ("half_pixel", lambda x: (x + 1) * 127.5)):
        ours = np.asarray(undo(prepare(IMAGES, name)))[:, ::23, ::23]
        np.testing.assert_allclose(ours, REFERENCE[name].transpose(0, 2, 3, 1), atol=2e-3)
    assert np.abs(REFERENCE["tensorflow"] - REFERENCE["half_pixel"]).max() > 10  # of 255: it is not a detail
    with pytest.raises(ValueError, match="resize='bicubic' must be"):
        prepare(IMAGES, "bicubic")


def test_other_files_are_refused():
    with pytest.raises(ConvertError, match="not of FID's Inception network"):
        load_inception({"fc.weight": np.zeros((1000, 2048))})
