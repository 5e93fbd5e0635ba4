"""Images as a CLIP reads them: one that was trained here on [-1, 1], a public one on normalised pixels."""

import jax

from ddpm_jax.data.transforms import CLIP_MEAN, CLIP_STD
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.storage.model_directory import FAMILY, Model


def encode_images(clip: Model, images: jax.Array) -> jax.Array:
    """Run a CLIP's image tower on float32[B, S, S, 3] in [-1, 1]. Returns unit vectors, float32[B, D]."""
    if clip.family != FAMILY:
        images = ((images + 1.0) / 2.0 - CLIP_MEAN.reshape(1, 1, 1, 3)) / CLIP_STD.reshape(1, 1, 1, 3)
    return normalize(clip.apply(images, method=CLIP.encode_image))
