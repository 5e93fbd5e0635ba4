"""Karlo as a pipeline: captions or pictures in, pictures out, wired as diffusers' UnCLIPPipeline is.

It is the way of `pipelines.unclip` with other conventions: embeddings are not normalised (norms are part of what the
networks read), a dropped caption is the empty one, the prior's draws are clipped and turned back by the statistics of
image embeddings, and a second upsampler takes the last step. `interop.karlo.open_karlo` makes one of a directory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.guidance import classifier_free, static_threshold
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.stages import Text, to_uint8
from ddpm_jax.process import GaussianProcess, make_process, respace
from ddpm_jax.samplers import ancestral_step, example_keys, sample
from ddpm_jax.samplers.noise import transition_keys
from ddpm_jax.schedules import cosine_betas


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

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embed pictures as `data.transforms.clip_pixels` leaves them, float32[B, S, S, 3]. Returns float32[B, D]."""
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
        steps: str = "25",
        scale: float = 8.0,
    ) -> jax.Array:
        """Draw small pictures of embeddings and captions, float32[B, h, h, 3] in [-1, 1]."""
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
            (self.sizes[0], self.sizes[0], 3),
            step=ancestral_step(),
            variance="learned_range",
            x0_transform=static_threshold(),
        )
        return jnp.clip(images, -1.0, 1.0)

    def upsample(self, images: jax.Array, keys: jax.Array, *, steps: str = "7") -> jax.Array:
        """Enlarge pictures in [-1, 1], float32[B, h, h, 3]; the network "last" takes the last step."""
        network = lambda name, xt, t: self.upsampler.apply({"params": self.params[name]}, xt, t, images)  # noqa: E731
        larger = sample(
            _process(steps),
            lambda xt, t: jax.lax.cond(t[0] == 0, lambda: network("last", xt, t), lambda: network("first", xt, t)),
            keys,
            (self.sizes[1], self.sizes[1], 3),
            step=ancestral_step(),
            x0_transform=static_threshold(),
        )
        return jnp.clip(larger, -1.0, 1.0)

    def generate(self, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 4, **options: Any) -> np.ndarray:
        """Draw one picture for every prompt.

        Args:
            prompts: captions; one too long is cut, with a warning.
            seed: of all noise; picture i depends on it, i and prompt i.
            batch_size: pictures at a time.
            options: prior_steps ("25"), decoder_steps ("25"), upsampler_steps ("7"), prior_scale (4.0), decoder_scale
                (8.0); report, called with the number of pictures each time some are done.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, or this pipeline has no prior.
        """
        if self.prior is None:
            raise ValueError("this pipeline has no prior, which draws embeddings of captions; use variations")
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be a list of captions, got {prompts!r}")
        return self._draw(list(prompts), None, seed, batch_size, **options)

    def variations(self, pixels: np.ndarray, *, seed: int = 0, batch_size: int = 4, **options: Any) -> np.ndarray:
        """Draw other pictures of what pictures show (DALL-E 2, section 3.1, by ancestral sampling as in Karlo).

        pixels: float32[N, S, S, 3], from `data.transforms.clip_pixels`. The rest as for `generate`.
        """
        if self.image is None:
            raise ValueError("this pipeline has no image encoder, which variations need; open the image variation one")
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
        empty = self.tokenizer.null(self.text.text.context)
        if pixels is None:
            tokens, mask = self.tokenizer(prompts, self.text.text.context)
        else:  # variations say nothing
            tokens, mask = (np.repeat(x, len(prompts), axis=0) for x in empty)
        keys, done = example_keys(jax.random.key(seed, impl="threefry2x32"), len(prompts)), []
        names = tuple(sorted(options.items()))
        for start in range(0, len(prompts), batch_size):
            # The last batch repeats its last row, so that all have one shape.
            rows = np.minimum(np.arange(start, start + min(batch_size, len(prompts))), len(prompts) - 1)
            given = None if pixels is None else jnp.asarray(pixels[rows])
            images = _generate(self, tokens[rows], mask[rows], *empty, keys[rows], given, names)
            done.append(np.asarray(images)[: len(prompts) - start])
            if report is not None:
                report(len(done[-1]))
        return np.concatenate(done)


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
) -> jax.Array:
    """Run all stages for one batch. Returns uint8[B, R, R, 3]."""
    options = dict(options)
    take = lambda stage, *names: {  # noqa: E731
        name: options.pop(f"{stage}_{name}") for name in names if f"{stage}_{name}" in options
    }
    how = {stage: take(stage, "steps", "scale") for stage in ("prior", "decoder")} | {"up": take("upsampler", "steps")}
    if options:
        raise ValueError(f"there is no option {next(iter(options))!r}")
    text = karlo.encode_text(tokens, mask)
    nothing = karlo.encode_text(*(jnp.broadcast_to(x, tokens.shape) for x in (empty, empty_mask)))
    stage_keys = [transition_keys(keys, n) for n in range(3)]
    if pixels is None:
        z_image = karlo.draw_embedding(text, nothing, stage_keys[0], **how["prior"])
    else:
        z_image = karlo.encode_image(pixels)
    small = karlo.decode(z_image, text, nothing, stage_keys[1], **how["decoder"])
    return to_uint8(karlo.upsample(small, stage_keys[2], **how["up"]))


@functools.cache
def _process(steps: str) -> GaussianProcess:
    with jax.ensure_compile_time_eval():  # respacing needs numbers, also inside of somebody's jit
        return respace(make_process(cosine_betas(1000)), steps)


def _scaled(z: jax.Array) -> jax.Array:
    """Undo what the networks multiply embeddings by, which they take to be unit vectors."""
    return z / z.shape[-1] ** 0.5
