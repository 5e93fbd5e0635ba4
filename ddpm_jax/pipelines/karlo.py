"""Karlo as a pipeline: captions or pictures in, pictures out, wired as diffusers' UnCLIPPipeline is.

It is the way of `pipelines.unclip` with other conventions: embeddings are not normalised (norms are part of what the
networks read), a dropped caption is the empty one, the prior's draws are clipped and turned back by the statistics of
image embeddings, and a second upsampler takes the last step. `interop.karlo.open_karlo` makes one of a directory.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.data.transforms import clip_pixels
from ddpm_jax.diffusion.guidance import classifier_free
from ddpm_jax.diffusion.process import GaussianProcess, make_process
from ddpm_jax.diffusion.samplers import ancestral_step, example_keys, sample
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.schedules import cosine_betas
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.request import (
    Steps,
    as_float,
    as_int,
    as_prompts,
    as_seed,
    as_steps,
    check_finite,
    respaced,
    tokenize,
)
from ddpm_jax.pipelines.stages import Text, bounded, finite, to_uint8

STAGES = ("text encoder", "image encoder", "prior", "decoder", "upsampler")
OPTIONS = ("prior_steps", "prior_scale", "decoder_steps", "decoder_scale", "upsampler_steps")


def _static(**options: Any) -> Any:
    return flax.struct.field(pytree_node=False, **options)


class Karlo(flax.struct.PyTreeNode):
    """The networks and their parameters; a tree of arrays, so that it can be an argument of a jitted function.

    params: of each network by name: "text", "image", "prior", "decoder", "first", "last" (the two upsamplers).
    statistics: the mean and the standard deviation of image embeddings, float32[D] each. image: None where there is no
    image encoder, or no prior; then there are no variations, or no captions. sizes: of the decoder's pictures, and of
    the upsampler's. prior_clip: what the prior predicts is clipped to +- this; 5 in diffusers, 10 in the original code.
    """

    params: dict[str, Any]
    statistics: tuple[jax.Array, jax.Array] | None
    text: CLIP = _static()
    image: CLIP | None = _static()
    prior: DiffusionPrior | None = _static()
    decoder: Decoder = _static()
    upsampler: Upsampler = _static()
    tokenizer: Tokenizer | None = _static(default=None)
    sizes: tuple[int, int] = _static(default=(64, 256))
    prior_clip: float = _static(default=5.0)

    @property
    def image_size(self) -> int:
        """Height and width of the pictures, in pixels."""
        return self.sizes[1]

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> Text:
        """Return what the networks see of captions.

        tokens: int32[B, L], padded with the end token as transformers does; mask: bool[B, L], True up to the end. The
        text tower sees padding, as in the published pipelines; the networks after it do not.
        """
        z, hidden = self.text.apply({"params": self.params["text"]}, tokens, mask, method=CLIP.encode_text)
        return Text(_scaled(z), hidden, mask)

    @property
    def pixel_size(self) -> int:
        """Height and width of the images that the image encoder reads, in pixels."""
        return self.image.vision.image_size

    def encode_image(self, images: Any) -> jax.Array:
        """Embed images.

        images: a float array is embedded as it is, and must be as `data.transforms.clip_pixels` returns it,
        float32[B, S, S, 3], where S is `pixel_size`; it may be traced. Other images (PIL, integer arrays, a list) go
        through `clip_pixels`. Returns float32[B, D]. Warns of values that no normalised image has.
        """
        if not hasattr(images, "dtype") or not jnp.issubdtype(images.dtype, jnp.floating):
            images = clip_pixels(images, self.pixel_size)
        elif not isinstance(images, jax.core.Tracer) and (largest := np.abs(images).max(initial=0.0)) > 10.0:
            warnings.warn(
                f"images has values up to {largest:.4g}, which images that clip_pixels normalised do not have; give "
                "integer arrays or PIL images, which encode_image prepares",
                stacklevel=2,
            )
        return self.image.apply({"params": self.params["image"]}, images, method=CLIP.encode_image)

    def draw_embedding(
        self, text: Text, empty: Text, keys: jax.Array, *, steps: Steps = "25", scale: float = 4.0
    ) -> jax.Array:
        """Draw image embeddings of captions; empty: the empty caption, repeated for each. Returns float32[B, D].

        They are as CLIP's projection gives them, like those of `encode_image`: not of unit length.
        """
        network = lambda text: (
            lambda zt, t: self.prior.apply(  # noqa: E731
                {"params": self.params["prior"]}, zt, t, text.z, text.hidden, text.mask
            )
        )
        z = sample(
            _process(as_steps("steps", steps)),
            classifier_free(network(text), network(empty), scale),
            keys,
            (self.prior.embed_dim,),
            step=ancestral_step(),
            kind="x0",
            x0_transform=lambda x0: bounded(x0, self.prior_clip),
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
        steps: Steps = "25",
        scale: float = 8.0,
    ) -> jax.Array:
        """Draw small images of embeddings and captions, float32[B, h, h, 3] in [-1, 1].

        z_image: float32[B, D], as `encode_image` and `draw_embedding` return it.
        """
        nothing = jnp.zeros(z_image.shape[0], bool)
        network = lambda text, keep: (
            lambda xt, t: self.decoder.apply(  # noqa: E731
                {"params": self.params["decoder"]}, xt, t, _scaled(z_image), text.z, text.hidden, text.mask, keep
            )
        )
        images = sample(
            _process(as_steps("steps", steps)),
            classifier_free(network(text, ~nothing), network(empty, nothing), scale),
            keys,
            (self.sizes[0], self.sizes[0], 3),
            step=ancestral_step(),
            variance="learned_range",
            x0_transform=bounded,
        )
        return bounded(images)

    def upsample(self, images: jax.Array, keys: jax.Array, *, steps: Steps = "7") -> jax.Array:
        """Enlarge pictures in [-1, 1], float32[B, h, h, 3]; the network "last" takes the last step."""
        network = lambda name, xt, t: self.upsampler.apply({"params": self.params[name]}, xt, t, images)  # noqa: E731
        larger = sample(
            _process(as_steps("steps", steps)),
            lambda xt, t: jax.lax.cond(t[0] == 0, lambda: network("last", xt, t), lambda: network("first", xt, t)),
            keys,
            (self.sizes[1], self.sizes[1], 3),
            step=ancestral_step(),
            x0_transform=bounded,
        )
        return bounded(larger)

    def generate(self, prompts: Iterable[str], *, seed: int = 0, batch_size: int = 4, **options: Any) -> np.ndarray:
        """Draw one image for every prompt.

        Args:
            prompts: captions, of which "" is the unconditional one; one too long is cut, with a warning.
            seed: seed of all random numbers, in [0, 2**32); image i depends on it, i and prompt i.
            batch_size: images at a time.
            options: prior_steps (25), decoder_steps (25) and upsampler_steps (7), each a number of steps from the first
                timestep to the last, a spec of `schedules.respaced_timesteps`, or the timesteps; prior_scale (4.0),
                decoder_scale (8.0); report, called with the number of images each time some are done.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, an argument does not fit, or this pipeline has no prior.
            NotFiniteError: if a network returned NaN or infinity.
        """
        if self.prior is None:
            raise ValueError("this pipeline has no prior, which draws embeddings of captions; use variations")
        return self._draw(as_prompts(prompts), None, seed, batch_size, **options)

    def variations(
        self, pixels: Any, *, seed: int = 0, batch_size: int = 4, prepared: bool = False, **options: Any
    ) -> np.ndarray:
        """Draw other images of what images show (DALL-E 2, section 3.1, by ancestral sampling as in Karlo).

        Args:
            pixels: N images as `data.transforms.as_images` takes them (PIL images, arrays in [0, 255], floats in
                [0, 1], of any sizes), or what `data.transforms.clip_pixels` returned.
            seed: as for `generate`.
            batch_size: as for `generate`.
            prepared: True embeds pixels as they are: float32[N, S, S, 3], normalised by another preprocessing, where S
                is `pixel_size`.
            options: as for `generate`.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no image, an argument does not fit, or this pipeline has no image encoder.
            NotFiniteError: if a network returned NaN or infinity.
        """
        if self.image is None:
            raise ValueError("this pipeline has no image encoder, which variations need; open the image variation one")
        size = self.pixel_size
        pixels = np.asarray(pixels) if prepared else clip_pixels(pixels, size)
        if pixels.dtype != np.float32 or pixels.shape[1:] != (size, size, 3) or not len(pixels):
            raise ValueError(
                f"pixels with prepared=True must be float32[N, {size}, {size}, 3], N at least 1, got "
                f"{pixels.dtype}{list(pixels.shape)}"
            )
        if not np.isfinite(pixels).all():
            raise ValueError("pixels has values that are not finite (NaN or infinity)")
        return self._draw([""] * len(pixels), pixels, seed, batch_size, **options)

    def _draw(
        self,
        prompts: list[str],
        pixels: np.ndarray | None,
        seed: int,
        batch_size: int,
        *,
        report: Callable[[int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        if self.tokenizer is None:
            raise ValueError("this pipeline has no tokenizer; give it one, as in karlo.replace(tokenizer=...)")
        names, batch_size = _checked(options), as_int("batch_size", batch_size, least=1)
        length = self.text.text.context
        tokens, mask = tokenize(self.tokenizer, prompts, length, allow_empty=True)
        empty = self.tokenizer.null(length)
        keys, done = example_keys(jax.random.key(as_seed(seed), impl="threefry2x32"), len(prompts)), []
        for start in range(0, len(prompts), batch_size):
            # The last batch repeats its last row, so that all have one shape.
            rows = np.minimum(np.arange(start, start + min(batch_size, len(prompts))), len(prompts) - 1)
            given = None if pixels is None else jnp.asarray(pixels[rows])
            images, finite_of = _generate(self, tokens[rows], mask[rows], *empty, keys[rows], given, names)
            check_finite(STAGES, finite_of, rows, "prompts" if pixels is None else "pixels")
            done.append(np.asarray(images)[: len(prompts) - start])
            if report is not None:
                report(len(done[-1]))
        return np.concatenate(done)


def _checked(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the options of the stages in a form that can be hashed; None means the default."""
    found = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"there is no option {name!r}; there are {', '.join(OPTIONS)}")
        if value is not None and name.endswith("steps"):
            found[name] = as_steps(name, value)
            respaced(_process(1000), name, found[name])
        elif value is not None:
            found[name] = as_float(name, value)
    return tuple(sorted(found.items()))


