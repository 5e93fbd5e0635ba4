"""GLIDE's noised CLIP, whose image tower reads noised images and their timestep (Nichol et al. 2022, section 4.4).

It guides denoisers with weak or no text conditioning (section 2.4): the gradient of the similarity of image and caption
takes the place of a classifier's. With `z_text` the caption's unit embedding,

    log_prob = lambda xt, t: clip.apply({"params": params}, xt, t, z_text, method="log_prob")

is what `guidance.classifier_guided` and `guidance.log_prob_gradient` take.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.models.clip import normalize
from ddpm_jax.models.layers import Embed
from ddpm_jax.models.text_encoder import TextEncoder, end_position
from ddpm_jax.models.transformer import Transformer

MEAN = np.array([122.77093945, 116.74601272, 104.09373519], np.float32)  # of the channels, for pixels in [0, 255]
STD = np.array([68.50053285, 66.63215831, 70.32316309], np.float32)


class NoisedVisionTransformer(nn.Module):
    """A ViT whose first token is the learned vector of the timestep, with a norm before the blocks.

    images: float[B, S, S, 3]; t: int32[B] in [0, num_steps) -> [B, width], the first token, normalised.

    Attributes:
        image_size: S, a multiple of patch.
        patch: side of a patch in pixels.
        width: channels of the tokens; a multiple of heads.
        layers: number of transformer blocks, >= 1.
        heads: number of attention heads.
        num_steps: number of timesteps of the process.
        remat: what each block computes again in the backward pass, see `layers.rematerialized`.
        dtype: in which the layers compute; parameters are float32.
    """

    image_size: int
    patch: int
    width: int
    layers: int
    heads: int
    num_steps: int = 1000
    remat: bool | str = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, t: jax.Array) -> jax.Array:
        b, size = images.shape[0], self.image_size
        if images.shape[1:] != (size, size, 3) or size % self.patch:
            raise ValueError(
                f"images have shape {images.shape}; this CLIP takes [B, {size}, {size}, 3], a size that "
                f"patch={self.patch} must divide"
            )
        if t.shape != (b,) or not jnp.issubdtype(t.dtype, jnp.integer):
            raise ValueError(f"t must be one integer for each of {b} images, got {t.dtype}{list(t.shape)}")
        norm = lambda name: nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)  # noqa: E731
        mean, std = MEAN.reshape(1, 1, 1, 3), STD.reshape(1, 1, 1, 3)
        x = ((images.astype(jnp.float32) + 1.0) * 127.5 - mean) / std
        p = (self.patch, self.patch)
        x = nn.Conv(self.width, p, strides=p, padding="VALID", use_bias=False, dtype=self.dtype, name="patch")(x)
        x = x.reshape(b, -1, self.width)
        init = nn.initializers.normal(self.width**-0.5)
        first = Embed(self.num_steps, self.width, dtype=self.dtype, embedding_init=init, name="time")(t)
        x = jnp.concatenate([first[:, None], x], axis=1)
        position = self.param("position", init, (x.shape[1], self.width), jnp.float32)
        x = norm("ln_pre")(x + position[None].astype(self.dtype))
        x = Transformer(self.layers, self.heads, remat=self.remat, dtype=self.dtype, name="transformer")(x)
        return norm("ln_post")(x[:, 0])


class NoisedCLIP(nn.Module):
    """CLIP whose image tower is conditioned on the timestep; the text tower is CLIP's.

    Attributes:
        vision: the image tower.
        text: the text tower.
        embed_dim: size of the embeddings.
        scale: factor of the similarity, exp(logit_scale) in GLIDE's code, which sets it to 100; no file holds it.
    """

    vision: NoisedVisionTransformer
    text: TextEncoder
    embed_dim: int
    scale: float = 100.0

    def setup(self):
        project = lambda width: nn.Dense(  # noqa: E731
            self.embed_dim, use_bias=False, kernel_init=nn.initializers.normal(math.sqrt(2 / (width + self.embed_dim)))
        )
        self.image_projection = project(self.vision.width)
        self.text_projection = project(self.text.width)

    def encode_image(self, images: jax.Array, t: jax.Array) -> jax.Array:
        """Embed noised images.

        Args:
            images: float32[B, S, S, 3], in the range of images in [-1, 1] with noise; never clipped.
            t: int32[B] in [0, num_steps), of the process that the network was trained with, not of a respaced one.
                Out of range it is refused where it is known, and gives NaN where it is traced.

        Returns:
            float32[B, embed_dim], not normalised.

        Raises:
            ValueError: if the images are of another size, or t is not one integer an image.
        """
        return self.image_projection(self.vision(images, t).astype(jnp.float32))

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Embed tokens, int32[B, L], and their mask, bool[B, L], as `ClipTokenizer()` gives them.

        Returns float32[B, embed_dim], not normalised. Raises ValueError if L is larger than the text tower's context.
        """
        hidden = self.text(tokens)
        last = jnp.take_along_axis(hidden, end_position(mask)[:, None, None], axis=1)[:, 0]
        return self.text_projection(last.astype(jnp.float32))

    def log_prob(self, images: jax.Array, t: jax.Array, z_text: jax.Array) -> jax.Array:
        """Return scale <z_image, z_text>, float32[B]: log p(caption | image, t) up to a constant (GLIDE, section 2.4).

        images, t: as `encode_image` takes them; z_text: unit embeddings, float32[B, embed_dim] (`normalize`).
        """
        return self.scale * jnp.sum(normalize(self.encode_image(images, t)) * z_text, axis=-1)

    def __call__(
        self, images: jax.Array, t: jax.Array, tokens: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return (z_image, z_text), unit embeddings float32[B, embed_dim]."""
        return normalize(self.encode_image(images, t)), normalize(self.encode_text(tokens, mask))
