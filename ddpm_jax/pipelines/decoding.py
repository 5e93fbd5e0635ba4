"""One interface to the decoders of `UnCLIP` and `Karlo`, of which the manipulations of images are made."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

from ddpm_jax.data.transforms import clip_pixels, resize_center_crop
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers import RecordedNoise
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.sampling import Sampling, bounded, sample_with
from ddpm_jax.diffusion.schedules import respaced_timesteps
from ddpm_jax.models.clip import normalize
from ddpm_jax.pipelines.enlarging import enlarging_options, stops_of, with_stops
from ddpm_jax.pipelines.karlo import DIFFUSION, Karlo
from ddpm_jax.pipelines.request import as_prompts, check_steps, negative_tokens, stage_samplings, tokenize
from ddpm_jax.pipelines.stages import Text, check_kept, finite, guided_stages, with_moments
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.pipelines.upsampling import image_size_of, noise_levels, upsample_all
from ddpm_jax.types import Denoiser, Step, to_float

Keys = jax.Array | RecordedNoise
Wraps = Sequence[Callable[[Step], Step] | None]
"""For each stage of images what makes another step of the sampler's, such as `samplers.repaint_step`."""


class Words(NamedTuple):
    """Tokenized captions.

    Attributes:
        tokens: int32[B, L].
        mask: bool[B, L], True at real tokens.
        keep: bool[B], False drops the caption.
    """

    tokens: Any
    mask: Any
    keep: Any


