"""Arguments out of range, options that are traced, and traps: an error in one sentence, NaN, or the right number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import (
    ancestral_step,
    classifier_free,
    cosine_betas,
    ddim_step,
    denoising_loss,
    drop,
    example_keys,
    linear_betas,
    make_process,
    min_snr,
    predict,
    q_posterior,
    q_sample,
    respace,
    respaced_timesteps,
    sample,
    static_threshold,
    target,
    vlb_terms,
)
from ddpm_jax.diffusion import continuous
from ddpm_jax.diffusion.continuous import discretize, edm, edm_preconditioned, karras_times
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.guidance import classifier_guided, dynamic_threshold, implicit_gradient
from ddpm_jax.diffusion.importance import importance_timesteps, loss_history, record_losses, timestep_probabilities
from ddpm_jax.diffusion.likelihood import bits_per_dimension
from ddpm_jax.diffusion.losses import (
    edm_weighting,
    log_normal_times,
    p2,
    snr_power,
    stratified_times,
    stratified_timesteps,
)
from ddpm_jax.diffusion.samplers import (
    analytic_step,
    average_of,
    dpm_solver_step,
    heun_step,
    invert,
    predictor_corrector_step,
    repaint_step,
    sdedit,
    truncate,
    unipc_step,
)
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.diffusion.schedules import sigmoid_alpha_bar, sigmoid_betas, spaced_timesteps, zero_terminal_snr
from ddpm_jax.models.layers import Embed
from ddpm_jax.pipelines.request import as_steps, respaced

FULL = make_process(cosine_betas(1000))
SHORT = respace(FULL, "4")
X = jnp.array([[0.5, -0.2], [1.0, 0.3], [-0.7, 0.1]])
KEYS = example_keys(jax.random.key(0), 3)


def net(xt, t):
    return 0.9 * xt


def other(xt, t):
    return 0.8 * xt


# ---- Timesteps and labels out of range -------------------------------------------------------------------------------

BY_TIMESTEP = {
    "q_sample": lambda t: q_sample(FULL, X, t, X),
    "q_posterior": lambda t: q_posterior(FULL, X, X, t)[0],
    "predict": lambda t: predict(FULL, X, X, t, prediction="eps", variance="fixed_large").log_variance,
    "vlb_terms": lambda t: vlb_terms(FULL, predict(FULL, X, X, t, prediction="x0"), X, X, t),
    "guidance": lambda t: classifier_guided(FULL, net, lambda x, t: x.sum(-1), 1.0)(X, t),
    "embedding": lambda t: Embed(1000, 2).apply({"params": {"embedding": jnp.ones((1000, 2))}}, t),
}
for prediction in ("eps", "x0", "v", "score", "mean"):
    BY_TIMESTEP[f"target {prediction}"] = lambda t, prediction=prediction: target(FULL, X, X, t, prediction=prediction)
    BY_TIMESTEP[f"loss {prediction}"] = lambda t, prediction=prediction: denoising_loss(
        FULL, lambda xt, t: jnp.zeros(xt.shape), jax.random.key(0), X, t=t, noise=X, prediction=prediction
    )[0]
BY_TIMESTEP["weighted loss"] = lambda t: denoising_loss(
    FULL, net, jax.random.key(0), X, t=t, noise=X, weighting=min_snr(5.0, "eps")
)[0]


@pytest.mark.parametrize("name", BY_TIMESTEP)
def test_timesteps_out_of_range(name):
    """Known ones are refused; a traced one gives NaN in its own example, and the others stay as they are."""
    run = BY_TIMESTEP[name]
    inside = np.asarray(run(jnp.array([5, 700, 999])))
    assert np.isfinite(inside).all()
    for wrong in (1000, 5000, -1, -1001):
        t = jnp.array([5, wrong, 999])
        with pytest.raises(ValueError, match=rf"must be in \[0, 1000\).*{wrong}|does not have \[{wrong}\]"):
            run(t)
    traced = jax.jit(run)
    np.testing.assert_allclose(traced(jnp.array([5, 700, 999])), inside, rtol=1e-5)
    for wrong in (1000, -1):
        found = np.asarray(traced(jnp.array([5, wrong, 999])))
        assert np.isnan(found[1]).all(), found
        np.testing.assert_allclose(found[::2], inside[::2], rtol=1e-5)


def test_look_ups_under_vmap_pmap_and_grad():
    t = jnp.array([0, 400, 999])
    one = lambda x, t: q_sample(FULL, x[None], t[None], x[None])[0]
    whole = q_sample(FULL, X, t, X)
    np.testing.assert_allclose(jax.vmap(one)(X, t), whole, rtol=1e-6)
    np.testing.assert_allclose(jax.pmap(one)(X, t), whole, rtol=1e-6)
    loss = lambda scale, t: denoising_loss(
        FULL, lambda xt, t: scale * xt, jax.random.key(0), X, t=t, noise=X, weighting=min_snr(5.0, "eps")
    )[0].sum()
    slope = jax.grad(loss)(0.5, t)
    np.testing.assert_allclose(slope, (loss(0.51, t) - loss(0.49, t)) / 0.02, rtol=1e-3)
    assert np.isnan(jax.jit(jax.grad(loss))(0.5, t + 1))
    embed = lambda table, y: Embed(4, 3).apply({"params": {"embedding": table}}, y).sum()
    np.testing.assert_array_equal(
        jax.grad(embed)(jnp.ones((4, 3)), jnp.array([1, 1, 3])), np.array([0, 2, 0, 1.0])[:, None] * np.ones(3)
    )
    table = jnp.arange(3.0).reshape(1, 3)  # nn.Embed broadcasts the only vector whatever the id is
    run = jax.jit(lambda y: Embed(1, 3).apply({"params": {"embedding": table}}, y))
    np.testing.assert_array_equal(run(jnp.array([0, 1])), np.array([[0, 1, 2], [np.nan] * 3]))


def test_losses_out_of_range_are_not_recorded():
    history, losses = loss_history(3, 2), jnp.ones(2)
    with pytest.raises(ValueError, match=r"t must be in \[0, 3\), got values from -1 to 2"):
        record_losses(history, jnp.array([-1, 2]), losses)
    for wrong in (-1, 3):
        same = jax.jit(record_losses)(history, jnp.array([wrong, 2]), losses)
        np.testing.assert_array_equal(same.counts, 0)


@pytest.mark.parametrize("t", [[1, 2, 3], 3])
def test_timesteps_that_are_no_array(t):
    with pytest.raises(ValueError, match=r"t must be integers of shape \(3,\), one an example, got"):
        q_sample(FULL, X, t, X)
    with pytest.raises(ValueError, match="x0 must be an array.*got a list"):
        denoising_loss(FULL, net, jax.random.key(0), [[1.0]])


# ---- Guidance --------------------------------------------------------------------------------------------------------


def log_prob(xt, t):
    return -jnp.square(xt - 1.0).sum(-1)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_guidance_reads_the_same_of_the_respaced_process(prediction):
    """Levels belong to original timesteps; twice respaced, and truncated, they are still found."""
    t = SHORT.timestep_map[jnp.array([3, 1, 0])]
    guided = lambda p: classifier_guided(p, net, log_prob, 2.0, prediction=prediction)(X, t)
    implied = lambda p: implicit_gradient(p, net, other, 2.0, prediction=prediction)(X, t)
    for run in (guided, implied):
        expected = run(FULL)
        for process in (SHORT, respace(respace(FULL, "10"), "4")):
            np.testing.assert_allclose(run(process), expected, rtol=1e-5)
            np.testing.assert_allclose(jax.jit(run)(process), expected, rtol=1e-5)


def test_guidance_at_timesteps_that_its_process_lacks():
    t = jnp.array([0, 500, 999])
    for run in (
        lambda t: classifier_guided(SHORT, net, log_prob, 2.0)(X, t),
        lambda t: implicit_gradient(SHORT, net, other, 2.0)(X, t),
    ):
        with pytest.raises(ValueError, match=r"process that guidance was given, which does not have \[500\]"):
            run(t)
        assert np.isnan(jax.jit(run)(t)).any(axis=1).tolist() == [False, True, False]


def test_guided_samples_are_those_of_the_posterior():
    """Data N(0, s^2) seen through noise of variance 1, as case 30: with either process the same samples."""
    seen, s = 1.0, 0.7
    levels = lambda t: (FULL.alpha[t][:, None], FULL.sigma[t][:, None])

    def eps(xt, t):
        a, sigma = levels(t)
        return sigma * xt / (a**2 * s**2 + sigma**2)

    def log_prob(xt, t):
        a, sigma = levels(t)
        total = a**2 * s**2 + sigma**2
        return (-0.5 * (seen - a * s**2 * xt / total) ** 2 / (1 + s**2 * sigma**2 / total)).sum(-1)

    short, keys = respace(FULL, "20"), example_keys(jax.random.key(0), 500)
    run = jax.jit(lambda p: sample(short, classifier_guided(p, eps, log_prob, 1.0), keys, (1,), step=ddim_step()))
    right, found = run(FULL), run(short)
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert abs(float(found.mean()) - s**2 / (1 + s**2) * seen) < 0.1  # 4 standard errors; it was 0.554


def test_moments_of_another_process_are_refused():
    """Those of all steps would be read at the first four."""
    moments = jnp.linspace(0.1, 0.9, 1000)
    with pytest.raises(ValueError, match=r"each of the 4 steps .* got 1000: of all steps take moments"):
        drawn(step=analytic_step(moments))
    assert np.isfinite(drawn(step=analytic_step(moments[SHORT.timestep_map]))).all()


def test_rescaled_guidance_of_constant_predictions():
    zero = lambda xt, t: jnp.zeros_like(xt)
    x, t = jnp.ones((2, 4, 4, 3)), jnp.zeros(2, jnp.int32)
    np.testing.assert_array_equal(classifier_free(zero, zero, 3.0, rescale=0.7)(x, t), 0.0)
    # One number an example, and a constant that rounding disturbs: nothing to rescale.
    for shape, c, n in (((3, 1), 1.9, 0.9), ((3, 7, 5), 0.1, 0.3)):
        x, t = jnp.ones(shape), jnp.zeros(3, jnp.int32)
        guided = classifier_free(lambda xt, t: c * xt, lambda xt, t: n * xt, 2.0, rescale=0.7)  # noqa: B023
        np.testing.assert_allclose(guided(x, t), n + 2 * (c - n), rtol=1e-6)
    slope = jax.grad(lambda a: classifier_free(lambda x, t: a * x, zero, 3.0, rescale=0.7)(x, t).sum())
    assert np.isfinite(slope(0.0)) and np.isfinite(slope(1.0))
    # A constant conditional prediction has standard deviation 0: (1 - phi) of the guided one is left.
    x = jnp.arange(6.0).reshape(1, 6)
    out = classifier_free(zero, lambda xt, t: xt, 3.0, rescale=0.25)(x, t[:1])
    np.testing.assert_allclose(out, 0.75 * -2 * x, rtol=1e-6)


# ---- Traced options --------------------------------------------------------------------------------------------------

drawn = lambda **options: sample(SHORT, net, KEYS, (2,), **options)  # noqa: E731
EDM = discretize(edm(), karras_times(edm(), 4))
OPTIONS = {
    "scale": (lambda v: classifier_free(net, other, v)(X, jnp.arange(3)), 0.5, None),
    "rescale": (lambda v: classifier_free(net, other, 2.0, rescale=v)(X, jnp.arange(3)), 0.5, 1.5),
    "interval": (lambda v: classifier_free(net, other, 2.0, interval=(0, v))(X, jnp.arange(3)), 1, None),
    "eta": (lambda v: drawn(step=ddim_step(v)), 0.5, 1.5),
    "snr": (lambda v: drawn(step=predictor_corrector_step(snr=v)), 0.1, 1.5),
    "gamma": (lambda v: sample(EDM, net, KEYS, (2,), step=heun_step(v), prediction="x0"), 0.2, 0.9),
    "static_threshold": (lambda v: drawn(x0_transform=static_threshold(v)), 0.5, -1.0),
    "quantile": (lambda v: drawn(x0_transform=dynamic_threshold(v)), 0.5, 2.0),
    "bound": (lambda v: drawn(x0_transform=dynamic_threshold(0.9, v)), 0.5, 0.0),
    "min_snr": (lambda v: min_snr(v, "eps")(FULL.log_snr), 5.0, 0.0),
    "power": (lambda v: snr_power(v, 2.0, "x0")(FULL.log_snr), 0.5, 1.5),
    "p2": (lambda v: p2(v, prediction="v")(FULL.log_snr), 0.5, -0.5),
    "p2 k": (lambda v: p2(1.0, v, prediction="v")(FULL.log_snr), 0.5, 0.0),
    "sigma_data": (lambda v: edm_weighting(v)(FULL.log_snr), 0.5, 0.0),
    "sigma_data of the network": (lambda v: edm_preconditioned(net, v)(X, jnp.ones(3)), 0.5, 0.0),
    "bins": (lambda v: bits_per_dimension(jnp.ones(3), 12, v), 256, None),
    "bound of the variance": (lambda v: drawn(step=analytic_step(jnp.full(4, 0.5), v)), 1.0, 0.0),
    "uniform": (lambda v: timestep_probabilities(loss_history(4), v), 0.5, 1.5),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_may_be_traced(name):
    run, value, wrong = OPTIONS[name]
    traced, expected = jax.jit(run), run(value)
    np.testing.assert_allclose(traced(value), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(jnp.array([value, value]))[1], expected, rtol=1e-5, atol=1e-6)
    if wrong is not None:
        assert np.isnan(traced(wrong)).any()
        for given in (wrong, np.float32(wrong), jnp.float32(wrong), float("nan")):
            with pytest.raises(ValueError, match="must"):
                run(given)


def test_the_drop_rate_may_be_traced():
    keep = jax.jit(lambda rate: drop(jax.random.key(0), rate, 100))
    np.testing.assert_array_equal(keep(0.3), drop(jax.random.key(0), 0.3, 100))
    assert keep(-1.0).all() and not keep(2.0).any()


@pytest.mark.parametrize("value", ["0.5", None, [0.5], jnp.array([0.5])])
def test_options_that_are_no_number(value):
    for run in (ddim_step, static_threshold, lambda v: min_snr(v, "eps"), lambda v: drop(jax.random.key(0), v, 2)):
        with pytest.raises(ValueError, match="must be one number: it must"):
            run(value)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda v: make_process(v * jnp.ones(3) / 10), "betas and timestep_map"),
        (lambda v: linear_betas(100, v / 1e4), "beta_start and beta_end"),
        (lambda v: cosine_betas(v), "num_steps"),
        (lambda v: cosine_betas(10, v), "s"),
        (lambda v: respace(FULL, v), "spec"),
        (lambda v: truncate(FULL, v), "num_steps"),
        (lambda v: sdedit(SHORT, net, KEYS, X, strength=v), "strength"),
        (lambda v: drop(jax.random.key(0), 0.5, v), "batch_size"),
        (lambda v: predictor_corrector_step(corrector_steps=v), "corrector_steps"),
        (lambda v: repaint_step(X, X > 0, resample=v), "resample"),
        (lambda v: heun_step(0.1, noise_scale=v), "sigma_min, sigma_max and noise_scale"),
        (lambda v: dpm_solver_step(v), "order"),
        (lambda v: unipc_step(v), "order"),
        (lambda v: invert(FULL, net, X, iterations=v), "iterations"),
        (lambda v: drawn(progress=print, progress_every=v), "progress_every"),
        (lambda v: drawn(trajectory=v), "trajectory"),
        (lambda v: sample(SHORT, net, KEYS, (v,)), "shape"),
        (lambda v: invert(SHORT, net, X, trajectory=v), "trajectory"),
        (lambda v: dpm_solver_step(sde=v), "sde"),
        (lambda v: average_of(X, v), "factor"),
        (lambda v: sigmoid_betas(100, reach=v), "reach"),
        (lambda v: sigmoid_alpha_bar(np.ones(3), tau=v), "u, start, end, tau and smallest"),
        (lambda v: spaced_timesteps(100, 4, offset=v), "count and offset"),
        (lambda v: continuous.vp_linear(v), "beta_min, beta_max and t_min"),
        (lambda v: continuous.sub_vp(0.1, v), "beta_min, beta_max and t_min"),
        (lambda v: continuous.cosine(v), "shift, t_min and t_max"),
        (lambda v: continuous.ve(v), "sigma_min and sigma_max"),
        (lambda v: edm(0.1, v), "sigma_min and sigma_max"),
        (lambda v: continuous.init_monotone(jax.random.key(0), v), "width"),
        (lambda v: continuous.uniform_times(edm(), v), "num_steps"),
        (lambda v: continuous.log_snr_times(edm(), v), "num_steps"),
        (lambda v: karras_times(edm(), 4, v), "rho"),
        (lambda v: karras_times(dataclasses.replace(edm(), t_max=v), 4), "t_min and t_max of the schedule"),
        (lambda v: discretize(edm(), v * jnp.array([4.0, 1.0])), "times"),
        (
            lambda v: discretize(continuous.from_log_snr(lambda t: -v * t), [1.0, 0.5]),
            "what the functions of the schedule close over",
        ),
        (lambda v: stratified_timesteps(jax.random.key(0), v, 10), "batch_size"),
        (lambda v: stratified_times(jax.random.key(0), v, edm()), "batch_size"),
        (lambda v: log_normal_times(jax.random.key(0), v), "batch_size"),
        (lambda v: loss_history(v), "num_steps and length"),
        (lambda v: importance_timesteps(jax.random.key(0), v, loss_history(4)), "batch_size"),
        (lambda v: Diffusion("cosine", v), "num_steps"),
        (lambda v: Diffusion((v / 10, v / 10), 2), "schedule"),
        (lambda v: Sampling().with_options(steps=v), "steps"),
        (lambda v: Sampling("unipc").with_options(order=v), "order"),
    ],
)
def test_what_must_be_known_is_named(run, name):
    with pytest.raises(ValueError, match=f"^{name} must be known outside of jit, since .*: give a Python number"):
        jax.jit(run)(1)
    with pytest.raises(ValueError, match=f"^{name} must be known outside of jit"):
        jax.vmap(run)(jnp.array([1, 1]))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), jnp.array([1.0, jnp.nan])])
def test_scales_are_finite(scale):
    for run in (
        lambda: classifier_free(net, other, scale),
        lambda: classifier_guided(FULL, net, log_prob, scale),
        lambda: implicit_gradient(FULL, net, other, scale),
    ):
        with pytest.raises(ValueError, match="scale=.* must be finite"):
            run()


# ---- Processes inside of a jitted function ---------------------------------------------------------------------------


def tables(process):
    return jax.tree.leaves(process)


def test_processes_made_inside_of_jit():
    make = lambda: respace(respace(make_process(cosine_betas(1000)), "100"), "ddim10")
    inside, outside = jax.jit(make)(), make()
    jax.tree.map(np.testing.assert_array_equal, tables(inside), tables(outside))
    assert jax.tree.structure(inside) == jax.tree.structure(outside)


@pytest.mark.parametrize("betas", [linear_betas(1000), cosine_betas(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("spec", ["10", "1000", [100, 600, 998], "1"])
def test_a_traced_process_is_respaced(betas, spec):
    """Against float64 numpy, (4), (5) and (12), to float32's precision."""
    process = make_process(betas)
    traced = jax.jit(lambda p: respace(p, spec))(process)
    outside = respace(process, spec)
    assert jax.tree.structure(traced) == jax.tree.structure(outside)
    kept = respaced_timesteps(1000, spec)
    alpha_bar = np.cumprod(1 - betas)[kept]
    before = np.append(1, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    for name, expected in {
        "betas": beta,
        "alpha_bar": alpha_bar,
        "log_betas": np.log(beta),
        "posterior_variance": variance,
        "posterior_coef_x0": np.sqrt(before) * beta / (1 - alpha_bar),
        "posterior_coef_xt": (1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
        "timestep_map": kept,
    }.items():
        np.testing.assert_allclose(getattr(traced, name), expected, rtol=3e-5, atol=1e-7, err_msg=name)
    for ours, theirs in zip(tables(traced), tables(outside), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=1e-6)


def test_a_space_inside_a_number_of_steps_is_refused():
    assert respaced(FULL, "steps", " 10, 5 ").num_steps == 15 and as_steps("steps", " 25 ") == 25
    for steps in ("2 5", "10, 1 5", "ddim2 5"):
        with pytest.raises(ValueError, match="steps='.* .*' must be like"):
            respaced(FULL, "steps", steps)


# ---- Where sampling starts -------------------------------------------------------------------------------------------


def test_sampling_does_not_start_from_noise_where_data_are_left():
    """[10, 15, 20] is section counts in guided-diffusion and timesteps here."""
    message = r'process ends at 2\.1% .*section counts are a string like "10,15,20".*x_init'
    early = respace(FULL, [10, 15, 20])
    with pytest.raises(ValueError, match=message):
        sample(early, net, KEYS, (2,))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda p: sample(p, net, KEYS, (2,)))(early)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda p: sample(respace(p, [10, 15, 20]), net, KEYS, (2,)))(FULL)
    assert sample(early, net, KEYS, (2,), x_init=X).shape == X.shape
    for cut in (truncate(FULL, 300), respace(truncate(FULL, 300), "5"), respace(respace(FULL, "100"), [0, 20])):
        with pytest.raises(ValueError, match="sampling cannot start from pure noise"):
            sample(cut, net, KEYS, (2,))
    assert sdedit(SHORT, net, KEYS, X, strength=0.25).shape == X.shape
    assert respace(FULL, "10,15,20").num_steps == 45
    # The last timestep decides, not the number of list entries: 16 and 20 of 1000 are early, 900 is not.
    coarse = respace(FULL, [*range(0, 17, 2), 999])
    for cut in (truncate(coarse, 9), respace(respace(FULL, [0, 10, 20, 999]), [0, 1, 2])):
        assert cut.reach == (int(cut.timestep_map[-1]) + 1) / 1000
        with pytest.raises(ValueError, match="sampling cannot start from pure noise"):
            sample(cut, net, KEYS, (2,))
    with pytest.raises(ValueError, match=r"process ends at 1\.7%"):
        jax.jit(lambda p: sample(truncate(p, 9), net, KEYS, (2,)))(coarse)
    late = truncate(respace(FULL, [900, 950, 999]), 1)
    assert late.reach == 0.901 and sample(late, net, KEYS, (2,)).shape == X.shape
    # A list may end before the last timestep, as Stable Diffusion's do, and any string is as published.
    for spec in ([1, 251, 501, 751], "ddim4", "fast27"):
        process = respace(FULL, spec)
        assert process.reach == (0.752 if isinstance(spec, list) else 1.0)
        sample(process, net, KEYS, (2,), step=ancestral_step())


