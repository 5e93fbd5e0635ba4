"""Guided and improved diffusion from noise to image: the published code's loops, from noise that it recorded."""

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
    ancestral_step,
    cosine_betas,
    ddim_step,
    linear_betas,
    make_process,
    predict,
    respace,
    sample,
    static_threshold,
)
from ddpm_jax.diffusion.guidance import classifier_guided, log_prob_gradient
from ddpm_jax.interop.guided import PUBLISHED, load_guided
from ddpm_jax.models.adm import Classifier, ClassUNet
from ddpm_jax.models.unet import UNet

REFERENCE = np.load(Path(__file__).parent / "data" / "guided_loops.npz")
LABELS = jnp.asarray(REFERENCE["y"], jnp.int32)
SIZES = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
MODELS = {
    "adm": ClassUNet(UNet(32, 6, head_channels=16, **SIZES), 10),
    "classifier": Classifier(32, 10, 16, head_channels=16, **SIZES),
    "improved": UNet(32, 6, heads=4, conv_resample=True, **SIZES),
}
PROCESS = make_process(linear_betas(1000))
SCALE = 30.0


@pytest.fixture(scope="module")
def params():
    weights = lambda name: random_weights(json.loads(str(REFERENCE[f"{name}/shapes"])))
    return {name: load_guided(weights(name), model, image_size=16) for name, model in MODELS.items()}


def adm(params):
    """The tests' network, see make_guided_loops.py."""
    run = lambda xt, t: MODELS["adm"].apply({"params": params["adm"]}, xt, t, LABELS)
    return lambda xt, t: jnp.concatenate([xt, 0 * xt], axis=-1) + 0.2 * run(xt, t)


def improved(params, rate):
    run = lambda xt, t: MODELS["improved"].apply({"params": params["improved"]}, xt, t * rate)
    return lambda xt, t: jnp.concatenate([xt, 0 * xt], axis=-1) + 0.2 * run(xt, t)


def log_prob(params):
    def run(xt, t):
        logits = MODELS["classifier"].apply({"params": params["classifier"]}, xt, t)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), LABELS[:, None], axis=1)[:, 0]

    return run


@pytest.fixture(scope="module")
def draw(params):
    """Return (sampler) -> image: sampler(params, noise), in which transition i gets the i-th noise of the file."""
    noise = RecordedNoise(jnp.asarray(REFERENCE["noises"].transpose(1, 0, 3, 4, 2)))

    def run(sampler):
        with jax.default_matmul_precision("highest"):
            return fast_jit(sampler)(params, noise)

    return run


def drawn(process, denoise, keys, **options):
    options = {"variance": "learned_range", "x0_transform": static_threshold()} | options
    return sample(process, denoise, keys, (16, 16, 3), **options)


def agrees(ours, name):
    theirs = REFERENCE[name].transpose(0, 2, 3, 1)
    assert theirs.std() > 0.3 and (np.abs(theirs) < 0.99).mean() > 0.8
    np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_ancestral(draw):
    agrees(draw(lambda params, keys: drawn(respace(PROCESS, "6"), adm(params), keys)), "ancestral")


def test_ddim(draw):
    agrees(draw(lambda params, keys: drawn(respace(PROCESS, "ddim6"), adm(params), keys, step=ddim_step())), "ddim")


def test_ancestral_with_a_classifier(draw):
    """The mean is shifted by the learned variance times the gradient."""

    def sampler(params, keys):
        guide = lambda xt, t: SCALE * log_prob_gradient(log_prob(params), xt, t)
        return drawn(respace(PROCESS, "6"), adm(params), keys, step=ancestral_step(guide))

    agrees(draw(sampler), "ancestral_guided")


def test_ddim_with_a_classifier(draw):
    """Guided diffusion clips x0 before the shift and not behind it; so the network is read as x0 first."""

    def sampler(params, keys):
        network = adm(params)

        def clipped(xt, t):
            options = {"prediction": "eps", "variance": "learned_range", "x0_transform": static_threshold()}
            return predict(PROCESS, network(xt, t), xt, t, **options).x0

        guided = classifier_guided(PROCESS, clipped, log_prob(params), SCALE, prediction="x0")
        options = {"prediction": "x0", "variance": "fixed_small", "x0_transform": None, "step": ddim_step()}
        return drawn(respace(PROCESS, "ddim6"), guided, keys, **options)

    agrees(draw(sampler), "ddim_guided")


def test_ddim_with_a_classifier_unclipped(draw):
    def sampler(params, keys):
        guided = classifier_guided(PROCESS, adm(params), log_prob(params), SCALE)
        return drawn(respace(PROCESS, "ddim6"), guided, keys, x0_transform=None, step=ddim_step())

    agrees(draw(sampler), "ddim_guided_unclipped")


@pytest.mark.parametrize("kind,least", [("ancestral", 0.02), ("ddim", 0.1)])
def test_guidance_is_seen(kind, least):
    """Otherwise the tests above would pass without it."""
    assert np.abs(REFERENCE[f"{kind}_guided"] - REFERENCE[kind]).mean() > least


@pytest.mark.parametrize("name,spec,step", [("improved", "6", None), ("improved_ddim", "ddim6", ddim_step())])
def test_improved_diffusion(draw, name, spec, step):
    """4000 steps of the cosine schedule, a quarter of which the network is conditioned on: rescale_timesteps."""
    process = respace(make_process(cosine_betas(4000)), spec)
    rate = 1000 / PUBLISHED["imagenet64_uncond_100M_1500K"].num_steps
    agrees(draw(lambda params, keys: drawn(process, improved(params, rate), keys, step=step)), name)
    if step is None:
        untold = draw(lambda params, keys: drawn(process, improved(params, 1.0), keys))
        assert np.abs(untold - REFERENCE[name].transpose(0, 2, 3, 1)).max() > 0.1