class Decoding(flax.struct.PyTreeNode):
    """A pipeline from the image embedding on; a tree of arrays, like the pipeline itself.

    Attributes:
        pipeline: with the options of a request in `configured` ones.
    """

    pipeline: Any

    @property
    def image_size(self) -> int:
        """Side of the decoder's images."""
        return self.sizes[0]

    @property
    def sampling(self) -> Sampling:
        """How the decoder is sampled."""
        return self.pipeline.sampling["decoder"]

    @property
    def timesteps(self) -> Sequence[int]:
        """The decoder's timesteps, increasing; sampling starts from noise of the last."""
        return respaced_timesteps(self.diffusion.num_steps, self.sampling.steps)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names for messages, in the order of the flags of `manipulation`."""
        return ("CLIP model", "prior", "decoder", *self.upsamplers)

    def decode(
        self,
        z_image: jax.Array,
        keep_image: jax.Array,
        words: Words,
        negative: Words | None,
        keys: Keys,
        **options: Any,
    ) -> jax.Array:
        """Sample the decoder's images.

        Args:
            z_image: float32[B, D].
            keep_image: bool[B], False gives the null embedding.
            words: captions.
            negative: captions that guidance leads away from; None for the null condition.
            keys: [B].
            options: x_init, stop and wrap_step of `sample_with`.

        Returns:
            float32[B, R, R, C].
        """
        denoise, null = self.denoisers(z_image, keep_image, words, negative)
        size, channels = self.image_size, self.channels
        return self.finished(
            sample_with(
                self.sampling,
                self.diffusion,
                denoise,
                keys,
                (size, size, channels),
                null=null,
                moments=self.moments,
                **options,
            )
        )

    def _samplings(self, decoder: Sampling | None, options: Mapping[str, Any], **known: Any) -> dict[str, Any]:
        defaults = dict(self.pipeline.sampling) | ({} if decoder is None else {"decoder": decoder})
        able = {"normed": ("prior",), **known}
        return stage_samplings(defaults, options, arguments=("images", "prompts", "negative_prompts"), **able)


class UnCLIPDecoding(Decoding):
    """That of an `UnCLIP`."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the decoder's images and of each upsampler's."""
        return tuple(image_size_of(model) for model in (self.pipeline.decoder, *self.pipeline.upsamplers))

    @property
    def upsamplers(self) -> tuple[str, ...]:
        """Names of the upsamplers."""
        return self.pipeline.names

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.pipeline.decoder.metadata.get("channels", 3)

    @property
    def embed_dim(self) -> int:
        """Size of the embeddings."""
        return self.pipeline.decoder.network.embed_dim

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines by."""
        return min(float(np.exp(self.pipeline.clip.params["params"]["log_scale"])), 100.0)

    @property
    def diffusion(self) -> Diffusion:
        """The decoder's process."""
        return self.pipeline.decoder.diffusion

    @property
    def moments(self) -> jax.Array | None:
        """The decoder's second moments."""
        return self.pipeline.decoder.moments

    @property
    def stops(self) -> list[int | None]:
        """Where each stage stops before it is enlarged, see `enlarging.Enlarging`."""
        return stops_of(self.pipeline.enlarging)

    @property
    def has_prior(self) -> bool:
        """Whether embeddings of captions can be sampled."""
        return True

    @property
    def batch_size(self) -> int:
        """Images at a time by default."""
        return self.pipeline.batch_size

    def configured(
        self, decoder: Sampling | None, options: Mapping[str, Any], negative: Words | None = None
    ) -> "UnCLIPDecoding":
        """Return the same for one request, without the tokenizer, which a compiled program would keep alive.

        Args:
            decoder: how the decoder is sampled where the options do not say it; None is the pipeline's own.
            options: as `UnCLIP.generate` has them.
            negative: captions that guidance leads away from; None for the null condition.

        Raises:
            ValueError: if an option is wrong.
        """
        models = self.pipeline.diffusions()
        upsamplers = dict(zip(self.pipeline.names, self.pipeline.upsamplers))
        levels, options = noise_levels(upsamplers, self.pipeline.noise_levels, options)
        enlarging, options = enlarging_options(self.pipeline.names, dict(self.pipeline.enlarging), options)
        guided = guided_stages(self.pipeline.models, None if negative is None else negative.keep)
        sampling = self._samplings(decoder, options, guided=guided, measured=with_moments(models))
        for stage, model in models.items():
            check_steps(f"{stage}_steps", sampling[stage], model.diffusion)
        enlarging, levels = with_stops(enlarging, {"decoder": self.pipeline.decoder, **upsamplers}, sampling, levels)
        pipeline = self.pipeline.replace(sampling=sampling, noise_levels=levels, enlarging=enlarging)
        return UnCLIPDecoding(pipeline.replace(tokenizer=None, batch_size=0))

    def check_kept(self, keep_image: Any, words: Words) -> None:
        """Raise ValueError if the decoder is to go without a condition that it was never trained without.

        keep_image: bool[N], or None for all.
        """
        model = self.pipeline.decoder
        kept = True if keep_image is None else keep_image
        check_kept("decoder", model, "image_embedding", kept, "embedding='none'")
        check_kept("decoder", model, "caption", words.keep, "an image without a caption in prompts")

    def pixels(self, images: Any) -> np.ndarray:
        """Prepare images for `embed`. Returns uint8[N, S, S, 3]."""
        return resize_center_crop(images, self.pipeline.clip.network.vision.image_size)

    def words(self, captions: Iterable[str]) -> Words:
        """Return captions as arrays."""
        captions = as_prompts(captions)
        tokenizer, length = self.pipeline.tokenizer, self.pipeline.clip.metadata["length"]
        keep = lambda: np.array([bool(tokenizer.ids(text)) for text in captions])  # noqa: E731
        return Words(*tokenize(tokenizer, captions, length, allow_empty=True), keep())

    def negative(self, captions: Any, count: int) -> Words | None:
        """Return the captions that guidance leads away from, one for all or one for each, as arrays."""
        if captions is None:
            return None
        tokens, mask = negative_tokens(self.pipeline.tokenizer, captions, count, self.pipeline.clip.metadata["length"])
        return Words(tokens, mask, mask.sum(1) > 2)

    # ---- Functions of arrays ---------------------------------------------------------------------------------------

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Return image embeddings as the decoder takes them, float32[B, D]."""
        return self.pipeline.encode_image(to_float(pixels))

    def embed_text(self, words: Words) -> jax.Array:
        """Return text embeddings, unit vectors float32[B, D]."""
        return self.pipeline.encode_text(words.tokens, words.mask).z

    def sample_embedding(self, words: Words, negative: Words | None, keys: Keys) -> jax.Array:
        """Sample image embeddings of captions, float32[B, D]."""
        text, tokens, keep = self._text(words)
        away = None if negative is None else self._text(negative)
        return self.pipeline.sample_embedding(text, tokens, keys, keep_text=keep, negative=away)

    def denoisers(
        self, z_image: jax.Array, keep_image: jax.Array, words: Words, negative: Words | None
    ) -> tuple[Denoiser, Denoiser]:
        """Return the decoder's network with its condition, and with what guidance leads away from."""
        text, tokens, keep = self._text(words)
        away = None if negative is None else self._text(negative)
        return self.pipeline.denoisers(z_image, text, tokens, keep_image=keep_image, keep_text=keep, negative=away)

    def finished(self, images: jax.Array) -> jax.Array:
        """Return the decoder's images as the pipeline hands them on."""
        return images

    def enlarge(self, images: jax.Array, keys: Keys, wraps: Wraps) -> tuple[jax.Array, list[jax.Array]]:
        """Return the images, and bool[B] for each upsampler: whether all that it returned is finite.

        keys: those of the images, from which each stage derives its own.
        """
        return upsample_all(self.pipeline, images, keys, 2, wraps=wraps)

    def _text(self, words: Words) -> tuple[Text, jax.Array, jax.Array]:
        return self.pipeline.encode_text(words.tokens, words.mask), words.tokens, words.keep


