"""`Diffusion` and `Sampling`: ranges, the samplers they stand for bit for bit, and one program for all numbers."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal

from ddpm_jax.diffusion.diffusion import MAX_STEPS, SCHEDULES, Diffusion
from ddpm_jax.diffusion.guidance import classifier_free
from ddpm_jax.diffusion.process import make_process, respace
from ddpm_jax.diffusion.samplers import (
    SAMPLERS,
    analytic_step,
    ancestral_step,
    ddim_step,
    dpm_solver_step,
    euler_maruyama_step,
    example_keys,
    heun_step,
    plms_step,
    predictor_corrector_step,
    reverse_diffusion_step,
    sample,
    unipc_step,
)
from ddpm_jax.diffusion.sampling import Sampling, as_steps, bounded, sample_with, sampling_from
from ddpm_jax.diffusion.schedules import cosine_betas, linear_betas
from ddpm_jax.types import Step

T, B, SHAPE, STEPS = 60, 3, (4, 2), 6
DIFFUSION = Diffusion("cosine", T, prediction="v")
KEYS = example_keys(jax.random.key(5), B)


def network(xt, t):
    return 0.7 * jnp.sin(xt) + 0.01 * t.reshape(-1, 1, 1)


def null(xt, t):
    return 0.4 * jnp.cos(xt) - 0.005 * t.reshape(-1, 1, 1)


def log_prob(xt, t):
    return -jnp.square(xt - 1.0).sum((1, 2)) / (1.0 + t)


def refused(message, make):
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value) and message in str(error.value), str(error.value)


# ---- Diffusion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, f"num_steps=0 must be between 1 and {MAX_STEPS}"),
        ({"num_steps": -1}, f"num_steps=-1 must be between 1 and {MAX_STEPS}"),
        ({"num_steps": 10**9}, f"num_steps=1000000000 must be between 1 and {MAX_STEPS}"),
        ({"num_steps": 10.0}, "num_steps=10.0 must be an integer"),
        ({"num_steps": True}, "num_steps=True must be an integer"),
        ({"num_steps": "10"}, "num_steps='10' must be an integer"),
        ({"schedule": "cos"}, "schedule='cos' must be one of 'linear', 'cosine'"),
        ({"schedule": None}, "schedule=None must be a name, or a sequence of betas"),
        ({"schedule": 0.1}, "schedule=0.1 must be a name, or a sequence of betas"),
        ({"schedule": ("a", "b"), "num_steps": 2}, "schedule=('a', 'b') must be a name, or a sequence of betas"),
        ({"schedule": (0.1, 0.2), "num_steps": 3}, "schedule has 2 betas, and num_steps=3"),
        ({"schedule": (0.1, 1.5), "num_steps": 2}, "betas"),
        ({"schedule": (0.1, math.nan), "num_steps": 2}, "betas"),
        ({"schedule": (0.0, 0.1), "num_steps": 2}, "betas"),
        ({"prediction": "noise"}, "prediction='noise' must be one of 'eps', 'x0', 'v', 'score', 'mean'"),
        ({"prediction": ["eps"]}, "prediction=['eps'] must be one of"),
        ({"variance": "learned"}, "variance='learned' must be one of 'fixed_small', 'fixed_large', 'learned_range'"),
    ],
)
def test_every_field_of_diffusion_out_of_its_range(fields, message):
    refused(message, lambda: Diffusion(**fields))


def test_the_process_is_that_of_its_betas():
    for schedule, betas in {"cosine": cosine_betas(50), "linear": linear_betas(50)}.items():
        expected = make_process(betas)
        for found in (Diffusion(schedule, 50).process, Diffusion(tuple(betas), 50).process):
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(Diffusion(schedule, 40).process.num_steps == 40 for schedule in SCHEDULES)


def test_diffusion_is_a_value():
    one, two = Diffusion("linear", 40, "x0"), Diffusion("cosine", 40).replace(schedule="linear", prediction="x0")
    assert one == two and hash(one) == hash(two)
    assert [one.replace(variance=v).channels(3) for v in ("fixed_small", "fixed_large", "learned_range")] == [3, 3, 6]
    for diffusion in (one, Diffusion([0.1, 0.2, 0.3], 3, "v", "learned_range")):
        assert Diffusion(**json.loads(json.dumps(dataclasses.asdict(diffusion)))) == diffusion


def test_a_process_made_while_a_function_is_traced_stays_numbers():
    diffusion = Diffusion("quadratic", 37)
    jax.jit(lambda x: x * diffusion.process.alpha_bar[3])(1.0)
    assert np.isfinite(np.asarray(diffusion.process.alpha_bar)).all()


# ---- Ranges of Sampling ----------------------------------------------------------------------------------------------

NUMBERS = {
    "eta": ("ddim", -0.1, 1.1),
    "churn": ("heun", -0.1, 0.5),
    "snr": ("predictor_corrector", 0.0, 1.0),
    "scale": ("ddim", -1.0, 1e5),
    "rescale": ("ddim", -0.1, 1.1),
    "classifier_scale": ("ddim", -1.0, 1e5),
    "threshold": ("ddim", 0.0, 1e7),
    "quantile": ("ddim", -0.1, 1.1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_out_of_its_range(name):
    sampler, *outside = NUMBERS[name]
    for bad in outside:
        refused(f"{name}={bad} must be in ", lambda bad=bad: Sampling(sampler, **{name: bad}).checked())
    for bad in (math.nan, -math.inf if name == "threshold" else math.inf, "1", True, [1.0]):
        message = f"decoder_{name}={bad!r} must be a finite number"
        refused(message, lambda bad=bad: Sampling(sampler, **{name: bad}).checked("decoder_"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "euler"}, "sampler='euler' must be one of 'ancestral', 'analytic', 'ddim'"),
        ({"sampler": None}, "sampler=None must be one of"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": "0"}, "steps='0' must be at least 1"),
        ({"steps": True}, "steps=True must be a number of steps"),
        ({"steps": 2.5}, "steps=2.5 must be a number of steps"),
        ({"steps": ""}, "steps='' must be a number of steps"),
        ({"steps": ()}, "steps=() must be a number of steps"),
        ({"steps": (1, 2.5)}, "steps=(1, 2.5) must be a number of steps"),
        ({"steps": None}, "steps=None must be a number of steps"),
        ({"sampler": "unipc", "order": 4}, "order=4 must be an integer in [1, 3]"),
        ({"sampler": "unipc", "order": 0}, "order=0 must be an integer in [1, 3]"),
        ({"sampler": "unipc", "order": 2.0}, "order=2.0 must be an integer in [1, 3]"),
        (
            {"sampler": "predictor_corrector", "corrector_steps": -1},
            "corrector_steps=-1 must be an integer in [0, 100]",
        ),
        ({"sampler": "dpm_solver", "sde": 1}, "sde=1 must be True or False"),
        ({"sampler": "heun", "eta": 0.5}, "eta=0.5 is no option of sampler='heun', which has churn"),
        ({"sampler": "plms", "order": 2}, "order=2 is no option of sampler='plms', which has no options"),
        ({"sampler": "unipc", "sde": True}, "sde=True is no option of sampler='unipc', which has order"),
    ],
)
def test_every_other_field_out_of_its_range(fields, message):
    refused(message, lambda: Sampling(**fields).checked())


def test_steps_that_the_process_does_not_have():
    refused("61", lambda: Sampling(steps=61).process(DIFFUSION))
    refused("fast9", lambda: Sampling(steps="fast9").process(DIFFUSION))


def test_fields_of_plain_data_are_named_with_where_they_are():
    refused(
        "sample.base has no option 'stepps'; there are sampler, steps",
        lambda: sampling_from({"stepps": 3}, name="sample.base"),
    )
    refused("sampling.eta=2 must be in [0, 1]", lambda: sampling_from({"sampler": "ddim", "eta": 2}))


def test_checked_is_one_form():
    """Numbers of numpy and JAX become Python's, and an option that does nothing is None."""
    given = Sampling("ddim", np.int64(7), eta=jnp.float32(0.0), scale=1, rescale=0.0, classifier_scale=np.float32(2))
    found = given.checked()
    assert found == Sampling("ddim", 7, classifier_scale=2.0) and type(found.classifier_scale) is float
    assert as_steps("steps", " 10, 10 ,5") == "10,10,5" and as_steps("steps", "25") == 25
    assert as_steps("steps", np.array([0, 3, 9])) == (0, 3, 9)
    # Its default as a number is no option of another sampler, and does no harm.
    assert Sampling("plms", 7, eta=0.0).checked() == Sampling("plms", 7)


