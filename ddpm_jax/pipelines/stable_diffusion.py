"""Stable Diffusion as a pipeline: captions in, images out, by DDIM in the latents of an autoencoder.

`open_stable_diffusion` makes one of a directory (Rombach et al. 2022, section 4.3).
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data.tokenizer import Tokenizer, tokenizer_from_config
from ddpm_jax.diffusion.guidance import classifier_free
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers import Point, RecordedNoise, sample
from ddpm_jax.diffusion.samplers.loop import check_start, initial_noise
from ddpm_jax.diffusion.sampling import Sampling, bounded
from ddpm_jax.diffusion.schedules import spaced_timesteps
from ddpm_jax.interop.latent_diffusion import read_stable_diffusion_file
from ddpm_jax.interop.stable_diffusion import process_of, read_stable_diffusion, sampling_of
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.models.traced import apply_traced
from ddpm_jax.models.unet import UNet
from ddpm_jax.pipelines.request import (
    as_prompts,
    as_seed,
    image_indices,
    image_keys,
    in_batches,
    negative_tokens,
    on_mesh,
    respaced,
    stage_samplings,
    tokenize,
)
from ddpm_jax.pipelines.stages import finite
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.types import PredictFn, Step, to_uint8

STAGES = ("text encoder", "U-Net", "autoencoder")


def _static(**options: Any) -> Any:
    return flax.struct.field(pytree_node=False, **options)


class StableDiffusion(flax.struct.PyTreeNode):
    """The networks and their parameters; a tree of arrays, so that it can be an argument of a jitted function.

    Attributes:
        params: of each network by name: "text", "unet" and "autoencoder".
        process: the one that the U-Net was trained with.
        text: the text encoder.
        unet: predicts in latents.
        autoencoder: of images and latents.
        tokenizer: CLIP's.
        prediction: what the U-Net predicts, "eps" (version 1) or "v" (version 2, 768).
        latent_size: height and width of the latents that it was trained on.
        timestep_spacing, steps_offset, set_alpha_to_one: of the scheduler's config; see `timesteps`, and False ends the
            last step of DDIM at the noise of t = 0 in place of the predicted x0.
        sampling: how latents are sampled where `generate` is given nothing else.
    """

    params: dict[str, Any]
    process: GaussianProcess
    text: TextEncoder = _static()
    unet: UNet = _static()
    autoencoder: Autoencoder = _static()
    tokenizer: Tokenizer | None = _static(default=None)
    prediction: str = _static(default="eps")
    latent_size: int = _static(default=64)
    timestep_spacing: str = _static(default="leading")
    steps_offset: int = _static(default=1)
    set_alpha_to_one: bool = _static(default=True)
    sampling: Sampling = flax.struct.field(default_factory=lambda: Sampling("ddim", 50, scale=7.5))

    @classmethod
    def from_converted(cls, converted: Converted, tokenizer: Tokenizer | None = None) -> "StableDiffusion":
        """Make a pipeline of what `interop.stable_diffusion` read or a directory of `ddpm_jax.convert` holds.

        Args:
            converted: networks, parameters and the numbers of the pipeline.
            tokenizer: in place of the one that it names.
        """
        metadata = converted.metadata
        return cls(
            params=jax.device_put(converted.params),
            process=process_of(metadata["schedule"]),
            tokenizer=tokenizer_from_config(metadata["tokenizer"]) if tokenizer is None else tokenizer,
            prediction=metadata["prediction"],
            latent_size=metadata["latent_size"],
            **sampling_of(metadata["schedule"]),
            **converted.models,
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.latent_size * self.autoencoder.factor

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Return what the U-Net reads of captions, [B, L, width]; padding is read too. tokens: int32[B, L]."""
        return self.text.apply({"params": self.params["text"]}, tokens)

    def sample_latents(
        self,
        process: GaussianProcess,
        text: jax.Array,
        null: jax.Array,
        keys: jax.Array | RecordedNoise,
        **options: Any,
    ) -> jax.Array:
        """Sample latents of captions, as the U-Net sees them (multiplied by the autoencoder's scale).

        Args:
            process: the pipeline's, respaced; its last timestep starts from noise, whichever it is.
            text: of the captions, [B, L, width].
            null: of what guidance leads away from, [B, L, width].
            keys: [B].
            options: fields of `Sampling` in place of those of the pipeline's, but for steps.

        Returns:
            float32[B, h, w, C].
        """
        sampling = self.sampling.with_options(**options)
        params, shape = {"params": self.params["unet"]}, (self.latent_size,) * 2 + (self.autoencoder.latent_channels,)
        network = lambda context: lambda xt, t: apply_traced(self.unet, params, xt, t, None, context)  # noqa: E731
        denoise, step = network(text), sampling.step()
        if sampling.scale is not None:
            rescale = 0.0 if sampling.rescale is None else sampling.rescale
            denoise = classifier_free(denoise, network(null), sampling.scale, rescale=rescale)
        if sampling.sampler == "ddim" and not self.set_alpha_to_one:
            step = _ending_at(self.process, step)
        return sample(
            process,
            denoise,
            keys,
            shape,
            x_init=initial_noise(process, keys, shape),  # at whichever timestep comes first, as published pipelines
            step=step,
            prediction=self.prediction,
            x0_transform=sampling.x0_transform(),
        )

    def decode(self, latents: jax.Array) -> jax.Array:
        """Return the images of latents, float32[B, H, W, 3] in [-1, 1]."""
        method = Autoencoder.decode
        z = latents / self.autoencoder.scale
        return bounded(self.autoencoder.apply({"params": self.params["autoencoder"]}, z, method=method))

    def generate(
        self,
        prompts: Iterable[str],
        *,
        negative_prompts: str | Iterable[str] | None = None,
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
        report: Callable[[int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Sample one image for every prompt.

        A program is compiled for a batch size, a sampler and a number of steps, once; other scales, thresholds, seeds
        and numbers of prompts run the same program. A scale of 1 is a program without the null branch.

        Args:
            prompts: captions, of which "" is the unconditional one; one too long is cut, with a warning.
            negative_prompts: the captions that guidance leads away from, one for all prompts or one for each; None is
                the unconditional one, "".
            seed: seed of all random numbers, in [0, 2**32); image i depends only on it, i and prompt i.
            start: i of the first prompt. generate(["c"], start=2) is image 2 of generate(["a", "b", "c", "d"]).
            batch_size: images at a time, 1 by default; more are faster on an accelerator. Up to half a batch that is
                left over is taken one by one, a larger one is filled up.
            mesh: devices of this process that share each batch, with an axis "data"; one device by default.
            report: called with the number of images each time some are done.
            options: the fields of `diffusion.sampling.Sampling`, also with the prefix "decoder_": sampler ("ddim"),
                steps, scale (7.5), eta, rescale, ... steps is a number, 50 or "50", taken at `timesteps(50)`; another
                spec of `schedules.respaced_timesteps`, such as "ddim50" or "10,10,5"; or increasing timesteps.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, or an argument does not fit.
            NotFiniteError: if a network returned NaN or infinity.
        """
        prompts = as_prompts(prompts)
        if self.tokenizer is None:
            raise ValueError("this pipeline has no tokenizer; give it one, as in pipeline.replace(tokenizer=...)")
        sampling = stage_samplings({"decoder": self.sampling}, options, guided=("decoder",))["decoder"]
        name = "decoder_steps" if "decoder_steps" in options else "steps"
        counted = isinstance(sampling.steps, int)
        process = respaced(self.process, name, self.timesteps(sampling.steps) if counted else sampling.steps)
        if not counted:
            check_start(process)
        length = self.text.context
        tokens, _ = tokenize(self.tokenizer, prompts, length, allow_empty=True)
        negative, _ = negative_tokens(self.tokenizer, negative_prompts, len(prompts), length)
        # Without the tokenizer, which the compiled program would keep alive.
        (pipeline, process), place, unit = on_mesh(mesh, (self.replace(sampling=sampling, tokenizer=None), process))
        return in_batches(
            functools.partial(_generate, pipeline, process, np.uint32(as_seed(seed))),
            (image_indices(start, len(prompts)), tokens, negative),
            batch_size=1 if batch_size is None else batch_size,
            stages=STAGES,
            report=report,
            place=place,
            unit=unit,
        )

    def timesteps(self, steps: int) -> list[int]:
        """Return the timesteps of a number of steps, increasing, by the rule `timestep_spacing`.

        See `schedules.spaced_timesteps`.

        Raises:
            ValueError: if there are fewer timesteps, or the rule is unknown.
        """
        try:
            return spaced_timesteps(self.process.num_steps, steps, self.timestep_spacing, self.steps_offset)
        except ValueError as error:
            raise ValueError(str(error).replace("count=", "steps=", 1)) from None


def _ending_at(process: GaussianProcess, step: Step) -> Step:
    """Return a step whose last transition ends at the noise of the process' first timestep, and not at the data."""
    alpha, sigma = process.alpha[0], process.sigma[0]

    def update(predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any) -> tuple:
        last = there.sigma == 0.0
        beta = jnp.square(here.sigma) - jnp.square(here.alpha / alpha * sigma)  # (13) of ``process``
        here = here.replace(beta=jnp.where(last, jnp.maximum(beta, 0.0), here.beta))
        there = there.replace(alpha=jnp.where(last, alpha, there.alpha), sigma=jnp.where(last, sigma, there.sigma))
        return step.update(predict_fn, keys, xt, here, there, carry)

    return Step(update, step.init)


@jax.jit
def _generate(
    pipeline: StableDiffusion,
    process: GaussianProcess,
    seed: jax.Array,
    index: jax.Array,
    tokens: jax.Array,
    negative: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, 3], and bool[B] for each of `STAGES`: whether all that it returned is finite.
    """
    text, null = pipeline.encode_text(tokens), pipeline.encode_text(negative)
    latents = pipeline.sample_latents(process, text, null, image_keys(seed, index))
    images = pipeline.decode(latents)
    return to_uint8(images), (finite(text) & finite(null), finite(latents), finite(images))


def open_stable_diffusion(
    directory: str | Path, *, tokenizer: Tokenizer | None = None, dtype: Any = jnp.float32
) -> StableDiffusion:
    """Make a pipeline of a directory in diffusers' layout, such as a copy of stable-diffusion-v1-5.

    Args:
        directory: as `interop.stable_diffusion.read_stable_diffusion` reads it.
        tokenizer: CLIP's by default, padded as the directory's tokenizer says.
        dtype: in which the networks compute; parameters are float32.

    Raises:
        ReadError: if a part is missing or cannot be read.
        ConvertError: if a part's tensors are not those of its network, or its config has what is not supported.
    """
    return StableDiffusion.from_converted(read_stable_diffusion(directory, dtype=dtype), tokenizer)


def open_stable_diffusion_file(
    path: str | Path, *, tokenizer: Tokenizer | None = None, **options: Any
) -> StableDiffusion:
    """Make a pipeline of a file such as v1-5-pruned-emaonly.safetensors or v2-1_768-ema-pruned.ckpt.

    Args:
        path: the file.
        tokenizer: CLIP's by default, padded with the end token (version 1) or with 0 (version 2).
        options: prediction, image_size, part, dtype, ..., as for `interop.latent_diffusion.read_stable_diffusion_file`.

    Raises:
        ReadError: if the file cannot be read.
        ConvertError: if its tensors are not those of the networks.
        ValueError: for an unknown prediction type, or an image_size that the networks cannot halve.
    """
    return StableDiffusion.from_converted(read_stable_diffusion_file(path, **options), tokenizer)
