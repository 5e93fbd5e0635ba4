"""Prepare a data set: `python -m ddpm_jax.prepare --source DIR --out NEW_DIR --size 256`.

Images of any source are resized, cropped to squares and written as ArrayRecord shards, with captions, labels and a
manifest, for training. What cannot be used is counted and named. Running the command again resumes.
"""

from ddpm_jax import cli

# isort: split
import ast
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from ddpm_jax.errors import counted

FLAGS = flags.FlagValues()
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "What to read: a folder of images, tar files (webdataset), prepared data, tfds:NAME, or emoji:DIR.",
    flag_values=FLAGS,
)
_OPTION = flags.DEFINE_multi_string(
    "option", [], "Option of the source, NAME=VALUE, such as captions=none; may be repeated.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Directory to write; new, empty, or to resume.", flag_values=FLAGS)
_SIZE = flags.DEFINE_integer(
    "size", None, "Side of the images in pixels.", lower_bound=1, upper_bound=8192, flag_values=FLAGS
)
_MIN_SIDE = flags.DEFINE_integer(
    "min_side",
    None,
    "Skip images with a shorter side than this; size if none, 1 enlarges small ones.",
    lower_bound=1,
    flag_values=FLAGS,
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "png",
    ["png", "webp", "jpeg"],
    "Image format of the records; png and webp are lossless.",
    flag_values=FLAGS,
)
_QUALITY = flags.DEFINE_integer("quality", 95, "Quality of jpeg.", lower_bound=1, upper_bound=100, flag_values=FLAGS)
_DUPLICATES = flags.DEFINE_bool(
    "keep_duplicates", False, "Include images whose pixels equal those of an earlier one.", flag_values=FLAGS
)
_MAX_SKIPPED = flags.DEFINE_string(
    "max_skipped",
    "0.1",
    "Stop when more images are skipped than this number, or fraction, such as 0.1.",
    flag_values=FLAGS,
)
_SHARD = flags.DEFINE_integer("shard_records", 1024, "Source records per shard.", lower_bound=1, flag_values=FLAGS)
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Processes that decode and encode; one for each core if none.", lower_bound=1, flag_values=FLAGS
)
_EMBED = flags.DEFINE_multi_string(
    "embed",
    [],
    "Model directory of a CLIP or an autoencoder, whose embeddings are stored as well; may be repeated.",
    flag_values=FLAGS,
)
_BATCH = flags.DEFINE_integer("batch_size", 64, "Batch size of the embeddings.", lower_bound=1, flag_values=FLAGS)
_INDEX = flags.DEFINE_integer(
    "process_index", 0, "Index of this process, where several share the work.", lower_bound=0, flag_values=FLAGS
)
_COUNT = flags.DEFINE_integer(
    "process_count", 1, "Number of processes that share the work, on one file system.", lower_bound=1, flag_values=FLAGS
)
_WORDS = {"none": None, "true": True, "false": False}


def main() -> None:
    """Run the program."""
    if not _SOURCE.value or not _OUT.value or not _SIZE.value:
        raise cli.UsageError("--source, --out and --size are needed")
    if _INDEX.value >= _COUNT.value:
        raise cli.UsageError(f"--process_index={_INDEX.value} must be less than --process_count={_COUNT.value}")
    index, count = _share()
    limit = _limit(_MAX_SKIPPED.value)
    for path in _EMBED.value:
        cli.check_exists(path, what="--embed")
    from ddpm_jax.data.preparing import Options, OutputError, prepare
    from ddpm_jax.parallel.shared_directory import check_shared

    cli.check_address(_OUT.value, f"--out={_OUT.value}")
    check_shared(os.path.abspath(_OUT.value), "--out")
    source = _open(_SOURCE.value, _options(_OPTION.value))
    options = Options(
        size=_SIZE.value,
        min_side=_MIN_SIDE.value,
        format=_FORMAT.value,
        quality=_QUALITY.value,
        keep_duplicates=_DUPLICATES.value,
        shard_records=_SHARD.value,
    )
    kwargs = {
        "workers": _WORKERS.value or _cores(),
        "max_skipped": limit,
        "embedders": [_embedder(path) for path in _EMBED.value],
        "process_index": index,
        "process_count": count,
        "provenance": {"source": _SOURCE.value, "options": _OPTION.value},
    }
    try:
        summary = prepare(source, _OUT.value, options, **kwargs)
        if _connected().count > 1:
            _connected().barrier("the data are prepared")
            summary = prepare(source, _OUT.value, options, **kwargs)  # of the whole
    except OutputError as error:
        raise cli.UsageError(f"--out: {error}") from error
    _show(summary)


def _share() -> tuple[int, int]:
    """Return the index of this process and the number of those that share the work."""
    if _connected().count == 1:
        return _INDEX.value, _COUNT.value
    if _COUNT.value != 1:
        raise cli.UsageError(f"--process_count={_COUNT.value} is for processes that are not connected; leave it out")
    return _connected().index, _connected().count


def _connected() -> Any:
    """Return the hosts of this run."""
    from ddpm_jax.parallel import hosts

    return hosts.current()


def _open(spec: str, options: Mapping[str, Any]) -> Any:
    """Open a source so that a record without a caption or an image is skipped, and does not end the work."""
    from ddpm_jax.data.open_source import open_source

    try:
        try:
            return open_source(spec, **{"check": False, **options})
        except TypeError:  # sources whose records are all complete have no such option
            return open_source(spec, **options)
    except (TypeError, ValueError) as error:
        raise cli.UsageError(f"--source={spec}: {error}") from error


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Return the options of the source, {name: value}; values are Python's numbers and tuples, or else texts."""
    options = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name.isidentifier() or not equals:
            raise cli.UsageError(f"--option={word} must be NAME=VALUE, such as captions=none")
        try:
            options[name] = _WORDS[text] if text in _WORDS else ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[name] = tuple(text.split(",")) if "," in text else text
    return options


def _limit(text: str) -> int | float:
    """Return the number "100" as an int, and the fraction "0.1" as a float."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if not value >= 0 or (isinstance(value, float) and value > 1):
        raise cli.UsageError(f"--max_skipped={text} must be a number of images, or a fraction in [0.0, 1.0]")
    return value


def _embedder(path: str) -> Any:
    """Load the network of a model directory for `prepare`."""
    from ddpm_jax.storage.embedder import open_embedder

    cli.use_cpu_devices()
    return open_embedder(path, batch_size=_BATCH.value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show(summary: Any) -> None:
    size = f"{summary.bytes / 1e6:.4g} MB"
    done = f"{counted(summary.records, 'image')} in {counted(summary.shards, 'shard')}, {size}"
    if summary.complete:
        cli.show(f"wrote {_OUT.value}: {done}")
    else:
        index, count = _share()
        cli.show(f"wrote the parts of process {index} of {count} in {_OUT.value}: {done}")
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.skipped.items())
    if reasons:
        listed = f"; {_OUT.value}/skipped.jsonl names them" if summary.complete else ""
        cli.show(f"skipped {sum(summary.skipped.values())}: {reasons}{listed}")
    if summary.unused:
        cli.show(f"not used: {summary.unused} files or rows that belong to no image; skipped.jsonl names them too")


if __name__ == "__main__":
    cli.run(main, FLAGS, distributed=True)