def test_with_options_drops_what_another_sampler_does_not_have():
    solver = Sampling("dpm_solver", 20, order=3, sde=True, scale=2.0, threshold=1.0)
    assert solver.with_options(sampler="unipc") == Sampling("unipc", 20, order=3, scale=2.0, threshold=1.0)
    assert solver.with_options(sampler="ddim", eta=0.5) == Sampling("ddim", 20, eta=0.5, scale=2.0, threshold=1.0)
    assert solver.with_options(steps="10", scale=None) == solver.replace(steps=10)
    assert Sampling("ddim", eta=0.5).with_options(sampler="ancestral", steps=5) == Sampling("ancestral", 5)
    refused(
        "decoder_eta=0.5 is no option of sampler='unipc'",
        lambda: solver.with_options("decoder_", sampler="unipc", eta=0.5),
    )
    refused("sampler='euler' must be one of", lambda: solver.with_options(sampler="euler"))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling("ddim", "ddim25", eta=0.3, scale=4.0, rescale=0.7, threshold=1.0, quantile=0.995),
        Sampling("dpm_solver", (0, 5, 9), order=1, sde=True, classifier_scale=2.0),
        Sampling("predictor_corrector", 12, corrector_steps=0, snr=0.1),
        Sampling("heun", 12, churn=0.3),
    ],
)
def test_a_description_gives_the_sampling_back(sampling):
    assert Sampling(**sampling.describe()) == sampling
    assert sampling_from(json.loads(json.dumps(sampling.describe()))) == sampling


