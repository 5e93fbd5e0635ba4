"""Report of a finished run: a grid of images, and the faithfulness table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax.data import image_grid
from ddpm_jax.errors import counted
from ddpm_jax.evaluation import faithfulness, measure
from ddpm_jax.pipelines.cascade import Cascade
from ddpm_jax.pipelines.sharing import generate_on_all_hosts
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.progress import progress_bar
from ddpm_jax.storage.json_file import write_json


def write_faithfulness(
    pipeline: UnCLIP,
    directory: Path,
    *,
    num_captions: int,
    seed: int,
    progress: bool = True,
    show: Callable[[str], Any] | None = None,
) -> str:
    """Measure every split; write samples.png and faithfulness.json; return the table in Markdown.

    show: called with the table before the files are written, which may fail.
    """
    results = measure.measure_all(pipeline, num_captions=num_captions, seed=seed, progress=progress)
    table = faithfulness.table({measure.SPLITS[split]: result for split, result in results.items()})
    if show is not None:
        show(table)
    save_grid(directory / "samples.png", results, per_result=8)
    stored = {"num_captions": num_captions, "seed": seed, "splits": measure.summary(results)}
    write_json(directory / "faithfulness.json", stored)
    return table


def write_comparison(
    pipeline: UnCLIP,
    directory: Path,
    *,
    num_captions: int,
    seed: int,
    progress: bool = True,
    show: Callable[[str], Any] | None = None,
) -> str:
    """Measure "why a prior?", and what an image shows whose caption and embedding disagree.

    Writes why_a_prior.json, why_a_prior.png and disagreement.png, whose rows are the images that were embedded and
    those that were sampled with the captions. Returns the tables in Markdown.

    show: called with each table before the files are written, which may fail.
    """
    options = {"num_captions": num_captions, "seed": seed, "progress": progress}
    results = measure.compare_conditions(pipeline, **options)
    tables = [faithfulness.table(results)]
    if show is not None:
        show(tables[0])
    followed = measure.compare_disagreement(pipeline, **options)
    tables.append(faithfulness.comparison_table(followed))
    if show is not None:
        show(tables[1])
    save_grid(directory / "why_a_prior.png", results, per_result=8, label_rows=True)
    save_disagreement(directory / "disagreement.png", followed)
    shares = {kind: followed[kind] for kind in ("n", "caption", "embedding")}
    shares = {kind: {k: v for k, v in rates.items() if v == v} for kind, rates in shares.items()}  # JSON has no NaN
    stored = {"num_captions": num_captions, "seed": seed, "conditions": measure.summary(results)}
    write_json(directory / "why_a_prior.json", stored | {"disagreement": shares})
    return "\n\n".join(tables)


def write_samples(
    pipeline: Cascade,
    directory: Path,
    *,
    num_images: int = 16,
    seed: int = 0,
    progress: bool = True,
    show: Callable[[str], Any] | None = None,
) -> None:
    """Write samples.png, a grid of images, uncurated; of a class-conditional pipeline the classes in turn.

    show: called with a sentence that says what was written.
    """
    known, labels = pipeline.labels, None
    if known is not None:
        labels = [i % known["num_classes"] for i in range(num_images)]
    hidden, share = not progress or jax.process_index() != 0, -(-num_images // jax.process_count())
    with progress_bar(share, description="sample", unit="image", shown=not hidden) as bar:
        each, kwargs = {"num_images": num_images, "labels": labels}, {"seed": seed, "report": bar.update}
        images = generate_on_all_hosts(pipeline.generate, num_images, each, **kwargs)
    if jax.process_index() != 0:
        return
    names = None if known is None else known.get("names")
    captions = [names[label] for label in labels] if names and labels else None
    images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    image_grid.save_png(directory / "samples.png", image_grid.grid(images, captions))
    if show is not None:
        show(f"wrote {directory / 'samples.png'}: {counted(num_images, 'image')}")


def save_disagreement(path: Path, followed: dict[str, Any], *, count: int = 8) -> None:
    """Write the first images of a result of `measure.compare_disagreement` below the images that were embedded."""
    if jax.process_index() != 0:
        return
    images, embedded = followed["images"][:count], followed["embedded"][:count]
    nearest = np.arange(images.shape[1]) * embedded.shape[1] // images.shape[1]
    embedded = embedded[:, nearest][:, :, nearest]
    captions = ["embedded"] * len(embedded) + followed["captions"][:count]
    image_grid.save_png(path, image_grid.grid([*embedded, *images], captions, columns=len(embedded)))


def save_grid(path: Path, results: dict[str, dict[str, Any]], *, per_result: int, label_rows: bool = False) -> None:
    """Write the first images of each result, a row each, with their captions, or with the result's name."""
    if jax.process_index() != 0:
        return
    images, captions = [], []
    for name, result in results.items():
        count = min(per_result, len(result["images"]))
        images += list(result["images"][:count])
        captions += [name] * count if label_rows else result["captions"][:count]
    image_grid.save_png(path, image_grid.grid(images, captions, columns=count))
