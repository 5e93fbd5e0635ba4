"""Pipelines of the smallest networks, every parameter random, and directories of them."""

import functools

import jax.numpy as jnp
import numpy as np
from random_networks import random_params

from ddpm_jax.data.shapes.captions import VOCABULARY
from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.adm import Classifier, ClassUNet
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.glide import Glide
from ddpm_jax.models.noised_clip import NoisedCLIP, NoisedVisionTransformer
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.transformer import quick_gelu
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines import Cascade, UnCLIP
from ddpm_jax.storage.metadata import freeze
from ddpm_jax.storage.model_directory import Model

LENGTH, WIDTH, SIZE, LOW, HIGH, CLASSES = 24, 16, 32, 8, 16, 3
TOKENIZER = CompactTokenizer(VOCABULARY)
WORDS = TOKENIZER.vocab_size
FLAT = {"attention_resolutions": (), "attention_levels": (), "mid_attention": False}


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def diffusion(**fields):
    return {"schedule": "cosine", "num_steps": 1000, "prediction": "eps", "variance": "fixed_small"} | fields


def image_metadata(size, conditions=(), **fields):
    return {"image_size": size, "channels": 3, "conditions": list(conditions)} | fields


def model(network, inputs, metadata, seed=0):
    return Model(random_params(network.init, *inputs, seed=seed), network, freeze(metadata))


@functools.cache
def clip():
    shared = {"activation": quick_gelu}
    network = CLIP(
        VisionTransformer(SIZE, 16, WIDTH, 1, 2, (16,), **shared),
        TextEncoder(WORDS, LENGTH, WIDTH, 1, 2, **shared),
        WIDTH,
    )
    inputs = (zeros(1, SIZE, SIZE, 3), zeros(1, LENGTH, dtype=np.int32), np.ones((1, LENGTH), bool))
    metadata = {"tokenizer": TOKENIZER.to_config(), "length": LENGTH, "image_size": SIZE}
    return model(network, inputs, metadata)


@functools.cache
def prior():
    network = DiffusionPrior(WIDTH, LENGTH, WIDTH, 1, 2, activation=quick_gelu)
    inputs = (zeros(1, WIDTH), zeros(1, dtype=np.int32), zeros(1, WIDTH), zeros(1, LENGTH, WIDTH))
    metadata = {"diffusion": diffusion(prediction="x0"), "embedding": {"scale": 4.3, "size": WIDTH}}
    metadata |= {"conditions": ["caption"], "caption": {"length": LENGTH, "own_tokens": False}}
    return model(network, (*inputs, np.ones((1, LENGTH), bool)), metadata)


@functools.cache
def decoder():
    network = Decoder(
        UNet(32, 3, (1,), 1, (), 16, patch=2, attention_levels=(0,), modulate=True),
        WIDTH,
        WIDTH,
        text_embedding=False,
        word_vectors=WORDS,
        cond_map_channels=4,
        cond_map_heads=2,
        text_encoder=TextEncoder(WORDS, LENGTH, WIDTH, 1, 2, causal=False),
    )
    z, tokens = zeros(1, WIDTH), zeros(1, LENGTH, dtype=np.int32)
    inputs = (zeros(1, LOW, LOW, 3), zeros(1, dtype=np.int32), z, z, tokens, np.ones((1, LENGTH), bool))
    metadata = image_metadata(LOW, ("image_embedding", "caption"), diffusion=diffusion(prediction="x0"))
    metadata |= {"image_embedding": {"drop": 0.5}, "caption": {"length": LENGTH, "own_tokens": True, "drop": 0.1}}
    return model(network, inputs, metadata)


@functools.cache
def upsampler(low=LOW, size=HIGH, **fields):
    """An upsampler; fields of its low_resolution metadata: noise, noise_level_input."""
    network = Upsampler(UNet(32, 3, (1,), 1, patch=4, **FLAT), fields.get("noise_level_input", False))
    inputs = (zeros(1, size, size, 3), zeros(1, dtype=np.int32), zeros(1, low, low, 3))
    inputs += (zeros(1),) if network.noise_level_input else ()
    metadata = image_metadata(size, ("low_resolution",), diffusion=diffusion(), low_resolution={"size": low} | fields)
    return model(network, inputs, metadata, seed=size)


