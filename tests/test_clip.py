"""CLIP: unit embeddings of their own row, the clamped scale, the end of a text, and what does not fit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal, random_params

from ddpm_jax.models.clip import CLIP, VisionTransformer, _at_most, normalize
from ddpm_jax.models.text_encoder import TextEncoder, end_position

B, L, D, VOCAB = 3, 5, 6, 11
MASK = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool)
OTHER_MASK = jnp.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
TOKENS = jnp.array([[1, 4, 2, 0, 0], [1, 5, 6, 7, 2], [1, 2, 0, 0, 0]], jnp.int32)
OTHER_TOKENS = jnp.array([[1, 8, 9, 2, 0], [1, 2, 0, 0, 0], [1, 3, 4, 5, 2]], jnp.int32)
CLIP_SIZE = 8


@functools.cache
def bound_clip():
    vision = VisionTransformer(CLIP_SIZE, 4, 8, 1, 2)
    clip = CLIP(vision, TextEncoder(VOCAB, L, 8, 1, 2), D)
    images = jnp.clip(normal(0, B, CLIP_SIZE, CLIP_SIZE, 3), -1, 1)
    params = random_params(clip.init, images, TOKENS, MASK)
    return clip, params, images, fast_jit(clip.apply)


def test_clip_embeddings_are_unit_vectors_and_depend_on_their_own_row():
    _, params, images, run = bound_clip()
    z_image, z_text, log_scale = run(params, images, TOKENS, MASK)
    for z in (z_image, z_text):
        assert z.shape == (B, D) and z.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(np.asarray(z, np.float64), axis=1), 1.0, atol=1e-6)
    assert log_scale == 1.0
    row = jnp.arange(B) == 1
    images = jnp.where(row[:, None, None, None], -images, images)
    tokens, mask = jnp.where(row[:, None], OTHER_TOKENS, TOKENS), jnp.where(row[:, None], OTHER_MASK, MASK)
    changed = run(params, images, tokens, mask)
    for before, after in zip((z_image, z_text), changed[:2], strict=True):
        np.testing.assert_array_equal(before[::2], after[::2])
        assert (before[1] != after[1]).all()


@pytest.mark.parametrize("value,scale", [(math.log(1 / 0.07), 1 / 0.07), (math.log(100.0), 100.0), (7.0, 100.0)])
def test_clip_scale_is_at_most_100(value, scale):
    _, params, images, run = bound_clip()
    params = {"params": params["params"] | {"log_scale": jnp.float32(value)}}
    np.testing.assert_allclose(np.exp(run(params, images, TOKENS, MASK)[2]), scale, rtol=1e-5)


@pytest.mark.parametrize("value,passes", [(4.0, (1, 1)), (5.0, (1, 0))])
def test_the_clamped_scale_can_come_down_again(value, passes):
    """A gradient that lowers the scale passes everywhere; one that raises it stops at the clamp, ln 100 = 4.6."""
    slopes = [float(jax.grad(lambda x, sign=sign: sign * _at_most(x, math.log(100.0)))(value)) for sign in (1.0, -1.0)]
    assert slopes == [passes[0], -passes[1]]


def test_clip_starts_at_its_published_temperature():
    clip, _, images, _ = bound_clip()
    params = fast_jit(clip.init)(jax.random.key(0), images, TOKENS, MASK)
    np.testing.assert_allclose(np.exp(params["params"]["log_scale"]), 1 / 0.07, rtol=1e-6)


def test_clip_reads_the_text_up_to_its_end():
    _, params, images, run = bound_clip()
    z = run(params, images, TOKENS, MASK)[1]
    np.testing.assert_array_equal(z, run(params, images, jnp.where(MASK, TOKENS, 9), MASK)[1])
    assert (z != run(params, images, TOKENS.at[:, 0].set(8), MASK)[1]).all()
    np.testing.assert_array_equal(end_position(MASK), [2, 4, 1])


def test_clip_names_what_does_not_fit():
    clip, params, images, _ = bound_clip()
    for size in (CLIP_SIZE - 1, 2 * CLIP_SIZE):
        with pytest.raises(ValueError, match=r"this CLIP takes \[B, 8, 8, 3\]"):
            jax.eval_shape(clip.apply, params, jnp.zeros((B, size, size, 3)), TOKENS, MASK)
    with pytest.raises(ValueError, match="tokens have length 6, the text encoder was built for at most 5"):
        jax.eval_shape(clip.apply, params, images, jnp.zeros((B, 6), jnp.int32), jnp.ones((B, 6), bool))
    odd = VisionTransformer(9, 4, 8, 1, 2)
    with pytest.raises(ValueError, match="patch=4 must divide"):
        jax.eval_shape(odd.init, jax.random.key(0), jnp.zeros((1, 9, 9, 3)))
    heads = TextEncoder(VOCAB, L, 8, 1, 3)
    with pytest.raises(ValueError, match="heads=3 must divide width=8"):
        jax.eval_shape(heads.init, jax.random.key(0), TOKENS)


def test_a_convolutional_stem_shrinks_the_image_before_the_patches():
    """Two layers of stride 2 in front of patches of 8 pixels: 2 x 2 tokens of 2 x 2 feature vectors each."""
    images = jnp.clip(normal(0, B, 16, 16, 3), -1, 1)
    vision = VisionTransformer(16, 8, 8, 1, 2, stem=(4, 6))
    params = random_params(vision.init, images)
    shapes = jax.tree.map(jnp.shape, params["params"])
    assert shapes["stem_0"] == {"kernel": (3, 3, 3, 4)} and shapes["stem_1"] == {"kernel": (3, 3, 4, 6)}
    assert shapes["patch"] == {"kernel": (2, 2, 6, 8)} and shapes["position"] == (1 + 2 * 2, 8)
    run = fast_jit(vision.apply)
    out = run(params, images)
    assert out.shape == (B, 8) and (out[1:] != run(params, images.at[1:].set(images[:-1]))[1:]).all()
    with pytest.raises(ValueError, match="patch=8 must be a multiple of 16"):
        jax.eval_shape(
            VisionTransformer(16, 8, 8, 1, 2, stem=(4, 4, 4, 4)).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))
        )


def test_a_text_shorter_than_the_context_is_read_alike():
    module = TextEncoder(VOCAB, L, 8, 2, 2)
    params = random_params(module.init, TOKENS)
    run = fast_jit(module.apply)
    whole, part = run(params, TOKENS), run(params, TOKENS[:, :3])
    np.testing.assert_allclose(whole[:, :3], part, atol=1e-5)


def test_normalize_keeps_zero_and_its_gradient_finite():
    z = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(normalize(z), [[0, 0], [0.6, 0.8]], atol=1e-7)
    assert np.isfinite(jax.grad(lambda z: normalize(z).sum())(z)).all()
