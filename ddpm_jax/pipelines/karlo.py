"""Karlo as a pipeline: caption or picture in, picture out, wired as diffusers' UnCLIPPipeline is.

It is the way of `pipelines.unclip` with other conventions: embeddings are not normalised (norms are part of what the
networks read), a dropped caption is the empty one, the prior's draws are clipped and turned back by the statistics of
image embeddings, and a second upsampler takes the last step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.guidance import classifier_free, static_threshold
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.stages import Text
from ddpm_jax.process import GaussianProcess, make_process, respace
from ddpm_jax.samplers import ancestral_step, sample
from ddpm_jax.schedules import cosine_betas

Params = Any


@dataclasses.dataclass(frozen=True)
class Karlo:
    """The networks, and the parameters of each by name: "text", "image", "prior", "decoder", "first", "last".

    statistics: the mean and the standard deviation of image embeddings, float32[D] each. prior_clip: what the prior
    predicts is clipped to +- this; 5 in diffusers, 10 in the published code.
    """

    text: CLIP
    image: CLIP
    prior: DiffusionPrior
    decoder: Decoder
    upsampler: Upsampler
    params: dict[str, Params]
    statistics: tuple[jax.Array, jax.Array]
    prior_clip: float = 5.0

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> Text:
        """Return what the networks see of captions.

        tokens: int32[B, L], padded with the end token as transformers does; mask: bool[B, L], True up to the end. The
        text tower sees padding, as in the published pipelines; the networks after it do not.
        """
        z, hidden = self.text.apply({"params": self.params["text"]}, tokens, mask, method=CLIP.encode_text)
        return Text(_scaled(z), hidden, mask)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embed pictures as CLIP's preprocessing leaves them, float32[B, S, S, 3]. Returns float32[B, D]."""
        return self.image.apply({"params": self.params["image"]}, images, method=CLIP.encode_image)

    def draw_embedding(
        self, text: Text, empty: Text, keys: jax.Array, *, steps: str = "25", scale: float = 4.0
    ) -> jax.Array:
        """Draw image embeddings of captions; empty: the empty caption as often. Returns float32[B, D]."""
        network = lambda text: (
            lambda zt, t: self.prior.apply(  # noqa: E731
                {"params": self.params["prior"]}, zt, t, text.z, text.hidden, text.mask
            )
        )
        z = sample(
            _process(steps),
            classifier_free(network(text), network(empty), scale),
            keys,
            (self.prior.embed_dim,),
            step=ancestral_step(),
            kind="x0",
            x0_transform=lambda x0: jnp.clip(x0, -self.prior_clip, self.prior_clip),
        )
        mean, std = self.statistics
        return z * std[None] + mean[None]

    def decode(
        self,
        z_image: jax.Array,
        text: Text,
        empty: Text,
        keys: jax.Array,
        *,
        size: int = 64,
        steps: str = "25",
        scale: float = 8.0,
    ) -> jax.Array:
        """Draw pictures of embeddings and captions, float32[B, size, size, 3] in [-1, 1]."""
        nothing = jnp.zeros(z_image.shape[0], bool)
        network = lambda text, keep: (
            lambda xt, t: self.decoder.apply(  # noqa: E731
                {"params": self.params["decoder"]}, xt, t, _scaled(z_image), text.z, text.hidden, text.mask, keep
            )
        )
        images = sample(
            _process(steps),
            classifier_free(network(text, ~nothing), network(empty, nothing), scale),
            keys,
            (size, size, 3),
            step=ancestral_step(),
            variance="learned_range",
            x0_transform=static_threshold(),
        )
        return jnp.clip(images, -1.0, 1.0)

    def upsample(self, images: jax.Array, keys: jax.Array, *, size: int = 256, steps: str = "7") -> jax.Array:
        """Enlarge pictures in [-1, 1], float32[B, h, h, 3], to size; the network "last" takes the last step."""
        network = lambda name, xt, t: self.upsampler.apply({"params": self.params[name]}, xt, t, images)  # noqa: E731
        larger = sample(
            _process(steps),
            lambda xt, t: jax.lax.cond(t[0] == 0, lambda: network("last", xt, t), lambda: network("first", xt, t)),
            keys,
            (size, size, 3),
            step=ancestral_step(),
            x0_transform=static_threshold(),
        )
        return jnp.clip(larger, -1.0, 1.0)


@functools.cache
def _process(steps: str) -> GaussianProcess:
    with jax.ensure_compile_time_eval():  # respacing needs numbers, also inside of somebody's jit
        return respace(make_process(cosine_betas(1000)), steps)


def _scaled(z: jax.Array) -> jax.Array:
    """Undo what the networks multiply embeddings by, which they take to be unit vectors."""
    return z / z.shape[-1] ** 0.5
