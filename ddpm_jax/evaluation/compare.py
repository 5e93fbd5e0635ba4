"""Distances between two sets of images: FID, sFID, Inception Score, KID, precision and recall, with intervals."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.errors import counted
from ddpm_jax.evaluation.bootstrap import Interval, bootstrap_means, interval
from ddpm_jax.evaluation.features import LOGITS, POOL, SPATIAL, Identity
from ddpm_jax.evaluation.neighbours import bootstrap_kernel, kernel_distances, precision_recall
from ddpm_jax.evaluation.statistics import bootstrap_frechet, bootstrap_score, frechet_distance
from ddpm_jax.evaluation.summary import Summary

METRICS = ("fid", "sfid", "is", "kid", "pr")


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: of the measure.
        value: of it.
        interval: 95 % confidence interval by the bootstrap over images, or None.
        note: how it was computed, in words.
    """

    name: str
    value: float
    interval: Interval | None = None
    note: str = ""

    def named(self, identity: Identity | None) -> "Measure":
        """Return the measure with the name of its features in the note, unless they are Inception's, as usual."""
        if identity is None or identity.name == "inception":
            return self
        note = f"{identity.name} features" + (f", {self.note}" if self.note else "")
        return dataclasses.replace(self, note=note)

    @classmethod
    def of_means(
        cls,
        name: str,
        values: np.ndarray,
        *,
        replicates: int,
        seed: int,
        note: str = "",
        least: float = 0.0,
        most: float = np.inf,
    ) -> "Measure":
        """Return the mean of numbers in [least, most], one for each image, with its interval."""
        value = float(np.mean(values))
        spread = bootstrap_means(values, replicates=replicates, seed=seed)
        return cls(name, value, interval(value, spread, least=least, most=most), note)


@dataclasses.dataclass(frozen=True)
class Options:
    """How sets are compared.

    Attributes:
        k: of the neighbours in precision and recall.
        kid_subsets, kid_subset_size: of KID; a smaller set than the size gives one subset of it.
        replicates: of the bootstrap; 0 gives no intervals.
        seed: of the bootstrap.
    """

    k: int = 3
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    replicates: int = 50
    seed: int = 0


def compare(
    samples: Summary, reference: Summary | None, metrics: Sequence[str] = METRICS, options: Options | None = None
) -> tuple[list[Measure], list[str]]:
    """Compare samples with a reference.

    Args:
        samples: what is measured.
        reference: what it should be like; None for the Inception Score alone.
        metrics: of `METRICS`.
        options: see `Options`.

    Returns:
        The measures, and sentences about those that could not be computed or mean less than usual.
    """
    measures, notes, options = [], warnings_about(samples, reference, metrics), options or Options()
    for metric in dict.fromkeys(metrics):
        missing = why_missing(metric, samples, reference)
        if missing is not None:
            notes.append(f"{metric} is not measured: {missing}")
            continue
        measures += _MEASURE[metric](samples, reference, options)
    return [each.named(samples.identity) for each in measures], notes


def warnings_about(samples: Summary, reference: Summary | None, metrics: Sequence[str]) -> list[str]:
    """Return what must be known to read the numbers: sets that are too small, and unlike preprocessing."""
    found = []
    for metric, name in (("fid", POOL), ("sfid", SPATIAL)):
        for each in (samples, reference):
            if metric not in metrics or each is None or name not in each.moments or each.count is None:
                continue
            size = len(each.moments[name].mean)
            if each.count <= size:
                found.append(
                    f"{each.name} has {counted(each.count, 'image')}, no more than the {size} dimensions of the "
                    f"features: the covariance is singular, and {metric.upper()} comes out too large; compare it "
                    f"only with that of as many images"
                )
    if reference is not None and None not in (samples.size, reference.size) and samples.size != reference.size:
        found.append(
            f"the samples have {_pixels(samples)} and the reference {_pixels(reference)}, which the features see; "
            "--size=N brings images of files to N x N pixels, and images that a workdir samples keep their size"
        )
    if reference is not None and reference.identity is None:
        found.append(
            f"{reference.name} does not name its features; they are taken to be those of the same weights and resize"
        )
    return list(dict.fromkeys(found))


