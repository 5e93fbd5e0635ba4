"""A cascade: images from noise, class labels or captions, enlarged by any number of upsamplers.

One model alone is DDPM (Ho et al. 2020); with a classifier it is guided diffusion (Dhariwal and Nichol 2021), with
upsamplers cascaded diffusion (Ho et al. 2022) and SR3, with captions and a noised CLIP GLIDE (Nichol et al. 2022).
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.diffusion.samplers import RecordedNoise
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.sampling import Sampling, sample_with
from ddpm_jax.pipelines.captions import (
    Captions,
    check_noised_clip,
    check_same_process,
    no_captions,
    similarity,
    token_metadata,
    tokenized,
)
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
    MOST_IMAGES,
    as_int,
    as_labels,
    as_seed,
    call_fitting,
    check_steps,
    image_indices,
    image_keys,
    in_batches,
    on_mesh,
    stage_samplings,
)
from ddpm_jax.pipelines.stages import finite, with_moments
from ddpm_jax.pipelines.upsampling import (
    check_upsamplers,
    default_names,
    default_sampling,
    denoiser,
    image_size_of,
    noise_levels,
    upsample_all,
)
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import to_uint8

_CONDITIONS = ("labels", "tokens", "low_resolution")


def _static(default: Any) -> Any:
    return flax.struct.field(pytree_node=False, default=default)


class Cascade(flax.struct.PyTreeNode):
    """The models and how they are sampled; a tree of arrays, so that it can be an argument of a jitted function.

    `ddpm_jax.load` opens one, `ddpm_jax.pipelines.save` writes it.

    Attributes:
        base: a network (xt, t), (xt, t, y) or (xt, t, tokens, mask); its metadata has "diffusion", "image_size", and
            "labels" if it is class-conditional, "tokens" if it has captions.
        upsamplers: any number of `Upsampler`s, smallest images first; metadata "diffusion", "image_size" and
            "low_resolution", and "labels" or "tokens" like the base.
        classifier: a network (xt, t) -> logits of classes of noised images, for `classifier_scale`; or None.
        sampling: how each stage is sampled: "base", and each of the upsamplers by its name.
        noise_levels: of the noise that is added to the images that upsamplers enlarge, by their names; those of their
            metadata, or 0, by default.
        names: of the upsamplers, as options of `generate` and keys of `sampling` have them; "upsampler" for one and
            "upsampler_1", ... for several by default.
        batch_size: images at a time, unless `generate` is given another number.
        enlarging: tiles and truncation of upsamplers by their names, `enlarging.Enlarging`; whole images by default.
        noised_clip: a `NoisedCLIP` of images of the base, for `clip_scale`; or None.
    """

    base: Model
    upsamplers: tuple[Model, ...] = ()
    classifier: Model | None = None
    sampling: Mapping[str, Sampling] = flax.struct.field(default_factory=dict)
    noise_levels: Mapping[str, float] = flax.struct.field(default_factory=dict)
    names: tuple[str, ...] = _static(())
    batch_size: int = _static(16)
    enlarging: Pairs = _static(())
    noised_clip: Model | None = None

    @property
    def image_size(self) -> int:
        """Height and width of the images that `generate` returns, in pixels."""
        return image_size_of((self.base, *self.upsamplers)[-1])

    @property
    def models(self) -> dict[str, Model]:
        """The models but for the upsamplers, by role."""
        found = {"base": self.base, "classifier": self.classifier, "noised_clip": self.noised_clip}
        return {role: model for role, model in found.items() if model is not None}

    @property
    def captioned(self) -> bool:
        """Whether `generate` takes captions."""
        return self.noised_clip is not None or token_metadata(self._diffusions) is not None

    @property
    def _diffusions(self) -> dict[str, Model]:
        return {"base": self.base, **dict(zip(self.names or default_names(len(self.upsamplers)), self.upsamplers))}

    @property
    def options(self) -> dict[str, Any]:
        """Options in pipeline.json besides models and sampling."""
        levels = {"noise_levels": dict(self.noise_levels)} if self.noise_levels else {}
        own = stored_enlarging(self.enlarging)
        return {"batch_size": self.batch_size, **levels, **({"enlarging": own} if own else {})}

    @property
    def labels(self) -> Mapping[str, Any] | None:
        """Metadata of the classes, "num_classes", "null" and "names"; None if no model has classes."""
        for model in (self.base, self.classifier, *self.upsamplers):
            if model is not None and "labels" in model.metadata:
                return model.metadata["labels"]
        return None

    def checked(self) -> "Cascade":
        """Return the pipeline with all defaults filled in.

        Raises:
            ValueError: if the models do not fit each other.
        """
        names = self.names or default_names(len(self.upsamplers))
        check_upsamplers(self.base, self.upsamplers, names, "base")
        diffusions = self._diffusions
        token_metadata(diffusions)
        for name, model in diffusions.items():
            odd = [condition for condition in model.metadata.get("conditions", ()) if condition not in _CONDITIONS]
            if odd:
                raise ValueError(f"{name} is conditioned on {odd[0]}, which a Cascade does not have")
            if "low_resolution" in model.metadata.get("conditions", ()) and name == "base":
                raise ValueError("base is an upsampler: it is conditioned on low_resolution")
        counts = {
            name: model.metadata["labels"]["num_classes"]
            for name, model in (self.models | diffusions).items()
            if "labels" in model.metadata
        }
        if len(set(counts.values())) > 1:
            raise ValueError("the models have different numbers of classes: " + _listed(counts))
        if self.classifier is not None:
            self._check_classifier(self.classifier)
        if self.noised_clip is not None:
            check_noised_clip(self.noised_clip, self.base)
        unknown = sorted(set(self.sampling) - set(diffusions))
        if unknown:
            raise ValueError(f"sampling has no stage {unknown[0]!r}; there are {', '.join(diffusions)}")
        default = {stage: default_sampling(model) for stage, model in diffusions.items()}
        sampling = {stage: own.checked(f"{stage}_") for stage, own in (default | dict(self.sampling)).items()}
        for stage, model in diffusions.items():
            check_steps(f"{stage}_steps", sampling[stage], model.diffusion)
        levels, _ = noise_levels(dict(zip(names, self.upsamplers)), self.noise_levels, {})
        enlarging = checked_enlarging(names, self.enlarging, (self.base, *self.upsamplers))
        return self.replace(names=names, sampling=sampling, noise_levels=levels, enlarging=enlarging)

    def _check_classifier(self, classifier: Model) -> None:
        if "labels" not in classifier.metadata:
            raise ValueError("the metadata of classifier lacks 'labels'")
        if image_size_of(classifier) != image_size_of(self.base):
            sizes = {role: image_size_of(model) for role, model in self.models.items() if role != "noised_clip"}
            raise ValueError("base and classifier are for images of different sizes: " + _listed(sizes))
        check_same_process("classifier", classifier, self.base)

    def generate(
        self,
        num_images: int | None = None,
        *,
        labels: Any = None,
        prompts: str | Iterable[str] | None = None,
        seed: int = 0,
        start: int = 0,
        low_res: bool = False,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
        report: Callable[[int], None] | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Sample images.

        Image i depends only on the seed, i and label i; on the devices and the batch size as float32 rounding does. A
        program is compiled for a batch size, the samplers and their numbers of steps, once; other scales, etas,
        thresholds, seeds and numbers of images run the same program.

        Args:
            num_images: N; the number of labels or prompts by default, or 1.
            labels: of a class-conditional model: one for each image, or one for all: the index of a class in
                [0, num_classes), its name, or None for the null class. All are the null class by default, if there is
                one.
            prompts: captions, of a pipeline with a noised CLIP or a base that is conditioned on captions: one for each
                image, or one for all; the null caption by default.
            seed: seed of all random numbers, in [0, 2**32).
            start: index of the first image. generate(1, start=2) is image 2 of generate(4).
            low_res: True returns the base's images, not upsampled.
            batch_size: images at a time. What is left over after whole batches is taken one by one if it is at most
                half a batch, and otherwise filled up.
            mesh: devices of this process that share each batch, with an axis "data"; one device by default.
            report: called with the number of images each time some are done.
            options: the fields of `diffusion.sampling.Sampling` for the base, such as sampler, steps, scale and
                classifier_scale; with the prefix <upsampler>_ for an upsampler; and <upsampler>_noise_level,
                <upsampler>_truncated, <upsampler>_tile and <upsampler>_overlap, see `enlarging.Enlarging`.

        Returns:
            uint8[N, R, R, C].

        Raises:
            ValueError: if an argument does not fit, or the parameters do not fit the networks.
            NotFiniteError: if a network returned NaN or infinity.
        """
        pipeline = self.checked()
        stages = pipeline._diffusions
        texts, num_images = pipeline._captions(prompts, num_images)
        labels, count = self._labels(labels, num_images)
        texts = pipeline._null_captions(count) if texts is None else texts
        levels, options = noise_levels({name: stages[name] for name in pipeline.names}, pipeline.noise_levels, options)
        enlarging, options = enlarging_options(pipeline.names, dict(pipeline.enlarging), options)
        sampling = pipeline._samplings(options)
        enlarging, levels = with_stops(enlarging, stages, sampling, levels)
        pipeline._check_guides(sampling["base"], labels, texts)
        pipeline = pipeline.replace(sampling=sampling, noise_levels=levels, batch_size=0)
        pipeline = pipeline.replace(enlarging=() if low_res else enlarging)
        pipeline, place, unit = on_mesh(mesh, pipeline)
        program = in_context(mesh, _generate_low if low_res else _generate)
        return in_batches(
            functools.partial(call_fitting, program, pipeline, np.uint32(as_seed(seed))),
            (image_indices(start, count), labels, *texts),
            batch_size=self.batch_size if batch_size is None else batch_size,
            stages=("base", *(() if low_res else pipeline.names)),
            report=report,
            name="images",
            place=place,
            unit=unit,
        )

    def _samplings(self, options: Mapping[str, Any]) -> dict[str, Sampling]:
        """Return how each stage is sampled; options: those of a request that are not of enlarging."""
        stages = self._diffusions
        sampling = stage_samplings(
            self.sampling,
            options,
            main="base",
            arguments=("num_images", "prompts" if self.captioned else "labels"),
            guided=[name for name, model in stages.items() if _can_drop(model)],
            classified=("base",) if self.classifier is not None else (),
            clip_guided=("base",) if self.noised_clip is not None else (),
            measured=with_moments(stages),
        )
        for stage, chosen in sampling.items():
            check_steps(f"{stage}_steps", chosen, stages[stage].diffusion)
        return sampling

    def _check_guides(self, sampling: Sampling, labels: np.ndarray | None, texts: Captions) -> None:
        """Raise ValueError if the base is to be guided to what is not given, or by what cannot guide it."""
        if sampling.classifier_scale is not None:
            given = f"classifier_scale={sampling.classifier_scale}"
            if labels is None or (labels < 0).any():
                raise ValueError(f"{given} needs the label of every image, which the classifier guides to")
            if not self.classifier.metadata.get("noised", True):
                raise ValueError(f"{given} needs a classifier of noised images, and this one was trained on clean ones")
        if sampling.clip_scale is not None and texts.clip_tokens is None:
            raise ValueError(f"clip_scale={sampling.clip_scale} needs prompts, which the noised CLIP guides to")

    def _captions(self, prompts: Any, num_images: int | None) -> tuple[Captions | None, int | None]:
        """Return the captions, and the number of images if it is known."""
        if prompts is None:
            return None, num_images
        if not self.captioned:
            raise ValueError(
                "prompts is no argument of this pipeline, which generates images from num_images and labels"
            )
        count = None if num_images is None else as_int("num_images", num_images, least=1, most=MOST_IMAGES)
        texts = tokenized(prompts, count, token_metadata(self._diffusions), self.noised_clip)
        return texts, len(next(array for array in texts if array is not None))

    def _null_captions(self, count: int) -> Captions:
        own = token_metadata(self._diffusions)
        return Captions() if own is None else no_captions(count, own)

    def _labels(self, labels: Any, num_images: int | None) -> tuple[np.ndarray | None, int]:
        """Return the labels, int32[N], -1 for the null class, or None; and N."""
        known = self.labels
        count = None if num_images is None else as_int("num_images", num_images, least=1, most=MOST_IMAGES)
        if known is None:
            if labels is not None:
                raise ValueError(f"labels={labels!r:.60}: no model of this pipeline has classes")
            return None, 1 if count is None else count
        found = as_labels(labels, known["num_classes"], known.get("names"), count)
        for name, model in self._diffusions.items():
            if "labels" in model.metadata.get("conditions", ()) and _null(model) is None and (found < 0).any():
                raise ValueError(
                    f"labels is needed: {name} is class-conditional, and was trained without a null class; give one of "
                    f"{known['num_classes']} classes for each image"
                )
        return found, len(found)

    def sample_base(
        self,
        keys: jax.Array | RecordedNoise,
        labels: jax.Array | None = None,
        *,
        captions: Captions = Captions(),  # noqa: B008 (it is immutable)
        stop: int | None = None,
    ) -> jax.Array:
        """Sample images of the base.

        Args:
            keys: [B].
            labels: int32[B], -1 for the null class.
            captions: of the images.
            stop: steps after which the noisy images are returned; None makes all.

        Returns:
            float32[B, R, R, C].
        """
        model, size, log_prob = self.base, image_size_of(self.base), None
        if self.classifier is not None and labels is not None:
            log_prob = lambda xt, t: _log_prob(self.classifier, xt, t, labels)  # noqa: E731
        clip = None
        if self.noised_clip is not None and captions.clip_tokens is not None:
            clip = similarity(self.noised_clip, captions)
        inputs, null = _inputs(model, labels, captions)
        return sample_with(
            self.sampling["base"],
            model.diffusion,
            denoiser(model, **inputs),
            keys,
            (size, size, model.metadata.get("channels", 3)),
            null=None if null is None else denoiser(model, **null),
            log_prob=log_prob,
            clip=clip,
            moments=model.moments,
            stop=stop,
        )


