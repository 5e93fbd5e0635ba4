"""Features of images that sets of images are compared by, each with a name that says exactly how it was computed."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.inception import load_inception
from ddpm_jax.models.inception import SIZE, Inception, prepare
from ddpm_jax.parallel.mesh import data_sharding, make_local_mesh, replicated
from ddpm_jax.storage.embedder import ClipEmbedder, open_embedder
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.model_directory import is_model_directory, open_model
from ddpm_jax.storage.tensor_file import read_tensors

POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"
"""Features for FID, KID, precision and recall; those for sFID; logits of classes, for the Inception Score."""
RESIZES = {
    "tensorflow": f"bilinear to {SIZE} x {SIZE} as TensorFlow 1 (no half pixel, no antialiasing), (x - 128) / 128",
    "half_pixel": f"bilinear to {SIZE} x {SIZE} with half-pixel centres (no antialiasing), 2 x / 255 - 1",
}
_RANDOM_SIZE, _RANDOM_WIDTHS, _RANDOM_FEATURES = 64, (32, 64, 128, 128), 128


class Identity(NamedTuple):
    """What statistics of features must have in common to be compared.

    Attributes:
        name: of the features.
        fingerprint: of the network's parameters.
        preprocessing: resize and range.
    """

    name: str
    fingerprint: str
    preprocessing: str

    def __str__(self) -> str:
        return f"{self.name} {self.fingerprint[:12]} ({self.preprocessing})"


class Extractor(Protocol):
    """Computes features of images.

    Attributes:
        identity: what it computes.
        dimensions: sizes of its features by name.
    """

    identity: Identity
    dimensions: Mapping[str, int]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return float32[B, D] features of uint8[B, H, W, 3] by name."""
        ...


def open_extractor(spec: str, *, resize: Literal["tensorflow", "half_pixel"] = "tensorflow") -> Extractor:
    """Open features by what names them.

    Args:
        spec: one of

            - "inception:FILE", FID's network from a file of its weights (`interop.inception`), or from a directory that
              `ddpm_jax.convert --from inception` made of it
            - "clip:DIRECTORY", the image embeddings of a CLIP in a model directory (`storage.embedder`)
            - "random", a fixed network with random weights (`random_extractor`), which needs no file
        resize: of "inception": "tensorflow", as the original code, torch-fidelity and guided-diffusion's evaluator have
            it, or "half_pixel", pytorch-fid's.

    Raises:
        ValueError: if it is none of these.
        LoadError: if the file or directory cannot be read.
    """
    kind, _, place = spec.partition(":")
    if kind == "random" and not place:
        return random_extractor()
    if kind == "clip" and place:
        return ClipFeatures(place)
    if kind == "inception" and place:
        return inception_extractor(_inception_params(os.path.expanduser(place)), resize)
    raise ValueError(f"features={spec} must be inception:FILE, clip:DIRECTORY or random")


def _inception_params(path: str) -> Any:
    """Return the parameters of a file, or of the directory that `ddpm_jax.convert` made of one."""
    if not is_model_directory(path):
        return load_inception(read_tensors(path))
    model = open_model(path)
    if not isinstance(model.network, Inception):
        raise ValueError(f"features=inception:{path} holds a {type(model.network).__name__}, and not Inception")
    return model.params["params"]


