"""What each stage of unCLIP trains: parameters, loss and previews. The loop knows nothing else of a stage.

Batches are dicts of arrays with a leading axis B:
    image   uint8[B, S, S, 3]
    tokens  int32[B, L], mask bool[B, L]
    z_image, z_text   float32[B, D], unit CLIP embeddings, computed once (`training.embeddings`)
"""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.guidance import drop
from ddpm_jax.diffusion.importance import LossHistory, Timesteps, importance_timesteps, loss_history, record_losses
from ddpm_jax.diffusion.losses import Objective, Weighting, contrastive_loss, denoising_loss, stratified_timesteps
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.layers import downsample2
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines import stages
from ddpm_jax.pipelines.stages import Sampling, Text
from ddpm_jax.types import Kind, Variance

Batch = dict[str, Any]
Params = Any


@dataclasses.dataclass
class ClipTask:
    """Contrastive pre-training (Radford et al. 2021, figure 3): each picture against every caption of the batch.

    With gradient accumulation a picture meets the captions of its own micro-batch only.
    """

    model: CLIP
    name: str = "clip"
    frozen: Any = None

    def init(self, key: jax.Array) -> Params:
        """Return new parameters."""
        size, context = self.model.vision.image_size, self.model.text.context
        return self.model.init(
            key, jnp.zeros((1, size, size, 3)), jnp.zeros((1, context), jnp.int32), jnp.ones((1, context), bool)
        )

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        return batch

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the symmetric cross-entropy of every pair, and how often its partner is ranked first.

        Batches of families ([B, family, ...], `data.contrast`) are laid out as one batch of B * family pairs.
        """
        size = self.model.vision.image_size
        batch = {
            "image": batch["image"].reshape(-1, size, size, 3),
            "tokens": batch["tokens"].reshape(-1, batch["tokens"].shape[-1]),
            "mask": batch["mask"].reshape(-1, batch["mask"].shape[-1]),
        }
        z_image, z_text, log_scale = self.model.apply(
            params, stages.to_float(batch["image"]), batch["tokens"], batch["mask"]
        )
        loss, aux = contrastive_loss(z_image, z_text, log_scale)
        return loss, aux | {"temperature": jnp.exp(-log_scale)}

    def preview(self, params: Params, key: jax.Array) -> np.ndarray | None:
        """Return None: there is nothing to draw."""
        return None


class _WithText:
    """A stage that reads captions through CLIP's frozen text tower, or by a text encoder of its own."""

    clip: CLIP
    frozen: Params | None

    def prepare(self, frozen: Params, batch: Batch) -> Batch:
        """Add the hidden states of the frozen text tower, "hidden" [B, L, W]."""
        return batch | {"hidden": stages.encode_text(self.clip, frozen, batch["tokens"], batch["mask"]).hidden}

    def text(self, batch: Batch) -> Text:
        """Return the captions as the network reads them."""
        return Text(batch["z_text"], batch.get("hidden", batch["tokens"]), batch["mask"])

    def _example(self) -> Batch:
        """Return one empty record, of the shapes that the network is built for."""
        length, d = self.clip.text.context, self.clip.embed_dim
        z, tokens, mask = jnp.zeros((1, d)), jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)
        hidden = {} if self.frozen is None else {"hidden": jnp.zeros((1, length, self.clip.text.width))}
        return {"z_image": z, "z_text": z, "tokens": tokens, "mask": mask} | hidden


