"""The stages of unCLIP as pure functions: from a caption to an embedding, to a picture, to a larger picture.

Each takes networks' parameters and conditions as arguments, so that a caller may jit it once; training previews and the
pipeline share them. Embeddings are unit vectors wherever they cross a border.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.guidance import classifier_free
from ddpm_jax.diffusion.process import GaussianProcess, respace
from ddpm_jax.diffusion.samplers import ancestral_step, ddim_step, sample
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.types import Denoiser, Kind, Step, Variance, to_float, to_uint8

Params = Any
__all__ = ["to_float", "to_uint8"]


class Text(flax.struct.PyTreeNode):
    """What the networks see of a batch of captions.

    z: float32[B, D], the unit CLIP text embedding; hidden: [B, L, W], hidden states of the CLIP text tower, or
    int32[B, L] tokens for networks with a text encoder of their own; mask: bool[B, L], True at real tokens.
    """

    z: jax.Array
    hidden: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a stage is sampled.

    Attributes:
        steps: respacing of the process, e.g. "64", "ddim25", "10,10,3,2,2" (see `schedules.respaced_timesteps`).
        eta: noise of the steps: None samples ancestrally, a number is DDIM's eta (0 is deterministic).
        scale: guidance scale; 1 does not guide.
    """

    steps: str
    eta: float | None = None
    scale: float = 1.0

    def step(self) -> Step:
        """Return the sampler's step."""
        return ancestral_step() if self.eta is None else ddim_step(eta=self.eta)


def finite(values: jax.Array) -> jax.Array:
    """Return whether all values of each example are finite. values: float[B, ...]. Returns bool[B]."""
    return jnp.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def bounded(values: jax.Array, bound: float = 1.0) -> jax.Array:
    """Clip to [-bound, bound], and map infinity to NaN: clipped, it would pass for an ordinary value."""
    return jnp.where(jnp.isfinite(values), jnp.clip(values, -bound, bound), jnp.nan)


def encode_text(model: CLIP, params: Params, tokens: jax.Array, mask: jax.Array) -> Text:
    """Run CLIP's text tower. tokens: int32[B, L]; mask: bool[B, L]."""
    z, hidden = model.apply(params, tokens, mask, method=CLIP.encode_text)
    return Text(normalize(z), hidden, mask)


def encode_image(model: CLIP, params: Params, images: jax.Array) -> jax.Array:
    """Run CLIP's image tower on float32[B, S, S, 3] in [-1, 1]. Returns unit vectors, float32[B, D]."""
    return normalize(model.apply(params, images, method=CLIP.encode_image))


def prior_denoiser(model: DiffusionPrior, params: Params, text: Text, keep_text: jax.Array | None = None) -> Denoiser:
    """Close a prior over its parameters and captions; keep_text: bool[B], False gives the null condition."""
    return lambda zt, t: model.apply(params, zt, t, text.z, text.hidden, text.mask, keep_text)


def decoder_denoiser(
    model: Decoder,
    params: Params,
    z_image: jax.Array,
    text: Text,
    keep_image: jax.Array | None = None,
    keep_text: jax.Array | None = None,
    **kwargs,
) -> Denoiser:
    """Close a decoder over its parameters and conditions; where a keep mask is False the condition is null."""
    return lambda xt, t: model.apply(
        params, xt, t, z_image, text.z, text.hidden, text.mask, keep_image, keep_text, **kwargs
    )


def draw_embedding(
    model: DiffusionPrior,
    params: Params,
    process: GaussianProcess,
    text: Text,
    keys: jax.Array,
    *,
    sampling: Sampling,
    embed_scale: float,
    candidates: int = 2,
) -> jax.Array:
    """Draw CLIP image embeddings for captions (DALL-E 2, section 2.2).

    The prior works on embeddings times `embed_scale` and predicts the clean one. Of `candidates` draws for each caption
    the one with the largest z_text . z_image is kept. keys: [B]. Returns unit vectors, float32[B, D].
    """
    null = jnp.zeros(text.z.shape[0], bool)
    denoise = classifier_free(
        prior_denoiser(model, params, text), prior_denoiser(model, params, text, null), sampling.scale
    )
    short = respace(process, sampling.steps)

    def draw(number: int) -> jax.Array:
        own = transition_keys(keys, number)
        # No clip: embeddings are not pictures, and Karlo's bounds of 5 or 10 are never reached at this scale.
        z = sample(short, denoise, own, text.z.shape[1:], step=sampling.step(), kind="x0")
        return normalize(z / embed_scale)

    draws = jnp.stack([draw(i) for i in range(candidates)])
    best = jnp.argmax(jnp.einsum("nbd,bd->nb", draws, text.z), axis=0)
    return jnp.take_along_axis(draws, best[None, :, None], axis=0)[0]


def draw_image(
    model: Decoder,
    params: Params,
    process: GaussianProcess,
    z_image: jax.Array,
    text: Text,
    keys: jax.Array,
    *,
    size: int,
    sampling: Sampling,
    kind: Kind,
    variance: Variance,
    keep_image: jax.Array | None = None,
    keep_text: jax.Array | None = None,
) -> jax.Array:
    """Draw pictures from embeddings and captions (DALL-E 2, section 2.1).

    The unconditional branch of the guidance drops both conditions together. keep_image, keep_text: bool[B], None keeps
    all. Returns float32[B, size, size, 3] in [-1, 1].
    """
    nothing = jnp.zeros(z_image.shape[0], bool)
    denoise = classifier_free(
        decoder_denoiser(model, params, z_image, text, keep_image, keep_text),
        decoder_denoiser(model, params, z_image, text, nothing, nothing),
        sampling.scale,
    )
    return sample(
        respace(process, sampling.steps),
        denoise,
        keys,
        (size, size, 3),
        step=sampling.step(),
        kind=kind,
        variance=variance,
        x0_transform=bounded,
    )


def upsample(
    model: Upsampler,
    params: Params,
    process: GaussianProcess,
    low_res: jax.Array,
    keys: jax.Array,
    *,
    size: int,
    sampling: Sampling,
    kind: Kind,
) -> jax.Array:
    """Enlarge pictures, float32[B, h, w, 3] in [-1, 1], to float32[B, size, size, 3] (DALL-E 2, section 2.1)."""
    return sample(
        respace(process, sampling.steps),
        lambda xt, t: model.apply(params, xt, t, low_res),
        keys,
        (size, size, 3),
        step=sampling.step(),
        kind=kind,
        x0_transform=bounded,
    )
