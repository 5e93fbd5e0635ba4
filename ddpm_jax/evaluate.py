"""Measure images and models: `python -m ddpm_jax.evaluate --samples images/ --reference data/ [--features ...]`.

Samples are a folder of images or another data source, an .npz file (arr_0, as guided-diffusion writes it), or sampled
by the pipeline of a --workdir while they are measured; of an upsampler alone, enlarged from the reference's images.
The reference is one of these, or an .npz file of statistics, which --write_statistics makes of any source. --metrics
chooses among FID, sFID, Inception Score, KID, precision and recall ("fid,sfid,is,kid,pr"), "clip" (CLIP score and
R-precision; needs --clip), "bits" and "exact" (bits per dimension of --reference under the model of --workdir: the
variational bound, and by the probability-flow ODE) and "cas" (the accuracy on --test of a classifier that is trained on
the samples). docs/evaluation.md says what each is.

With --workdir or --out alone: how faithful an unCLIP is to captions of captioned shapes, and with --compare "why a
prior?".
"""

from ddpm_jax import cli, cli_hosts, cli_sampling

# isort: split
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from ddpm_jax.errors import counted
from ddpm_jax.paths import as_path

FLAGS = flags.FlagValues()


def _string(name: str, default: str | None, help: str) -> flags.FlagHolder:
    return flags.DEFINE_string(name, default, help, flag_values=FLAGS)


def _integer(name: str, default: int | None, help: str, least: int = 1, most: int | None = None) -> flags.FlagHolder:
    return flags.DEFINE_integer(name, default, help, lower_bound=least, upper_bound=most, flag_values=FLAGS)


_WORKDIR = _string("workdir", None, "Workdir of a training run or converted pipeline; the bundled one if none.")
_OUT = _string("out", None, "Directory for the results; the workdir if it is one. Created if missing.")
_NUM = _integer("num_captions", 512, "Captions per row of the table of faithfulness.")
_SEED = _integer("seed", 1, "Seed of captions and random numbers.", 0, cli.MAX_SEED)
_COMPARE = flags.DEFINE_bool("compare", False, 'Also measure "why a prior?".', flag_values=FLAGS)

_SAMPLES = _string("samples", None, "Images to measure: a folder, another data source, or .npz.")
_REFERENCE = _string("reference", None, "Images they should be like, or an .npz file of their statistics.")
_WRITE = _string("write_statistics", None, "File to write the statistics of --reference to (.npz).")
_METRICS = flags.DEFINE_list("metrics", None, "fid, sfid, is, kid, pr, clip, bits, exact, cas.", flag_values=FLAGS)
_FEATURES = _string("features", "random", "inception:FILE, clip:DIRECTORY, or random, which needs no file.")
_RESIZE = flags.DEFINE_enum(
    "inception_resize",
    "tensorflow",
    ["tensorflow", "half_pixel"],
    "Resize of Inception: that of the original code and torch-fidelity, or pytorch-fid's.",
    flag_values=FLAGS,
)
_SIZE = _integer("size", None, "Crop and resize images of sources to this many pixels a side.")
_NUM_IMAGES = _integer("num_images", None, "Images to sample, or to take: of --samples, else of --reference.")
_BATCH = _integer("batch_size", None, "Images at a time.")
_KEEP = _integer("keep_features", 50_000, "Images of a set whose features stay in memory.", 2)
_BOOTSTRAP = _integer("bootstrap", 50, "Replicates of the confidence intervals; 0 for none.", 0)
_NEIGHBOURS = _integer("neighbours", 3, "k of precision and recall.")
_KID_SUBSETS = _integer("kid_subsets", 100, "Subsets of KID.")
_KID_SIZE = _integer("kid_subset_size", 1000, "Images of each subset of KID.", 2)
_CLIP = _string("clip", None, "Model directory of a CLIP, for CLIP score and R-precision.")
_CANDIDATES = _integer("candidates", 100, "Captions among which R-precision looks for the right one.", 2)
_LAYERS = _string("layers", None, 'Timesteps of "bits", as "100" or "ddim50"; all if none.')
_TOLERANCE = cli.define_finite("tolerance", 1e-5, 'Of the solver of "exact".', flag_values=FLAGS, lower_bound=1e-8)
_PLOT = flags.DEFINE_bool("plot", False, "Draw rate against distortion (needs matplotlib).", flag_values=FLAGS)
_TEST = _string("test", None, 'Real images with labels, on which "cas" tests its classifier.')
_CAS_UPDATES = _integer("cas_updates", 1000, 'Training steps of the classifier of "cas".')
_RAW = flags.DEFINE_bool("raw_weights", False, "Use raw instead of averaged weights of a workdir.", flag_values=FLAGS)
cli_sampling.define_sampling_flags(FLAGS)