STEPS = {"ddim": ddim_step, "predictor_corrector": lambda value: predictor_corrector_step(snr=value)}


@pytest.mark.parametrize("name", STEPS)
def test_a_known_scalar_of_any_type_is_the_python_number(name):
    """Also inside of a jitted function, where arithmetic with a known array is traced."""
    short, keys = respace(make_process(cosine_betas(100)), "4"), example_keys(jax.random.key(0), 2)
    network = lambda xt, t: 0.5 * xt

    def x0(value):
        options = {"step": STEPS[name](value), "x0_transform": static_threshold(value)}
        return jax.jit(lambda keys: sample(short, network, keys, (3,), **options))(keys)

    for number in (np.float64, jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(x0(number(0.5)), x0(0.5))


def test_indices_of_a_small_type():
    """256 and 1000 do not fit into 8 bits: a bound of that type would be 0 and 232."""
    embed = Embed(256, 4)
    params = embed.init(jax.random.key(0), jnp.zeros(1, jnp.int32))
    ids = jnp.array([3, 250])
    np.testing.assert_array_equal(embed.apply(params, ids.astype(jnp.uint8)), embed.apply(params, ids))
    process, x0 = make_process(cosine_betas(1000)), jnp.ones((2, 3))
    for prediction in ("eps", "v"):
        wide, small = (target(process, x0, 2 * x0, t, prediction=prediction) for t in (ids, ids.astype(jnp.uint8)))
        np.testing.assert_array_equal(small, wide)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_classifier_does_not_shift_pure_noise(prediction):
    process = make_process(zero_terminal_snr(linear_betas(100)))
    xt, t = jnp.ones((2, 3)), jnp.array([99, 98])
    network = lambda xt, t: 0.5 * xt
    log_prob = lambda xt, t: -jnp.sum(xt**2, axis=-1)
    guided = classifier_guided(process, network, log_prob, 2.0, prediction=prediction)(xt, t)
    np.testing.assert_array_equal(guided[0], network(xt, t)[0])
    assert np.isfinite(guided[1]).all() and (guided[1] != network(xt, t)[1]).all()


def test_images_of_8_bits_are_not_data():
    """Their values, 0 to 255, are far outside of [-1, 1]."""
    short, keys = respace(make_process(cosine_betas(100)), "4"), example_keys(jax.random.key(0), 1)
    x0 = jnp.full((1, 2, 2, 3), 255, jnp.uint8)
    network = lambda xt, t: 0.5 * xt
    for run in (
        lambda: sdedit(short, network, keys, x0),
        lambda: repaint_step(x0, jnp.ones((1, 2, 2, 1))),
        lambda: invert(short, network, x0),
        lambda: denoising_loss(short, network, jax.random.key(0), x0),
    ):
        with pytest.raises(ValueError, match=r"x0 must be a batch of floats .*, got uint8\[1, 2, 2, 3\]"):
            run()