def why_missing(metric: str, samples: Summary, reference: Summary | None) -> str | None:
    """Return why a metric cannot be computed, or None."""
    name = samples.identity.name if samples.identity is not None else "these"
    if metric == "is":
        return None if LOGITS in samples.features else f"the features {name} have no classes"
    if reference is None:
        return "it needs a reference"
    if metric in ("fid", "sfid"):
        feature = POOL if metric == "fid" else SPATIAL
        if feature not in samples.moments:
            return f"the features {name} have no spatial ones"
        return None if feature in reference.moments else f"{reference.name} has no statistics of {feature} features"
    if POOL not in reference.features:
        return f"{reference.name} has means and covariances, and not the features of its images"
    return None


def _frechet(feature: str, name: str) -> Callable[..., list[Measure]]:
    def measure(samples: Summary, reference: Summary, options: Options) -> list[Measure]:
        ours, theirs = samples.moments[feature], reference.moments[feature]
        value = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
        how = {"count": ours.count, "replicates": options.replicates, "seed": options.seed}
        replicates = bootstrap_frechet(samples.features[feature], theirs.mean, theirs.covariance, **how)
        return [Measure(name, value, interval(value, replicates, least=0.0))]

    return measure


def _inception_score(samples: Summary, reference: Summary | None, options: Options) -> list[Measure]:
    scores = samples.scores.scores()
    how = {"count": samples.count, "replicates": options.replicates, "seed": options.seed}
    replicates = bootstrap_score(samples.features[LOGITS], **how)
    value = float(scores.mean())
    note = f"{len(scores)} parts, standard deviation {scores.std():.4g}"
    return [Measure("Inception Score", value, interval(value, replicates, least=1.0), note)]


def _kid(samples: Summary, reference: Summary, options: Options) -> list[Measure]:
    ours, theirs = samples.features[POOL], reference.features[POOL]
    size = min(options.kid_subset_size, len(ours), len(theirs))
    subsets = 1 if size == len(ours) == len(theirs) else options.kid_subsets
    found = kernel_distances(ours, theirs, subsets=subsets, subset_size=size)
    value = float(found.mean())
    replicates = bootstrap_kernel(ours, theirs, replicates=options.replicates, seed=options.seed)
    note = f"{subsets} subsets of {size}, standard deviation {found.std():.4g}"
    return [Measure("KID", value, interval(value, replicates), note)]


def _precision_recall(samples: Summary, reference: Summary, options: Options) -> list[Measure]:
    ours, theirs = samples.features[POOL], reference.features[POOL]
    flags = precision_recall(theirs, ours, k=options.k)
    note = f"k = {options.k}, {len(ours)} samples, {len(theirs)} of the reference"
    how = {"replicates": options.replicates, "seed": options.seed, "note": note, "most": 1.0}
    pairs = zip(("precision", "recall"), flags, strict=True)
    return [Measure.of_means(name, inside, **how) for name, inside in pairs]


_MEASURE: Mapping[str, Callable[..., list[Measure]]] = {
    "fid": _frechet(POOL, "FID"),
    "sfid": _frechet(SPATIAL, "sFID"),
    "is": _inception_score,
    "kid": _kid,
    "pr": _precision_recall,
}


def table(measures: Sequence[Measure]) -> str:
    """Return measures as a Markdown table."""
    lines = ["| measure | value | 95 % interval | how |", "| --- | --- | --- | --- |"]
    for each in measures:
        bounds = "" if each.interval is None else f"{each.interval.low:.5g} to {each.interval.high:.5g}"
        lines.append(f"| {each.name} | {each.value:.6g} | {bounds} | {each.note} |")
    return "\n".join(lines)


def as_json(measures: Sequence[Measure]) -> dict[str, Any]:
    """Return measures as plain data, by name."""
    return {
        each.name: {"value": each.value, "interval": None if each.interval is None else list(each.interval)}
        | ({"note": each.note} if each.note else {})
        for each in measures
    }


def _pixels(summary: Summary) -> str:
    return f"{summary.size[0]} x {summary.size[1]} pixels"


def describe(role: str, summary: Summary) -> str:
    """Return a line on a set of images and what was done to them."""
    count = "an unknown number of images" if summary.count is None else counted(summary.count, "image")
    count += "" if summary.size is None else f" of {_pixels(summary)}"
    features = "features not named in the file" if summary.identity is None else f"features {summary.identity}"
    return f"{role}: {count} of {summary.name} ({summary.preprocessing}); {features}"
