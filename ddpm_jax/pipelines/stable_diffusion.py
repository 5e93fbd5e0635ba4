"""Stable Diffusion as a pipeline: captions in, pictures out, by DDIM in the latents of an autoencoder.

`interop.stable_diffusion.open_stable_diffusion` makes one of a directory (Rombach et al. 2022, section 4.3).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.diffusion.guidance import classifier_free
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers import Point, ddim_step, example_keys, sample
from ddpm_jax.diffusion.samplers.loop import check_start, initial_noise
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.unet import UNet
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
from ddpm_jax.pipelines.stages import bounded, finite, to_uint8
from ddpm_jax.types import PredictFn, Step

SPACINGS = ("leading", "trailing", "linspace")
STAGES = ("text encoder", "U-Net", "autoencoder")


def _static(**options: Any) -> Any:
    return flax.struct.field(pytree_node=False, **options)


class StableDiffusion(flax.struct.PyTreeNode):
    """The networks and their parameters; a tree of arrays, so that it can be an argument of a jitted function.

    params: "text", "unet" and "autoencoder". kind: what the U-Net predicts, "eps" (version 1) or "v" (version 2, 768).
    latent_size: height and width of the latents that it was trained on. timestep_spacing, steps_offset,
    set_alpha_to_one: of the scheduler's config; see `timesteps`, and False ends the last step at the noise of t = 0 in
    place of the predicted x0.
    """

    params: dict[str, Any]
    process: GaussianProcess
    text: TextEncoder = _static()
    unet: UNet = _static()
    autoencoder: Autoencoder = _static()
    tokenizer: Tokenizer | None = _static(default=None)
    kind: str = _static(default="eps")
    latent_size: int = _static(default=64)
    timestep_spacing: str = _static(default="leading")
    steps_offset: int = _static(default=1)
    set_alpha_to_one: bool = _static(default=True)

    @property
    def image_size(self) -> int:
        """Height and width of the pictures, in pixels."""
        return self.latent_size * self.autoencoder.factor

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Return what the U-Net reads of captions, [B, L, width]; padding is read too. tokens: int32[B, L]."""
        return self.text.apply({"params": self.params["text"]}, tokens)

    def draw_latents(
        self,
        process: GaussianProcess,
        text: jax.Array,
        nothing: jax.Array,
        keys: jax.Array,
        *,
        scale: float = 7.5,
        eta: float = 0.0,
    ) -> jax.Array:
        """Draw latents of captions, float32[B, h, w, C], as the U-Net sees them (multiplied by the scale).

        process: the pipeline's, respaced; its last timestep starts from noise, whichever it is. text, nothing: of the
        captions and of the empty one, [B, L, width].
        """
        network = lambda context: (
            lambda xt, t: self.unet.apply({"params": self.params["unet"]}, xt, t, None, context)  # noqa: E731
        )
        shape = (self.latent_size, self.latent_size, self.autoencoder.latent_channels)
        return sample(
            process,
            classifier_free(network(text), network(nothing), scale),
            keys,
            shape,
            x_init=initial_noise(process, keys, shape),  # at whichever timestep comes first, as published pipelines
            step=ddim_step(eta) if self.set_alpha_to_one else _ending_at(self.process, ddim_step(eta)),
            kind=self.kind,
        )

    def decode(self, latents: jax.Array) -> jax.Array:
        """Return the pictures of latents, float32[B, H, W, 3] in [-1, 1]."""
        method = Autoencoder.decode
        z = latents / self.autoencoder.scale
        return bounded(self.autoencoder.apply({"params": self.params["autoencoder"]}, z, method=method))

    def generate(
        self,
        prompts: Iterable[str],
        *,
        seed: int = 0,
        negative: str | Iterable[str] | None = "",
        steps: Steps = 50,
        decoder_scale: float | None = None,
        eta: float = 0.0,
        batch_size: int = 1,
        report: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Draw one image for every prompt.

        Args:
            prompts: captions, of which "" is the unconditional one; one too long is cut, with a warning.
            seed: seed of all random numbers, in [0, 2**32); image i depends on it, i and prompt i.
            negative: the caption that guidance leads away from: one for all prompts, or one for each; "" or None is the
                unconditional one.
            steps: a number of steps of DDIM, 50 or "50", taken at `timesteps(50)`; another spec of
                `schedules.respaced_timesteps`, such as "ddim50" or "10,10,5"; or the timesteps themselves, increasing.
            decoder_scale: of guidance, 7.5 by default.
            eta: of DDIM, in [0, 1]; 0 draws no noise on the way, 1 as much as ancestral sampling.
            batch_size: images at a time.
            report: called with the number of images each time some are done.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, or an argument does not fit.
            NotFiniteError: if a network returned NaN or infinity.
        """
        prompts, batch_size = as_prompts(prompts), as_int("batch_size", batch_size, least=1)
        if self.tokenizer is None:
            raise ValueError("this pipeline has no tokenizer; give it one, as in pipeline.replace(tokenizer=...)")
        grid = self._grid(steps)
        process = respaced(self.process, "steps", grid)
        if not isinstance(as_steps("steps", steps), int):
            check_start(process)
        scale = jnp.float32(7.5 if decoder_scale is None else as_float("decoder_scale", decoder_scale))
        how = (("eta", as_float("eta", eta, least=0.0, most=1.0)),)
        tokens, _ = tokenize(self.tokenizer, prompts, self.text.context, allow_empty=True)
        empty = self._negative(negative, len(prompts))
        keys, done = example_keys(jax.random.key(as_seed(seed), impl="threefry2x32"), len(prompts)), []
        for start in range(0, len(prompts), batch_size):
            # The last batch repeats its last row, so that all have one shape.
            rows = np.minimum(np.arange(start, start + min(batch_size, len(prompts))), len(prompts) - 1)
            images, finite_of = _generate(self, process, tokens[rows], empty[rows], keys[rows], scale, how)
            check_finite(STAGES, finite_of, rows)
            done.append(np.asarray(images)[: len(prompts) - start])
            if report is not None:
                report(len(done[-1]))
        return np.concatenate(done)

    def _grid(self, steps: Steps) -> str | Sequence[int]:
        """Return the timesteps of a number of steps; a number in a string means the same."""
        steps = as_steps("steps", steps)
        return self.timesteps(steps) if isinstance(steps, int) else steps

    def _negative(self, negative: str | Iterable[str] | None, count: int) -> np.ndarray:
        """Return the tokens of the captions that guidance leads away from, int32[count, L]."""
        texts = [negative or ""] if negative is None or isinstance(negative, str) else negative
        texts = list(texts) if isinstance(texts, Iterable) else []
        if len(texts) not in (1, count) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"negative must be one caption, or one for each of the {count} prompts, got {negative!r}")
        tokens, _ = tokenize(self.tokenizer, texts, self.text.context, name="negative", allow_empty=True)
        return np.broadcast_to(tokens, (count, self.text.context))

    def timesteps(self, steps: int) -> list[int]:
        """Return the timesteps that DDIM visits, increasing, by the rule `timestep_spacing` of T timesteps.

        "leading": steps_offset + i (T // steps); "trailing": round(T - i T / steps) - 1; "linspace": evenly from 0 to
        T - 1, rounded (Lin et al. 2024, table 2).

        Raises:
            ValueError: if there are fewer timesteps, or the rule is unknown.
        """
        total, offset = self.process.num_steps, self.steps_offset
        if self.timestep_spacing not in SPACINGS:
            raise ValueError(f"timestep_spacing={self.timestep_spacing!r} must be one of {', '.join(SPACINGS)}")
        most = total - (offset if self.timestep_spacing == "leading" else 0)
        if not 1 <= steps <= most:
            raise ValueError(f"{steps=} must be between 1 and {most}")
        if self.timestep_spacing == "trailing":
            return [round(total - i * (total / steps)) - 1 for i in reversed(range(steps))]
        if self.timestep_spacing == "linspace":
            return [round(float(t)) for t in np.linspace(0, total - 1, steps)]
        found = [offset + i * (total // steps) for i in range(steps)]
        if found[-1] >= total:
            raise ValueError(f"{steps=} with steps_offset={offset} leads to timestep {found[-1]} of {total}")
        return found


def _ending_at(process: GaussianProcess, step: Step) -> Step:
    """Return a step whose last transition ends at the noise of the process' first timestep, and not at the data."""
    alpha, sigma = process.sqrt_alpha_bar[0], process.sqrt_one_minus_alpha_bar[0]

    def update(predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any) -> tuple:
        last = there.sigma == 0.0
        beta = jnp.square(here.sigma) - jnp.square(here.alpha / alpha * sigma)  # (13) of ``process``
        here = here.replace(beta=jnp.where(last, jnp.maximum(beta, 0.0), here.beta))
        there = there.replace(alpha=jnp.where(last, alpha, there.alpha), sigma=jnp.where(last, sigma, there.sigma))
        return step.update(predict_fn, keys, xt, here, there, carry)

    return Step(update, step.init)


@functools.partial(jax.jit, static_argnames="options")
def _generate(
    pipeline: StableDiffusion,
    process: GaussianProcess,
    tokens: jax.Array,
    empty: jax.Array,
    keys: jax.Array,
    scale: jax.Array,
    options: tuple[tuple[str, Any], ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, 3], and bool[B] for each of `STAGES`: whether all that it returned is finite.
    """
    text = pipeline.encode_text(tokens)
    nothing = pipeline.encode_text(empty)
    latents = pipeline.draw_latents(process, text, nothing, keys, scale=scale, **dict(options))
    images = pipeline.decode(latents)
    return to_uint8(images), (finite(text) & finite(nothing), finite(latents), finite(images))