def test_infinity_turns_all_thresholds_off_and_0_the_dynamic_one():
    """In place of a pipeline's default, for which None stands."""
    default = Sampling("ddim", threshold=1.0, quantile=0.995)
    assert (
        default.with_options(threshold=math.inf)
        == default.with_options(threshold=np.float32(math.inf))
        == (Sampling("ddim"))
    )
    assert default.with_options(quantile=0) == Sampling("ddim", threshold=1.0)
    assert default.with_options(threshold=None, quantile=None) == default
    assert Sampling(threshold=math.inf).checked().x0_transform() is None


# ---- What is sampled -------------------------------------------------------------------------------------------------

MOMENTS = jnp.linspace(0.9, 0.2, T)
CASES = {
    "ancestral": ({}, lambda moments: ancestral_step()),
    "analytic": ({}, analytic_step),
    "ddim": ({"eta": 0.4}, lambda moments: ddim_step(0.4)),
    "ddim, eta by default": ({}, lambda moments: ddim_step(0.0)),
    "dpm_solver": ({"order": 3}, lambda moments: dpm_solver_step(3)),
    "dpm_solver, sde": ({"sde": True}, lambda moments: dpm_solver_step(2, sde=True)),
    "euler_maruyama": ({}, lambda moments: euler_maruyama_step()),
    "heun": ({}, lambda moments: heun_step()),
    "plms": ({}, lambda moments: plms_step()),
    "predictor_corrector": (
        {"corrector_steps": 2, "snr": 0.1},
        lambda moments: predictor_corrector_step(corrector_steps=2, snr=0.1),
    ),
    "reverse_diffusion": ({}, lambda moments: reverse_diffusion_step()),
    "unipc": ({"order": 1}, lambda moments: unipc_step(1)),
}


def test_every_sampler_takes_the_options_that_it_lists():
    values = {"eta": 0.4, "order": 1, "sde": True, "churn": 0.3, "corrector_steps": 2, "snr": 0.1}
    values |= {"variance_share": 0.4, "variance_weighted": False}  # the second needs a scale of guidance
    for name, sampler in SAMPLERS.items():
        moments = MOMENTS if name == "analytic" else None
        for options in ({}, {option: values[option] for option in sampler.options}):
            assert isinstance(Sampling(name, **options).checked().step(moments=moments), Step), name


@pytest.mark.parametrize("name", CASES)
def test_sample_with_is_the_composition_by_hand_bit_for_bit(name):
    """Respaced, guided and clipped."""
    options, make_step = CASES[name]
    sampling = Sampling(name.split(",")[0], STEPS, scale=3.0, threshold=1.0, **options)
    moments = MOMENTS if name == "analytic" else None

    @fast_jit
    def ours(keys):
        return sample_with(sampling, DIFFUSION, network, keys, SHAPE, null=null, moments=moments)

    @fast_jit
    def by_hand(keys):
        process = respace(make_process(cosine_betas(T)), STEPS)
        return sample(
            process,
            classifier_free(network, null, 3.0),
            keys,
            SHAPE,
            step=make_step(MOMENTS[process.timestep_map]),
            prediction="v",
            variance="fixed_small",
            x0_transform=lambda x0: jnp.where(jnp.isfinite(x0), jnp.clip(x0, -1.0, 1.0), jnp.nan),
        )

    found = ours(KEYS)
    assert found.shape == (B, *SHAPE) and np.isfinite(found).all() and np.asarray(found).std() > 0.01
    np.testing.assert_array_equal(found, by_hand(KEYS))