@dataclasses.dataclass
class PriorTask(_WithText):
    """The diffusion prior: plain squared error on the clean image embedding, uniform t (DALL-E 2, section 2.2).

    `embed_scale` multiplies the unit embeddings: the paper's 17.2 for 1024 dimensions, about 0.54 sqrt(D).
    """

    model: DiffusionPrior
    clip: CLIP
    frozen: Params | None
    process: GaussianProcess
    embed_scale: float
    drop_text: float = 0.1
    name: str = "prior"

    def init(self, key: jax.Array) -> Params:
        """Return new parameters."""
        one = self._example()
        text = self.text(one)
        return self.model.init(key, one["z_image"], jnp.zeros(1, jnp.int32), text.z, text.hidden, text.mask)

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the squared error of every example."""
        noise_key, drop_key = jax.random.split(key)
        keep = drop(drop_key, self.drop_text, batch["z_image"].shape[0])
        denoise = stages.prior_denoiser(self.model, params, self.text(batch), keep)
        loss, _ = denoising_loss(self.process, denoise, noise_key, batch["z_image"] * self.embed_scale, kind="x0")
        return loss, {}

    def preview(self, params: Params, key: jax.Array) -> np.ndarray | None:
        """Return None: embeddings cannot be looked at."""
        return None


@dataclasses.dataclass
class DecoderTask(_WithText):
    """The decoder: diffusion on pictures given an image embedding and a caption, dropped independently.

    `preview_batch` is a prepared batch of what the previews show; None makes none.
    """

    model: Decoder
    clip: CLIP
    frozen: Params | None
    process: GaussianProcess
    image_size: int
    sampling: Sampling
    kind: Kind = "eps"
    objective: Objective = "simple"
    variance: Variance = "fixed_small"
    weighting: Weighting | None = None
    vlb_weight: float = 1e-3
    drop_image: float = 0.1
    drop_text: float = 0.5
    timesteps: Timesteps = "uniform"
    preview_batch: Batch | None = None
    name: str = "decoder"

    def init(self, key: jax.Array) -> Params:
        """Return new parameters."""
        one = self._example()
        text, x = self.text(one), jnp.zeros((1, self.image_size, self.image_size, 3))
        return self.model.init(key, x, jnp.zeros(1, jnp.int32), one["z_image"], text.z, text.hidden, text.mask)

    @property
    def memory(self) -> LossHistory | None:
        """The losses by which timesteps are drawn, if they are drawn by importance."""
        return loss_history(self.process.num_steps) if self.timesteps == "importance" else None

    def remember(self, memory: LossHistory, kept: tuple[jax.Array, jax.Array]) -> LossHistory:
        """Return the history with a step's losses in it."""
        return record_losses(memory, *kept)

    def loss(
        self, params: Params, batch: Batch, key: jax.Array, memory: LossHistory | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss of every example; with a history, weighted so that its mean is the mean over timesteps."""
        x0 = stages.to_float(batch["image"])
        noise_key, image_key, text_key, dropout_key, t_key = jax.random.split(key, 5)
        denoise = stages.decoder_denoiser(
            self.model,
            params,
            batch["z_image"],
            self.text(batch),
            drop(image_key, self.drop_image, x0.shape[0]),
            drop(text_key, self.drop_text, x0.shape[0]),
            train=True,
            rngs={"dropout": dropout_key},
        )
        if self.timesteps not in get_args(Timesteps) or (self.timesteps == "importance") != (memory is not None):
            given = "no memory" if memory is None else "a memory"
            raise ValueError(
                f"timesteps={self.timesteps!r} with {given}: it must be one of {', '.join(get_args(Timesteps))}, and "
                "importance alone needs a memory"
            )
        t = None
        if self.timesteps == "stratified":
            t = stratified_timesteps(t_key, x0.shape[0], self.process.num_steps)
        elif memory is not None:
            t, weight = importance_timesteps(t_key, x0.shape[0], memory)
        loss, metrics = denoising_loss(
            self.process,
            denoise,
            noise_key,
            x0,
            kind=self.kind,
            objective=self.objective,
            variance=self.variance,
            weighting=self.weighting,
            vlb_weight=self.vlb_weight,
            t=t,
        )
        if memory is None:
            return loss, metrics
        # Weighted like the loss, so that their means are those of uniform timesteps.
        return weight * loss, {name: weight * value for name, value in metrics.items()} | {"kept": (t, loss)}

    def preview(self, params: Params, key: jax.Array) -> np.ndarray | None:
        """Draw the pictures of `preview_batch`."""
        if self.preview_batch is None:
            return None
        return _checked(*_preview_decoder(_ByIdentity(self), params, self.preview_batch, key))


@dataclasses.dataclass
class UpsamplerTask:
    """Super-resolution: diffusion on large pictures given a small copy, which is blurred at times in training.

    The low-resolution copy is the picture averaged down to `low_size / image_size` of its size. With probability
    `blur_rate` it is blurred by a Gaussian of `blur_sigma` pixels, kernel 3 (DALL-E 2, section 2.1: sigma 0.6), so that
    the network learns to mend what a decoder draws; it is never blurred in sampling. With `mix_colours` every picture's
    channels are permuted and inverted at random: enlarging is the same for all colours, and a network that has seen
    every shape in every colour draws no shape better in one than in another.
    """

    model: Upsampler
    process: GaussianProcess
    image_size: int
    low_size: int
    sampling: Sampling
    kind: Kind = "eps"
    weighting: Weighting | None = None
    blur_sigma: float = 0.6
    blur_rate: float = 0.5
    noise: float = 0.0
    mix_colours: bool = False
    preview_batch: Batch | None = None
    name: str = "upsampler"
    frozen: Any = None

    def init(self, key: jax.Array) -> Params:
        """Return new parameters."""
        high, low = (jnp.zeros((1, s, s, 3)) for s in (self.image_size, self.low_size))
        return self.model.init(key, high, jnp.zeros(1, jnp.int32), low)

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch as it is."""
        return batch

    def low_res(self, x0: jax.Array) -> jax.Array:
        """Average pictures or crops [B, H, W, 3] down by image_size / low_size."""
        factor = self.image_size // self.low_size
        while factor > 1:
            x0, factor = downsample2(x0), factor // 2
        return x0

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the squared error of every example."""
        x0 = stages.to_float(batch["image"])
        noise_key, blur_key, dropout_key, level_key, low_key, colour_key = jax.random.split(key, 6)
        if self.mix_colours:
            x0 = mix_colours(colour_key, x0)
        low = self.low_res(x0)
        blurred = drop(blur_key, 1.0 - self.blur_rate, x0.shape[0])
        low = jnp.where(blurred[:, None, None, None], gaussian_blur3(low, self.blur_sigma), low)
        level = self.noise * jax.random.uniform(level_key, (x0.shape[0], 1, 1, 1))
        low = low + level * jax.random.normal(low_key, low.shape)
        denoise = lambda xt, t: self.model.apply(params, xt, t, low, train=True, rngs={"dropout": dropout_key})  # noqa: E731
        return denoising_loss(self.process, denoise, noise_key, x0, kind=self.kind, weighting=self.weighting)

    def preview(self, params: Params, key: jax.Array) -> np.ndarray | None:
        """Enlarge the pictures of `preview_batch`."""
        if self.preview_batch is None:
            return None
        return _checked(*_preview_upsampler(_ByIdentity(self), params, self.preview_batch, key))


class _ByIdentity:
    """A task as a static argument of jit: the same task compiles once."""

    def __init__(self, task: Any):
        self.task = task

    def __hash__(self) -> int:
        return id(self.task)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.task is self.task


def _checked(images: jax.Array, finite: jax.Array) -> np.ndarray:
    """Return previews; raise FloatingPointError unless the numbers they were made of are finite."""
    if not finite:
        raise FloatingPointError("its pixels contain NaN or infinity")
    return np.asarray(images)


@functools.partial(jax.jit, static_argnums=0)
def _preview_decoder(held: _ByIdentity, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    task = held.task
    images = stages.draw_image(
        task.model,
        params,
        task.process,
        batch["z_image"],
        task.text(batch),
        example_keys(key, batch["z_image"].shape[0]),
        size=task.image_size,
        sampling=task.sampling,
        kind=task.kind,
        variance=task.variance,
    )
    return stages.to_uint8(images), jnp.isfinite(images).all()


@functools.partial(jax.jit, static_argnums=0)
def _preview_upsampler(held: _ByIdentity, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    task = held.task
    low = task.low_res(stages.to_float(batch["image"]))
    keys = example_keys(key, low.shape[0])
    images = stages.upsample(
        task.model, params, task.process, low, keys, size=task.image_size, sampling=task.sampling, kind=task.kind
    )
    return stages.to_uint8(images), jnp.isfinite(images).all()


def mix_colours(key: jax.Array, x: jax.Array) -> jax.Array:
    """Permute the colour channels of each picture, and flip the sign of each channel, at random.

    x: float[B, H, W, 3] in [-1, 1]; each of the 6 permutations and 8 inversions is as likely as the others.
    """
    order_key, sign_key = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(order_key, (x.shape[0], 3)), axis=-1)
    sign = jax.random.rademacher(sign_key, (x.shape[0], 1, 1, 3), x.dtype)
    return jnp.take_along_axis(x, order[:, None, None, :], axis=3) * sign


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