def _null(model: Model) -> int | None:
    """Return the index of a model's null class."""
    if "labels" not in model.metadata.get("conditions", ()):
        return None
    return model.metadata.get("labels", {}).get("null")


def _can_drop(model: Model) -> bool:
    """Return whether a network has learned to do without its labels and captions."""
    conditions = model.metadata.get("conditions", ())
    found = [_null(model) is not None] if "labels" in conditions else []
    found += [bool(model.metadata["tokens"].get("drop"))] if "tokens" in conditions else []
    return bool(found) and all(found)


def _inputs(model: Model, labels: jax.Array | None, captions: Captions) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return what a network is given for labels and captions, and for null ones if it has learned them."""
    conditions, given, dropped = model.metadata.get("conditions", ()), {}, {}
    if "labels" in conditions and (null := _null(model)) is None:
        given["y"] = dropped["y"] = labels
    elif "labels" in conditions:
        given["y"], dropped["y"] = jnp.where(labels < 0, null, labels), jnp.full_like(labels, null)
    if "tokens" in conditions:
        given |= {"tokens": captions.tokens, "mask": captions.mask}
        dropped |= {"tokens": captions.tokens, "mask": jnp.zeros_like(captions.mask)}
    return given, dropped if _can_drop(model) else None


def _log_prob(classifier: Model, xt: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    """Return log p(label | xt, t), float32[B]."""
    log_probs = jax.nn.log_softmax(denoiser(classifier)(xt, t).astype(jnp.float32))
    return jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} has {value}" for name, value in values.items())


def _run(
    pipeline: Cascade,
    seed: jax.Array,
    index: jax.Array,
    labels: jax.Array | None,
    captions: Captions,
    low_res: bool,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run all stages for one batch.

    Returns:
        The images, uint8[B, R, R, C], and bool[B] for each stage: whether all that it returned is finite.
    """
    keys = image_keys(seed, index)
    stop = None if low_res else stops_of(pipeline.enlarging)[0]
    out = pipeline.sample_base(transition_keys(keys, 0), labels, captions=captions, stop=stop)
    finite_of = [finite(out)]
    if not low_res:
        out, others = upsample_all(pipeline, out, keys, 1, lambda model: _inputs(model, labels, captions))
        finite_of += others
    return to_uint8(out), tuple(finite_of)


@jax.jit
def _generate(
    pipeline: Cascade, seed: jax.Array, index: jax.Array, labels: jax.Array | None = None, *captions: Any
) -> tuple:
    return _run(pipeline, seed, index, labels, Captions(*captions), low_res=False)


@jax.jit
def _generate_low(
    pipeline: Cascade, seed: jax.Array, index: jax.Array, labels: jax.Array | None = None, *captions: Any
) -> tuple:
    return _run(pipeline, seed, index, labels, Captions(*captions), low_res=True)