class NetworkFeatures:
    """Features that a function of parameters and images gives, computed on all devices of this process.

    Args:
        identity: what it computes.
        dimensions: sizes of the features by name.
        function: (params, uint8[B, H, W, 3]) -> features by name, float32[B, D].
        params: of the function.
    """

    def __init__(
        self, identity: Identity, dimensions: Mapping[str, int], function: Callable[[Any, jax.Array], Any], params: Any
    ):
        self.identity, self.dimensions = identity, dict(dimensions)
        self._mesh = make_local_mesh()
        self._params = jax.device_put(params, replicated(self._mesh))
        self._function, self._most = jax.jit(function), 0

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return features by name; a batch smaller than one before is filled up to its size, to compile once."""
        count, devices = len(images), self._mesh.size
        self._most = max(self._most, -(-count // devices) * devices)
        rows = np.minimum(np.arange(self._most), count - 1)
        batch = jax.device_put(images[rows], data_sharding(self._mesh))
        with jax.default_matmul_precision("highest"):
            found = self._function(self._params, batch)
        return {name: np.asarray(values, np.float32)[:count] for name, values in found.items()}


def inception_extractor(params: Any, resize: Literal["tensorflow", "half_pixel"] = "tensorflow") -> NetworkFeatures:
    """Return FID's features: 2048 of the last pooling, the spatial ones of sFID, and logits.

    Args:
        params: of `models.inception.Inception`, as `load_inception` returns them.
        resize: see `open_extractor`.
    """
    if resize not in RESIZES:
        raise ValueError(f"{resize=} must be one of {', '.join(RESIZES)}")

    def features(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = Inception().apply({"params": params}, prepare(images, resize))
        spatial = found["spatial"].reshape(len(images), -1)
        return {POOL: found["2048"], SPATIAL: spatial, LOGITS: found["logits_unbiased"]}

    identity = Identity("inception", tree_fingerprint(params), RESIZES[resize])
    return NetworkFeatures(identity, {POOL: 2048, SPATIAL: 17 * 17 * 7, LOGITS: 1008}, features, params)


def random_extractor() -> NetworkFeatures:
    """Return 128 features of a fixed convolutional network with random weights.

    Random networks embed images well enough to compare sets of images that ImageNet's classes do not describe (Naeem et
    al. 2020, section 4.1). Their distances are on a scale of their own: they rank models on one data set, and no
    published number has them. The network: images in [-1, 1] are resized to 64 x 64 (bilinear, antialiased); four 3 x 3
    convolutions of stride 2, each followed by a leaky ReLU, with 32, 64, 128 and 128 channels; and a projection of the
    4 x 4 x 128 values to 128. Weights are normal with variance 2 / inputs (1 / inputs of the projection), by numpy's
    RandomState(0), whose stream never changes.
    """
    params = _random_params()

    def features(params: Mapping[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        layout = ("NHWC", "HWIO", "NHWC")
        shape = (len(images), _RANDOM_SIZE, _RANDOM_SIZE, 3)
        x = jax.image.resize(images.astype(jnp.float32) / 127.5 - 1.0, shape, "linear", antialias=True)
        for kernel in params["kernels"]:
            x = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
            x = jax.nn.leaky_relu(x, 0.2)
        return {POOL: x.reshape(len(images), -1) @ params["projection"]}

    digest = hashlib.sha256(b"random 1" + tree_fingerprint(params).encode()).hexdigest()
    preprocessing = f"bilinear to {_RANDOM_SIZE} x {_RANDOM_SIZE}, antialiased, 2 x / 255 - 1"
    return NetworkFeatures(Identity("random", digest, preprocessing), {POOL: _RANDOM_FEATURES}, features, params)


@functools.cache
def _random_params() -> dict[str, Any]:
    rng, widths = np.random.RandomState(0), (3, *_RANDOM_WIDTHS)
    kernels = []
    for inputs, outputs in zip(widths, widths[1:]):
        kernel = rng.standard_normal((3, 3, inputs, outputs)) * np.sqrt(2.0 / (9 * inputs))
        kernels.append(kernel.astype(np.float32))
    inputs = (_RANDOM_SIZE // 2 ** len(_RANDOM_WIDTHS)) ** 2 * widths[-1]
    projection = (rng.standard_normal((inputs, _RANDOM_FEATURES)) / np.sqrt(inputs)).astype(np.float32)
    return {"kernels": kernels, "projection": projection}


class ClipFeatures:
    """The unit image embeddings of a CLIP.

    Args:
        path: a model directory that holds one.

    Raises:
        LoadError: if it does not.
        ValueError: if it holds another network.
    """

    def __init__(self, path: str):
        self._embed = open_embedder(os.path.expanduser(path))
        if not isinstance(self._embed, ClipEmbedder):
            raise ValueError(f"{path} holds no CLIP")
        how = f"Pillow's bicubic to {self._embed.image_size}, central square, {self._embed.pixels}"
        self.identity = Identity("clip", self._embed.fingerprint.partition(" ")[2], how)
        self.dimensions = {POOL: self._embed.dimensions}

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return {"pool": float32[B, D]}."""
        return {POOL: self._embed(images, None)["z_image"]}
