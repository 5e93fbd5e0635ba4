"""Measures of a set of images against a reference, from what they are called on the command line to the table."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.data import image_grid
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.source import read_record
from ddpm_jax.evaluation.archives import read_headers
from ddpm_jax.evaluation.captions import CaptionScores
from ddpm_jax.evaluation.compare import METRICS, Measure, Options, as_json, compare, describe, table, why_missing
from ddpm_jax.evaluation.features import POOL, SPATIAL, Extractor
from ddpm_jax.evaluation.images import IMAGES, ImageSet, NpzImages, open_images
from ddpm_jax.evaluation.statistics import Moments
from ddpm_jax.evaluation.summary import KEPT, Summary, has_statistics, read_statistics, summarize
from ddpm_jax.progress import progress_bar
from ddpm_jax.storage.json_file import write_json

SHOWN = 64  # images of samples.png


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sets of images are read.

    Attributes:
        size: to which images are cropped and resized; None leaves them as they are.
        at_most: images of a set, evenly spaced; None takes all.
        keep: images of which features are kept.
        batch_size: images at a time; what suits the set by default.
        seed: of the choice of images that are kept.
        progress: True shows a bar on stderr.
    """

    size: int | None = None
    at_most: int | None = None
    keep: int = KEPT
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True

    def summarize(self, images: ImageSet, extractor: Extractor, what: str, **options: Any) -> Summary:
        """Return the summary of a set; options of `summary.summarize`."""
        how = {"keep": self.keep, "batch_size": self.batch_size, "seed": self.seed} | options
        share = -(-len(images) // jax.process_count())
        shown = self.progress and jax.process_index() == 0
        with progress_bar(share, description=what, unit="image", shown=shown) as bar:
            return summarize(images, extractor, update=bar.update, **how)


def open_reference(
    spec: str | os.PathLike, extractor: Extractor, reading: Reading, *, needs_features: bool = True
) -> Summary:
    """Summarize a reference: a file of statistics, or any set of images.

    Of a file with statistics and images, as guided-diffusion's reference batches are, the features of the images are
    computed for precision, recall and KID.

    Args:
        spec: of a file or a set of images, see `images.open_images`.
        extractor: of the features.
        reading: how images are read.
        needs_features: whether these measures are wanted.

    Raises:
        ValueError, LoadError: if it cannot be read, or is of other features.
    """
    if not has_statistics(spec):
        images = open_images(spec, size=reading.size, at_most=reading.at_most)
        return reading.summarize(images, extractor, "reference")
    found = read_statistics(spec, extractor)
    if needs_features and POOL not in found.features and IMAGES in read_headers(spec):
        images = NpzImages(spec, size=reading.size, at_most=reading.at_most)
        summary = reading.summarize(images, extractor, "reference")
        found.features = summary.features
        found.size = summary.size if found.size is None and reading.size is None else found.size
    return found


def check_possible(metrics: Sequence[str], extractor: Extractor, reference: Summary | None = None) -> None:
    """Raise ValueError for the first metric that these features, or a reference, do not allow.

    Args:
        metrics: of `compare.METRICS`.
        extractor: of the features.
        reference: None checks the features alone.
    """
    moments = {name: Moments(size) for name, size in extractor.dimensions.items() if name in (POOL, SPATIAL)}
    some = {name: np.zeros((0, size), np.float32) for name, size in extractor.dimensions.items()}
    samples = Summary("samples", extractor.identity, "", None, moments, some)
    for metric in metrics:
        why = why_missing(metric, samples, samples if reference is None else reference)
        if why is not None:
            raise ValueError(f"{metric} cannot be measured: {why}")


def captions_of(spec: str | os.PathLike, count: int) -> list[str]:
    """Return the captions of the first records of a data source, at most `count`; none if they have none."""
    if os.fspath(spec).endswith(".npz"):
        return []
    source = open_source(spec)
    records = (read_record(source, index) for index in range(min(count, len(source))))
    found = [record.get("caption") for record in itertools.takewhile(lambda record: "caption" in record, records)]
    return [caption if isinstance(caption, str) else caption[0] for caption in found]


def measure_samples(
    images: ImageSet,
    extractor: Extractor,
    reference: Summary | None,
    reading: Reading,
    *,
    metrics: Sequence[str] = METRICS,
    options: Options | None = None,
    clip: str | None = None,
    candidates: int = 100,
    keep_grid: bool = False,
    collect: Callable[[dict[str, Any]], Any] = lambda batch: None,
) -> tuple[Summary, list[Measure], list[str], dict[str, Any]]:
    """Read samples once and measure them.

    Args:
        images: the samples.
        extractor: of the features.
        reference: what they should be like, or None.
        reading: how they are read.
        metrics: of `compare.METRICS`.
        options: of the comparison.
        clip: a model directory with a CLIP, for CLIP score and R-precision; None is without them.
        candidates: captions of R-precision.
        keep_grid: whether to return the first images.
        collect: called with each batch that this host reads.

    Returns:
        The summary of the samples, the measures, notes in words, and {"image": uint8[n, H, W, 3], "caption": list} of
        the first images of this host.
    """
    options = options or Options()
    captions, first = None if clip is None else CaptionScores(clip), {}

    def show(begin: int, batch: dict[str, Any]) -> None:
        collect(batch)
        if captions is not None:
            captions.add(batch)
        if keep_grid and begin < SHOWN:
            for name in ("image", "caption"):
                if name in batch:
                    first[name] = [*first.get(name, []), *batch[name]][:SHOWN]

    summary = reading.summarize(images, extractor, "samples", show=show)
    measures, notes = compare(summary, reference, metrics, options)
    if captions is not None:
        how = {"replicates": options.replicates, "seed": options.seed}
        measures += captions.measures(candidates=candidates, **how)
    return summary, measures, notes, first


def report(
    summary: Summary | None,
    reference: Summary | None,
    measures: Sequence[Measure],
    notes: Sequence[str],
    out: Path | None,
    show: Callable[[str], Any],
    name: str = "measures.json",
) -> None:
    """Print a table with what it was computed from, and write them as JSON into a directory.

    Raises:
        OSError: if the file cannot be written.
    """
    show(table(measures))
    lines = [
        describe(role, each) for role, each in (("samples", summary), ("reference", reference)) if each is not None
    ]
    for line in [*lines, *(f"note: {note}" for note in notes)]:
        show(line)
    if out is not None:
        stored = {"measures": as_json(measures), "sets": lines, "notes": list(notes)}
        write_json(out / name, stored)


def save_grid(path: Path, first: dict[str, Any]) -> None:
    """Write the first images as a grid, on the first host."""
    if jax.process_index() == 0 and first:
        image_grid.save_png(path, image_grid.grid(np.stack(first["image"]), first.get("caption")))