STEPS = {"prior": Sampling("ancestral", 2), "decoder": Sampling("ddim", 2, scale=1.5, threshold=1.0)}
ONE = Sampling("ddim", 1, threshold=1.0)


@functools.cache
def unclip(upsamplers=1):
    """A pipeline from 8 pixels to 16, 32, ..."""
    sizes = [LOW * 2**n for n in range(upsamplers + 1)]
    found = tuple(upsampler(low, size) for low, size in zip(sizes, sizes[1:]))
    names = ("upsampler",) if upsamplers == 1 else tuple(f"up_{size}" for size in sizes[1:])
    sampling = STEPS | dict.fromkeys(names, ONE)
    return UnCLIP(clip(), prior(), decoder(), found, sampling, names=names, candidates=1, batch_size=8).checked()


@functools.cache
def base(kind="unconditional"):
    """A model of 8 pixels: "unconditional", "labels", "guided", which has a null class too, or "captions"."""
    unet = UNet(32, 3, (1,), 1, patch=2, **FLAT)
    inputs = (zeros(1, LOW, LOW, 3), zeros(1, dtype=np.int32))
    if kind == "unconditional":
        return model(unet, inputs, image_metadata(LOW, diffusion=diffusion()))
    if kind == "captions":
        network = Glide(unet.clone(attention_levels=(0,), head_channels=16), WORDS, LENGTH, WIDTH, 1, 2)
        tokens = {"length": LENGTH, "drop": 0.2, "tokenizer": TOKENIZER.to_config()}
        metadata = image_metadata(LOW, ("tokens",), diffusion=diffusion(), tokens=tokens)
        inputs += (zeros(1, LENGTH, dtype=np.int32), np.ones((1, LENGTH), bool))
        return model(network, inputs, metadata)
    null = CLASSES if kind == "guided" else None
    metadata = image_metadata(LOW, ("labels",), diffusion=diffusion(), labels=labels(null))
    network = ClassUNet(unet, CLASSES + (null is not None))
    return model(network, (*inputs, zeros(1, dtype=np.int32)), metadata)


def labels(null=None):
    return {"num_classes": CLASSES, "null": null, "names": ["cat", "dog", "owl"]}


@functools.cache
def classifier():
    network = Classifier(32, CLASSES, LOW, (1,), 1, (LOW,), 32)
    inputs = (zeros(1, LOW, LOW, 3), zeros(1, dtype=np.int32))
    return model(network, inputs, {"diffusion": diffusion(), "image_size": LOW, "labels": labels()})


@functools.cache
def noised_clip():
    network = NoisedCLIP(
        NoisedVisionTransformer(LOW, 4, WIDTH, 1, 2), TextEncoder(WORDS, LENGTH, WIDTH, 1, 2), WIDTH, scale=10.0
    )
    inputs = (zeros(1, LOW, LOW, 3), zeros(1, dtype=np.int32), zeros(1, LENGTH, dtype=np.int32))
    metadata = {"tokenizer": TOKENIZER.to_config(), "length": LENGTH, "image_size": LOW, "diffusion": diffusion()}
    return model(network, (*inputs, np.ones((1, LENGTH), bool)), metadata)


@functools.cache
def cascade(kind="unconditional", upsamplers=0, guided=False):
    """A pipeline of a base, and of upsamplers that double the size."""
    sizes = [LOW * 2**n for n in range(upsamplers + 1)]
    found = tuple(upsampler(low, size) for low, size in zip(sizes, sizes[1:]))
    names = tuple(f"up_{size}" for size in sizes[1:])
    sampling = {"base": Sampling("ddim", 2, threshold=1.0)} | dict.fromkeys(names, ONE)
    own = classifier() if guided else None
    return Cascade(base(kind), found, own, sampling, names=names, batch_size=4).checked()


def other(tree):
    """The same tree of other numbers."""
    import jax

    return jax.tree.map(lambda leaf: leaf + jnp.float32(0.5), tree)
