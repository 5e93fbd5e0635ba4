"""Arithmetic on latents against numpy in float64, and their files."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import normal
from safetensors.numpy import save_file

from ddpm_jax.errors import LoadError
from ddpm_jax.pipelines.latents import (
    BipartiteLatent,
    fit_pca,
    load_latents,
    perturbed,
    save_latents,
    slerp,
    text_difference,
    truncated,
)
from ddpm_jax.pipelines.manipulation import pca_of


def f64(x):
    return np.asarray(x, np.float64)


def angle(a, b):
    a, b = f64(a), f64(b)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@pytest.mark.parametrize("shape", [(3, 16), (3, 4, 4, 2)])
def test_slerp(shape):
    """The published formula for directions, and norms between those of the ends."""
    a, b = normal(0, *shape), 3.0 * normal(1, *shape)
    weights = np.array([0.0, 0.3, 1.0])
    flat_a, flat_b = (f64(x).reshape(3, -1) for x in (a, b))
    norms = [np.linalg.norm(x, axis=1) for x in (flat_a, flat_b)]
    o = np.radians(angle(flat_a, flat_b))
    along = (np.sin((1 - weights) * o) / np.sin(o))[:, None] * flat_a / norms[0][:, None]
    along += (np.sin(weights * o) / np.sin(o))[:, None] * flat_b / norms[1][:, None]
    wanted = ((1 - weights) * norms[0] + weights * norms[1])[:, None] * along
    found = np.asarray(slerp(a, b, weights))
    np.testing.assert_allclose(found.reshape(3, -1), wanted, atol=1e-5)
    np.testing.assert_allclose(found[0], a[0], atol=1e-6)
    np.testing.assert_allclose(found[2], b[2], atol=2e-6)


def test_slerp_of_near_and_of_opposite_vectors():
    a = normal(0, 1, 8)
    np.testing.assert_allclose(slerp(a, a, 0.4), a, rtol=1e-6)
    near = a + 1e-5 * normal(1, 1, 8)
    np.testing.assert_allclose(slerp(a, near, 0.5), (f64(a) + f64(near)) / 2, atol=1e-6)
    assert np.isnan(slerp(a, -a, 0.5)).all()
    np.testing.assert_allclose(slerp(a, -a, 0.0), a, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, -a, 1.0), -a, rtol=1e-6)
    with pytest.raises(ValueError, match=r"arrays of one shape, got \(1, 8\) and \(1, 4\)"):
        slerp(a, a[:, :4], 0.5)


def test_text_difference():
    """z turns by theta times its angle to the difference of the captions, in their plane, with its norm."""
    z, texts = 2.5 * normal(0, 4, 16), f64(normal(1, 2, 16))
    source, target = (text / np.linalg.norm(text) for text in texts)
    np.testing.assert_allclose(text_difference(z, source, target, 0.0), z, atol=1e-6)
    found = text_difference(z, source, target, 0.25)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(z, axis=1), rtol=1e-6)
    whole = angle(z, target - source)
    np.testing.assert_allclose(angle(found, z), 0.25 * whole, rtol=1e-4)
    np.testing.assert_allclose(angle(found, target - source), 0.75 * whole, rtol=1e-4)
    with pytest.raises(ValueError, match="the captions have the same text embedding"):
        text_difference(z, source, source, 0.25)


def test_a_turn_is_by_its_angle():
    z = 2.5 * normal(0, 5, 16)
    found = [np.asarray(perturbed(z, degrees, jax.random.key(3))) for degrees in (0.0, 20.0, 40.0)]
    np.testing.assert_allclose(found[0], z, atol=1e-6)
    for degrees, one in ((20.0, found[1]), (40.0, found[2])):
        np.testing.assert_allclose(angle(one, z), degrees, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), np.linalg.norm(z, axis=1), rtol=1e-6)
    np.testing.assert_allclose(angle(found[1], found[2]), 20.0, rtol=1e-4)  # the same direction
    np.testing.assert_array_equal(perturbed(z[:2], 20.0, jax.random.key(3)), found[1][:2])
    towards = normal(4, 1, 16)
    assert (angle(perturbed(z, 30.0, towards=towards), towards) < angle(z, towards)).all()
    np.testing.assert_allclose(perturbed(z, 0.0, towards=z), z, rtol=1e-6)
    for wrong, message in (
        (lambda: perturbed(z, 20.0), "needs a key or towards, and only one of them"),
        (lambda: perturbed(z, 60.0, towards=z), r"towards is parallel to z_image\[0\]"),
        (lambda: perturbed(z, 60.0, towards=-3.0 * z), r"towards is parallel to z_image\[0\]"),
        (lambda: perturbed(z, 400.0, jax.random.key(0)), r"degrees=400.0 must be in \[0, 180\]"),
        (lambda: perturbed(z, np.nan, jax.random.key(0)), r"degrees=nan must be in \[0, 180\]"),
        (lambda: perturbed(z[0], 20.0, jax.random.key(0)), r"z_image must be float32\[N, D\], got shape \(16,\)"),
        (lambda: perturbed(z, 20.0, towards=towards[:, :4]), r"towards must be float32\[N, 16\], got shape \(1, 4\)"),
        (lambda: perturbed("z", 20.0, towards=towards), "z_image='z' must be embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_principal_components():
    """Those of the covariance, largest first; all of them reconstruct, none give the mean."""
    z = np.asarray(normal(0, 40, 6)) * np.array([3.0, 2.5, 2.0, 1.5, 1.0, 0.5], np.float32) + 1.0
    pca = fit_pca(z)
    values, vectors = np.linalg.eigh(np.cov(f64(z).T))
    np.testing.assert_allclose(np.abs(pca.components.T @ vectors[:, ::-1]), np.eye(6), atol=1e-5)
    np.testing.assert_allclose(pca.mean, f64(z).mean(0), rtol=1e-6)
    np.testing.assert_allclose(truncated(z, pca, 6), z, atol=1e-5)
    mean = pca.mean / np.linalg.norm(pca.mean)
    np.testing.assert_allclose(truncated(z, pca, 0), np.linalg.norm(z, axis=1)[:, None] * mean, atol=1e-5)
    errors = [angle(truncated(z, pca, dims), z).mean() for dims in range(7)]
    assert errors == sorted(errors, reverse=True)
    assert fit_pca(z[:4]).components.shape == (6, 3)
    with pytest.raises(ValueError, match=r"dims=7 must be an integer in \[0, 6\]"):
        truncated(z, pca, 7)
    with pytest.raises(ValueError, match=r"at least two embeddings \[N, D\], got shape \(1, 6\)"):
        fit_pca(z[:1])
    with pytest.raises(ValueError, match=r"z_image\[2\] holds NaN or infinity"):
        fit_pca(np.where(np.arange(40)[:, None] == 2, np.nan, z))
    with pytest.raises(ValueError, match=r"z_image must be float32\[N, 6\], got shape \(40, 5\)"):
        truncated(z[:, :5], pca, 3)


def test_components_of_codes():
    """Those of the codes, as the pipeline of an autoregressive prior has them."""
    z = np.asarray(normal(0, 20, 6))
    pca = fit_pca(z)
    params = {"mean": jnp.asarray(pca.mean), "components": jnp.asarray(pca.components[:, :3])}
    codes = SimpleNamespace(params={"params": params})
    found = pca_of(SimpleNamespace(codes=codes))
    np.testing.assert_allclose(truncated(z, found, 3), truncated(z, pca, 3), atol=1e-6)


def test_files(tmp_path):
    z, xt = np.asarray(normal(0, 2, 8)), np.asarray(normal(1, 2, 4, 4, 3))
    for latent in (BipartiteLatent(z), BipartiteLatent(z, xt, 25), BipartiteLatent(z, xt, (1, 5, 9))):
        save_latents(latent, tmp_path / "new" / "latents.safetensors")
        back = load_latents(tmp_path / "new" / "latents.safetensors")
        assert back.steps == latent.steps and len(back) == 2
        jax.tree.map(np.testing.assert_array_equal, back, latent)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["latents.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, back.take([1, 1]), BipartiteLatent(z[[1, 1]], xt[[1, 1]], (1, 5, 9)))


@pytest.mark.parametrize(
    "arrays,metadata,message",
    [
        ({"weight": np.zeros((2, 8), np.float32)}, {}, "is not a file of latents; python -m ddpm_jax.edit encode"),
        ({"z_image": np.full((2, 8), np.nan, np.float32)}, {}, "is damaged: its embeddings and noise are not finite"),
        ({"z_image": np.zeros((2, 8))}, {}, "are not finite arrays of float32"),
        ({"x_T": np.zeros((2, 4, 4, 3), np.float32)}, {"steps": "250"}, "are not finite arrays of float32"),
        ({"x_T": np.zeros((1, 4, 4, 3), np.float32)}, {"steps": "250"}, "its noise does not fit its embeddings"),
        (
            {"x_T": np.zeros((2, 4, 4, 3), np.float32)},
            {"steps": "[]"},
            "is damaged: steps=.* must be a number of",
        ),
        ({"x_T": np.zeros((2, 4, 4, 3), np.float32)}, {}, "is damaged: "),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, metadata, message):
    path = tmp_path / "a.safetensors"
    if "x_T" in arrays and "not finite" not in message:
        arrays = arrays | {"z_image": np.zeros((2, 8), np.float32)}
    metadata |= {} if "weight" in arrays else {"format": "ddpm_jax latents 1"}
    save_file(arrays, path, metadata)
    with pytest.raises(LoadError, match=message):
        load_latents(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(LoadError, match="latents file .*nowhere.safetensors does not exist"):
        load_latents(tmp_path / "nowhere.safetensors")