class KarloDecoding(Decoding):
    """That of a `Karlo`, where a dropped caption is the empty one."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the decoder's images and of the upsampler's."""
        return self.pipeline.sizes

    @property
    def upsamplers(self) -> tuple[str, ...]:
        """Names of the upsamplers."""
        return ("upsampler",)

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return 3

    @property
    def embed_dim(self) -> int:
        """Size of the embeddings."""
        return self.pipeline.decoder.embed_dim

    @property
    def logit_scale(self) -> float:
        """What OpenAI's CLIP multiplies cosines by; Karlo's files do not have it."""
        return 100.0

    @property
    def diffusion(self) -> Diffusion:
        """The decoder's process."""
        return DIFFUSION["decoder"]

    @property
    def moments(self) -> None:
        """Converted networks have no second moments."""
        return None

    @property
    def stops(self) -> list[None]:
        """No stage stops early."""
        return [None, None]

    @property
    def has_prior(self) -> bool:
        """Whether embeddings of captions can be sampled."""
        return self.pipeline.prior is not None

    @property
    def batch_size(self) -> int:
        """Images at a time by default."""
        return 1

    def check_kept(self, keep_image: Any, words: Words) -> None:
        """Do nothing: Karlo's networks were trained without each of their conditions."""

    def configured(
        self, decoder: Sampling | None, options: Mapping[str, Any], negative: Words | None = None
    ) -> "KarloDecoding":
        """Return the same for one request, without the tokenizer; see `UnCLIPDecoding.configured`."""
        sampling = self._samplings(decoder, options, guided=("prior", "decoder"))
        for stage, own in sampling.items():
            check_steps(f"{stage}_steps", own, DIFFUSION[stage])
        return KarloDecoding(self.pipeline.replace(sampling=sampling, tokenizer=None))

    def pixels(self, images: Any) -> np.ndarray:
        """Prepare images for `embed`. Returns float32[N, S, S, 3]."""
        return clip_pixels(images, self.pipeline.pixel_size)

    def words(self, captions: Iterable[str]) -> Words:
        """Return captions as arrays."""
        captions, length = as_prompts(captions), self.pipeline.text.text.context
        return Words(
            *tokenize(self.pipeline.tokenizer, captions, length, allow_empty=True), np.ones(len(captions), bool)
        )

    def negative(self, captions: Any, count: int) -> Words:
        """Return the captions that guidance leads away from; the empty one by default."""
        length = self.pipeline.text.text.context
        return Words(*negative_tokens(self.pipeline.tokenizer, captions, count, length), np.ones(count, bool))

    # ---- Functions of arrays ---------------------------------------------------------------------------------------

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Return image embeddings as the decoder takes them, float32[B, D]."""
        return self.pipeline.encode_image(pixels)

    def embed_text(self, words: Words) -> jax.Array:
        """Return text embeddings, unit vectors float32[B, D]."""
        return normalize(self._text(words).z)

    def sample_embedding(self, words: Words, negative: Words, keys: Keys) -> jax.Array:
        """Sample image embeddings of captions, float32[B, D]."""
        return self.pipeline.sample_embedding(self._text(words), self._text(negative), keys)

    def denoisers(
        self, z_image: jax.Array, keep_image: jax.Array, words: Words, negative: Words
    ) -> tuple[Denoiser, Denoiser]:
        """Return the decoder's network with its condition, and with what guidance leads away from."""
        return self.pipeline.denoisers(z_image, self._text(words), self._text(negative), keep_image=keep_image)

    def finished(self, images: jax.Array) -> jax.Array:
        """Return the decoder's images as the pipeline hands them on."""
        return bounded(images)

    def enlarge(self, images: jax.Array, keys: Keys, wraps: Wraps) -> tuple[jax.Array, list[jax.Array]]:
        """Return the images, and whether all that the upsampler returned is finite; see `UnCLIPDecoding.enlarge`."""
        images = self.pipeline.upsample(images, transition_keys(keys, 2), wrap_step=wraps[0])
        return images, [finite(images)]

    def _text(self, words: Words) -> Text:
        return self.pipeline.encode_text(words.tokens, words.mask)


def decoding_of(pipeline: Any) -> Decoding:
    """Return the interface of a pipeline.

    Raises:
        ValueError: if it is neither an `UnCLIP` of RGB images nor a `Karlo` with an image encoder and a tokenizer.
    """
    if isinstance(pipeline, UnCLIP):
        decoding = UnCLIPDecoding(pipeline.checked())
        if decoding.channels != 3:
            raise ValueError(f"images are manipulated in RGB, and this decoder has channels={decoding.channels}")
        return decoding
    if not isinstance(pipeline, Karlo):
        name = type(getattr(pipeline, "network", pipeline)).__name__
        raise ValueError(f"images are manipulated by an UnCLIP or a Karlo, got a {name}, which has no image embedding")
    if pipeline.image is None:
        raise ValueError("this Karlo has no image encoder; convert the image variation pipeline, or the original files")
    if pipeline.tokenizer is None:
        raise ValueError("this pipeline has no tokenizer; give it one, as in karlo.replace(tokenizer=...)")
    return KarloDecoding(pipeline)