@functools.partial(jax.jit, static_argnames="options")
def _generate(
    karlo: Karlo,
    tokens: jax.Array,
    mask: jax.Array,
    empty: jax.Array,
    empty_mask: jax.Array,
    keys: jax.Array,
    pixels: jax.Array | None,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, 3], and bool[B] for each of `STAGES`: whether all that it returned is finite.
    """
    how = {stage: {} for stage in ("prior", "decoder", "upsampler")}
    for name, value in options:
        stage, _, option = name.partition("_")
        how[stage][option] = value
    text = karlo.encode_text(tokens, mask)
    nothing = karlo.encode_text(*(jnp.broadcast_to(x, tokens.shape) for x in (empty, empty_mask)))
    stage_keys = [transition_keys(keys, n) for n in range(3)]
    if pixels is None:
        z_image = karlo.draw_embedding(text, nothing, stage_keys[0], **how["prior"])
    else:
        z_image = karlo.encode_image(pixels)
    small = karlo.decode(z_image, text, nothing, stage_keys[1], **how["decoder"])
    large = karlo.upsample(small, stage_keys[2], **how["upsampler"])
    encoded = finite(text.z) & finite(text.hidden) & finite(nothing.z) & finite(nothing.hidden)
    of_image, unused = finite(z_image), jnp.ones_like(encoded)
    embedded = (unused, of_image) if pixels is None else (of_image, unused)
    return to_uint8(large), (encoded, *embedded, finite(small), finite(large))


@functools.cache
def _process(steps: int | str | tuple[int, ...]) -> GaussianProcess:
    with jax.ensure_compile_time_eval():  # respacing needs numbers, also inside of somebody's jit
        return respaced(make_process(cosine_betas(1000)), "steps", steps)


def _scaled(z: jax.Array) -> jax.Array:
    """Undo what the networks multiply embeddings by, which they take to be unit vectors."""
    return z / z.shape[-1] ** 0.5
