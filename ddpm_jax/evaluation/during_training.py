"""Measures of samples for `Stage.evaluate`: FID and the like of a stage that is being trained."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.evaluation.compare import METRICS, Options, compare
from ddpm_jax.evaluation.features import Extractor, open_extractor
from ddpm_jax.evaluation.images import SampledImages, SourceImages
from ddpm_jax.evaluation.sets import Reading, open_reference
from ddpm_jax.evaluation.summary import Summary
from ddpm_jax.pipelines.cascade import Cascade
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleQuality:
    """Samples images of a diffusion model, classes in turn, and compares them with a reference.

    Attributes:
        reference: a path or a name of images or of statistics (`evaluation.sets.open_reference`), or a source.
        features: see `evaluation.features.open_extractor`.
        num_images: of the samples.
        sampling: how they are sampled; the pipeline's default if None.
        size: to which the reference is cropped and resized; None leaves it as it is.
        metrics: of `evaluation.compare.METRICS`.
        metric: the measure that says which parameters are best: "fid", "sfid", "inception_score", "kid", "precision"
            or "recall".
        seed: of the samples, the same at each measurement.
        batch_size: images at a time.
    """

    reference: str | Source
    features: str = "random"
    num_images: int = 1000
    sampling: Sampling | None = None
    size: int | None = None
    metrics: tuple[str, ...] = ("fid",)
    metric: str = "fid"
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"metrics={self.metrics} must be of {', '.join(METRICS)}")
        if self.num_images < 2:
            raise ValueError(f"num_images={self.num_images} must be at least 2")

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of `metric` is better."""
        return self.metric in ("inception_score", "precision", "recall")

    def check(self) -> None:
        """Open the features and summarize the reference; raise ValueError or LoadError if that is not possible."""
        assert self._reference

    def __call__(self, model: Model) -> Mapping[str, float]:
        """Return the measures of a model's samples by name."""
        extractor, reference = self._reference
        sampling = {} if self.sampling is None else {"base": self.sampling}
        pipeline = Cascade(base=model, sampling=sampling, batch_size=self.batch_size).checked()
        images = SampledImages(pipeline, self.num_images, seed=self.seed)
        summary = Reading(progress=False).summarize(images, extractor, "samples")
        measures, _ = compare(summary, reference, self.metrics, Options(replicates=0))
        return {each.name.lower().replace(" ", "_"): each.value for each in measures}

    @functools.cached_property
    def _reference(self) -> tuple[Extractor, Summary]:
        extractor, reading = open_extractor(self.features), Reading(size=self.size, progress=False)
        if isinstance(self.reference, str):
            return extractor, open_reference(self.reference, extractor, reading)
        source: Any = SourceImages(self.reference, "the reference", size=self.size)
        return extractor, reading.summarize(source, extractor, "reference")
