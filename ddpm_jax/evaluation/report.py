"""What a finished run leaves to look at: a captioned grid of pictures and the faithfulness table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ddpm_jax.data import image_grid as pictures
from ddpm_jax.evaluation import faithfulness, measure
from ddpm_jax.parallel.mesh import make_local_mesh
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.training.run import write_json


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
    results = measure.measure_all(
        pipeline, num_captions=num_captions, seed=seed, progress=progress, mesh=make_local_mesh()
    )
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
    """Measure "why a prior?"; write why_a_prior.png and why_a_prior.json; return the table in Markdown.

    show: called with the table before the files are written, which may fail.
    """
    results = measure.compare_conditions(
        pipeline, num_captions=num_captions, seed=seed, progress=progress, mesh=make_local_mesh()
    )
    table = faithfulness.table(results)
    if show is not None:
        show(table)
    save_grid(directory / "why_a_prior.png", results, per_result=8, label_rows=True)
    write_json(
        directory / "why_a_prior.json",
        {"num_captions": num_captions, "seed": seed, "conditions": measure.summary(results)},
    )
    return table


def save_grid(path: Path, results: dict[str, dict[str, Any]], *, per_result: int, label_rows: bool = False) -> None:
    """Write the first pictures of each result, a row each, with their captions, or with the result's name."""
    if jax.process_index() != 0:
        return
    images, captions = [], []
    for name, result in results.items():
        count = min(per_result, len(result["images"]))
        images += list(result["images"][:count])
        captions += [name] * count if label_rows else result["captions"][:count]
    pictures.save_png(path, pictures.grid(images, captions, columns=count))
