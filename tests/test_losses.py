"""Losses against float64 numpy, and the gradients that must and must not flow."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import (
    contrastive_loss,
    cosine_betas,
    denoising_loss,
    linear_betas,
    make_process,
    min_snr,
    predict,
    q_sample,
    respace,
    target,
    vlb_terms,
)
from ddpm_jax.diffusion.losses import discretized_log_likelihood, p2, snr_power, stratified_timesteps
from ddpm_jax.diffusion.schedules import reciprocal_betas
from ddpm_jax.parallel.mesh import data_sharding, make_mesh

KEY = jax.random.key(0)
BETAS = {"linear": linear_betas(1000), "cosine": cosine_betas(1000)}


@functools.partial(jax.jit, static_argnames="variance")
def _vlb_of_x0(process, output, x0, xt, t, *, variance):
    return vlb_terms(process, predict(process, output, xt, t, prediction="x0", variance=variance), x0, xt, t)


def _images(batch=8, channels=3):
    levels = jax.random.randint(KEY, (batch, 4, 4, channels), 0, 256)
    return levels.astype(jnp.float32) / 127.5 - 1.0


def _cdf(z):
    return 0.5 * np.vectorize(math.erfc)(-z / math.sqrt(2.0))


def _bin_log_probability(x, mean, scale):
    """Log of the Gaussian mass of the bin of x, float64; the survival function on the right of the mean."""
    sign = np.where(x > mean, -1.0, 1.0)  # mirror into the lower tail
    low = np.where(x < -0.999, -np.inf, x - 1 / 255)
    high = np.where(x > 0.999, np.inf, x + 1 / 255)
    a, b = sign * (low - mean) / scale, sign * (high - mean) / scale
    return np.log(np.abs(_cdf(b) - _cdf(a)))


@pytest.mark.parametrize("scale", [0.003, 0.02, 0.3, 3.0])
def test_discretized_likelihood_is_the_mass_of_the_bin(scale):
    x = np.array([0, 1, 77, 127, 128, 254, 255]) / 127.5 - 1.0
    for offset in (-12 * scale, -2.0 * scale, 0.0, 0.4 * scale, 12 * scale):
        mean = x + offset
        expected = _bin_log_probability(x, mean, scale)
        log_scale = jnp.full(x.shape, math.log(scale), jnp.float32)
        got = jax.jit(discretized_log_likelihood)(
            jnp.asarray(x, jnp.float32), jnp.asarray(mean, jnp.float32), log_scale
        )
        np.testing.assert_allclose(got, expected, rtol=3e-4, atol=3e-4)


def test_discretized_likelihood_sums_to_one():
    x = jnp.arange(256) / 127.5 - 1.0
    for mean, scale in [(0.1, 0.05), (-0.99, 0.3), (1.2, 0.5)]:
        log_p = discretized_log_likelihood(x, jnp.full(256, mean), jnp.full(256, math.log(scale)))
        assert float(jnp.exp(log_p).sum()) == pytest.approx(1.0, abs=1e-4)


def test_discretized_likelihood_has_a_gradient_far_from_the_mean():
    for x in (-1.0, 0.0, 1.0):
        slope = jax.grad(lambda mean, x=x: discretized_log_likelihood(jnp.array(x), mean, jnp.array(-5.0)))
        for mean in (-2.0, 2.0):
            towards_x = float(slope(jnp.array(mean))) * np.sign(x - mean)
            assert np.isfinite(towards_x)
            assert towards_x >= 0
            assert towards_x > 0 or abs(x) == 1.0  # beyond the outermost bins the mass is 1


@pytest.mark.parametrize("schedule", BETAS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_vlb_terms_match_float64(schedule, variance):
    betas = BETAS[schedule]
    process = make_process(betas)
    x0, noise = _images(), jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    t = jnp.array([0, 0, 1, 2, 100, 500, 990, 999], jnp.int32)
    xt = q_sample(process, x0, t, noise)
    v = jax.random.uniform(jax.random.key(2), x0.shape, minval=-1.0)
    guess = 0.9 * x0  # the network's x0
    output = jnp.concatenate([guess, v], axis=-1) if variance == "learned_range" else guess
    got = _vlb_of_x0(process, output, x0, xt, t, variance=variance)

    x0, xt, guess, v = (np.asarray(a, np.float64) for a in (x0, xt, guess, v))
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1, alpha_bar[:-1])
    tilde = betas * (1 - previous) / (1 - alpha_bar)
    tilde[0] = tilde[1]
    upper = np.append(tilde[1], betas[1:])
    for i, step in enumerate(np.asarray(t)):
        c_x0 = betas[step] * np.sqrt(previous[step]) / (1 - alpha_bar[step])
        c_xt = (1 - previous[step]) * np.sqrt(1 - betas[step]) / (1 - alpha_bar[step])
        mean, model_mean = c_x0 * x0[i] + c_xt * xt[i], c_x0 * guess[i] + c_xt * xt[i]
        fraction = (v[i] + 1) / 2
        model_variance = {
            "fixed_small": tilde[step] * np.ones_like(v[i]),
            "fixed_large": upper[step] * np.ones_like(v[i]),
            "learned_range": betas[step] ** fraction * tilde[step] ** (1 - fraction),
        }[variance]
        ratio = tilde[step] / model_variance
        kl = 0.5 * (ratio - 1 - np.log(ratio) + (mean - model_mean) ** 2 / model_variance)
        nll = -_bin_log_probability(x0[i], model_mean, np.sqrt(model_variance))
        expected = (nll if step == 0 else kl).mean() / np.log(2)
        np.testing.assert_allclose(got[i], expected, rtol=1e-3, atol=1e-6)


def test_simple_loss_of_a_zero_output_is_one():
    process = make_process(BETAS["linear"])
    x0 = jnp.zeros((64, 8, 8, 3))
    loss, aux = denoising_loss(process, lambda xt, t: jnp.zeros_like(xt), KEY, x0)
    assert loss.shape == aux["mse"].shape == (64,)
    assert loss.dtype == jnp.float32
    assert float(loss.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / x0.size))  # the variance of eps^2 is 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_simple_loss_of_the_true_target_is_zero(prediction):
    process = make_process(BETAS["cosine"])
    x0, noise = _images(), jax.random.normal(KEY, (8, 4, 4, 3))
    t = jnp.arange(8, dtype=jnp.int32) * 100
    right = target(process, x0, noise, t, prediction=prediction)
    loss, _ = denoising_loss(process, lambda xt, t: right, KEY, x0, prediction=prediction, t=t, noise=noise)
    np.testing.assert_array_equal(loss, 0.0)


def test_the_network_sees_original_timesteps_and_the_noised_batch():
    process = respace(make_process(BETAS["cosine"]), "10")
    x0, noise = _images(10), jax.random.normal(KEY, (10, 4, 4, 3))
    t, seen = jnp.arange(10, dtype=jnp.int32), {}

    def denoise(xt, t):
        seen.update(xt=xt, t=t)
        return xt

    denoising_loss(process, denoise, KEY, x0, t=t, noise=noise)
    np.testing.assert_array_equal(seen["t"], [0, 111, 222, 333, 444, 555, 666, 777, 888, 999])
    np.testing.assert_array_equal(seen["xt"], q_sample(process, x0, t, noise))


def test_timesteps_are_drawn_uniformly():
    process = make_process(BETAS["cosine"][:8])
    drawn = []
    denoising_loss(process, lambda xt, t: (drawn.append(t), xt)[1], KEY, jnp.zeros((8000, 1)))
    counts = np.bincount(np.asarray(drawn[0]), minlength=8)
    assert counts.sum() == 8000
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_hybrid_trains_the_mean_by_the_squared_error_alone():
    process = make_process(BETAS["cosine"])
    x0 = _images()
    t = jnp.array([0, 0, 1, 10, 100, 400, 700, 999], jnp.int32)
    params = {"mean": 0.1 * jax.random.normal(KEY, x0.shape), "v": jnp.zeros(x0.shape)}

    def gradient(objective, variance):
        def total(params):
            parts = [params["mean"], params["v"]] if variance == "learned_range" else [params["mean"]]
            output = jnp.concatenate(parts, axis=-1)
            options = {"objective": objective, "variance": variance, "t": t}
            return denoising_loss(process, lambda xt, t: output, KEY, x0, **options)[0].sum()

        return jax.jit(jax.grad(total))(params)

    hybrid, simple = gradient("hybrid", "learned_range"), gradient("simple", "fixed_small")
    np.testing.assert_allclose(hybrid["mean"], simple["mean"], rtol=1e-6)
    vlb = gradient("vlb", "learned_range")
    assert float(jnp.abs(vlb["mean"]).max()) > 0
    np.testing.assert_allclose(hybrid["v"], 1e-3 * vlb["v"], rtol=1e-4, atol=1e-9)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves([hybrid, vlb]))
    assert bool(jnp.all(jnp.any(hybrid["v"] != 0, axis=(1, 2, 3))))


def test_objectives_add_up():
    process = make_process(BETAS["linear"])
    x0 = _images()

    def denoise(xt, t):
        return jnp.concatenate([0.9 * xt, jnp.full_like(xt, 0.2)], axis=-1)

    options = {"variance": "learned_range"}
    hybrid, aux = denoising_loss(process, denoise, KEY, x0, objective="hybrid", **options)
    vlb, vlb_aux = denoising_loss(process, denoise, KEY, x0, objective="vlb", **options)
    np.testing.assert_allclose(vlb, 1000 * aux["vlb"], rtol=1e-6)
    np.testing.assert_allclose(hybrid, aux["mse"] + 1e-3 * vlb, rtol=1e-6)
    unscaled, _ = denoising_loss(process, denoise, KEY, x0, objective="hybrid", vlb_weight=0.25, **options)
    np.testing.assert_allclose(unscaled, aux["mse"] + 0.25 * vlb, rtol=1e-6)
    np.testing.assert_array_equal(aux["mse"], vlb_aux["mse"])


def test_bfloat16_networks_give_float32_losses():
    process = make_process(BETAS["linear"])

    def denoise(xt, t):
        return jnp.zeros((*xt.shape[:-1], 6), jnp.bfloat16)

    loss, aux = denoising_loss(process, denoise, KEY, _images(), objective="hybrid", variance="learned_range")
    assert {leaf.dtype.name for leaf in jax.tree.leaves((loss, aux))} == {"float32"}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_is_one_weight_on_x0(prediction):
    process = make_process(BETAS["cosine"])
    x0, noise = _images(10), jax.random.normal(KEY, (10, 4, 4, 3))
    t = jnp.arange(10, dtype=jnp.int32) * 90 + 5
    wrong = 0.8 * x0 + 0.1
    xt = q_sample(process, x0, t, noise)
    read = predict(process, wrong, xt, t, prediction="x0")  # the same mistake, expressed in each prediction type
    output = target(process, read.x0, read.eps, t, prediction=prediction)
    options = {"prediction": prediction, "t": t, "noise": noise, "weighting": min_snr(5.0, prediction)}
    loss, _ = denoising_loss(process, lambda xt, t: output, KEY, x0, **options)
    snr = np.exp(np.asarray(process.log_snr, np.float64))[np.asarray(t)]
    expected = np.minimum(snr, 5.0) * np.mean(np.asarray(wrong - x0, np.float64) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=2e-3)


def test_contrastive_loss_matches_numpy():
    rng = np.random.default_rng(0)
    z_image, z_text = rng.normal(size=(2, 5, 8))
    z_image /= np.linalg.norm(z_image, axis=1, keepdims=True)
    z_text /= np.linalg.norm(z_text, axis=1, keepdims=True)
    logits = 7.0 * z_image @ z_text.T
    rows = np.log(np.exp(logits).sum(1)) - np.diag(logits)
    columns = np.log(np.exp(logits).sum(0)) - np.diag(logits)
    arguments = (jnp.asarray(z_image, jnp.float32), jnp.asarray(z_text, jnp.float32), jnp.log(7.0))
    loss, aux = contrastive_loss(*arguments)
    np.testing.assert_allclose(loss, (rows + columns) / 2, rtol=1e-5)
    np.testing.assert_array_equal(aux["image_to_text"], logits.argmax(1) == np.arange(5))
    np.testing.assert_array_equal(aux["text_to_image"], logits.argmax(0) == np.arange(5))


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_chunks_of_the_contrastive_loss_change_nothing(chunk_size):
    rng = np.random.default_rng(5)
    z = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rng.normal(size=(2, 16, 4)).astype(np.float32)]
    arguments = (*map(jnp.asarray, z), jnp.log(jnp.float32(100.0)))  # the largest scale: exponentials would overflow

    def total(*arguments, **options):
        loss, aux = contrastive_loss(*arguments, **options)
        return jnp.sum(loss * jnp.arange(16)), (loss, aux)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True), static_argnames="chunk_size")
    (whole, (loss, aux)), (parts, found) = gradients(*arguments), gradients(*arguments, chunk_size=chunk_size)
    np.testing.assert_allclose(found[0], loss, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found[1], aux)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), parts, whole)


def test_no_device_has_the_whole_matrix_of_logits():
    mesh = make_mesh({"data": 8})
    z = jax.device_put(jnp.ones((64, 3)), data_sharding(mesh))
    total = lambda a, b: contrastive_loss(a, b, jnp.float32(1.0), chunk_size=16)[0].sum()
    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(z, z).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) <= 64 * 16 // 8 * 2  # 2 of 64 rows on each device, and the two embeddings whole


def test_contrastive_loss_limits():
    same = jnp.ones((16, 4)) / 2.0
    np.testing.assert_allclose(contrastive_loss(same, same, jnp.log(100.0))[0], math.log(16), rtol=1e-6)
    right = jnp.eye(4)
    assert float(contrastive_loss(right, right, jnp.log(100.0))[0].max()) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "mse"}, "objective='mse' must be one of"),
        ({"objective": "hybrid"}, "needs variance='learned_range'"),
        ({"variance": "learned_range"}, "would leave variance='learned_range' untrained"),
        ({"objective": "vlb", "weighting": min_snr(5.0, "eps")}, "weighting applies to the squared error"),
        ({"objective": "hybrid", "variance": "learned_range"}, "2C = 6 channels"),
        ({"prediction": "noise"}, "prediction='noise' must be one of"),
        ({"t": jnp.zeros(3, jnp.int32)}, "t must be integers of shape"),
        ({"noise": jnp.zeros((8, 4))}, "eps must have the shape of x0"),
    ],
)
def test_denoising_loss_errors(options, message):
    with pytest.raises(ValueError, match=message):
        denoising_loss(make_process(BETAS["linear"]), lambda xt, t: xt, KEY, _images(), **options)


def test_other_errors():
    with pytest.raises(ValueError, match="x0 must be a batch of floats"):
        denoising_loss(make_process(BETAS["linear"]), lambda xt, t: xt, KEY, jnp.zeros((2, 4, 4, 3), jnp.uint8))
    with pytest.raises(ValueError, match="gamma=0 must be positive"):
        min_snr(0, "eps")
    with pytest.raises(ValueError, match="prediction='noise'"):
        min_snr(5.0, "noise")
    with pytest.raises(ValueError, match="of one shape"):
        contrastive_loss(jnp.zeros((2, 3)), jnp.zeros((3, 3)), jnp.zeros(()))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("power", "bound"), [(0.5, 4.0), (0.0, 1.0), (1.0, 5.0)])
def test_snr_power_is_one_weight_on_x0_for_every_prediction_type(prediction, power, bound):
    log_snr = np.linspace(-8.0, 8.0, 33)
    snr = np.exp(log_snr)
    # The squared error of x0 is that of eps / snr and that of v / (snr + 1).
    on_x0 = {"x0": 1.0, "eps": snr, "v": snr + 1.0}[prediction]
    weight = snr_power(power, bound, prediction)(jnp.asarray(log_snr, jnp.float32))
    np.testing.assert_allclose(np.asarray(weight) * on_x0, np.minimum(snr**power, bound), rtol=2e-5)


def test_snr_power_errors():
    with pytest.raises(ValueError, match="power"):
        snr_power(1.5, 1.0, "x0")
    with pytest.raises(ValueError, match="bound"):
        snr_power(0.5, 0.0, "x0")


def test_stratified_timesteps_are_uniform_and_evenly_spread():
    keys = jax.random.split(jax.random.key(0), 4000)
    t = np.asarray(jax.vmap(lambda key: stratified_timesteps(key, 8, 40))(keys))
    assert t.min() == 0 and t.max() == 39
    # One in each eighth of [0, 40), for every batch.
    np.testing.assert_array_equal(np.sort(t // 5, axis=1), np.tile(np.arange(8), (4000, 1)))
    counts = np.bincount(t[:, 3], minlength=40)  # any one position is uniform: chi-square, 39 degrees of freedom
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 75


@pytest.mark.parametrize("gamma,k", [(0.0, 1.0), (1.0, 1.0), (0.5, 3.0)])
def test_p2_is_one_weight_on_the_error_of_eps_whatever_the_network_predicts(gamma, k):
    """err_eps = snr err_x0 = snr / (snr + 1) err_v."""
    log_snr = jnp.linspace(-12, 12, 25)
    snr = np.exp(np.asarray(log_snr, np.float64))
    on_eps = 1 / (k + snr) ** gamma
    np.testing.assert_allclose(p2(gamma, k, prediction="eps")(log_snr), on_eps, rtol=2e-5)
    np.testing.assert_allclose(p2(gamma, k, prediction="x0")(log_snr), on_eps * snr, rtol=2e-5)
    np.testing.assert_allclose(p2(gamma, k, prediction="v")(log_snr), on_eps * snr / (snr + 1), rtol=2e-5)


@pytest.mark.parametrize("options", [{"gamma": -1.0}, {"gamma": 1.0, "k": 0.0}, {"gamma": 1.0, "prediction": "noise"}])
def test_p2_errors(options):
    with pytest.raises(ValueError, match="must"):
        p2(**{"prediction": "eps"} | options)


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("weighting", [None, "plain", "min_snr", "p2"])
def test_losses_are_finite_where_a_process_ends_in_pure_noise(prediction, weighting):
    process = make_process(reciprocal_betas(10))
    chosen = {"plain": lambda: snr_power(0.0, 1.0, prediction), "min_snr": lambda: min_snr(5.0, prediction)}
    chosen |= {"p2": lambda: p2(1.0, prediction=prediction)}
    options = {
        "prediction": prediction,
        "weighting": chosen[weighting]() if weighting else None,
        "t": jnp.array([0, 9]),
    }
    loss, _ = denoising_loss(process, lambda xt, t: jnp.zeros_like(xt), KEY, jnp.ones((2, 3)), **options)
    assert np.isfinite(loss).all()
    if prediction == "x0" and weighting in (None, "plain"):
        np.testing.assert_allclose(loss, 1.0)  # the error of 0 as an estimate of 1
    with pytest.raises(ValueError, match="prediction='eps' could not be sampled from pure noise"):
        denoising_loss(process, lambda xt, t: xt, KEY, jnp.ones((2, 3)))