_OF_SETS, _OF_MODELS = ("fid", "sfid", "is", "kid", "pr", "clip", "cas"), ("bits", "exact")
_COMPARISONS = {"fid", "sfid", "kid", "pr"}  # with a reference
_OF_METRIC = {
    "neighbours": "pr",
    "kid_subsets": "kid",
    "kid_subset_size": "kid",
    "clip": "clip",
    "candidates": "clip",
    "layers": "bits",
    "plot": "bits",
    "tolerance": "exact",
    "test": "cas",
    "cas_updates": "cas",
}
_OF_SOURCES = ("features", "inception_resize", "size", "num_images", "batch_size", "keep_features", "bootstrap")


def main() -> None:
    """Run the program."""
    cli.check_exists(_WORKDIR.value, what="--workdir")
    if any(flag.value for flag in (_SAMPLES, _REFERENCE, _METRICS, _WRITE)):
        _measure()
    else:
        _faithfulness()


def _faithfulness() -> None:
    if _WORKDIR.value is None and not _OUT.value:
        raise cli.UsageError("--out is needed, a directory for the results")
    if _COMPARE.value and _NUM.value < 2:
        raise cli.UsageError(f"--num_captions={_NUM.value} must be at least 2 with --compare")
    _refuse((*_OF_METRIC, *_OF_SOURCES, "raw_weights"), "without --samples, --reference or --metrics")
    _refuse(cli_sampling.sampling_options(FLAGS), "without --samples, --reference or --metrics")
    out = _checked_out("faithfulness.json")
    from ddpm_jax.evaluation import report
    from ddpm_jax.pipelines import UnCLIP, load

    cli.use_cpu_devices()
    pipeline = load(_WORKDIR.value)
    if not isinstance(pipeline, UnCLIP):
        raise cli.UsageError(
            f"--workdir={_WORKDIR.value} holds no UnCLIP, and only that is measured on captions; give --reference"
        )
    out.mkdir(parents=True, exist_ok=True)
    kwargs = {"num_captions": _NUM.value, "seed": _SEED.value, "show": cli.show}
    report.write_faithfulness(pipeline, out, **kwargs)
    if _COMPARE.value:
        report.write_comparison(pipeline, out, **kwargs)


def _checked_out(name: str) -> Path:
    """Return the directory of the results, in which a file of this name can be written."""
    out = as_path(_OUT.value or _WORKDIR.value)
    if _OUT.value or out.is_dir():
        cli.check_can_write(out / name, what="--out" if _OUT.value else "--workdir")
    return out


def _measure() -> None:
    """Measure sets of images, or images under a model."""
    default = [] if _WRITE.value and not (_SAMPLES.value or _WORKDIR.value) else _OF_SETS[:5]
    metrics = list(dict.fromkeys(_METRICS.value or default))
    _check_flags(metrics)
    _check_effects(metrics)
    out = _checked_out("measures.json") if _OUT.value or _WORKDIR.value else None
    if _WRITE.value:
        cli.check_can_write(_WRITE.value, what="--write_statistics")
    if _PLOT.value:
        from ddpm_jax.extras import needs_extra

        with needs_extra("examples"):
            import matplotlib  # noqa: F401 (before anything is computed)
    cli.use_cpu_devices()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    of_sets, of_models = ([name for name in metrics if name in each] for each in (_OF_SETS, _OF_MODELS))
    pipeline = _pipeline(bits=bool(of_models)) if _WORKDIR.value and metrics else None
    if of_sets or _WRITE.value:
        _measure_sets(of_sets, pipeline, out)
    if of_models:
        _measure_bits(of_models, _of_bits(pipeline), out)


