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
from ddpm_jax.interop.guided import PUBLISHED, export_guided, guided_shapes, load_guided, metadata_of
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.adm import Classifier, ClassUNet, SuperUNet
from ddpm_jax.models.unet import UNet
from ddpm_jax.storage.metadata import diffusion_from

REFERENCE = np.load(Path(__file__).parent / "data" / "guided.npz")
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
    return random_weights(json.loads(str(REFERENCE[f"{name}/shapes"])))


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_equal_the_reference(name):
    model, reference = MODELS[name], weights(name)
    options = {"image_size": 16, "new_attention_order": name == "new_order"}
    params = load_guided(reference, model, **options)
    nhwc = lambda key: jnp.asarray(REFERENCE[key].transpose(0, 2, 3, 1))
    given = [nhwc("x"), jnp.asarray(REFERENCE["t"])]
    given += [nhwc("low")] if name == "upsampler" else []
    given += [jnp.asarray(REFERENCE["y"], jnp.int32)] if name in ("adm", "upsampler") else []
    with jax.default_matmul_precision("highest"):
        ours = fast_jit(lambda params: model.apply({"params": params}, *given))(params)
    theirs = REFERENCE[f"{name}/out"]
    theirs = theirs if theirs.ndim == 2 else theirs.transpose(0, 2, 3, 1)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    back = export_guided(params, model, **options)
    assert set(back) == set(reference)
    for key, array in reference.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


OTHERS = {
    "heads_up": unet(heads=4, heads_up=2),
    "pooled": unet(heads=2, heads_up=4, pool_resample=True, out_channels=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_heads_pooling_and_channels(name):
    """num_heads_upsample, conv_resample=False, and inputs of four channels and of one."""
    model, reference = OTHERS[name], weights(name)
    options = {"image_size": 16, "new_attention_order": name == "heads_up"}
    params = load_guided(reference, model, **options)
    x, theirs = (REFERENCE[f"{name}/{key}"].transpose(0, 2, 3, 1) for key in ("x", "out"))
    with jax.default_matmul_precision("highest"):
        ours = fast_jit(lambda params: model.apply({"params": params}, x, REFERENCE["t"][1:2]))(params)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    back = export_guided(params, model, **options)
    assert set(back) == set(reference)
    for key, array in reference.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)


def test_images_of_another_size():
    """8 x 32, through networks of 16 x 16 with attention at level 1, said by a resolution and by the level."""
    x = jnp.asarray(REFERENCE["size/x"].transpose(0, 2, 3, 1))
    levels = {"attention_resolutions": (), "attention_levels": (1,)}
    classifier = Classifier(32, 10, 16, pool="adaptive", **(CLASSIFIER | levels))
    for model, name, theirs in (
        (unet(), "new_order", REFERENCE["size/out"].transpose(0, 2, 3, 1)),
        (classifier, "classifier/adaptive", REFERENCE["size/classifier"]),
    ):
        params = load_guided(weights(name), model, image_size=16)
        with jax.default_matmul_precision("highest"):
            ours = fast_jit(lambda params, model=model: model.apply({"params": params}, x, REFERENCE["t"][1:2]))(params)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    at = lambda model, *size: jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)), jnp.zeros(1))
    shapes = at(unet(**levels), 16, 16)
    assert shapes == at(unet(**levels), 16, 32) == at(unet(**levels), 64, 8) == at(unet(), 16, 16)


@pytest.mark.parametrize("size", [(256, 256), (512, 256)])
def test_attention_belongs_to_levels(size):
    """The 256 model of ADM has 2 + 2 + 2 layers on the way down, one in the middle and 9 on the way up, at any size."""
    spec = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    model = PUBLISHED["256x256_diffusion"].model()
    given = spec(1, *size, 3), spec(1), spec(1, dtype=jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *given)["params"]["unet"]
    assert sum(name.endswith("_attn") for name in params) == 16