TRACED = {
    "ddim": [{"eta": eta, "scale": scale} for eta, scale in ((0.2, 2.0), (0.9, 4.0), (0.2, 7.0))],
    "unipc": [{"scale": 2.0}, {"scale": 3.0}],
    "predictor_corrector": [{"snr": 0.1}, {"snr": 0.2}],
    "ancestral": [{"classifier_scale": 1.0, "threshold": 1.0}, {"classifier_scale": 9.0, "threshold": 2.0}],
    "dpm_solver": [
        {"scale": 2.0, "rescale": 0.1, "threshold": 1.0, "quantile": 0.9},
        {"scale": 3.0, "rescale": 0.7, "threshold": 0.5, "quantile": 0.5},
    ],
}


@pytest.mark.parametrize("name", TRACED)
def test_one_compiled_program_serves_all_numbers(name):
    """Numbers are arguments: a function is traced once, and gives what the numbers as constants give."""
    traces = []

    @fast_jit
    def traced(sampling, keys):
        traces.append(sampling)
        return sample_with(sampling, DIFFUSION, network, keys, SHAPE, null=null, log_prob=log_prob)

    for options in TRACED[name]:
        sampling = Sampling(name, STEPS, **options).checked()
        traced(sampling, KEYS)
    assert len(traces) == 1
    last = sample_with(sampling, DIFFUSION, network, KEYS, SHAPE, null=null, log_prob=log_prob)
    np.testing.assert_allclose(traced(sampling, KEYS), last, rtol=1e-4, atol=1e-5)
    first = traced(Sampling(name, STEPS, **TRACED[name][0]).checked(), KEYS)
    assert np.abs(np.asarray(first) - np.asarray(last)).max() > 1e-3


def test_a_scale_may_be_mapped_over():
    scales = jnp.array([1.5, 4.0])
    run = lambda scale: sample_with(
        Sampling("ddim", 3, scale=scale).checked(), DIFFUSION, network, KEYS, SHAPE, null=null
    )
    both = fast_jit(jax.vmap(run))(scales)
    for scale, found in zip(scales, both, strict=True):
        np.testing.assert_allclose(found, run(float(scale)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(scale=2.0), "scale=2.0 needs a network with a null condition, and this one has none"),
        (Sampling(classifier_scale=2.0), "classifier_scale=2.0 needs a classifier, and there is none"),
        (Sampling(clip_scale=2.0), "clip_scale=2.0 needs a noised CLIP, and there is none"),
        (Sampling("analytic"), "sampler='analytic' needs the second moments of the network"),
    ],
)
def test_options_without_what_they_need(sampling, message):
    refused(message, lambda: sample_with(sampling.replace(steps=3), DIFFUSION, network, KEYS, SHAPE))


# ---- Thresholds ------------------------------------------------------------------------------------------------------


def test_static_threshold_and_what_is_not_finite():
    x0 = np.array([[-3.0, 0.5], [np.inf, 2.0], [np.nan, -np.inf]], np.float32)
    expected = np.array([[-1.5, 0.5], [np.nan, 1.5], [np.nan, np.nan]], np.float32)
    np.testing.assert_array_equal(Sampling(threshold=1.5).x0_transform()(jnp.asarray(x0)), expected)
    np.testing.assert_array_equal(bounded(jnp.asarray(x0), 1.5), expected)
    assert Sampling().x0_transform() is None


@pytest.mark.parametrize(("quantile", "threshold"), itertools.product((0.5, 0.9, 1.0), (None, 1.0, 0.6)))
def test_dynamic_threshold_equals_numpy(quantile, threshold):
    """Imagen, section 2.3, for every example: s = max(quantile of |x0|, 1), x0 = clip(x0, -s, s) / s."""
    x0 = np.asarray(normal(0, 4, 5, 3)) * np.array([0.1, 0.8, 2.0, 10.0], np.float32).reshape(4, 1, 1)
    bound, expected = 1.0 if threshold is None else threshold, []
    for example in x0.astype(np.float64):
        s = max(np.quantile(np.abs(example), quantile), bound)
        expected.append(np.clip(example, -s, s) / s * bound)
    found = Sampling(quantile=quantile, threshold=threshold).x0_transform()(jnp.asarray(x0))
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-6)
    assert np.abs(found).max() <= bound * (1 + 1e-6)


