"""GLIDE's U-Nets: what OpenAI's code returned, its loop with guidance, the way back, and the published size."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax import (
    RecordedNoise,
    classifier_free,
    cosine_betas,
    make_process,
    respace,
    sample,
    static_threshold,
)
from ddpm_jax.interop import glide
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.glide import Glide
from ddpm_jax.models.unet import UNet

REFERENCE = np.load(Path(__file__).parent / "data" / "glide.npz")
MODEL = Glide(UNet(32, 6, (1, 2), 1, (8,), 16), vocab_size=64, context=12, width=32, layers=2, heads=2)
EXTRA = {
    "base": {},
    "upsampler": {"low_res": "low"},
    "inpaint": {"image": "picture", "known": "known"},
    "upsampler_inpaint": {"low_res": "low", "image": "picture", "known": "known"},
}


def weights(name):
    return random_weights(json.loads(str(REFERENCE[f"{name}/shapes"])))


def given(name):
    array = REFERENCE[name]
    return jnp.asarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


TEXT = given("tokens").astype(jnp.int32), given("mask")


@pytest.mark.parametrize("name", EXTRA)
def test_the_outputs_equal_the_reference(name):
    reference = weights(name)
    params = glide.load_glide(reference, MODEL, image_size=16)
    extra = {key: given(value) for key, value in EXTRA[name].items()}
    with jax.default_matmul_precision("highest"):
        run = fast_jit(lambda params: MODEL.apply({"params": params}, given("x"), given("t"), *TEXT, **extra))
        ours = run(params)
    np.testing.assert_allclose(ours, REFERENCE[f"{name}/out"].transpose(0, 2, 3, 1), atol=2e-5)
    back = glide.export_glide(params, MODEL, image_size=16)
    assert set(back) == set(reference)
    for key, array in reference.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_the_loop_with_guidance():
    """From recorded noise: transition number i gets the i-th of the file, 0 is where it starts."""
    noise = RecordedNoise(jnp.asarray(REFERENCE["loop/noises"].transpose(1, 0, 3, 4, 2)))
    params = glide.load_glide(weights("base"), MODEL, image_size=16)
    nothing = jnp.full_like(TEXT[0], 63), jnp.zeros_like(TEXT[1])
    network = lambda text: lambda xt, t: MODEL.apply({"params": params}, xt, t, *text)
    process = respace(make_process(cosine_betas(1000)), "5")
    draw = lambda keys: sample(
        process,
        classifier_free(network(TEXT), network(nothing), 3.0),
        keys,
        (16, 16, 3),
        variance="learned_range",
        x0_transform=static_threshold(),
    )
    with jax.default_matmul_precision("highest"):
        ours = fast_jit(draw)(noise)
    theirs = REFERENCE["loop/out"].transpose(0, 2, 3, 1)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_another_file_is_refused():
    with pytest.raises(ConvertError, match=r"of another shape, input_blocks\.0\.0\.weight \[32, 4, 3, 3\]"):
        glide.load_glide(weights("base") | {"input_blocks.0.0.weight": np.zeros((32, 4, 3, 3))}, MODEL, image_size=16)
    init = lambda *text, **extra: jax.eval_shape(MODEL.init, jax.random.key(0), given("x"), given("t"), *text, **extra)
    with pytest.raises(ValueError, match="image and known must be given together"):
        init(*TEXT, image=given("picture"))
    with pytest.raises(ValueError, match="tokens have length 3; this network was built for 12"):
        init(TEXT[0][:, :3], TEXT[1][:, :3])


@pytest.mark.parametrize("name,channels,size", [("BASE", 3, 64), ("UPSAMPLER", 6, 256)])
def test_the_published_networks_have_a_table(name, channels, size):
    model = getattr(glide, name)()
    shapes = glide.glide_shapes(model, size, channels)
    flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert sorted(flat) == sorted(entry.ours for entry in glide.glide_table(model, size))