def _refuse(names: Iterable[str], where: str) -> None:
    """Raise UsageError for the first of these flags that was given."""
    for name in names:
        if FLAGS[name].present:
            raise cli.UsageError(f"--{name} is not used {where}")


def _check_flags(metrics: list[str]) -> None:
    """Raise UsageError for flags that do not fit each other."""
    known = (*_OF_SETS, *_OF_MODELS)
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise cli.UsageError(f"--metrics={','.join(metrics)}: {unknown[0]!r} must be one of {', '.join(known)}")
    of_sets = [name for name in metrics if name in _OF_SETS]
    if _SAMPLES.value and _WORKDIR.value and of_sets:
        raise cli.UsageError("--samples and --workdir are both given; measure one of them")
    if of_sets and not (_SAMPLES.value or _WORKDIR.value):
        raise cli.UsageError("--samples or --workdir is needed, the images to measure")
    if set(metrics) & set(_OF_MODELS) and not (_WORKDIR.value and _REFERENCE.value):
        raise cli.UsageError("bits per dimension need --workdir, a model, and --reference, the images to measure it on")
    compared = [name for name in metrics if name in _COMPARISONS]
    if compared and not _REFERENCE.value:
        raise cli.UsageError(f"--reference is needed for {compared[0]}")
    for name, flag, what in (("clip", _CLIP, "a model directory with a CLIP"), ("cas", _TEST, "images with labels")):
        if name in metrics and not flag.value:
            raise cli.UsageError(f"--{flag.name} is needed for {name}, {what}")
    if "cas" in metrics and not (_OUT.value or _WORKDIR.value):
        raise cli.UsageError("--out is needed for cas, where its classifier is trained")
    if _WRITE.value and not _REFERENCE.value:
        raise cli.UsageError("--reference is needed, of which --write_statistics writes the statistics")
    if _WRITE.value and not _WRITE.value.endswith(".npz"):
        raise cli.UsageError(f"--write_statistics={_WRITE.value} must end in .npz")


def _check_effects(metrics: list[str]) -> None:
    """Raise UsageError for a flag that none of the measures uses."""
    of_sets = [name for name in metrics if name in _OF_SETS]
    if metrics and not of_sets:
        unused = ["samples"] if _WRITE.value else ["samples", "features", "keep_features"]
        _refuse(unused, "by bits per dimension, which are of --reference")
    if not _FEATURES.value.startswith("inception:"):
        _refuse(["inception_resize"], f"by --features={_FEATURES.value}")
    if not (_SAMPLES.value or _REFERENCE.value or _TEST.value):
        _refuse(["size"], "where no images are read")
    for name, metric in _OF_METRIC.items():
        if metric not in metrics:
            _refuse([name], f"by --metrics={','.join(metrics)}, only by {metric}" if metrics else f"without {metric}")
    _refuse(["num_captions", "compare"], "with --samples, --reference or --metrics")
    if not (of_sets and _WORKDIR.value):
        where = "where images are not sampled" if metrics else "where nothing is measured"
        _refuse(cli_sampling.sampling_options(FLAGS), where)
        _refuse(() if _WORKDIR.value else ["raw_weights"], where)
    if _SAMPLES.value and not (_WRITE.value or set(metrics) & _COMPARISONS):
        _refuse(["reference"], f"by --metrics={','.join(metrics)}")


def _measure_sets(metrics: list[str], pipeline: Any, out: Path | None) -> None:
    from ddpm_jax.evaluation import sets
    from ddpm_jax.evaluation.compare import METRICS, Options
    from ddpm_jax.evaluation.features import open_extractor

    extractor = open_extractor(_FEATURES.value, resize=_RESIZE.value)
    chosen = [name for name in metrics if name in METRICS]
    asked = chosen if _METRICS.value else []  # of the default ones, what is not possible is left out, with a note
    sets.check_possible(asked, extractor)
    images = _samples(pipeline, metrics) if metrics else None
    labelled, tested = _open_test(images) if "cas" in metrics else (None, None)
    reading = sets.Reading(_SIZE.value, None if metrics else _NUM_IMAGES.value, _KEEP.value, _BATCH.value, _SEED.value)
    reference = _reference(chosen, asked, extractor, reading) if _WRITE.value or set(chosen) - {"is"} else None
    if images is None:
        return
    options = Options(_NEIGHBOURS.value, _KID_SUBSETS.value, _KID_SIZE.value, _BOOTSTRAP.value, _SEED.value)
    summary, measures, notes, first = sets.measure_samples(
        images,
        extractor,
        reference,
        reading,
        metrics=chosen,
        options=options,
        clip=_CLIP.value if "clip" in metrics else None,
        candidates=_CANDIDATES.value,
        keep_grid=_WORKDIR.value is not None,
        collect=(lambda batch: None) if labelled is None else labelled.add,
    )
    if out is not None and _WORKDIR.value is not None:
        sets.save_grid(out / "measured_samples.png", first)
    if measures or labelled is None:
        sets.report(summary, reference, measures, notes, out, cli.show)
    if labelled is not None:
        measures.append(_accuracy(labelled.arrays(), images, tested, out))
        sets.report(summary, reference, measures, notes, out, cli.show)


