"""Clean data x0 of a diffusion model, read from a prepared batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_count, check_number
from ddpm_jax.models.embedding_norm import PAPER_SCALE, EmbeddingNorm, EmbeddingStatistics
from ddpm_jax.storage.clip_images import encode_images
from ddpm_jax.training.tasks.keys import named_keys
from ddpm_jax.types import to_float

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Images:
    """Images in [-1, 1], from "image", uint8[B, S, S, C].

    Attributes:
        size: height and width of the images that the model generates, in pixels; training images may be crops.
        channels: C.
        mix_colours: True permutes and inverts the channels of each training image at random. Enlarging is the same for
            all colours, so an upsampler learns it for colours and shapes that never met in training.
    """

    size: int
    channels: int = 3
    mix_colours: bool = False

    def __post_init__(self):
        check_count("Images.size", self.size)
        check_count("Images.channels", self.channels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one generated example."""
        return (self.size, self.size, self.channels)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch

    def __call__(self, batch: Batch, key: jax.Array | None = None, *, crops: bool = False) -> jax.Array:
        """Return x0, float32[B, H, W, C].

        Args:
            batch: has "image", uint8[B, H, W, C].
            key: of the step's randomness, None for none.
            crops: True allows images that are smaller than `size`.

        Raises:
            ValueError: if the images are not of this dtype, size and number of channels.
        """
        images = batch["image"]
        if images.dtype != np.uint8:
            raise ValueError(f"images of the records must be uint8, whose white is 255, got {images.dtype}")
        if images.ndim != 4:
            raise ValueError(
                f"images of the records must be [H, W, {self.channels}], got the shape {list(images.shape[1:])}; "
                "image[:, :, None] gives a grey image its one channel, for Images(size, channels=1)"
            )
        height, width, channels = images.shape[1:]
        whole = height == width == self.size
        smaller = crops and 0 < height <= self.size and 0 < width <= self.size
        if channels != self.channels or not (whole or smaller):
            raise ValueError(
                f"images of the records must be {self.size} x {self.size} x {self.channels}, got "
                f"{' x '.join(map(str, images.shape[1:]))}; transforms such as CenterCrop({self.size}) bring them there"
            )
        x0 = to_float(images)
        if self.mix_colours and key is not None:
            (own,) = named_keys(key, "mix_colours")
            x0 = mix_colours(own, x0)
        return x0

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {"image_size": self.size, "channels": self.channels}


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Vectors of few entries, from "vector", float32[B, D], for data such as `data.toys`.

    Attributes:
        size: D.
    """

    size: int

    def __post_init__(self):
        check_count("Vectors.size", self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return (self.size,)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Return x0, float32[B, D].

        Raises:
            ValueError: if the vectors are not of this size, or no floats.
        """
        del key
        found = batch["vector"]
        if found.shape[1:] != self.shape or not jnp.issubdtype(found.dtype, jnp.floating):
            raise ValueError(
                f"vectors of the records must be float32[{self.size}], got {found.dtype}{list(found.shape[1:])}"
            )
        return found.astype(jnp.float32)

    def metadata(self) -> dict[str, Any]:
        """Return what a sampler has to know, plain data."""
        return {"vector": {"size": self.size}}


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """CLIP's embedding of the image, of unit length, times a scale or standardized (`models.embedding_norm`).

    The batch has "z_image" float32[B, D]; where it has not, the frozen CLIP computes it (`with_image_embedding`).

    Attributes:
        size: D.
        scale: of all entries; None is 0.54 sqrt(D), which gives entries of the size of an image's, as the paper's 17.2
            for 1024 dimensions does. None with statistics.
        role: of the frozen CLIP among the stage's needs.
        statistics: role of fitted `EmbeddingStatistics` among the stage's needs, by which entries get mean 0 and
            deviation 1 in place of a scale; None for a scale.
    """

    size: int
    scale: float | None = None
    role: str = "clip"
    statistics: str | None = dataclasses.field(default=None, metadata={"describe": "unless default"})

    def __post_init__(self):
        check_count("Embeddings.size", self.size)
        if self.scale is not None:
            check_number("Embeddings.scale", self.scale, lambda scale: scale > 0, "must be positive")
        if self.scale is not None and self.statistics is not None:
            raise ValueError(f"scale={self.scale} of Embeddings must be None with statistics={self.statistics!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return (self.size,)

    def norm(self, frozen: Any) -> EmbeddingNorm:
        """Return the way between embeddings and x0; frozen: the models of the stage's needs, by role."""
        if self.statistics is None:
            return EmbeddingNorm(scale=self._scale)
        own = frozen[self.statistics]
        if not isinstance(own.network, EmbeddingStatistics) or own.network.embed_dim != self.size:
            found = f"a {type(own.network).__name__} of {getattr(own.network, 'embed_dim', None)}"
            raise ValueError(
                f"its model for the role {self.statistics!r} must be EmbeddingStatistics of {self.size} entries, got "
                f"{found}"
            )
        return own.apply()

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Add "z_image" unless it is there, and with statistics "x0", the standardized embeddings."""
        batch = with_image_embedding(frozen, batch, self.role)
        return batch if self.statistics is None else batch | {"x0": self.norm(frozen).normalize(batch["z_image"])}

    def __call__(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Return x0, float32[B, D]."""
        del key
        return self.norm({}).normalize(batch["z_image"]) if self.statistics is None else batch["x0"]

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        how = {"scale": self._scale} if self.statistics is None else {"standardized": True}
        return {"embedding": {"size": self.size, **how}}

    @property
    def _scale(self) -> float:
        return PAPER_SCALE * self.size**0.5 if self.scale is None else self.scale


def with_image_embedding(frozen: Any, batch: Batch, role: str) -> Batch:
    """Return the batch with "z_image" float32[B, D], computed by a frozen CLIP unless it is there.

    CLIP reads "clip_image" uint8[B, H, W, 3] if the batch has it, else "image", resized to the size of its images.
    """
    if "z_image" in batch:
        return batch
    clip, x = frozen[role], to_float(batch["clip_image"] if "clip_image" in batch else batch["image"])
    size = clip.network.vision.image_size
    if x.shape[1:3] != (size, size):
        x = jax.image.resize(x, (x.shape[0], size, size, 3), "cubic")
    return batch | {"z_image": encode_images(clip, x)}


def mix_colours(key: jax.Array, x: jax.Array) -> jax.Array:
    """Permute the colour channels of each image, and flip the sign of each channel, at random.

    x: float[B, H, W, 3] in [-1, 1]; each of the 6 permutations and 8 inversions is as likely as the others.
    """
    order_key, sign_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (x.shape[0], 3)), axis=-1)
    sign = jax.random.rademacher(sign_key, (x.shape[0], 1, 1, 3), x.dtype)
    return jnp.take_along_axis(x, order[:, None, None, :], axis=3) * sign
