"""Find the best noise level of an upsampler: `python -m ddpm_jax.sweep --workdir DIR --data PATH --out DIR`.

An upsampler that was trained with conditioning augmentation (Ho et al. 2022, cascaded diffusion, section 4.2) enlarges
images with noise of a level of your choice. This command restores held-out images at several levels, and measures their
PSNR and the sliced Wasserstein distance of their finest details; bicubic enlarging stands beside them. --workdir is a
pipeline, or the directory of an upsampler alone. With --generated it also generates images with the whole pipeline at
each level, with noise added to the finished image of the stage before (non-truncated) and with that stage stopped at
the level (truncated), and measures the distance of their details from those of the held-out images; of captioned shapes
also the share of images with all attributes of their captions.

Writes sweep.json, table.md, sweep.png (the measures against the level) and images.png into --out.
"""

from ddpm_jax import cli

# isort: split
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.extras import needs_extra

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Pipeline, or an upsampler's model directory; the bundled pipeline if none.", flag_values=FLAGS
)
_DATA = flags.DEFINE_string("data", None, 'Held-out images, as in docs/data.md, or "shapes".', flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Directory for the results. Created if missing.", flag_values=FLAGS)
_NAME = flags.DEFINE_string("upsampler", None, "Name of an upsampler; the first by default.", flag_values=FLAGS)
_LEVELS = flags.DEFINE_list(
    "levels", None, "Levels, such as 0,0.1,0.2; seven up to the largest of training by default.", flag_values=FLAGS
)
_DEGRADATION = flags.DEFINE_enum(
    "degradation", "none", ["none", "blur", "bsr"], "How low-resolution images are made.", flag_values=FLAGS
)
_NUM = flags.DEFINE_integer("num_images", 64, "Images per level, evenly spaced.", lower_bound=1, flag_values=FLAGS)
_SEED = flags.DEFINE_integer(
    "seed", 1, "Seed of all random numbers.", lower_bound=0, upper_bound=cli.MAX_SEED, flag_values=FLAGS
)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Images at a time.", lower_bound=1, flag_values=FLAGS)
_SAMPLER = flags.DEFINE_enum("sampler", None, list(SAMPLERS), "Sampler of the upsampler.", flag_values=FLAGS)
_STEPS = flags.DEFINE_string("steps", None, 'Its steps: a number, or a spec like "fast27".', flag_values=FLAGS)
_TILE = flags.DEFINE_integer("tile", None, "Side of tiles; whole images by default.", lower_bound=1, flag_values=FLAGS)
_GENERATED = flags.DEFINE_bool("generated", False, "Also measure generated images.", flag_values=FLAGS)


def main() -> None:
    """Run the program."""
    for flag, what in ((_DATA, "held-out images"), (_OUT, "a directory for the results")):
        if not flag.value:
            raise cli.UsageError(f"--{flag.name} is needed, {what}")
    cli.check_exists(_WORKDIR.value, what="--workdir")
    cli.check_can_write(Path(_OUT.value) / "sweep.json", what="--out")
    with needs_extra("examples"):
        import matplotlib  # noqa: F401 (before anything is computed)
    from ddpm_jax.evaluation import upsampling
    from ddpm_jax.pipelines import load
    from ddpm_jax.pipelines.enlarging import Enlarging, check_tile
    from ddpm_jax.progress import progress_bar

    cli.use_cpu_devices()
    pipeline = load(_WORKDIR.value)
    try:
        name, model, sampling = _chosen(pipeline)
        if _GENERATED.value and model is pipeline:
            raise ValueError("--generated needs a pipeline, and --workdir is an upsampler alone")
        levels = _levels(model)
        size, low_size = model.metadata["image_size"], model.metadata["low_resolution"]["size"]
        check_tile("--", Enlarging(tile=_TILE.value), model.network, size // low_size)
        if _GENERATED.value:
            _check_described(pipeline)
        kwargs = {"count": _NUM.value, "seed": _SEED.value}
        low, high = upsampling.read_pairs(_source(size), size, low_size, degradation=_DEGRADATION.value, **kwargs)
        labels = _labels(model.metadata.get("labels"), _source(size))
        with progress_bar(len(levels) * _NUM.value, description="restore", unit="image", shown=True) as bar:
            kwargs = {"labels": labels, "seed": _SEED.value, "batch_size": _BATCH.value, "report": bar.update}
            kwargs["enlarging"] = Enlarging(tile=_TILE.value)
            found = upsampling.sweep_restored(model, sampling, low, high, levels, **kwargs)
        found["generated"] = _generated(pipeline, name, sampling, levels) if _GENERATED.value else {}
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    _write(Path(_OUT.value), name, sampling, found, low, high)


def _chosen(pipeline: Any) -> tuple[str, Any, Any]:
    """Return the name of the upsampler, its model, and how it is sampled."""
    from ddpm_jax.diffusion.sampling import Sampling
    from ddpm_jax.storage.model_directory import Model

    if isinstance(pipeline, Model):
        name, model, sampling = "upsampler", pipeline, Sampling("ddim", min(27, pipeline.diffusion.num_steps))
        sampling = sampling.replace(threshold=1.0)
    else:
        names = getattr(pipeline, "names", ())
        name = _NAME.value or (names[0] if names else None)
        if name not in names:
            there = ", ".join(names) or "none"
            raise ValueError(f"--upsampler={name}: the pipeline has the upsamplers {there}")
        model, sampling = pipeline.upsamplers[names.index(name)], pipeline.sampling[name]
    if "size" not in model.metadata.get("low_resolution", {}):
        raise ValueError(f"--workdir={_WORKDIR.value} holds no upsampler: its metadata has no low_resolution")
    return name, model, sampling.with_options("--", sampler=_SAMPLER.value, steps=_STEPS.value)


def _levels(model: Any) -> list[float]:
    most = model.metadata["low_resolution"].get("noise", 0.0)
    if _LEVELS.value is None:
        return [round(most * n / 6, 4) for n in range(7)] if most else [0.0]
    try:
        levels = sorted({float(level) for level in _LEVELS.value})
    except ValueError:
        raise ValueError(f"--levels={','.join(_LEVELS.value)} must be numbers separated by commas") from None
    if not levels or not all(0 <= level <= most for level in levels):
        raise ValueError(f"--levels={','.join(_LEVELS.value)} must lie in [0, {most:g}], the levels of training")
    return levels


def _source(size: int, split: str = "train") -> Any:
    from ddpm_jax.data.open_source import open_source
    from ddpm_jax.data.shapes.scenes import ShapesSource
    from ddpm_jax.data.split import Subset, evenly_spaced

    if _DATA.value == "shapes":
        return ShapesSource(_SEED.value, size, split)
    source = open_source(_DATA.value)
    return source if len(source) <= _NUM.value else Subset(source, evenly_spaced(len(source), _NUM.value))


def _labels(known: Any, source: Any) -> np.ndarray | None:
    """Return the classes of the held-out images as a network numbers them, None if it or they have none."""
    from ddpm_jax.evaluation.upsampling import read_labels

    return None if known is None else read_labels(known, source, _NUM.value, f"--data={_DATA.value}")


def _check_described(pipeline: Any) -> None:
    """Raise ValueError if the images lack what the pipeline generates images from."""
    from ddpm_jax.pipelines import Cascade

    entry = ("label" if pipeline.labels else None) if isinstance(pipeline, Cascade) else "caption"
    source, count = _source(pipeline.image_size), _NUM.value
    lacking = (number for number in range(min(count, len(source))) if entry not in source[number])
    if entry is not None and (number := next(lacking, None)) is not None:
        raise ValueError(
            f"--generated needs a {entry} for each image, from which the pipeline generates images, and image {number} "
            f"of --data={_DATA.value} has none"
        )


def _generated(pipeline: Any, name: str, sampling: Any, levels: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Return measures of generated images by level: "non-truncated", and "truncated" where the upsampler allows it."""
    pipeline = pipeline.replace(sampling={**pipeline.sampling, name: sampling})
    low = pipeline.upsamplers[pipeline.names.index(name)].metadata["low_resolution"]
    ways = [False, True] if low.get("variance_preserving") and low.get("noise_level_input") else [False]
    found: dict[str, list[dict[str, Any]]] = {}
    for way in ways:
        rows = found["truncated" if way else "non-truncated"] = []
        for level in levels:
            if level or not way:
                options = {f"{name}_noise_level": level, f"{name}_truncated": way, f"{name}_tile": _TILE.value}
                actual = _stopped_level(pipeline, name, level) if way else level
                rows.append({"level": actual} | _scores(pipeline, options))
    return found


def _stopped_level(pipeline: Any, name: str, level: float) -> float:
    """Return the level of the step at which the stage before an upsampler stops."""
    from ddpm_jax.pipelines.enlarging import Enlarging, with_stops

    main = "decoder" if hasattr(pipeline, "decoder") else "base"
    stages = {main: getattr(pipeline, main), **dict(zip(pipeline.names, pipeline.upsamplers))}
    return with_stops({name: Enlarging(truncated=True)}, stages, pipeline.sampling, {name: level})[1][name]


def _scores(pipeline: Any, options: dict[str, Any]) -> dict[str, float]:
    """Generate images, of the captions of the held-out images if the pipeline reads captions, and measure them."""
    from ddpm_jax.evaluation.measure import measure
    from ddpm_jax.evaluation.upsampling import read_pairs, sliced_wasserstein
    from ddpm_jax.pipelines import Cascade

    size, count = pipeline.image_size, _NUM.value
    of_shapes = _DATA.value == "shapes" and not isinstance(pipeline, Cascade)
    source, found = _source(size, "single" if of_shapes else "train"), {}
    _, references = read_pairs(source, size, size // 2, count=count, seed=_SEED.value)
    if isinstance(pipeline, Cascade):
        labels = _labels(pipeline.labels, source)
        images = pipeline.generate(count, labels=labels, seed=_SEED.value, batch_size=_BATCH.value, **options)
    elif of_shapes:
        kwargs = {"num_captions": count, "seed": _SEED.value, "progress": False, "batch_size": _BATCH.value}
        result = measure(pipeline, "single", **kwargs, **options)
        images, found = result["images"], {"all_right": result["rates"]["all"]}
    else:
        prompts = [source[i]["caption"] for i in range(count)]
        images = pipeline.generate(prompts, seed=_SEED.value, batch_size=_BATCH.value, **options)
    return {"swd": sliced_wasserstein(images, references)} | found


def _write(out: Path, name: str, sampling: Any, found: dict[str, Any], low: np.ndarray, high: np.ndarray) -> None:
    """Write the results and print the table."""
    from ddpm_jax.data import image_grid
    from ddpm_jax.evaluation.upsampling import best_levels, bicubic
    from ddpm_jax.storage.json_file import write_json

    out.mkdir(parents=True, exist_ok=True)
    shown, restored = found.pop("images"), found["levels"]
    best = {"restored": best_levels(restored)} | {way: best_levels(rows) for way, rows in found["generated"].items()}
    settings = {"upsampler": name, "sampling": sampling.describe(), "degradation": _DEGRADATION.value}
    settings |= {"num_images": len(high), "tile": _TILE.value, "seed": _SEED.value, "data": _DATA.value}
    write_json(out / "sweep.json", settings | found | {"best": best})
    table = _table(found, best)
    (out / "table.md").write_text(table + "\n")
    _plot(out / "sweep.png", found)
    count, size = shown.shape[1], high.shape[1]
    rows = {"low-resolution": low[:count].repeat(size // low.shape[1], 1).repeat(size // low.shape[2], 2)}
    rows |= {"bicubic": bicubic(low[:count], size)}
    rows |= {f"level {row['level']:.4g}": images for row, images in zip(restored, shown)} | {"original": high[:count]}
    captions = [text for text in rows for _ in range(count)]
    image_grid.save_png(out / "images.png", image_grid.grid(np.concatenate([*rows.values()]), captions, columns=count))
    cli.show(table)
    cli.show(f"wrote sweep.json, table.md, sweep.png and images.png into {out}")


def _table(found: dict[str, Any], best: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    number = lambda row, measure, text: text.format(row[measure]) if measure in row else ""  # noqa: E731
    lines = ["| images | noise level | PSNR | SWD | all right |", "| --- | --- | --- | --- | --- |"]
    rows = [("bicubic", found["bicubic"]), *(("restored", row) for row in found["levels"])]
    rows += [(f"generated, {way}", row) for way, each in found["generated"].items() for row in each]
    for what, row in rows:
        cells = [number(row, "level", "{:.4g}"), number(row, "psnr", "{:.2f} dB"), number(row, "swd", "{:.1f}")]
        lines.append(f"| {what} | {' | '.join([*cells, number(row, 'all_right', '{:.1%}')])} |")
    for what, measures in best.items():
        named = ", ".join(f"{row['level']:.4g} by {measure}" for measure, row in measures.items())
        lines += ["", f"Best level, {what}: {named}"] if named else []
    return "\n".join(lines)


def _plot(path: Path, found: dict[str, Any]) -> None:
    """Draw the measures against the level."""
    from matplotlib.figure import Figure

    series = {"restored": found["levels"], **found["generated"]}
    labels = {"psnr": "PSNR (dB)", "swd": "sliced Wasserstein distance", "all_right": "share with all attributes right"}
    measures = [name for name in labels if any(name in row for rows in series.values() for row in rows)]
    figure = Figure(figsize=(4.5 * len(measures), 3.5), layout="constrained")
    for axes, measure in zip(np.atleast_1d(figure.subplots(1, len(measures))), measures):
        for number, (what, rows) in enumerate(series.items()):
            points = [(row["level"], row[measure]) for row in rows if measure in row]
            if points:
                axes.plot(*zip(*points), marker="o", label=what, color=f"C{number}")
        if measure in found["bicubic"]:
            axes.axhline(found["bicubic"][measure], color="gray", linestyle="--", label="bicubic")
        axes.set(xlabel="noise level", ylabel=labels[measure])
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main, FLAGS)