def test_attention_by_resolution_of_an_image_that_is_not_square():
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=r"\(8,\) is for square images; level 0 of this one has 8 x 16 pos"):
        jax.eval_shape(unet().init, jax.random.key(0), spec(1, 8, 16, 3), spec(1))
    with pytest.raises(ValueError, match=r"attention_levels=\(2,\) must lie between 0 and 1, the coarsest level"):
        jax.eval_shape(unet(attention_levels=(2,)).init, jax.random.key(0), spec(1, 16, 16, 3), spec(1))
    with pytest.raises(ValueError, match="heads=5 must be at least 1 and divide the 64 channels of the level"):
        jax.eval_shape(unet(heads=5).init, jax.random.key(0), spec(1, 16, 16, 3), spec(1))


def test_the_order_of_attention_matters():
    """It cannot be read from a file: both orders fit."""
    one, other = (load_guided(weights("new_order"), unet(), image_size=16, new_attention_order=o) for o in (0, 1))
    qkv = lambda params: params["mid_attn"]["qkv"]["kernel"]
    assert qkv(one).shape == qkv(other).shape and np.abs(qkv(one) - qkv(other)).max() > 0.1


def test_another_network_is_refused():
    for model in (unet(num_res_blocks=2), unet(scale_shift=False), unet(conv_resample=True), ClassUNet(unet(), 10)):
        with pytest.raises(ConvertError, match="the file does not fit: it"):
            load_guided(weights("new_order"), model, image_size=16)
    for name, model, message in (
        (
            "pooled",
            unet(heads=2, out_channels=2),
            r"pooling \(trained with conv_resample=False\), .* pool_resample=T",
        ),
        ("improved", unet(scale_shift=False), "convolutions, which need conv_resample=True of the model"),
        ("new_order", unet(conv_resample=True), "residual blocks, which need conv_resample=False and pool_resample=F"),
    ):
        with pytest.raises(ConvertError, match=f"the file does not fit: it .*; its levels are joined by {message}"):
            load_guided(weights(name), model, image_size=16)
    with pytest.raises(ValueError, match="conv_resample=True and pool_resample=True contradict each other"):
        load_guided(weights("pooled"), unet(conv_resample=True, pool_resample=True), image_size=16)
    odd = weights("upsampler") | {"input_blocks.0.0.weight": np.zeros((32, 5, 3, 3), np.float32)}
    with pytest.raises(ConvertError, match="network sees 5 channels, where an upsampler sees two images"):
        load_guided(odd, SuperUNet(unet(), 10), image_size=16)
    with pytest.raises(ConvertError, match="it has, unknown to this network, label_emb.weight"):
        load_guided(weights("adm"), unet(), image_size=16)


@pytest.mark.parametrize("channels,millions", [(64, 30), (96, 68), (128, 120), (192, 270)])
def test_the_sizes_of_improved_diffusion(channels, millions):
    """Section 6 of its paper; what was released has 128 or 192 channels. All files: test_published_sizes.py."""
    model = PUBLISHED["imagenet64_uncond_100M_1500K"].model().clone(channels=channels)
    size = sum(leaf.size for leaf in jax.tree.leaves(guided_shapes(model, 64)))
    assert size / 1e6 == pytest.approx(millions, rel=0.012)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.endswith("classifier")])
def test_the_published_processes_are_as_published(name):
    """The schedule, its length, and whether the network is conditioned on t or t * 1000 / num_steps."""
    published, reference = PUBLISHED[name], PROCESSES[name]
    assert (published.num_steps, published.rescale_timesteps) == (
        reference["num_steps"],
        reference["rescale_timesteps"],
    )
    betas = {"linear": linear_betas, "cosine": cosine_betas}[published.schedule](published.num_steps)
    assert betas.sum() == pytest.approx(reference["sum_of_betas"], rel=1e-12)
    metadata = metadata_of(published, published.model())
    assert diffusion_from(metadata["diffusion"]).process.betas.sum() == pytest.approx(
        reference["sum_of_betas"], rel=1e-5
    )
    scale = 1000 / reference["num_steps"] if reference["rescale_timesteps"] else 1.0
    assert metadata["timestep_scale"] == scale
    assert ("labels" in metadata["conditions"]) == ("uncond" not in name and "lsun" not in name)
    assert ("low_resolution" in metadata["conditions"]) == ("upsample" in name)
