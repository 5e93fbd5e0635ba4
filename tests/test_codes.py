"""The autoregressive prior: codes of embeddings, its network with and without a cache, sampling, the pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from random_networks import fast_jit, random_params
from tiny_pipelines import LENGTH, WIDTH, clip, decoder, upsampler, zeros

from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.diffusion.tokens import TokenSampling, nucleus, sample_token, sample_tokens, token_sampling_from
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.embedding_codes import EmbeddingCodes
from ddpm_jax.pipelines import UnCLIP, load, save
from ddpm_jax.pipelines import unclip as module
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training import AutoregressiveTask, Captions, CodesTask

D, K, BUCKETS, DOTS, L, B = 12, 5, 1024, 8, 4, 3


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    monkeypatch.setattr(module, "_generate", _generate)


_generate = fast_jit(module._generate.__wrapped__, static_argnames=("embedding", "use_text", "low_res"))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.cache
def embeddings():
    """Unit vectors of which K directions have nearly all the variance, and of their captions."""
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 0.7, 0.5, 0.3, 0.2] + [0.002] * (D - K))
    rotation = np.linalg.qr(rng.standard_normal((D, D)))[0]
    z = unit(5.0 * rotation[0] + (rng.standard_normal((2000, D)) * spread) @ rotation)
    return z.astype(np.float32), unit(z + 0.3 * rng.standard_normal((2000, D))).astype(np.float32)


@functools.cache
def fitted(dims=K, buckets=BUCKETS):
    task = CodesTask(EmbeddingCodes(D, dims, buckets, DOTS))
    total = None
    for part in np.array_split(np.arange(2000), 8):
        sums = task.sums({"z_image": jnp.asarray(embeddings()[0][part]), "z_text": jnp.asarray(embeddings()[1][part])})
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return task, *task.fitted(total)


def test_components_are_those_of_numpy_in_their_order():
    _, params, metrics = fitted()
    z = embeddings()[0].astype(np.float64)
    _, singular, right = np.linalg.svd(z - z.mean(0), full_matrices=False)
    found = params["params"]
    np.testing.assert_allclose(found["mean"], z.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(found["components"].T * right[:K], axis=1)), 1.0, atol=1e-4)
    std = singular[:K] / np.sqrt(len(z))
    np.testing.assert_allclose(found["edges"][:, -1], 6 * std, rtol=1e-4)
    np.testing.assert_allclose(found["edges"], np.outer(std, np.linspace(-6, 6, BUCKETS + 1)), rtol=1e-4, atol=1e-6)
    assert metrics["explained"] == pytest.approx((singular[:K] ** 2).sum() / (singular**2).sum(), rel=1e-4)
    assert metrics["dot_product"] == pytest.approx((z * embeddings()[1]).sum(1).mean(), abs=1e-3)


def test_the_error_of_the_codes():
    """What the other directions have, and the rounding to buckets: less than 1 % of the variance here."""
    task, params, metrics = fitted()
    z = jnp.asarray(embeddings()[0])
    error = float(task.measure(params, {"z_image": z})["quantization_error"])
    assert error < 0.01 and error == pytest.approx(1 - metrics["explained"], abs=2e-3)
    coarse, coarse_params, _ = fitted(buckets=8)
    assert float(coarse.measure(coarse_params, {"z_image": z})["quantization_error"]) > 3 * error
    codes = task.model.apply(params, z)
    assert codes.shape == (2000, K) and codes.dtype == jnp.int32 and codes.min() >= 0 and codes.max() < BUCKETS
    decoded = task.model.apply(params, codes, method="decode")
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=-1), 1.0, atol=1e-5)


def test_codes_count_the_edges_below():
    task, params, _ = fitted(buckets=8)
    z = embeddings()[0][:50]
    found = np.asarray(task.model.apply(params, jnp.asarray(z)))
    own = params["params"]
    c = (z.astype(np.float64) - own["mean"]) @ own["components"].astype(np.float64)
    expected = np.clip((c[:, :, None] > own["edges"][None]).sum(-1) - 1, 0, 7)
    assert (found != expected).mean() <= 1 / found.size  # one may lie on an edge but for rounding


def test_dot_products_fill_their_buckets_evenly():
    task, params, _ = fitted()
    found = task.model.apply(params, *map(jnp.asarray, embeddings()[::-1]), method="dot_code")
    np.testing.assert_allclose(np.bincount(found, minlength=DOTS) / len(found), 1 / DOTS, atol=0.01)
    dots = (embeddings()[0] * embeddings()[1]).sum(1)
    assert scipy.stats.spearmanr(dots, found).statistic > 0.98  # larger products have larger codes


def test_too_few_embeddings_are_refused():
    task = CodesTask(EmbeddingCodes(D, K, 8, DOTS))
    few = {name: jnp.asarray(z[:K]) for name, z in zip(("z_image", "z_text"), embeddings())}
    with pytest.raises(ValueError, match="dims=5 components need more embeddings than 5"):
        task.fitted(task.sums(few))


# ---- The network -----------------------------------------------------------------------------------------------------


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(L)[None] < rng.integers(1, L + 1, (B, 1))
    text = rng.standard_normal((B, L, 7)).astype(np.float32)
    z = unit(rng.standard_normal((B, D))).astype(np.float32)
    return rng.integers(0, 11, (B, K)).astype(np.int32), rng.integers(0, DOTS, B).astype(np.int32), z, text, mask


@functools.cache
def network(scan):
    net = AutoregressivePrior(D, K, 11, DOTS, L, 16, 2, 2, scan=scan)
    return net, random_params(net.init, *arguments())


@pytest.mark.parametrize("scan", [False, True])
def test_the_cache_changes_nothing(scan):
    net, params = network(scan)
    codes, *prefix = arguments()
    keep = np.array([True, False, True])
    whole = np.asarray(fast_jit(net.apply)(params, codes, *prefix, keep))

    @fast_jit
    def one_by_one(codes, prefix):
        logits, state = net.apply(params, *prefix, keep, method="begin")
        found = [logits]
        for i in range(K - 1):
            logits, state = net.apply(params, state, codes[:, i], method="next")
            found.append(logits)
        return jnp.stack(found, axis=1)

    np.testing.assert_allclose(one_by_one(codes, prefix), whole, atol=1e-5 * np.abs(whole).max())


def test_a_code_sees_those_before_it_alone():
    net, params = network(False)
    codes, *prefix = arguments()
    apply = fast_jit(net.apply)
    before = np.asarray(apply(params, codes, *prefix))
    codes[:, 2] += 1
    after = np.asarray(apply(params, codes, *prefix))
    changed = np.abs(after - before).max((0, 2)) > 1e-6
    np.testing.assert_array_equal(changed, [False, False, False, True, True])


def test_a_dropped_caption_has_no_influence_and_padding_neither():
    net, params = network(False)
    codes, dot, z, text, mask = arguments()
    apply = fast_jit(net.apply)
    other = arguments(1)
    none = np.zeros(B, bool)
    np.testing.assert_array_equal(
        apply(params, codes, dot, z, text, mask, none), apply(params, codes, *other[1:], none)
    )
    kept = apply(params, codes, dot, z, text, mask)
    np.testing.assert_array_equal(kept, apply(params, codes, dot, z, np.where(mask[..., None], text, 7.0), mask))
    for i in range(3):
        changed = [dot, z, text, mask]
        changed[i] = other[i + 1]
        assert np.abs(kept - apply(params, codes, *changed)).max() > 1e-3


def test_the_loss_is_the_mean_cross_entropy():
    net, params = network(False)
    codes, dot, z, text, mask = arguments()
    task = AutoregressiveTask(model=net, captions=Captions(L, drop=0.1))
    batch = {"codes": codes, "dot_code": dot, "z_text": z, "hidden": text, "mask": mask}
    loss, metrics = task.eval_loss(params, batch, jax.random.key(0))
    logits = np.asarray(net.apply(params, codes, dot, z, text, mask), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, codes[..., None], -1)[..., 0].mean(-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == codes).mean(-1))


# ---- Sampling --------------------------------------------------------------------------------------------------------


def test_tokens_have_the_probabilities_of_their_logits():
    """A Markov chain of three tokens: counts of the second against its exact distribution, by chi-square."""
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]], np.float32))
    n = 20_000
    following = lambda state, token: (jnp.asarray(logits)[token], state)
    run = jax.jit(lambda keys: sample_tokens(jnp.broadcast_to(logits[0], (n, 3)), following, None, keys, 3))
    found = np.asarray(run(example_keys(jax.random.key(0), n)))
    assert found.shape == (n, 3)
    chain = np.exp(logits.astype(np.float64))
    for position, exact in enumerate((chain[0], chain[0] @ chain, chain[0] @ chain @ chain)):
        counts = np.bincount(found[:, position], minlength=3)
        assert scipy.stats.chisquare(counts, n * exact / exact.sum()).pvalue > 1e-4
    np.testing.assert_array_equal(found[7], run(example_keys(jax.random.key(0), n))[7])


def test_temperature():
    logits = np.array([[1.0, 0.0, -1.0]], np.float32)
    keys = example_keys(jax.random.key(1), 20_000)
    wide = jnp.broadcast_to(logits, (20_000, 3))
    assert (np.asarray(sample_token(keys, wide, temperature=0.0)) == 0).all()
    counts = np.bincount(sample_token(keys, wide, temperature=2.0), minlength=3)
    exact = np.exp(logits[0].astype(np.float64) / 2)
    assert scipy.stats.chisquare(counts, 20_000 * exact / exact.sum()).pvalue > 1e-4


@pytest.mark.parametrize("top_p,kept", [(0.4, [0]), (0.5, [0]), (0.51, [0, 2]), (0.8, [0, 2]), (1.0, [0, 1, 2, 3])])
def test_nucleus_is_the_smallest_set_of_that_probability(top_p, kept):
    probabilities = np.array([[0.5, 0.125, 0.3125, 0.0625]], np.float32)
    found = np.flatnonzero(np.isfinite(nucleus(jnp.log(probabilities), top_p)[0]))
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"scale": -1.0}, "sampling.scale=-1.0 must be in [0, 10000]"),
        ({"temperature": "hot"}, "sampling.temperature='hot' must be a finite number"),
        ({"top_p": 0.0}, "sampling.top_p=0.0 must be in [1e-06, 1]"),
        ({"steps": 3}, "sampling has no option 'steps'; there are scale, temperature, top_p"),
    ],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError) as error:
        token_sampling_from(fields)
    assert str(error.value) == message


# ---- The pipeline ----------------------------------------------------------------------------------------------------


@functools.cache
def pipeline():
    codes = EmbeddingCodes(WIDTH, 6, 8, 4)
    params = random_params(codes.init, zeros(1, WIDTH), seed=1)
    params["params"]["edges"] = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, 9), (6, 9))
    net = AutoregressivePrior(WIDTH, 6, 8, 4, LENGTH, WIDTH, 1, 2)
    inputs = (zeros(1, 6, dtype=np.int32), zeros(1, dtype=np.int32), zeros(1, WIDTH), zeros(1, LENGTH, WIDTH))
    metadata = freeze({"conditions": ["caption"], "caption": {"length": LENGTH, "own_tokens": False}})
    prior = Model(random_params(net.init, *inputs, np.ones((1, LENGTH), bool)), net, metadata)
    return UnCLIP(clip(), prior, decoder(), codes=Model(params, codes), upsamplers=(upsampler(),), batch_size=4)


PROMPTS = ["a small red circle", "a large blue square", "", "a small green star"]


def test_generate_by_codes():
    images = pipeline().generate(PROMPTS, low_res=True)
    assert images.dtype == np.uint8 and len(images) == 4
    again = pipeline().generate(PROMPTS[1:2], start=1, low_res=True)
    assert np.abs(images[1:2].astype(int) - again).max() <= 1
    for options in ({"prior_scale": 3.0, "prior_temperature": 0.5, "prior_top_p": 0.3}, {"seed": 1}):
        assert (pipeline().generate(PROMPTS, low_res=True, **options) != images).any(), options


def test_guidance_of_1_is_none_and_0_is_unconditional():
    alone = pipeline().replace(candidates=1).checked()
    tokens, mask = alone.tokenizer(PROMPTS[:2], LENGTH)
    keys = example_keys(jax.random.key(0), 2)

    @fast_jit
    def sample(keep, sampling):
        text = alone.encode_text(tokens, mask)
        own = alone.replace(sampling=alone.sampling | {"prior": sampling})
        return own.sample_embedding(text, tokens, keys, keep_text=keep)

    kept, dropped = np.ones(2, bool), np.zeros(2, bool)
    given, without = (np.asarray(sample(keep, TokenSampling())) for keep in (kept, dropped))
    np.testing.assert_allclose(np.linalg.norm(given, axis=-1), 1.0, atol=1e-5)
    assert (given != without).any()
    np.testing.assert_allclose(sample(kept, TokenSampling(scale=0.0)), without, atol=1e-6)
    np.testing.assert_allclose(sample(kept, TokenSampling(scale=1.0)), given, atol=1e-6)


def test_a_directory_gives_the_pipeline_back(tmp_path):
    own = pipeline().replace(sampling={"prior": TokenSampling(scale=2.0, top_p=0.9)})
    save(own, tmp_path / "p")
    np.testing.assert_array_equal(load(tmp_path / "p").generate(PROMPTS[:1]), own.generate(PROMPTS[:1]))


def test_what_does_not_fit_is_refused():
    other = pipeline().codes.replace(network=EmbeddingCodes(WIDTH, 5, 8, 4))
    with pytest.raises(ValueError, match="prior has dims=6, and codes 5"):
        pipeline().replace(codes=other).checked()
    with pytest.raises(ValueError, match="an AutoregressivePrior needs codes"):
        pipeline().replace(codes=None).checked()


def test_a_prior_that_is_damaged_is_named():
    """NaN in the weights of the prior, which the largest of its logits would not show."""
    damaged = jax.tree.map(lambda x: x * jnp.nan, pipeline().prior.params)
    with pytest.raises(NotFiniteError, match="the prior returned values that are not finite"):
        pipeline().replace(prior=pipeline().prior.replace(params=damaged)).generate(PROMPTS[:1])


@pytest.mark.parametrize("sampling", [{"prior": Sampling("ddim", 5)}, {"decoder": TokenSampling()}])
def test_sampling_of_another_kind_is_refused(sampling):
    with pytest.raises(ValueError, match="sampling of .* must be a"):
        pipeline().replace(sampling=sampling).checked()


def test_options_of_a_code_prior_are_named():
    with pytest.raises(ValueError, match="'prior_steps': the stage prior takes scale, temperature, top_p"):
        pipeline().generate(PROMPTS, prior_steps=3)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_known_options_of_tokens_are_checked_and_traced_ones_give_minus_1(options):
    ((name, value),) = options.items()
    logits, keys = jnp.zeros((2, 3)), example_keys(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=name):
        sample_token(keys, logits, **options)
    np.testing.assert_array_equal(jax.jit(lambda v: sample_token(keys, logits, **{name: v}))(value), [-1, -1])


def test_tasks_of_other_networks_are_refused():
    for task in (lambda net: CodesTask(net), lambda net: AutoregressiveTask(model=net, captions=Captions(L))):
        with pytest.raises(ValueError, match="model=.* must be a"):
            task(decoder().network)
    for deviations in (0.0, np.inf, True, "6"):
        with pytest.raises(ValueError, match="deviations=.* must be a positive number"):
            CodesTask(EmbeddingCodes(D, K, 8, DOTS), deviations)
