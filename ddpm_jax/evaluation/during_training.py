"""Measures of samples for `Stage.evaluate`: FID and the like of a stage that is being trained.

A recipe has `config.evaluate = evaluate_fields()` and gives its stage by `measured(Stage(...), config.evaluate)`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddpm_jax.checks import check_count
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation.compare import METRICS, Options, compare, why_missing
from ddpm_jax.evaluation.features import POOL, SPATIAL, Extractor, open_extractor
from ddpm_jax.evaluation.images import SampledImages, SourceImages
from ddpm_jax.evaluation.sets import Reading, open_reference
from ddpm_jax.evaluation.statistics import Moments
from ddpm_jax.evaluation.summary import Summary
from ddpm_jax.pipelines.cascade import Cascade
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training.stage import Stage
from ddpm_jax.types import Source

_MEASURES = {"fid": ("fid",), "sfid": ("sfid",), "is": ("inception_score",), "kid": ("kid",)}
_MEASURES |= {"pr": ("precision", "recall")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """Samples images of a diffusion model, classes in turn, and compares them with a reference.

    Attributes:
        reference: a path or a name of images or of statistics (`evaluation.sets.open_reference`), or a source.
        features: see `evaluation.features.open_extractor`.
        num_images: of the samples.
        sampling: how they are sampled; the pipeline's default if None.
        size: to which the reference is cropped and resized; None leaves it as it is.
        at_most: images of the reference, evenly spaced; None takes all.
        metrics: of `evaluation.compare.METRICS`.
        metric: the measure that says which parameters are best: "fid", "sfid", "inception_score", "kid", "precision"
            or "recall", one that `metrics` have.
        seed: of the samples, the same at each measurement.
        batch_size: images at a time.

    Raises:
        ValueError: if a number is out of its range, or a name unknown.
    """

    reference: str | Source
    features: str = "random"
    num_images: int = 1000
    sampling: Sampling | None = None
    size: int | None = None
    at_most: int | None = None
    metrics: tuple[str, ...] = ("fid",)
    metric: str = "fid"
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics or isinstance(self.metrics, str):
            raise ValueError(f"metrics={self.metrics!r} must be of {', '.join(METRICS)}")
        names = [name for each in self.metrics for name in _MEASURES[each]]
        if self.metric not in names:
            raise ValueError(f"metric={self.metric!r} must be a measure of metrics={self.metrics}: {', '.join(names)}")
        for name in ("num_images", "batch_size", *(("at_most",) if self.at_most is not None else ())):
            check_count(name, getattr(self, name))
        if self.sampling is not None and self.sampling.sampler == "analytic":
            raise ValueError("sampling has the sampler 'analytic', whose moments are estimated after training only")
        for name in ("num_images", "at_most"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name}=1 must be at least 2")

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of `metric` is better."""
        return self.metric in ("inception_score", "precision", "recall")

    def check(self, model: Model) -> None:
        """Open the features, summarize the reference, and see that a model can be sampled and compared with it.

        Args:
            model: its parameters may be shapes.

        Raises:
            ValueError: if the model does not sample images from noise, or a metric cannot be computed.
            LoadError: if the features or the reference cannot be read.
        """
        self._pipeline(model)
        extractor, reference = self._reference
        sizes = extractor.dimensions
        moments = {name: Moments(size) for name, size in sizes.items() if name in (POOL, SPATIAL)}
        samples = Summary("samples", extractor.identity, "", None, moments, {name: np.zeros(()) for name in sizes})
        for metric in self.metrics:
            why = why_missing(metric, samples, reference)
            if why is not None:
                raise ValueError(f"{metric} cannot be measured: {why}")

    def __call__(self, model: Model) -> Mapping[str, float]:
        """Return the measures of a model's samples by name."""
        extractor, reference = self._reference
        images = SampledImages(self._pipeline(model), self.num_images, seed=self.seed)
        summary = Reading(progress=False).summarize(images, extractor, "samples")
        measures, _ = compare(summary, reference, self.metrics, Options(replicates=0))
        return {each.name.lower().replace(" ", "_"): each.value for each in measures}

    def _pipeline(self, model: Model) -> Cascade:
        sampling = {} if self.sampling is None else {"base": self.sampling}
        return Cascade(base=model, sampling=sampling, batch_size=self.batch_size).checked()

    @functools.cached_property
    def _reference(self) -> tuple[Extractor, Summary]:
        extractor, reading = open_extractor(self.features), Reading(self.size, self.at_most, progress=False)
        if isinstance(self.reference, str):
            needs = any(name in ("kid", "pr") for name in self.metrics)
            return extractor, open_reference(self.reference, extractor, reading, needs_features=needs)
        source: Any = SourceImages(self.reference, "the reference", size=self.size, at_most=self.at_most)
        return extractor, reading.summarize(source, extractor, "reference")


def evaluate_fields() -> dict[str, Any]:
    """Return the fields of a recipe's `evaluate`, which `measured` reads.

    "every": steps between measurements, 0 for none, else a multiple of `eval_every`; "reference": a path or a name, ""
    for the images that the stage is trained with; "reference_images": how many of its images at most; "metrics": names
    separated by commas; "metric", "features", "num_images" and "batch_size": see `SampleQuality`.
    """
    fields = {"every": 0, "reference": "", "reference_images": 10_000, "features": "random", "num_images": 1000}
    return fields | {"batch_size": 64, "metrics": "fid", "metric": "fid"}


def measured(stage: Stage, fields: Mapping[str, Any]) -> Stage:
    """Return a stage of a diffusion model of images whose samples are measured while it is trained.

    Args:
        stage: its task samples as in previews, and has the images `task.x0`.
        fields: as of `evaluate_fields`.

    Raises:
        ValueError: if a field is out of its range; the message names it.
    """
    if fields["every"] == 0:
        return stage
    sampling = stage.task.sampling
    if sampling is not None and sampling.sampler == "analytic":
        sampling = sampling.with_options(sampler="ancestral")  # as previews have it, there being no moments yet
    try:
        quality = SampleQuality(
            reference=fields["reference"] or stage.source,
            sampling=sampling,
            size=stage.task.x0.size,
            at_most=fields["reference_images"],
            metrics=tuple(name.strip() for name in fields["metrics"].split(",")),
            **{name: fields[name] for name in ("features", "num_images", "batch_size", "metric")},
        )
        training = dataclasses.replace(stage.training, evaluate_every=fields["every"])
        return stage.replace(training=training, evaluate=quality)
    except ValueError as error:
        raise ValueError(f"evaluate: {error}") from None
