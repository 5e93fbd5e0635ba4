"""The space that a diffusion prior works in: a scale or statistics, the way there and back, and clamps in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from tiny_pipelines import LENGTH, WIDTH, decoder, prior, unclip

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling, sample_with
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.models.embedding_norm import EmbeddingNorm, EmbeddingStatistics
from ddpm_jax.pipelines import load, save
from ddpm_jax.storage.metadata import freeze, thaw
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training import DiffusionTask, Embeddings, Images, StatisticsTask
from ddpm_jax.training.describe import describe

D, N = 6, 1000


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def embeddings():
    """Unit vectors whose first entry is near 0.9 with a deviation of a hundredth of that, as in public CLIPs."""
    rng = np.random.default_rng(0)
    z = 0.3 * rng.standard_normal((N, D))
    z[:, 0] = np.linalg.norm(z[:, 1:], axis=1) * (2.0 + 0.05 * rng.standard_normal(N))
    return unit(z).astype(np.float32)


@functools.cache
def fitted():
    task, total = StatisticsTask(EmbeddingStatistics(D)), None
    for part in np.array_split(embeddings(), 8):
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), task.sums({"z_image": jnp.asarray(part)}))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return task, *task.fitted(total)


def test_statistics_are_those_of_numpy():
    task, params, metrics = fitted()
    z = embeddings().astype(np.float64)
    assert z.mean(0)[0] > 50 * z.std(0)[0]  # where sums of squares in float32 would have lost the deviation
    np.testing.assert_allclose(params["params"]["mean"], z.mean(0), atol=1e-7)
    np.testing.assert_allclose(params["params"]["std"], z.std(0), rtol=1e-4)
    assert metrics["mean_norm"] ** 2 + metrics["std_norm"] ** 2 == pytest.approx(1.0, abs=1e-6)
    assert metrics["smallest_std"] == pytest.approx(z.std(0).min(), rel=1e-4)
    measured = task.measure(params, {"z_image": jnp.asarray(embeddings())})["mean_square"]
    assert float(measured.mean()) == pytest.approx(1.0, rel=1e-3)


def test_what_cannot_be_standardized_is_refused():
    task = StatisticsTask(EmbeddingStatistics(D))
    with pytest.raises(ValueError, match="a deviation needs at least 2 embeddings, got 1"):
        task.fitted(task.sums({"z_image": jnp.ones((1, D))}))
    with pytest.raises(ValueError, match="entry 0 of the embeddings is 1 in all of them"):
        task.fitted(task.sums({"z_image": jnp.ones((4, D))}))
    with pytest.raises(ValueError, match="model=.* must be a"):
        StatisticsTask(decoder().network)


def norms():
    _, params, _ = fitted()
    return {
        "scale": EmbeddingNorm(scale=17.2),
        "statistics": EmbeddingStatistics(D).apply(params),
        "converted": EmbeddingNorm.standardizing(jnp.arange(D, dtype=jnp.float32), jnp.full(D, 2.0)),
    }


@pytest.mark.parametrize("name", ["scale", "statistics", "converted"])
def test_there_and_back_and_the_length_of_training(name):
    norm, z = norms()[name], jnp.asarray(embeddings()[:5]) * 3.0
    np.testing.assert_allclose(norm.restore(norm.normalize(z)), z, atol=1e-5)
    length = {"scale": 1.0, "statistics": 1.0, "converted": np.sqrt(0 + 1 + 4 + 9 + 16 + 25 + 6 * 4.0)}[name]
    projected = norm.restore(norm.project(norm.normalize(z)))
    np.testing.assert_allclose(projected, length * unit(np.asarray(z, np.float64)), atol=1e-5 * length)


def test_x0_of_a_task():
    z, (_, params, _) = jnp.asarray(embeddings()[:5]), fitted()
    # The paper's 17.2 for 1024 dimensions, to two digits of 0.54.
    assert Embeddings(1024).metadata()["embedding"]["scale"] == pytest.approx(17.2, rel=0.01)
    np.testing.assert_allclose(Embeddings(D)({"z_image": z}), 0.54 * np.sqrt(D) * z, rtol=1e-6)
    np.testing.assert_array_equal(Embeddings(D, 4.3)({"z_image": z}), z * 4.3)
    standardized = Embeddings(D, statistics="numbers")
    frozen = {"numbers": Model(params, EmbeddingStatistics(D))}
    own = params["params"]
    found = standardized(standardized.prepare(frozen, {"z_image": z}))
    np.testing.assert_allclose(found, (np.asarray(z) - own["mean"]) / own["std"], rtol=1e-4, atol=1e-4)
    assert standardized.metadata() == {"embedding": {"size": D, "standardized": True}}
    # A checkpoint of a version without the field is one of a scale.
    assert describe(Embeddings(D, 4.3)) == {"class": "Embeddings", "size": D, "scale": 4.3, "role": "clip"}
    assert describe(standardized)["statistics"] == "numbers"
    for wrong in (EmbeddingStatistics(D + 1), EmbeddingCodes(D, 2, 8, 4)):
        with pytest.raises(ValueError, match="for the role 'numbers' must be EmbeddingStatistics of 6 entries, got a"):
            standardized.prepare({"numbers": Model(params, wrong)}, {"z_image": z})
    for options, message in (
        ({"scale": 2.0, "statistics": "numbers"}, "scale=2.0 of Embeddings must be None with statistics='numbers'"),
        ({"scale": 0.0}, "Embeddings.scale=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Embeddings(D, **options)


# ---- Clamps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, lambda x0, norm: x0),
        ({"threshold": 10.0}, lambda x0, norm: np.clip(x0, -10, 10)),
        ({"l2_clamp": True}, lambda x0, norm: 17.2 * unit(x0)),
        ({"threshold": 5.0, "l2_clamp": True}, lambda x0, norm: 17.2 * unit(np.clip(x0, -5, 5))),
    ],
)
def test_clamps_of_the_prediction(options, expected):
    """The last step of a sampler returns the estimate of x0, here of a network that always predicts the same."""
    x0 = np.linspace(-14.0, 12.0, D, dtype=np.float32)[None] * np.array([[1.0], [0.2]], np.float32)
    norm = norms()["scale"]
    found = sample_with(
        Sampling("ancestral", 2, **options).checked(),
        Diffusion("cosine", 10, "x0"),
        lambda xt, t: jnp.asarray(x0),
        example_keys(jax.random.key(0), 2),
        (D,),
        project=norm.project,
    )
    np.testing.assert_allclose(found, expected(x0.astype(np.float64), norm), rtol=1e-5, atol=1e-5)


def test_the_l2_clamp_is_for_embeddings():
    with pytest.raises(ValueError, match="l2_clamp=1 must be True or False"):
        Sampling(l2_clamp=1).checked()
    with pytest.raises(ValueError, match="decoder_l2_clamp=True is for a diffusion prior"):
        unclip().generate(["a small red circle"], decoder_l2_clamp=True)
    with pytest.raises(ValueError, match="l2_clamp=True is for a diffusion prior"):
        Sampling(l2_clamp=True).x0_transform()
    clamped = Sampling("ddim", 5, l2_clamp=True)
    with pytest.raises(ValueError, match="l2_clamp=True is for a diffusion prior"):
        DiffusionTask(model=decoder().network, diffusion=Diffusion("cosine", 10), x0=Images(8), sampling=clamped)
    assert Sampling(**clamped.describe()) == clamped
    assert clamped.with_options(l2_clamp=False, sampler="ancestral") == Sampling("ancestral", 5)


# ---- The pipeline ----------------------------------------------------------------------------------------------------


def statistics(mean=0.0, std=1 / 4.3):
    params = {"params": {"mean": jnp.full(WIDTH, mean), "std": jnp.full(WIDTH, std)}}
    return Model(params, EmbeddingStatistics(WIDTH))


@functools.cache
def standardized():
    metadata = thaw(prior().metadata) | {"embedding": {"size": WIDTH, "standardized": True}}
    return prior().replace(metadata=freeze(metadata))


@fast_jit
def sample_embedding(pipeline, tokens, mask):
    text = pipeline.encode_text(tokens, mask)
    return pipeline.sample_embedding(text, tokens, example_keys(jax.random.key(0), len(tokens)))


def test_a_standardized_prior_with_the_numbers_of_a_scale_is_one_of_that_scale(tmp_path):
    tokens, mask = unclip().tokenizer(["a small red circle", "a large blue square"], LENGTH)
    pipeline = unclip().replace(prior=standardized(), statistics=statistics(), tokenizer=None)
    scaled = sample_embedding(unclip().replace(tokenizer=None), tokens, mask)
    np.testing.assert_allclose(sample_embedding(pipeline, tokens, mask), scaled, atol=1e-5)
    moved = sample_embedding(pipeline.replace(statistics=statistics(mean=0.3)), tokens, mask)
    assert np.abs(moved - scaled).max() > 0.05
    save(pipeline.replace(sampling=pipeline.sampling | {"prior": Sampling("ddim", 2, l2_clamp=True)}), tmp_path / "p")
    back = load(tmp_path / "p")
    assert back.sampling["prior"].l2_clamp and back.prior.metadata["embedding"]["standardized"]
    np.testing.assert_array_equal(back.statistics.params["params"]["std"], statistics().params["params"]["std"])


def test_statistics_that_do_not_fit_are_refused():
    pipeline = unclip().replace(prior=standardized())
    other = Model({"params": {}}, EmbeddingStatistics(WIDTH + 1))
    metadata = freeze(thaw(prior().metadata) | {"embedding": {"size": WIDTH}})
    for broken, message in (
        (pipeline, "the prior works on standardized embeddings and needs statistics"),
        (pipeline.replace(statistics=decoder()), "statistics must be EmbeddingStatistics, got a Decoder"),
        (pipeline.replace(statistics=other), "prior has embed_dim=16, and statistics 17"),
        (unclip().replace(statistics=statistics()), "statistics are for a prior of standardized embeddings"),
        (unclip().replace(prior=prior().replace(metadata=metadata)), "lacks 'embedding', the scale that it works at"),
    ):
        with pytest.raises(ValueError, match=message):
            broken.checked()
