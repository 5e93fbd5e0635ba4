"""Conditions of diffusion models: each reads the batch and returns keyword arguments of the network.

With a key a condition is dropped at its rate, as classifier-free guidance needs it (Ho and Salimans 2022, algorithm 1);
without one it is complete, as in sampling. `null` gives the arguments of the unconditional network.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_count, check_number
from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.diffusion.guidance import keep_mask
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.models.layers import downsample2
from ddpm_jax.training.tasks.data import with_image_embedding
from ddpm_jax.training.tasks.keys import named_keys
from ddpm_jax.types import to_float

Batch = dict[str, Any]
Arguments = dict[str, jax.Array]


class Condition(Protocol):
    """Condition of a network, such as class labels or captions."""

    name: str

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch with what frozen networks compute from it; frozen: role -> model."""
        ...

    def __call__(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> Arguments:
        """Return keyword arguments of the network; key: of the step's randomness, or None in sampling."""
        ...

    def null(self, arguments: Arguments) -> Arguments | None:
        """Return the arguments with the condition dropped, as they are if it stays, or None if it cannot be dropped."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        ...


class _Condition:
    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        del frozen
        return batch


@dataclasses.dataclass(frozen=True)
class Labels(_Condition):
    """Class labels, from "label", int32[B]; the network's argument y.

    Attributes:
        num_classes: K. With drop > 0 the network must have K + 1 classes, of which the last is the null class.
        drop: rate at which the label is replaced by the null class.
        names: of the classes, for the command line.
    """

    num_classes: int
    drop: float = 0.0
    names: tuple[str, ...] | None = None
    name = "labels"

    def __post_init__(self):
        check_count("Labels.num_classes", self.num_classes)
        _check_rate("Labels.drop", self.drop)

    def __call__(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> Arguments:
        """Return {"y": int32[B]}."""
        labels = batch["label"].astype(jnp.int32)
        if key is not None and self.drop:
            (own,) = named_keys(key, "drop_label")
            labels = jnp.where(keep_mask(own, self.drop, labels.shape[0]), labels, self.num_classes)
        return {"y": labels}

    def null(self, arguments: Arguments) -> Arguments | None:
        """Return the null class, if the network has learned it."""
        return {"y": jnp.full_like(arguments["y"], self.num_classes)} if self.drop else None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        names = None if self.names is None else list(self.names)
        null = self.num_classes if self.drop else None
        return {"num_classes": self.num_classes, "null": null, "names": names}


@dataclasses.dataclass(frozen=True)
class Captions(_Condition):
    """Captions, as CLIP's text tower encodes them; arguments z_text, text, text_mask and keep_text.

    The batch has "tokens" int32[B, L] and "mask" bool[B, L]; "z_text" float32[B, D], the unit text embedding, is
    computed by the frozen CLIP unless it is there.

    Attributes:
        length: L.
        drop: rate at which captions are dropped.
        own_tokens: True gives the network token ids, for its own text encoder, in place of hidden states of the
            frozen text tower.
        role: of the frozen CLIP among the stage's needs.
    """

    length: int
    drop: float = 0.0
    own_tokens: bool = False
    role: str = "clip"
    name = "caption"

    def __post_init__(self):
        check_count("Captions.length", self.length)
        _check_rate("Captions.drop", self.drop)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Add "hidden", [B, L, W], unless the network encodes tokens itself, and "z_text" unless it is there."""
        if self.own_tokens and "z_text" in batch:
            return batch
        clip = frozen[self.role]
        z, hidden = clip.apply(batch["tokens"], batch["mask"], method=CLIP.encode_text)
        added = {} if self.own_tokens else {"hidden": hidden}
        return batch | added | ({} if "z_text" in batch else {"z_text": normalize(z)})

    def __call__(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> Arguments:
        """Return the captions as the network reads them."""
        text = batch["tokens"] if self.own_tokens else batch["hidden"]
        keep = _keep(key, "drop_text", self.drop, x0.shape[0])
        return {"z_text": batch["z_text"], "text": text, "text_mask": batch["mask"], "keep_text": keep}

    def null(self, arguments: Arguments) -> Arguments | None:
        """Return the arguments with every caption dropped."""
        return arguments | {"keep_text": jnp.zeros_like(arguments["keep_text"])} if self.drop else None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {"length": self.length, "own_tokens": self.own_tokens, "drop": self.drop}


@dataclasses.dataclass(frozen=True)
class Tokens(_Condition):
    """Captions as tokens, for a network with a text encoder of its own (GLIDE); arguments tokens and mask.

    The batch has "tokens" int32[B, L] and "mask" bool[B, L]. A dropped caption is one of padding alone.

    Attributes:
        tokenizer: stored in model.json, since the network cannot be sampled without it.
        length: L.
        drop: rate at which captions are dropped.
    """

    tokenizer: Tokenizer
    length: int
    drop: float = 0.0
    name = "tokens"

    def __post_init__(self):
        check_count("Tokens.length", self.length)
        _check_rate("Tokens.drop", self.drop)

    def __call__(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> Arguments:
        """Return {"tokens": int32[B, L], "mask": bool[B, L]}."""
        keep = _keep(key, "drop_text", self.drop, x0.shape[0])
        return {"tokens": batch["tokens"], "mask": batch["mask"] & keep[:, None]}

    def null(self, arguments: Arguments) -> Arguments | None:
        """Return the arguments with every caption dropped."""
        return arguments | {"mask": jnp.zeros_like(arguments["mask"])} if self.drop else None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {"length": self.length, "drop": self.drop, "tokenizer": self.tokenizer.to_config()}


@dataclasses.dataclass(frozen=True)
class ImageEmbedding(_Condition):
    """CLIP's embedding of the image, of unit length; arguments z_image and keep_image.

    The batch has "z_image" float32[B, D]; where it has not, the frozen CLIP computes it (`data.with_image_embedding`).

    Attributes:
        drop: rate at which the embedding is dropped.
        role: of the frozen CLIP among the stage's needs.
    """

    drop: float = 0.0
    role: str = "clip"
    name = "image_embedding"

    def __post_init__(self):
        _check_rate("ImageEmbedding.drop", self.drop)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Add "z_image" unless it is there."""
        return with_image_embedding(frozen, batch, self.role)

    def __call__(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> Arguments:
        """Return the embeddings."""
        return {"z_image": batch["z_image"], "keep_image": _keep(key, "drop_image", self.drop, x0.shape[0])}

    def null(self, arguments: Arguments) -> Arguments | None:
        """Return the arguments with every embedding dropped."""
        return arguments | {"keep_image": jnp.zeros_like(arguments["keep_image"])} if self.drop else None

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {"drop": self.drop}


@dataclasses.dataclass(frozen=True)
class LowResolution(_Condition):
    """A small copy of the image; arguments low_res and, with noise_level_input, noise_level.

    The copy is the image averaged down by `factor`, or what a transform put into the batch, such as
    `data.degradation.DegradeBSR`. In training it is blurred with probability `blur_rate` by a
    Gaussian kernel of 3 pixels (DALL-E 2, section 2.1: sigma 0.6), and Gaussian noise is added whose standard deviation
    is uniform in [0, noise] (conditioning augmentation: Ho et al. 2022, cascaded diffusion, section 4.2), so that the
    network learns to correct what the stage before it generates. In sampling it is neither blurred nor, by default,
    noised.

    Attributes:
        size: height and width of the low-resolution image in sampling, in pixels.
        factor: of enlarging, a power of two.
        blur_sigma: > 0, in pixels of the low-resolution image.
        blur_rate: in [0, 1].
        noise: the largest level, in [0, 1].
        variance_preserving: True scales the image by sqrt(1 - level^2) before noise is added (Imagen).
        noise_level_input: True gives the network the level.
        entry: of the batch that has the copies, uint8[B, H / factor, W / factor, C]; None averages the images.
    """

    size: int
    factor: int
    blur_sigma: float = 0.6
    blur_rate: float = 0.5
    noise: float = 0.0
    variance_preserving: bool = False
    noise_level_input: bool = False
    entry: str | None = None
    name = "low_resolution"

    def __post_init__(self):
        check_count("LowResolution.size", self.size)
        if not isinstance(self.factor, int) or self.factor < 2 or self.factor.bit_count() != 1:
            raise ValueError(f"factor={self.factor} of enlarging must be a power of two, at least 2")
        check_number(
            "blur_sigma", self.blur_sigma, lambda sigma: sigma > 0, "must be positive; blur_rate=0 never blurs"
        )
        _check_rate("blur_rate", self.blur_rate)
        _check_rate("noise", self.noise)

    def low_res(self, x0: jax.Array) -> jax.Array:
        """Average images or crops [B, H, W, C] down by the factor."""
        for _ in range(self.factor.bit_length() - 1):
            x0 = downsample2(x0)
        return x0

    def __call__(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> Arguments:
        """Return the low-resolution images, and their noise levels."""
        low, count = self._copies(batch, x0), x0.shape[0]
        if key is None:
            return {"low_res": low} | ({"noise_level": jnp.zeros(count)} if self.noise_level_input else {})
        blur_key, level_key, noise_key = named_keys(key, "blur", "noise_level", "low_resolution_noise")
        blurred = keep_mask(blur_key, 1.0 - self.blur_rate, count)
        low = jnp.where(blurred[:, None, None, None], gaussian_blur3(low, self.blur_sigma), low)
        level = self.noise * jax.random.uniform(level_key, (count, 1, 1, 1))
        low = add_noise(low, level, jax.random.normal(noise_key, low.shape), self.variance_preserving)
        return {"low_res": low} | ({"noise_level": level.reshape(count)} if self.noise_level_input else {})

    def _copies(self, batch: Batch, x0: jax.Array) -> jax.Array:
        """Return the copies that are in the batch, or averages."""
        if self.entry is None:
            return self.low_res(x0)
        images = batch[self.entry]
        wanted = (x0.shape[0], *(side // self.factor for side in x0.shape[1:3]), x0.shape[3])
        if images.shape != wanted or images.dtype != np.uint8:
            raise ValueError(
                f"{self.entry} must be uint8{list(wanted)}, the images smaller by factor={self.factor}, got "
                f"{images.dtype}{list(images.shape)}"
            )
        return to_float(images)

    def null(self, arguments: Arguments) -> Arguments | None:
        """Return the arguments: the low-resolution image always stays."""
        return arguments

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        return {
            "size": self.size,
            "noise": self.noise,
            "variance_preserving": self.variance_preserving,
            "noise_level_input": self.noise_level_input,
        }


def check_guidance(sampling: Any, conditions: Sequence[Condition]) -> None:
    """Raise ValueError if samples are to be guided away from a null condition that is never trained.

    sampling: a `Sampling` or a `TokenSampling`.
    """
    scale = sampling.checked().scale
    if scale is None:
        return
    never = [
        f"{type(condition).__name__}.drop={condition.drop}" for condition in conditions if _is_always_given(condition)
    ]
    if never or all(isinstance(condition, LowResolution) for condition in conditions):
        what = " and ".join(never) if never else "the task has no condition that is dropped"
        raise ValueError(
            f"{what}, and sampling.scale={scale} guides away from a null condition, which training learns at drop "
            "above 0; sampling.scale=1 does not guide"
        )


def _is_always_given(condition: Condition) -> bool:
    return getattr(condition, "drop", None) == 0


def add_noise(low: jax.Array, level: jax.Array, noise: jax.Array, variance_preserving: bool) -> jax.Array:
    """Add noise of a level to low-resolution images; level: broadcastable to low [B, h, w, C]."""
    return (jnp.sqrt(1.0 - level**2) * low if variance_preserving else low) + level * noise


def gaussian_blur3(x: jax.Array, sigma: float) -> jax.Array:
    """Blur with a 3 x 3 Gaussian kernel, edges replicated. x: float[B, H, W, C]; sigma > 0, in pixels."""
    side = float(np.exp(-0.5 / sigma**2))
    middle, side = 1.0 / (1.0 + 2.0 * side), side / (1.0 + 2.0 * side)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        wide, n = jnp.pad(x, pad, mode="edge"), x.shape[axis]
        part = lambda start: jax.lax.slice_in_dim(wide, start, start + n, axis=axis)  # noqa: B023, E731
        x = side * (part(0) + part(2)) + middle * part(1)
    return x


def _keep(key: jax.Array | None, name: str, rate: float, count: int) -> jax.Array:
    if key is None:  # complete, unless the network is trained without it
        return jnp.full(count, rate < 1)
    (own,) = named_keys(key, name)
    return keep_mask(own, rate, count)


def _check_rate(name: str, rate: float) -> None:
    check_number(name, rate, lambda rate: 0 <= rate <= 1, "must lie between 0 and 1")
