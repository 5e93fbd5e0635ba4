"""Health of priors: embeddings that are sampled while a prior trains, against the true ones and three baselines."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.diffusion.tokens import TokenSampling
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.models.embedding_norm import EmbeddingNorm, EmbeddingStatistics
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training import AutoregressiveTask, Captions, DiffusionTask, Embeddings, Images
from ddpm_jax.training.tasks.health import embedding_health

B, D, L = 6, 5, 4


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    z_image = unit(rng.standard_normal((B, D)))
    z_text = unit(z_image + 0.5 * rng.standard_normal((B, D)))
    mask = np.ones((B, L), bool)
    hidden = rng.standard_normal((B, L, 3))
    found = {"z_image": z_image, "z_text": z_text, "hidden": hidden}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()} | {"mask": jnp.asarray(mask)}


def test_metrics_equal_numpy():
    own = batch()
    z, text = (np.asarray(own[name], np.float64) for name in ("z_image", "z_text"))
    predicted = np.random.default_rng(1).standard_normal((B, D))
    found = embedding_health(jnp.asarray(predicted, jnp.float32), own["z_image"], own["z_text"], length=2.0)
    others = [unit(np.delete(z, i, axis=0).sum(0)) for i in range(B)]
    rank = lambda query: np.mean([1 + np.sum(z @ query[i] > z[i] @ query[i]) for i in range(B)])
    expected = {
        "cosine_predicted": np.mean((unit(predicted) * z).sum(-1)),
        "cosine_text": np.mean((text * z).sum(-1)),
        "cosine_other_image": np.mean([z[i] @ z[i - 1] for i in range(B)]),
        "cosine_mean_image": np.mean([z[i] @ others[i] for i in range(B)]),
        "cosine_predicted_text": np.mean((unit(predicted) * text).sum(-1)),
        "norm_predicted": np.linalg.norm(predicted, axis=-1).mean() / 2.0,
        "rank_predicted": rank(predicted),
        "rank_text": rank(text),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert 1 < expected["rank_predicted"] < B


class Answer(nn.Module):
    """A prior that predicts a text embedding: of a scale, or standardized by a mean and a deviation."""

    norm: EmbeddingNorm

    @nn.compact
    def __call__(self, zt, t, z_text, text, text_mask, keep_text, *, train=False):
        return self.norm.normalize(z_text)


STATISTICS = {"params": {"mean": jnp.full(D, 0.1), "std": jnp.linspace(0.2, 0.4, D)}}


@pytest.mark.parametrize(
    "standardized,options", [(False, {"l2_clamp": True}), (True, {"sampler": "analytic", "scale": 3.0})]
)
def test_a_prior_that_repeats_the_text_embedding_is_as_near_as_that(standardized, options):
    statistics = Model(STATISTICS, EmbeddingStatistics(D))
    x0 = Embeddings(D, statistics="statistics") if standardized else Embeddings(D, 4.0)
    task = DiffusionTask(
        model=Answer(statistics.apply() if standardized else EmbeddingNorm(scale=4.0)),
        diffusion=Diffusion("cosine", 10, "x0"),
        x0=x0,
        conditions=(Captions(L, drop=0.1),),
        sampling=Sampling(steps=3).with_options(**options),
    )
    assert task.health_needs == (("statistics",) if standardized else ())
    frozen = dict.fromkeys(task.health_needs, statistics)
    found = fast_jit(lambda batch, key: task.health({}, frozen, batch, key))(
        task.x0.prepare(frozen, batch()), jax.random.key(0)
    )
    np.testing.assert_allclose(found["cosine_predicted"], found["cosine_text"], atol=1e-4)
    np.testing.assert_allclose(found["cosine_predicted_text"], 1.0, atol=1e-4)
    assert found["rank_predicted"] == found["rank_text"]
    length = statistics.apply().length if standardized else 1.0
    np.testing.assert_allclose(found["norm_predicted"], 1.0 / length, atol=1e-4)


def test_a_task_that_samples_no_embeddings_has_no_health():
    network, diffusion = Answer(EmbeddingNorm()), Diffusion("cosine", 10)
    images = DiffusionTask(model=network, diffusion=diffusion, x0=Images(8), sampling=Sampling(steps=2))
    unsampled = DiffusionTask(model=network, diffusion=diffusion, x0=Embeddings(D))
    assert images.health_needs is None and unsampled.health_needs is None


def test_health_of_an_autoregressive_prior():
    """A network whose logits do not depend on anything but the position gives one row of codes, known beforehand."""
    codes = EmbeddingCodes(D, 3, 4, 4)
    rng = np.random.default_rng(0)
    params = {
        "mean": np.zeros(D),
        "components": np.linalg.qr(rng.standard_normal((D, D)))[0][:, :3],
        "edges": np.broadcast_to(np.linspace(-1, 1, 5), (3, 5)),
        "dot_edges": np.linspace(-0.5, 0.5, 3),
    }
    own = Model({"params": {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}}, codes)
    network = AutoregressivePrior(D, 3, 4, 4, L, 8, 1, 2)
    task = AutoregressiveTask(model=network, captions=Captions(L, drop=0.1), sampling=TokenSampling(scale=2.0))
    prepared = batch() | {"codes": jnp.zeros((B, 3), jnp.int32), "dot_code": jnp.zeros(B, jnp.int32)}
    shapes = jax.eval_shape(network.init, jax.random.key(0), **_arguments(prepared))
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    weights["params"]["out"]["bias"] = jnp.array([-50.0, -50.0, 50.0, -50.0])  # always bucket 2, whose middle is 0.25
    assert task.health_needs == ("codes",)
    found = fast_jit(lambda batch, key: task.health(weights, {"codes": own}, batch, key))(prepared, jax.random.key(0))
    expected = unit(params["components"] @ np.full(3, 0.25))
    np.testing.assert_allclose(
        found["cosine_predicted"], np.mean(np.asarray(prepared["z_image"]) @ expected), atol=1e-5
    )
    np.testing.assert_allclose(found["norm_predicted"], 1.0, atol=1e-5)


def _arguments(prepared):
    names = {"codes": "codes", "dot_code": "dot_code", "z_text": "z_text", "text": "hidden", "text_mask": "mask"}
    return {argument: prepared[name] for argument, name in names.items()}