def _reference(chosen: list[str], asked: list[str], extractor: Any, reading: Any) -> Any:
    """Return the summary of the reference, which is written where that is wanted."""
    from ddpm_jax.evaluation import sets
    from ddpm_jax.evaluation.compare import describe
    from ddpm_jax.evaluation.summary import has_statistics, write_statistics

    if reading.at_most is not None and has_statistics(_REFERENCE.value):
        _refuse(["num_images"], f"where --reference={_REFERENCE.value} holds statistics")
    needs = bool(set(chosen) & {"kid", "pr"})
    reference = sets.open_reference(_REFERENCE.value, extractor, reading, needs_features=needs)
    if _WRITE.value:
        write_statistics(_WRITE.value, reference)
        cli.show(f"wrote {_WRITE.value}, statistics of the {describe('reference', reference)}")
    sets.check_possible(asked, extractor, reference)
    return reference


def _samples(pipeline: Any, metrics: list[str]) -> Any:
    """Return the images to measure."""
    from ddpm_jax.evaluation.images import SampledImages, open_images
    from ddpm_jax.evaluation.sets import captions_of

    if _SAMPLES.value:
        return open_images(_SAMPLES.value, size=_SIZE.value, at_most=_NUM_IMAGES.value)
    from ddpm_jax.evaluation.conditions import is_upsampler
    from ddpm_jax.evaluation.enlarged import EnlargedImages
    from ddpm_jax.pipelines import Cascade

    kwargs = cli_sampling.sampling_options(FLAGS) | {"seed": _SEED.value, "batch_size": _BATCH.value}
    if is_upsampler(pipeline):
        if not _REFERENCE.value:
            raise cli.UsageError(
                f"--workdir={_WORKDIR.value} holds an upsampler; --reference is needed, whose images it enlarges"
            )
        originals = open_images(_REFERENCE.value, size=_SIZE.value, at_most=_NUM_IMAGES.value)
        return EnlargedImages(pipeline, originals, **kwargs)
    captions, count = None, _NUM_IMAGES.value or 10_000
    if _REFERENCE.value and (not isinstance(pipeline, Cascade) or pipeline.captioned):
        captions = captions_of(_REFERENCE.value, count)
    used = captions or _WRITE.value or set(metrics) & _COMPARISONS or set(_METRICS.value or ()) & set(_OF_MODELS)
    if not used:
        _refuse(["reference"], f"by --metrics={','.join(metrics)}")
    return SampledImages(pipeline, count, captions=captions, **kwargs)


def _pipeline(*, bits: bool) -> Any:
    """Return the pipeline of the workdir, or the upsampler that it holds alone; bits: whether these are measured."""
    from ddpm_jax.evaluation.bits import check_layers
    from ddpm_jax.evaluation.conditions import is_upsampler
    from ddpm_jax.pipelines import Cascade, load
    from ddpm_jax.storage.model_directory import Model

    pipeline = load(_WORKDIR.value, ema=not _RAW.value)
    alone = isinstance(pipeline, Model) and not is_upsampler(pipeline)
    if alone and {"diffusion", "image_size", "conditions"} <= set(pipeline.metadata):
        pipeline = Cascade(base=pipeline).checked()
    if not (hasattr(pipeline, "generate") or is_upsampler(pipeline)):
        raise cli.UsageError(f"--workdir={_WORKDIR.value} holds no pipeline that generates images")
    if bits and not (isinstance(pipeline, Cascade) or is_upsampler(pipeline)):
        raise cli.UsageError(
            f"--workdir={_WORKDIR.value} holds a {type(pipeline).__name__}; bits are of a base of images, or of an "
            "upsampler alone"
        )
    if bits:
        check_layers(_of_bits(pipeline).diffusion, _LAYERS.value, name="--layers")
    return pipeline


