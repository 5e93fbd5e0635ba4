"""unCLIP as one object: captions in, images out (DALL-E 2, Ramesh et al. 2022)."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.data.tokenizer import Tokenizer, tokenizer_from_config
from ddpm_jax.data.transforms import resize_center_crop
from ddpm_jax.diffusion.samplers import RecordedNoise
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.sampling import Sampling, sample_with
from ddpm_jax.diffusion.tokens import TokenSampling
from ddpm_jax.models.autoregressive_prior import AutoregressivePrior
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.pipelines.codes import check_codes, sample_code_embedding
from ddpm_jax.pipelines.enlarging import (
    Pairs,
    checked_enlarging,
    enlarging_options,
    in_context,
    stops_of,
    stored_enlarging,
    with_stops,
)
from ddpm_jax.pipelines.request import (
    as_prompts,
    as_seed,
    call_fitting,
    check_steps,
    image_indices,
    image_keys,
    in_batches,
    negative_tokens,
    on_mesh,
    stage_samplings,
    tokenize,
)
from ddpm_jax.pipelines.stages import (
    Text,
    check_request_kept,
    check_statistics,
    embedding_norm,
    finite,
    guided_stages,
    kept_in_training,
    with_moments,
)
from ddpm_jax.pipelines.upsampling import (
    IMAGES,
    check_upsamplers,
    default_names,
    image_size_of,
    noise_levels,
    upsample_all,
)
from ddpm_jax.storage.clip_images import encode_images
from ddpm_jax.storage.metadata import thaw
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import Denoiser, to_float, to_uint8

Embedding = Literal["prior", "text", "image", "none"]
EMBEDDINGS = ("prior", "text", "image", "none")


def _static(default: Any) -> Any:
    return flax.struct.field(pytree_node=False, default=default)


class UnCLIP(flax.struct.PyTreeNode):
    """The models and how they are sampled; a tree of arrays, so that it can be an argument of a jitted function.

    `ddpm_jax.load` opens one, `ddpm_jax.pipelines.save` writes it.

    Attributes:
        clip: a `CLIP`; its metadata has "tokenizer" and "length", the number of tokens of a caption.
        prior: a `DiffusionPrior`; its metadata has "diffusion" and "embedding", with the scale that it works at or
            "standardized". Or an `AutoregressivePrior`.
        decoder: a `Decoder`; its metadata has "diffusion" and "image_size".
        upsamplers: any number of `Upsampler`s, smallest images first; metadata "diffusion" and "image_size".
        sampling: how each stage is sampled: "prior" (with codes a `TokenSampling`), "decoder", and each of the
            upsamplers by its name.
        noise_levels: of the noise that is added to the images that upsamplers enlarge, by their names; those of their
            metadata, or 0, by default.
        names: of the upsamplers, as options of `generate` and keys of `sampling` have them; "upsampler" for one and
            "upsampler_1", ... for several by default.
        tokenizer: reads captions.
        candidates: embeddings that are sampled for a caption, of which the one nearest to it is taken.
        batch_size: images at a time, unless `generate` is given another number.
        codes: the `EmbeddingCodes` that an `AutoregressivePrior` predicts; None with a `DiffusionPrior`.
        statistics: the `EmbeddingStatistics` of a `DiffusionPrior` that works on standardized embeddings, or None.
        enlarging: tiles and truncation of upsamplers by their names, `enlarging.Enlarging`; whole images by default.
    """

    clip: Model
    prior: Model
    decoder: Model
    upsamplers: tuple[Model, ...] = ()
    sampling: Mapping[str, Sampling | TokenSampling] = flax.struct.field(default_factory=dict)
    noise_levels: Mapping[str, float] = flax.struct.field(default_factory=dict)
    names: tuple[str, ...] = _static(())
    tokenizer: Tokenizer | None = _static(None)
    candidates: int = _static(2)
    batch_size: int = _static(64)
    codes: Model | None = None
    statistics: Model | None = None
    enlarging: Pairs = _static(())

    @property
    def image_size(self) -> int:
        """Height and width of the images that `generate` returns, in pixels."""
        return image_size_of((self.decoder, *self.upsamplers)[-1])

    def checked(self) -> "UnCLIP":
        """Return the pipeline with all defaults filled in.

        Raises:
            ValueError: if the models do not fit each other.
        """
        priors = (DiffusionPrior, AutoregressivePrior)
        for role, kinds in {"clip": (CLIP,), "prior": priors, "decoder": (Decoder,)}.items():
            if not isinstance(getattr(self, role).network, kinds):
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{role} must be a {names}, got a {type(getattr(self, role).network).__name__}")
        clip, metadata = self.clip.network, self.clip.metadata
        widths = {role: getattr(self, role).network.embed_dim for role in ("clip", "prior", "decoder")}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{role} has {width}" for role, width in widths.items())
            raise ValueError(f"the models are for embeddings of different sizes (embed_dim): {found}")
        for name in ("tokenizer", "length"):
            if name not in metadata:
                raise ValueError(f"the metadata of clip lacks {name!r}")
        tokenizer = self.tokenizer or tokenizer_from_config(thaw(metadata["tokenizer"]))
        length, known = metadata["length"], clip.text.vocab_size
        if tokenizer.vocab_size != known:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, and clip's text tower {known}")
        for role, context in {"clip": clip.text.context, "prior": self.prior.network.context}.items():
            if length > context or (role == "prior" and length != context):
                raise ValueError(f"captions have length {length} by clip's metadata, and {role} reads {context} tokens")
        if self._by_codes:
            check_codes(self.prior, self.codes, self.statistics)
        elif self.codes is not None:
            raise ValueError("codes are for an AutoregressivePrior, and prior is a DiffusionPrior")
        else:
            check_statistics(self.prior, self.statistics)
        names = self.names or default_names(len(self.upsamplers))
        check_upsamplers(self.decoder, self.upsamplers, names, "decoder")
        own = TokenSampling() if self._by_codes else Sampling("ancestral", 64)
        default = {"prior": own, **dict.fromkeys(("decoder", *names), IMAGES)}
        unknown = sorted(set(self.sampling) - set(default))
        if unknown:
            raise ValueError(f"sampling has no stage {unknown[0]!r}; there are {', '.join(default)}")
        for stage, own in default.items():
            if not isinstance(self.sampling.get(stage, own), type(own)):
                given = type(self.sampling[stage]).__name__
                raise ValueError(f"sampling of {stage} must be a {type(own).__name__}, got a {given}")
        sampling = {stage: self.sampling.get(stage, own).checked(f"{stage}_") for stage, own in default.items()}
        levels, _ = noise_levels(dict(zip(names, self.upsamplers)), self.noise_levels, {})
        pipeline = self.replace(tokenizer=tokenizer, sampling=sampling, noise_levels=levels, names=names)
        pipeline = pipeline.replace(
            enlarging=checked_enlarging(names, self.enlarging, (self.decoder, *self.upsamplers))
        )
        for stage, model in pipeline.diffusions().items():
            check_steps(f"{stage}_steps", sampling[stage], model.diffusion)
        return pipeline

    @property
    def models(self) -> dict[str, Model]:
        """The models but for the upsamplers, by role."""
        fitted = {"codes": self.codes, "statistics": self.statistics}
        fitted = {role: model for role, model in fitted.items() if model is not None}
        return {"clip": self.clip, **fitted, "prior": self.prior, "decoder": self.decoder}

    @property
    def options(self) -> dict[str, Any]:
        """Options in pipeline.json besides models and sampling."""
        levels = {"noise_levels": dict(self.noise_levels)} if self.noise_levels else {}
        enlarging = {"enlarging": own} if (own := stored_enlarging(self.enlarging)) else {}
        return {"candidates": self.candidates, "batch_size": self.batch_size, **levels, **enlarging}

    @property
    def _by_codes(self) -> bool:
        return isinstance(self.prior.network, AutoregressivePrior)

    def diffusions(self) -> dict[str, Model]:
        """Return the diffusion models by the names of their stages."""
        prior = {} if self._by_codes else {"prior": self.prior}
        return prior | {"decoder": self.decoder, **dict(zip(self.names, self.upsamplers))}

    def generate(
        self,
        prompts: Iterable[str],
        *,
        negative_prompts: str | Iterable[str] | None = None,
        seed: int = 0,
        start: int = 0,
        embedding: Embedding = "prior",
        images: Any = None,
        use_text: bool = True,
        low_res: bool = False,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
        report: Callable[[int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Sample one image for every prompt.

        Image i depends only on the seed, i and prompt i; on the devices and the batch size as float32 rounding does,
        which is one grey level at most where it shows. A program is compiled for a batch size, the samplers and their
        numbers of steps, once; other scales, etas, thresholds, seeds and numbers of prompts run the same program.

        Args:
            prompts: captions, of which "" is the unconditional one; one too long is cut, with a warning.
            negative_prompts: captions that guidance leads away from, one for all prompts or one for each; the null
                conditions that the networks were trained with by default.
            seed: seed of all random numbers, in [0, 2**32).
            start: i of the first prompt. generate(["c"], start=2) is image 2 of generate(["a", "b", "c", "d"]).
            embedding: what the decoder is given as image embedding: the "prior"'s, the CLIP "text" embedding, the true
                embedding of `images` ("image"), or the null embedding ("none").
            images: N images, for embedding="image", as `data.transforms.as_images` takes them; those of another size
                than CLIP's are resized and cropped by `data.transforms.resize_center_crop`.
            use_text: whether the decoder is given the caption.
            low_res: True returns the decoder's images, not upsampled.
            batch_size: images at a time. What is left over after whole batches is taken one by one if it is at most
                half a batch, and otherwise filled up.
            mesh: devices of this process that share each batch, with an axis "data"; one device by default.
            report: called with the number of images each time some are done.
            options: the fields of `diffusion.sampling.Sampling` of a stage by the names <stage>_<field>, such as
                prior_scale, decoder_steps and upsampler_sampler, and <field> alone for the decoder; of an
                `AutoregressivePrior` prior_scale, prior_temperature and prior_top_p; and <upsampler>_noise_level,
                <upsampler>_truncated, <upsampler>_tile and <upsampler>_overlap, see `enlarging.Enlarging`.

        Returns:
            uint8[N, R, R, 3].

        Raises:
            ValueError: if there is no prompt, one has an unknown word, an argument does not fit, or the parameters do
                not fit the networks.
            NotFiniteError: if a network returned NaN or infinity.
        """
        prompts, images = _check_request(prompts, embedding, images, self.clip.network.vision.image_size)
        pipeline = self.checked()
        models = pipeline.diffusions()
        levels, options = noise_levels(dict(zip(pipeline.names, self.upsamplers)), pipeline.noise_levels, options)
        enlarging, options = enlarging_options(pipeline.names, dict(pipeline.enlarging), options)
        length = self.clip.metadata["length"]
        tokens, mask = tokenize(pipeline.tokenizer, prompts, length, allow_empty=True)
        keep = np.array([bool(pipeline.tokenizer.ids(text)) for text in prompts])
        negative = _negative(pipeline.tokenizer, negative_prompts, len(prompts), length)
        check_request_kept(pipeline, keep, embedding, use_text)
        able = {"guided": guided_stages(pipeline.models, negative[2]), "normed": ("prior",)}
        sampling = stage_samplings(pipeline.sampling, options, measured=with_moments(models), **able)
        for stage, model in models.items():
            check_steps(f"{stage}_steps", sampling[stage], model.diffusion)
        images_of = {name: models[name] for name in ("decoder", *pipeline.names)}
        enlarging, levels = with_stops(enlarging, images_of, sampling, levels)
        names = () if low_res else pipeline.names
        # Without the tokenizer, which the compiled program would keep alive.
        pipeline = pipeline.replace(sampling=sampling, noise_levels=levels, tokenizer=None, batch_size=0)
        pipeline = pipeline.replace(enlarging=() if low_res else enlarging)
        pipeline, place, unit = on_mesh(mesh, pipeline)
        static = {"embedding": embedding, "use_text": bool(use_text), "low_res": bool(low_res)}
        return in_batches(
            functools.partial(call_fitting, in_context(mesh, _generate), pipeline, np.uint32(as_seed(seed)), **static),
            (image_indices(start, len(prompts)), tokens, mask, keep, *negative, images),
            batch_size=self.batch_size if batch_size is None else batch_size,
            stages=("CLIP model", "prior", "decoder", *names),
            report=report,
            place=place,
            unit=unit,
        )

    # ---- Stages, as pure functions of arrays -------------------------------------------------------------------------

    def encode_text(self, tokens: jax.Array, mask: jax.Array) -> Text:
        """Run CLIP's text tower. tokens: int32[B, L]; mask: bool[B, L], True at real tokens."""
        z, hidden = self.clip.apply(tokens, mask, method=CLIP.encode_text)
        return Text(normalize(z), hidden, mask)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Run CLIP's image tower on float32[B, S, S, 3] in [-1, 1]. Returns unit vectors, float32[B, D]."""
        return encode_images(self.clip, images)

    def sample_embedding(
        self,
        text: Text,
        tokens: jax.Array,
        keys: jax.Array | RecordedNoise,
        *,
        keep_text: jax.Array | None = None,
        negative: tuple[Text, jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Sample CLIP image embeddings for captions (DALL-E 2, section 2.2).

        Of `candidates` samples for each caption the one with the largest z_text . z_image is returned.

        Args:
            text: of the captions, from `encode_text`.
            tokens: int32[B, L].
            keys: [B].
            keep_text: bool[B], False drops the caption.
            negative: (text, tokens, keep_text) of the negative prompts; the null condition by default.

        Returns:
            Unit vectors, float32[B, D].
        """
        keep_text = kept_in_training(self.prior, "caption", keep_text, len(tokens))
        if negative is not None:
            negative = (*negative[:2], kept_in_training(self.prior, "caption", negative[2], len(tokens)))
        by = self._by_code if self._by_codes else self._by_diffusion
        one = by(text, tokens, keys, keep_text, negative)
        found = jnp.stack([one(i) for i in range(self.candidates)])
        nearness = jnp.where(keep_text[None], jnp.einsum("nbd,bd->nb", found, text.z), 0.0)
        return jnp.take_along_axis(found, jnp.argmax(nearness, axis=0)[None, :, None], axis=0)[0]

    def _by_diffusion(self, text: Text, tokens: jax.Array, keys: Any, keep_text: jax.Array, negative: Any) -> Any:
        """Return number -> one candidate for each caption, by the diffusion prior."""
        model, norm = self.prior, embedding_norm(self.prior, self.statistics)
        condition = lambda text, tokens, keep: (  # noqa: E731
            lambda zt, t: model.apply_traced(zt, t, text.z, _read_by(model, text, tokens), text.mask, keep)
        )
        null = condition(text, tokens, jnp.zeros_like(keep_text)) if negative is None else condition(*negative)

        def one(number: int) -> jax.Array:
            z = sample_with(
                self.sampling["prior"],
                model.diffusion,
                condition(text, tokens, keep_text),
                transition_keys(keys, number),
                text.z.shape[1:],
                null=null,
                moments=model.moments,
                project=norm.project,
            )
            return normalize(norm.restore(z))

        return one

    def _by_code(self, text: Text, tokens: jax.Array, keys: Any, keep_text: jax.Array, negative: Any) -> Any:
        """Return number -> one candidate for each caption, by the autoregressive prior."""
        read = lambda text, tokens, keep: (text, _read_by(self.prior, text, tokens), keep)  # noqa: E731
        null = (text, tokens, jnp.zeros_like(keep_text)) if negative is None else negative
        arguments = (read(text, tokens, keep_text), read(*null))
        return lambda number: sample_code_embedding(
            self.prior, self.codes, self.sampling["prior"], transition_keys(keys, number), *arguments
        )

    def decode(
        self,
        z_image: jax.Array,
        text: Text,
        tokens: jax.Array,
        keys: jax.Array | RecordedNoise,
        *,
        keep_image: jax.Array | None = None,
        keep_text: jax.Array | None = None,
        negative: tuple[Text, jax.Array, jax.Array] | None = None,
        stop: int | None = None,
    ) -> jax.Array:
        """Sample images of embeddings and captions (DALL-E 2, section 2.1).

        Args:
            z_image: unit vectors, float32[B, D].
            text: of the captions, from `encode_text`.
            tokens: int32[B, L].
            keys: [B].
            keep_image: bool[B], False gives the null embedding.
            keep_text: bool[B], False drops the caption.
            negative: (text, tokens, keep_text) of the negative prompts, with the null embedding; both conditions
                are dropped together by default.
            stop: steps after which the noisy images are returned; None makes all.

        Returns:
            float32[B, R, R, 3] in [-1, 1].
        """
        model, size = self.decoder, self.decoder.metadata["image_size"]
        given = {"keep_image": keep_image, "keep_text": keep_text, "negative": negative}
        denoise, null = self.denoisers(z_image, text, tokens, **given)
        return sample_with(
            self.sampling["decoder"],
            model.diffusion,
            denoise,
            keys,
            (size, size, model.metadata.get("channels", 3)),
            null=null,
            moments=model.moments,
            stop=stop,
        )

    def denoisers(
        self,
        z_image: jax.Array,
        text: Text,
        tokens: jax.Array,
        *,
        keep_image: jax.Array | None = None,
        keep_text: jax.Array | None = None,
        negative: tuple[Text, jax.Array, jax.Array] | None = None,
    ) -> tuple[Denoiser, Denoiser]:
        """Return the decoder closed over its conditions, and over what guidance leads away from; as for `decode`."""
        model, nothing = self.decoder, jnp.zeros(len(tokens), bool)
        keep_image = kept_in_training(model, "image_embedding", keep_image, len(tokens))
        keep_text = kept_in_training(model, "caption", keep_text, len(tokens))
        condition = lambda text, tokens, keep_image, keep_text: (  # noqa: E731
            lambda xt, t: model.apply_traced(
                xt, t, z_image, text.z, _read_by(model, text, tokens), text.mask, keep_image, keep_text
            )
        )
        null = condition(text, tokens, nothing, nothing)
        if negative is not None:
            away = kept_in_training(model, "caption", negative[2], len(tokens))
            null = condition(negative[0], negative[1], nothing, away)
        return condition(text, tokens, keep_image, keep_text), null


def _read_by(model: Model, text: Text, tokens: jax.Array) -> jax.Array:
    """Return the text input of a network: token ids if it has a text encoder, else hidden states."""
    return text.hidden if model.network.text_encoder is None else tokens


def _negative(tokenizer: Tokenizer, given: Any, count: int, length: int) -> tuple[Any, Any, Any]:
    """Return tokens, mask and whether there are any, of the captions that guidance leads away from; None of none."""
    tokens, mask = (None, None) if given is None else negative_tokens(tokenizer, given, count, length)
    return tokens, mask, None if given is None else mask.sum(1) > 2


def _check_request(prompts: Iterable[str], embedding: str, images: Any, size: int) -> tuple[list[str], Any]:
    """Return the prompts, and the images as uint8[N, size, size, 3] or None."""
    if embedding not in EMBEDDINGS:
        raise ValueError(f"{embedding=} must be one of {', '.join(EMBEDDINGS)}")
    prompts = as_prompts(prompts)
    if (embedding == "image") != (images is not None):
        raise ValueError('images are needed for embedding="image", and only then')
    if images is None:
        return prompts, None
    images = resize_center_crop(images, size)
    if len(images) != len(prompts):
        raise ValueError(f"images must be as many as prompts, got {len(images)} and {len(prompts)}")
    return prompts, images


@functools.partial(jax.jit, static_argnames=("embedding", "use_text", "low_res"))
def _generate(
    pipeline: UnCLIP,
    seed: jax.Array,
    index: jax.Array,
    tokens: jax.Array,
    mask: jax.Array,
    keep: jax.Array,
    negative_tokens: jax.Array | None,
    negative_mask: jax.Array | None,
    negative_keep: jax.Array | None,
    images: jax.Array | None,
    *,
    embedding: Embedding,
    use_text: bool,
    low_res: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, 3], and bool[B] for each stage: whether all that it returned is finite.
    """
    keys, everything = image_keys(seed, index), jnp.ones(len(tokens), bool)
    text = pipeline.encode_text(tokens, mask)
    negative = None
    if negative_tokens is not None:
        negative = (pipeline.encode_text(negative_tokens, negative_mask), negative_tokens, negative_keep)
    keep_image = everything
    if embedding == "prior":
        z_image = pipeline.sample_embedding(text, tokens, transition_keys(keys, 0), keep_text=keep, negative=negative)
    elif embedding == "image":
        z_image = pipeline.encode_image(to_float(images))
    else:
        z_image, keep_image = text.z, keep if embedding == "text" else ~everything
    out = pipeline.decode(
        z_image,
        text,
        tokens,
        transition_keys(keys, 1),
        keep_image=keep_image,
        keep_text=keep if use_text else ~everything,
        negative=negative,
        stop=None if low_res else stops_of(pipeline.enlarging)[0],
    )
    encoded = everything if embedding == "none" else finite(text.z) & finite(text.hidden)
    if embedding == "image":
        encoded &= finite(z_image)
    finite_of = [encoded, finite(z_image) if embedding == "prior" else everything, finite(out)]
    if not low_res:
        out, others = upsample_all(pipeline, out, keys, 2)
        finite_of += others
    return to_uint8(out), tuple(finite_of)