# ---- Classifier guidance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_classifier_guidance_tilts_a_gaussian(sampler):
    """Data N(m, s^2) with p(y | x) ~ exp(a x): guided by scale w, samples are of p(x) p(y | x)^w = N(m + s^2 a w, s^2).

    The noise that is in x_t is known: E[x0 | xt] = (m sigma^2 + alpha s^2 xt) / (alpha^2 s^2 + sigma^2), and
    log p(y | xt) = a E[x0 | xt] + const, since the variance of x0 given xt does not depend on xt.
    """
    m, s, a, w, n = 0.5, 0.6, 1.5, 2.0, 4000
    diffusion = Diffusion("cosine", 400, prediction="x0")
    alpha_bar = jnp.asarray(diffusion.process.alpha_bar)

    def denoise(xt, t):
        alpha, variance = jnp.sqrt(alpha_bar[t])[:, None], 1.0 - alpha_bar[t][:, None]
        return (m * variance + alpha * s**2 * xt) / (alpha**2 * s**2 + variance)

    @fast_jit
    def run(sampling, keys):
        log_prob = lambda xt, t: a * denoise(xt, t).sum(-1)
        return sample_with(sampling, diffusion, denoise, keys, (2,), log_prob=log_prob)

    keys = example_keys(jax.random.key(0), n)
    for scale in (w, -1.0):
        found = np.asarray(run(Sampling(sampler, 400, classifier_scale=scale), keys), np.float64)
        error = s / math.sqrt(2 * n)
        assert abs(found.mean() - (m + s**2 * a * scale)) < 4 * error + 0.01
        assert abs(found.std() / s - 1) < 0.04


@pytest.mark.parametrize("weighted", [False, True])
def test_guidance_by_a_null_condition_tilts_a_gaussian(weighted):
    """Data N(m, s^2), of a class N(m + s^2 a, s^2) ~ exp(a x) N(m, s^2): guided by w they are N(m + s^2 a w, s^2)."""
    m, s, a, w, n = 0.5, 0.6, 1.0, 2.0, 4000
    diffusion = Diffusion("cosine", 400, prediction="x0")
    alpha_bar = jnp.asarray(diffusion.process.alpha_bar)

    def denoiser(mean):
        def denoise(xt, t):
            alpha, variance = jnp.sqrt(alpha_bar[t])[:, None], 1.0 - alpha_bar[t][:, None]
            return (mean * variance + alpha * s**2 * xt) / (alpha**2 * s**2 + variance)

        return denoise

    how = Sampling("ancestral", 400, scale=w, variance_weighted=weighted)
    run = lambda keys: sample_with(how, diffusion, denoiser(m + s**2 * a), keys, (2,), null=denoiser(m))
    found = np.asarray(fast_jit(run)(example_keys(jax.random.key(0), n)), np.float64)
    assert abs(found.mean() - (m + s**2 * a * w)) < 4 * s / math.sqrt(2 * n) + 0.01
    assert abs(found.std() / s - 1) < 0.04


def test_the_share_of_the_variance():
    """At its ends it is that of fixed_small and fixed_large; the network's own is refused."""
    run = lambda how, variance: sample_with(how, DIFFUSION.replace(variance=variance), network, KEYS, SHAPE)
    for share, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):
        shared = run(Sampling("ancestral", 5, variance_share=share), "fixed_small")
        np.testing.assert_allclose(shared, run(Sampling("ancestral", 5), variance), rtol=1e-5, atol=1e-5)
    refused(
        "variance_share=0.5 is for networks without",
        lambda: run(Sampling(steps=5, variance_share=0.5), "learned_range"),
    )


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling("ddim", scale=2.0, variance_weighted=True), "variance_weighted=True is no option of sampler='ddim'"),
        (Sampling(variance_weighted=True), "variance_weighted=True needs scale, the scale of the guidance"),
        (Sampling(scale=2.0, rescale=0.5, variance_weighted=True), "variance_weighted=True excludes rescale=0.5"),
    ],
)
def test_what_cannot_be_weighted_by_the_variance(sampling, message):
    refused(message, sampling.checked)