def _of_bits(pipeline: Any) -> Any:
    """Return the model whose bits are measured: the base, or the upsampler alone."""
    return getattr(pipeline, "base", pipeline)


def _open_test(images: Any) -> tuple[Any, Any]:
    """Return what collects labelled samples, and images, labels and their set of --test, before anything is sampled."""
    from ddpm_jax.evaluation.accuracy import Labelled, match_classes, read_labelled
    from ddpm_jax.evaluation.images import open_images

    test = open_images(_TEST.value, size=_SIZE.value)
    tested = read_labelled(test)
    if images.classes is not None:
        match_classes(tested[1][:0], images.classes, tested[1], test.classes, test.name)
    return Labelled(images.name, tested[0].shape[1:]), (*tested, test)


def _accuracy(samples: Any, images: Any, tested: Any, out: Path) -> Any:
    """Return the classification accuracy score of labelled samples."""
    from ddpm_jax.evaluation.accuracy import accuracy_score, match_classes

    test = tested[2]
    labels, num_classes = match_classes(samples[1], images.classes, tested[1], test.classes, test.name)
    how = {"num_steps": _CAS_UPDATES.value, "replicates": _BOOTSTRAP.value, "seed": _SEED.value}
    return accuracy_score(samples, (tested[0], labels), out / "accuracy", num_classes=num_classes, **how)


def _measure_bits(metrics: list[str], model: Any, out: Path) -> None:
    """Measure bits per dimension of the reference."""
    from ddpm_jax.evaluation import bits, sets
    from ddpm_jax.evaluation.compare import Measure
    from ddpm_jax.evaluation.conditions import is_upsampler
    from ddpm_jax.evaluation.images import open_images
    from ddpm_jax.progress import progress_bar
    from ddpm_jax.storage.json_file import write_json

    images = open_images(_REFERENCE.value, size=_SIZE.value, at_most=_NUM_IMAGES.value)
    spread, measures, shown = {"replicates": _BOOTSTRAP.value, "seed": _SEED.value}, [], cli_hosts.is_first_host()
    how = {"seed": _SEED.value, "batch_size": _BATCH.value}
    if "bits" in metrics:
        with progress_bar(len(images), description="bound", unit="image", shown=shown) as bar:
            bound = bits.measure_bound(model, images, layers=_LAYERS.value, update=bar.update, **how)
        measures.append(bound.measure(**spread))
        cli.show(bits.table(bound))
        write_json(out / "elbo.json", bound.as_json())
        if _PLOT.value and shown:
            bits.save_plot(out / "elbo.png", bound)
    if "exact" in metrics:
        with progress_bar(len(images), description="exact", unit="image", shown=shown) as bar:
            solved = {"tolerance": _TOLERANCE.value, "update": bar.update}
            values, calls = bits.measure_exact(model, images, **solved, **how)
        words = (f"tolerance {_TOLERANCE.value:g}", counted(len(values), "image"), f"{calls:.0f} network calls")
        note = f"probability-flow ODE, {', '.join(words)}"
        spread["least"] = -math.inf
        measures.append(Measure.of_means("bits per dimension (exact)", values, note=note, **spread))
    if {"bits", "exact"} <= set(metrics):
        spread["note"] = "mean over the same images"
        measures.append(Measure.of_means("bound less exact", bound.totals - values, **spread))
    about = [f"images: {images.name} ({images.preprocessing})"]
    if is_upsampler(model):
        about.append(f"given their averages of {model.metadata['low_resolution']['size']} pixels a side")
    sets.report(None, None, measures, about, out, cli.show, name="bits.json")


if __name__ == "__main__":
    cli_sampling.define_stage_flags(FLAGS, sys.argv[1:])
    cli.run(main, FLAGS, distributed=True)
