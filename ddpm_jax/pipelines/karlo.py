"""Karlo as a pipeline: captions or images in, images out, wired as diffusers' UnCLIPPipeline is.

It is the way of `pipelines.unclip` with other conventions: embeddings are not normalised (norms are part of what the
networks read), a dropped caption is the empty one, the prior's samples are clipped and turned back by the statistics of
image embeddings, and a second upsampler takes the last step. `open_karlo` makes one of a directory.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data.tokenizer import Tokenizer, tokenizer_from_config
from ddpm_jax.data.transforms import clip_pixels
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.sampling import Sampling, bounded, sample_with
from ddpm_jax.interop.karlo import read_karlo
from ddpm_jax.interop.karlo_original import read_karlo_original
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.embedding_norm import EmbeddingNorm
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.traced import apply_traced
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.pipelines.request import (
    as_prompts,
    as_seed,
    check_steps,
    image_indices,
    image_keys,
    in_batches,
    negative_tokens,
    on_mesh,
    stage_samplings,
    tokenize,
)
from ddpm_jax.pipelines.stages import Text, finite
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.types import Denoiser, Step, to_uint8

STAGES = ("text encoder", "image encoder", "prior", "decoder", "upsampler")
DIFFUSION = {
    "prior": Diffusion("cosine", 1000, "x0"),
    "decoder": Diffusion("cosine", 1000, "eps", "learned_range"),
    "upsampler": Diffusion("cosine", 1000, "eps"),
}


def _static(**options: Any) -> Any:
    return flax.struct.field(pytree_node=False, **options)


def default_sampling(prior_clip: float = 5.0) -> dict[str, Sampling]:
    """Return how Karlo's stages are sampled, as its published pipeline does in its fast mode.

    prior_clip: bound of what the prior predicts; 5 in diffusers, 10 in the original code.
    """
    return {
        "prior": Sampling("ancestral", 25, scale=4.0, threshold=prior_clip),
        "decoder": Sampling("ancestral", 25, scale=8.0, threshold=1.0),
        "upsampler": Sampling("ancestral", 7, threshold=1.0),
    }


class Karlo(flax.struct.PyTreeNode):
    """The networks and their parameters; a tree of arrays, so that it can be an argument of a jitted function.

    Attributes:
        params: of each network by name: "text", "image", "prior", "decoder", "first", "last" (the two upsamplers).
        statistics: the mean and the standard deviation of image embeddings, float32[D] each.
        sampling: how the prior, the decoder and the upsampler are sampled where `generate` is given nothing else.
        text: CLIP's text tower.
        image: CLIP's image tower; without it there are no variations.
        prior: without it there are no images of captions.
        decoder: samples images of embeddings and captions.
        upsampler: the network of both upsamplers.
        tokenizer: CLIP's.
        sizes: of the decoder's images, and of the upsampler's, in pixels.
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
    sampling: dict[str, Sampling] = flax.struct.field(default_factory=default_sampling)

    @classmethod
    def from_converted(cls, converted: Converted, tokenizer: Tokenizer | None = None) -> "Karlo":
        """Make a pipeline of what `interop.karlo.read_karlo` or a directory of `ddpm_jax.convert` holds.

        Args:
            converted: networks, parameters and the numbers of the pipeline.
            tokenizer: in place of the one that it names.
        """
        metadata, models, params = converted.metadata, converted.models, jax.device_put(converted.params)
        numbers = params.pop("statistics", None)
        return cls(
            params=params,
            statistics=None if numbers is None else (numbers["mean"], numbers["std"]),
            text=models["text"],
            image=models.get("image"),
            prior=models.get("prior"),
            decoder=models["decoder"],
            upsampler=models["first"],
            tokenizer=tokenizer_from_config(metadata["tokenizer"]) if tokenizer is None else tokenizer,
            sizes=tuple(metadata["sizes"]),
            sampling=default_sampling(metadata["prior_clip"]),
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
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

    def sample_embedding(self, text: Text, null: Text, keys: jax.Array, **options: Any) -> jax.Array:
        """Sample image embeddings of captions.

        Args:
            text: of the captions.
            null: of what guidance leads away from, the empty caption by default, for each.
            keys: [B], or `RecordedNoise`.
            options: fields of `Sampling` in place of those of the pipeline's, such as steps=50.

        Returns:
            float32[B, D], as CLIP's projection gives them, like those of `encode_image`: not of unit length.
        """

        def network(text: Text) -> Callable[..., jax.Array]:
            params = {"params": self.params["prior"]}
            return lambda zt, t: apply_traced(self.prior, params, zt, t, text.z, text.hidden, text.mask)

        norm = EmbeddingNorm.standardizing(*self.statistics)
        z = sample_with(
            self.sampling["prior"].with_options("prior_", **options),
            DIFFUSION["prior"],
            network(text),
            keys,
            (self.prior.embed_dim,),
            null=network(null),
            project=norm.project,
        )
        return norm.restore(z)

    def decode(self, z_image: jax.Array, text: Text, null: Text, keys: jax.Array, **options: Any) -> jax.Array:
        """Sample small images of embeddings and captions.

        Args:
            z_image: float32[B, D], as `encode_image` and `sample_embedding` return it.
            text: of the captions.
            null: of what guidance leads away from, beside the null embedding.
            keys: [B], or `RecordedNoise`.
            options: fields of `Sampling` in place of those of the pipeline's.

        Returns:
            float32[B, h, h, 3] in [-1, 1].
        """
        denoise, null_denoise = self.denoisers(z_image, text, null)
        images = sample_with(
            self.sampling["decoder"].with_options("decoder_", **options),
            DIFFUSION["decoder"],
            denoise,
            keys,
            (self.sizes[0], self.sizes[0], 3),
            null=null_denoise,
        )
        return bounded(images)

    def denoisers(
        self, z_image: jax.Array, text: Text, null: Text, *, keep_image: jax.Array | None = None
    ) -> tuple[Denoiser, Denoiser]:
        """Return the decoder closed over its conditions, and over what guidance leads away from; as for `decode`.

        keep_image: bool[B], False gives the null embedding; None keeps all.
        """
        params, z = {"params": self.params["decoder"]}, _scaled(z_image)

        def network(text: Text, keep: jax.Array) -> Denoiser:
            return lambda xt, t: apply_traced(self.decoder, params, xt, t, z, text.z, text.hidden, text.mask, keep)

        keep = jnp.ones(len(z_image), bool) if keep_image is None else keep_image
        return network(text, keep), network(null, jnp.zeros(len(z_image), bool))

    def upsample(
        self,
        images: jax.Array,
        keys: jax.Array,
        *,
        wrap_step: Callable[[Step], Step] | None = None,
        **options: Any,
    ) -> jax.Array:
        """Enlarge images, float32[B, h, h, 3] in [-1, 1]; the network "last" is used at t = 0, "first" before.

        keys: [B], or `RecordedNoise`. wrap_step: of `sample_with`. options: fields of `Sampling` in place of those of
        the pipeline's.
        """
        params = {name: {"params": self.params[name]} for name in ("first", "last")}
        network = lambda name, xt, t: apply_traced(self.upsampler, params[name], xt, t, images)  # noqa: E731
        larger = sample_with(
            self.sampling["upsampler"].with_options("upsampler_", **options),
            DIFFUSION["upsampler"],
            lambda xt, t: jax.lax.cond(t[0] == 0, lambda: network("last", xt, t), lambda: network("first", xt, t)),
            keys,
            (self.sizes[1], self.sizes[1], 3),
            wrap_step=wrap_step,
        )
        return bounded(larger)

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

        Programs are compiled for a batch size, the samplers and their steps, once; other scales, thresholds, seeds and
        numbers of prompts run the same programs. A scale of 1 is a program without the null branch.

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
            options: the fields of `diffusion.sampling.Sampling` of the stages "prior", "decoder" and "upsampler":
                prior_steps (25), prior_scale (4.0), decoder_steps (25), decoder_scale (8.0), upsampler_steps (7),
                decoder_sampler ("ancestral"), ... Without a stage, as in steps=50, they are the decoder's.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, an argument does not fit, or this pipeline has no prior.
            NotFiniteError: if a network returned NaN or infinity.
        """
        if self.prior is None:
            raise ValueError("this pipeline has no prior, which samples embeddings of captions; use variations")
        kwargs = {"seed": seed, "start": start, "batch_size": batch_size, "mesh": mesh, "report": report}
        return self._sample(as_prompts(prompts), None, negative_prompts, options, **kwargs)

    def variations(
        self,
        pixels: Any,
        *,
        negative_prompts: str | Iterable[str] | None = None,
        seed: int = 0,
        start: int = 0,
        batch_size: int | None = None,
        prepared: bool = False,
        mesh: Mesh | None = None,
        report: Callable[[int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Sample other images of what images show (DALL-E 2, section 3.1, by ancestral sampling as in Karlo).

        Args:
            pixels: N images as `data.transforms.as_images` takes them (PIL images, arrays in [0, 255], floats in
                [0, 1], of any sizes), or what `data.transforms.clip_pixels` returned.
            negative_prompts: as for `generate`.
            seed: as for `generate`.
            start: as for `generate`.
            batch_size: as for `generate`.
            prepared: True embeds pixels as they are: float32[N, S, S, 3], normalised by another preprocessing, where S
                is `pixel_size`.
            mesh: as for `generate`.
            report: as for `generate`.
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
        kwargs = {"seed": seed, "start": start, "batch_size": batch_size, "mesh": mesh, "report": report}
        return self._sample([""] * len(pixels), pixels, negative_prompts, options, **kwargs)

    def _sample(
        self,
        prompts: list[str],
        pixels: np.ndarray | None,
        negative_prompts: Any,
        options: dict[str, Any],
        *,
        seed: int,
        start: int,
        batch_size: int | None,
        mesh: Mesh | None,
        report: Callable[[int], None] | None,
    ) -> np.ndarray:
        if self.tokenizer is None:
            raise ValueError("this pipeline has no tokenizer; give it one, as in karlo.replace(tokenizer=...)")
        sampling = stage_samplings(
            self.sampling,
            options,
            arguments=("prompts" if pixels is None else "pixels", "negative_prompts"),
            guided=("prior", "decoder"),
            normed=("prior",),
        )
        length = self.text.text.context
        for stage, of_stage in sampling.items():
            check_steps(f"{stage}_steps", of_stage, DIFFUSION[stage])
        tokens, mask = tokenize(self.tokenizer, prompts, length, allow_empty=True)
        negative = negative_tokens(self.tokenizer, negative_prompts, len(prompts), length)
        # Without the tokenizer, which the compiled program would keep alive.
        karlo, place, unit = on_mesh(mesh, self.replace(sampling=sampling, tokenizer=None))
        return in_batches(
            functools.partial(_generate, karlo, np.uint32(as_seed(seed))),
            (image_indices(start, len(prompts)), tokens, mask, *negative, pixels),
            batch_size=1 if batch_size is None else batch_size,
            stages=STAGES,
            report=report,
            name="prompts" if pixels is None else "pixels",
            place=place,
            unit=unit,
        )


@jax.jit
def _generate(
    karlo: Karlo,
    seed: jax.Array,
    index: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    negative: jax.Array,
    negative_mask: jax.Array,
    pixels: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, 3], and bool[B] for each of `STAGES`: whether all that it returned is finite.
    """
    text, null = karlo.encode_text(tokens, mask), karlo.encode_text(negative, negative_mask)
    keys = image_keys(seed, index)
    stage_keys = [transition_keys(keys, n) for n in range(3)]
    z_image = karlo.sample_embedding(text, null, stage_keys[0]) if pixels is None else karlo.encode_image(pixels)
    small = karlo.decode(z_image, text, null, stage_keys[1])
    large = karlo.upsample(small, stage_keys[2])
    encoded = finite(text.z) & finite(text.hidden) & finite(null.z) & finite(null.hidden)
    of_image, unused = finite(z_image), jnp.ones_like(encoded)
    embedded = (unused, of_image) if pixels is None else (of_image, unused)
    return to_uint8(large), (encoded, *embedded, finite(small), finite(large))


def _scaled(z: jax.Array) -> jax.Array:
    """Undo what the networks multiply embeddings by, which they take to be unit vectors."""
    return z / z.shape[-1] ** 0.5


def open_karlo(directory: str | Path, *, tokenizer: Tokenizer | None = None, dtype: Any = jnp.float32) -> Karlo:
    """Make a pipeline of a directory in diffusers' layout, such as a copy of kakaobrain/karlo-v1-alpha.

    Args:
        directory: as `interop.karlo.read_karlo` reads it; with a prior (captions) or an image encoder (variations).
        tokenizer: CLIP's, padded with the end token, by default.
        dtype: in which the networks compute; parameters are float32.

    Raises:
        ReadError: if a part is missing or cannot be read.
        ConvertError: if a part's tensors are not those of its network, or its config has a field, or a value of one,
            that is not supported.
    """
    return Karlo.from_converted(read_karlo(directory, dtype=dtype), tokenizer)


def open_karlo_original(directory: str | Path, *, tokenizer: Tokenizer | None = None, **options: Any) -> Karlo:
    """Make a pipeline of a directory with the five files of Karlo's original release, version 1.0.0 alpha.

    The decoder's 25 steps are Karlo's "fast" mode, decoder_steps="50" its default. For variations Karlo squeezes images
    to a square, of which `variations` takes the middle instead (`data.transforms.clip_pixels`).

    Args:
        directory: as `interop.karlo_original.read_karlo_original` reads it.
        tokenizer: CLIP's, filled up with 0 as Karlo's, by default. No network sees what stands behind the end of a
            caption, so that another padding gives the same images.
        options: heads, head_channels, head_width, image_sizes, prior_clip and dtype, as for `read_karlo_original`.

    Raises:
        ReadError: if a file is missing, there twice, or cannot be read.
        ConvertError: if a file's tensors are not those of its network, or the networks do not fit each other.
        ValueError: if a number of heads, or the width of one, does not divide a layer's width.
    """
    return Karlo.from_converted(read_karlo_original(directory, **options), tokenizer)
