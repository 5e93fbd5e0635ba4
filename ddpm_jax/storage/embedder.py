"""Embeddings of images and captions by a network from a model directory, for prepared data sets."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.tokenizer import ClipTokenizer, tokenizer_from_config
from ddpm_jax.data.transforms import clip_pixels, resize_center_crop
from ddpm_jax.errors import LoadError
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.parallel.mesh import data_sharding, make_local_mesh, replicated
from ddpm_jax.storage import model_directory
from ddpm_jax.storage.fingerprint import tree_fingerprint


def open_embedder(path: str | os.PathLike, *, batch_size: int = 64) -> "ClipEmbedder | LatentEmbedder":
    """Open the CLIP or the autoencoder of a model directory, of a stage that is trained here or a converted one.

    Raises:
        LoadError: if it cannot be read, or holds neither.
    """
    network, params, family, metadata = _network(path)
    params = {"params": params}
    if isinstance(network, Autoencoder):
        return LatentEmbedder(network, params, batch_size)
    is_public = family != model_directory.FAMILY
    return ClipEmbedder(network, params, batch_size, _tokenize(network, metadata, is_public), is_public=is_public)


def _tokenize(network: CLIP, metadata: Mapping[str, Any], is_public: bool) -> Callable | None:
    """Return captions -> (tokens, mask) of a CLIP, or None if it does not say how."""
    config, length = metadata.get("tokenizer"), metadata.get("length", getattr(network.text, "context", None))
    if (
        config is None
        and is_public
        and network.text is not None
        and network.text.vocab_size == ClipTokenizer.vocab_size
    ):
        config = ClipTokenizer().to_config()  # the public ones all have OpenAI's
    if network.text is None or config is None or length is None:
        return None
    return functools.partial(tokenizer_from_config(config), length=length)


class _Embedder:
    """Runs a function of batches of one size on all devices of this process."""

    def __init__(self, params: Any, batch_size: int):
        self._mesh = make_local_mesh(at_most=batch_size)
        devices = self._mesh.size
        self.batch_size = -(-batch_size // devices) * devices
        self._params = jax.device_put(params, replicated(self._mesh))

    def _run(self, function: Any, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return what a function computes of arrays [B, ...], in batches that are filled up to one size."""
        count, results = len(arrays[0]), []
        for begin in range(0, count, self.batch_size):
            rows = np.minimum(np.arange(begin, begin + self.batch_size), count - 1)
            batch = jax.device_put([array[rows] for array in arrays], data_sharding(self._mesh))
            results.append([np.asarray(value, np.float32) for value in function(self._params, *batch)])
        return tuple(np.concatenate(parts)[:count] for parts in zip(*results, strict=True))


class ClipEmbedder(_Embedder):
    """Gives "z_image", and "z_text" where there are captions and a tokenizer: unit vectors float32[D].

    Args:
        network: a CLIP.
        params: as `network.apply` takes them.
        batch_size: images at a time; it is rounded up to a multiple of the devices.
        tokenizer: captions -> (tokens, mask); None gives no "z_text".
        is_public: whether it was trained as OpenAI's CLIP, on normalised pixels, and not here, on [-1, 1].

    Attributes:
        image_size: of the images that it embeds.
        dimensions: D.
        pixels: their range, in words.
        reads_captions: whether it has a text tower and a tokenizer.
    """

    def __init__(self, network: CLIP, params: Any, batch_size: int, tokenizer: Callable | None, *, is_public: bool):
        super().__init__(params, batch_size)
        self.fingerprint = f"CLIP {tree_fingerprint(params)}"
        self._tokenizer, self._is_public = tokenizer, is_public
        self.reads_captions = tokenizer is not None
        self._size = self.image_size = network.vision.image_size
        self.dimensions = network.embed_dim
        self.pixels = "pixels normalised as CLIP's" if is_public else "pixels in [-1, 1]"
        self._image = jax.jit(
            lambda params, images: (normalize(network.apply(params, images, method=CLIP.encode_image)),)
        )
        self._text = jax.jit(
            lambda params, tokens, mask: (normalize(network.apply(params, tokens, mask, method=CLIP.encode_text)[0]),)
        )

    def __call__(self, images: np.ndarray, captions: Sequence[str] | None) -> Mapping[str, np.ndarray]:
        """Return the embeddings of uint8[B, H, W, 3] and of captions."""
        pixels = clip_pixels(images, self._size) if self._is_public else _signed(resize_center_crop(images, self._size))
        (z_image,) = self._run(self._image, pixels)
        if captions is None or self._tokenizer is None:
            return {"z_image": z_image}
        (z_text,) = self._run(self._text, *self._tokenizer(list(captions)))
        return {"z_image": z_image, "z_text": z_text}


class LatentEmbedder(_Embedder):
    """Gives "latent_mean" and "latent_std" float32[H / factor, W / factor, C], before the scale of the latents.

    Args:
        network: an autoencoder.
        params: as `network.apply` takes them.
        batch_size: images at a time; it is rounded up to a multiple of the devices.
    """

    def __init__(self, network: Autoencoder, params: Any, batch_size: int):
        super().__init__(params, batch_size)
        self.fingerprint = f"Autoencoder {tree_fingerprint(params)}"
        self._encode = jax.jit(lambda params, images: network.apply(params, images, method=Autoencoder.encode))

    def __call__(self, images: np.ndarray, captions: Sequence[str] | None) -> Mapping[str, np.ndarray]:
        """Return the Gaussians over latents of uint8[B, H, W, 3]."""
        del captions
        mean, std = self._run(self._encode, _signed(images))
        return {"latent_mean": mean, "latent_std": std}


def _signed(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def _network(path: str | os.PathLike) -> tuple[nn.Module, Any, str, Mapping[str, Any]]:
    """Return the only CLIP or autoencoder of a directory, its parameters, its family, and the metadata."""
    described = model_directory.read_description(path)
    if len(described["networks"]) == 1:
        model = model_directory.open_model(path)
        networks, params = {"model": model.network}, {"model": model.params["params"]}
    else:
        converted = model_directory.load(path)
        networks, params = converted.models, converted.params
    found = [name for name, network in networks.items() if isinstance(network, (CLIP, Autoencoder))]
    if len(found) != 1:
        kinds = ", ".join(type(network).__name__ for network in networks.values())
        raise LoadError(f"{path} must hold one CLIP or one autoencoder, it holds {kinds}")
    network = networks[found[0]]
    if isinstance(network, CLIP) and network.vision is None:
        raise LoadError(f"{path} holds a CLIP without its image tower")
    params = jax.tree.map(jnp.asarray, params[found[0]])
    return network, params, described["family"], described["metadata"]
