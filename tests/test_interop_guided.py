"""Networks of guided and improved diffusion: the published code's own outputs, the way back, the published sizes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax import cosine_betas, linear_betas
from ddpm_jax.interop.guided import PUBLISHED, export_guided, guided_shapes, load_guided
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.adm import Classifier, ClassUNet, SuperUNet
from ddpm_jax.models.unet import UNet

PEER = np.load(Path(__file__).parent / "data" / "guided.npz")
PROCESSES = json.loads((Path(__file__).parent / "data" / "published_sizes.json").read_text())
CLASSIFIER = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,), "head_channels": 16}


def unet(**options):
    return UNet(**({"channels": 32, "out_channels": 6, **CLASSIFIER} | options))


MODELS = {
    "adm": ClassUNet(unet(), 10),
    "new_order": unet(),
    "improved": unet(conv_resample=True, scale_shift=False, heads=4),
    "wide": unet(channel_mult=(2, 1, 1), num_res_blocks=2, attention_resolutions=(8, 4)),
    "upsampler": SuperUNet(unet(), 10),
} | {
    f"classifier/{pool}": Classifier(32, 10, 16, pool=pool, **CLASSIFIER)
    for pool in ("attention", "adaptive", "spatial", "spatial_v2")
}


def weights(name):
    return random_weights(json.loads(str(PEER[f"{name}/shapes"])))


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_are_the_peers(name):
    model, peer = MODELS[name], weights(name)
    options = {"image_size": 16, "new_attention_order": name == "new_order"}
    params = load_guided(peer, model, **options)
    nhwc = lambda key: jnp.asarray(PEER[key].transpose(0, 2, 3, 1))
    given = [nhwc("x"), jnp.asarray(PEER["t"])]
    given += [nhwc("low")] if name == "upsampler" else []
    given += [jnp.asarray(PEER["y"], jnp.int32)] if name in ("adm", "upsampler") else []
    with jax.default_matmul_precision("highest"):
        ours = fast_jit(lambda params: model.apply({"params": params}, *given))(params)
    theirs = PEER[f"{name}/out"]
    theirs = theirs if theirs.ndim == 2 else theirs.transpose(0, 2, 3, 1)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    back = export_guided(params, model, **options)
    assert set(back) == set(peer)
    for key, array in peer.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_the_order_of_attention_matters():
    """It cannot be read from a file: both orders fit."""
    one, other = (load_guided(weights("new_order"), unet(), image_size=16, new_attention_order=o) for o in (0, 1))
    qkv = lambda params: params["mid_attn"]["qkv"]["kernel"]
    assert qkv(one).shape == qkv(other).shape and np.abs(qkv(one) - qkv(other)).max() > 0.1


def test_another_network_is_refused():
    for model in (unet(num_res_blocks=2), unet(scale_shift=False), unet(conv_resample=True), ClassUNet(unet(), 10)):
        with pytest.raises(ConvertError, match="the file does not fit: it"):
            load_guided(weights("new_order"), model, image_size=16)
    with pytest.raises(ConvertError, match="it has, unknown to this network, label_emb.weight"):
        load_guided(weights("adm"), unet(), image_size=16)


@pytest.mark.parametrize("channels,millions", [(64, 30), (96, 68), (128, 120), (192, 270)])
def test_the_sizes_of_improved_diffusion(channels, millions):
    """Section 6 of its paper; what was released has 128 or 192 channels. All files: test_published_sizes.py."""
    model = PUBLISHED["imagenet64_uncond_100M_1500K"].model().clone(channels=channels)
    size = sum(leaf.size for leaf in jax.tree.leaves(guided_shapes(model, 64)))
    assert size / 1e6 == pytest.approx(millions, rel=0.012)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.endswith("classifier")])
def test_the_published_processes_are_the_peers(name):
    """The schedule, its length, and whether the network is told t or t * 1000 / num_steps."""
    published, peer = PUBLISHED[name], PROCESSES[name]
    assert (published.num_steps, published.rescale_timesteps) == (peer["num_steps"], peer["rescale_timesteps"])
    betas = {"linear": linear_betas, "cosine": cosine_betas}[published.schedule](published.num_steps)
    assert betas.sum() == pytest.approx(peer["sum_of_betas"], rel=1e-12)
