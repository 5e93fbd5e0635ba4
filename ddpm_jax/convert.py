"""Read another library's checkpoint, and write it back.

    python -m ddpm_jax.convert --from karlo --src DIR --out WORKDIR
    python -m ddpm_jax.convert --to karlo --src WORKDIR --out DIR

The first writes a directory that `ddpm_jax.pipelines.load` and `python -m ddpm_jax.sample --workdir` open, and prints
its model card; the second writes safetensors in the layout that the source had. docs/checkpoints.md describes the
families. Nothing that a file contains is run, and nothing is written unless all of it could be read.
"""

from ddpm_jax import cli

# isort: split
import os
import re
import secrets
import time
from pathlib import Path

from absl import flags

from ddpm_jax.interop import families, table
from ddpm_jax.temporary import temporary_path

FLAGS = flags.FlagValues()
_FROM = flags.DEFINE_enum("from", None, list(families.FAMILIES), "Checkpoint family of --src.", flag_values=FLAGS)
_TO = flags.DEFINE_enum(
    "to", None, list(families.FAMILIES), "Checkpoint family to export a converted --src to.", flag_values=FLAGS
)
_SRC = flags.DEFINE_string("src", None, "File or directory to read.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "Directory to create.", flag_values=FLAGS)
_MODEL = flags.DEFINE_string(
    "model", None, "Name of a released network; for guided, glide, clip and score-sde.", flag_values=FLAGS
)
_HEAD = flags.DEFINE_list(
    "head_width",
    None,
    "Channels of an attention head, for clip: one number, or those of the text and the image tower (64,80).",
    flag_values=FLAGS,
)
_ACTIVATION = flags.DEFINE_enum(
    "activation",
    None,
    ["quick_gelu", "gelu"],
    "Activation, for clip; gelu for most checkpoints of open_clip.",
    flag_values=FLAGS,
)
_CLIP = cli.define_finite(
    "prior_clip", None, "Bound of what Karlo's prior predicts; by its layout 5 or 10.", lower_bound=0.0,
    flag_values=FLAGS,
)  # fmt: skip
_PREDICTION = flags.DEFINE_enum(
    "prediction", None, ["eps", "v"],
    "Prediction type of Stable Diffusion in one file: eps by default, v at 768 pixels.",
    flag_values=FLAGS,
)  # fmt: skip
_SIZE = flags.DEFINE_integer(
    "image_size", None, "Image size of Stable Diffusion in one file, 512 by default.", lower_bound=1,
    flag_values=FLAGS,
)  # fmt: skip
_PART = flags.DEFINE_string(
    "part",
    None,
    "Part of a training checkpoint, such as ema; the raw parameters by default, of score-sde the averages.",
    flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "float16", "bfloat16"], "Data type of the parameters in --out.", flag_values=FLAGS
)


_ONE_FILE = "stable-diffusion"  # its options are of one file, and not of a directory


def main() -> None:
    """Run the program."""
    if not _SRC.value or not _OUT.value or (_FROM.value is None) == (_TO.value is None):
        raise cli.UsageError("--src, --out and either --from or --to are needed")
    source, out = Path(_SRC.value), Path(os.path.realpath(_OUT.value))
    cli.check_exists(source, what="--src")
    _check_options(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise cli.UsageError(f"--out={_OUT.value} exists already; give a new directory")
    if out == Path.cwd() or os.path.ismount(out):  # an empty directory is replaced as a whole
        raise cli.UsageError(f"--out={_OUT.value} cannot be replaced by another directory; give a new one")
    cli.check_can_write(out.with_name(f"{out.name}.probe"), what="--out", given=_OUT.value)
    start = time.perf_counter()
    if _FROM.value is not None:
        _convert(source, out)
    else:
        _export(source, out)
    cli.show(f"wrote {out} in {time.perf_counter() - start:.0f} s")


def _check_options(source: Path) -> None:
    """Raise UsageError for a flag that the family does not use, before anything is read."""
    family = _FROM.value
    known = () if family is None else families.FAMILIES[family].options
    used = () if family == _ONE_FILE and source.is_dir() else known
    for name in ("model", "head_width", "activation", "prior_clip", "prediction", "image_size", "part"):
        if FLAGS[name].value is None or name in used:
            continue
        if family is None:
            reason = f"--to={_TO.value} writes what was converted, and has no such option"
        elif name in known:
            reason = f"{source} is a directory, and with --from={family} this option is for one file"
        else:
            listed = ", ".join(f"--{option}" for option in known) or "none"
            reason = f"--from={family} has no such option; it has {listed}"
        raise cli.UsageError(f"--{name}={_given(name)} is not used: {reason}")


def _given(name: str) -> str:
    value = FLAGS[name].value
    return ",".join(value) if isinstance(value, list) else str(value)


def _convert(source: Path, out: Path) -> None:
    import jax.numpy as jnp
    import numpy as np

    from ddpm_jax.progress import progress_bar
    from ddpm_jax.storage import model_directory as converted

    options = families.Options(
        *(_MODEL.value, _heads(), _ACTIVATION.value, _CLIP.value),
        *(_PREDICTION.value or "eps", _SIZE.value or 512, _PART.value),
    )
    try:
        read = families.FAMILIES[_FROM.value].read(source, options)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        # A file or a config that is not of the family may fail in ways that are not checked above.
        reason = f"{type(error).__name__}: {error}"
        raise table.ConvertError(f"{source} does not fit {_FROM.value} ({reason})") from error
    sums = {}
    base = source if source.is_dir() else source.parent
    with progress_bar(len(read.files), description="sha256", unit="file") as bar:
        for path in read.files:
            sums[str(path.relative_to(base))] = families.sha256(path)
            bar.update()
    dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16}[_DTYPE.value]
    small = families.source_files(source, read.files)
    cli.show(converted.save(read.converted, out, sources=sums, assumed=read.assumed, source_files=small, dtype=dtype))


def _heads() -> tuple[int, int] | None:
    if not _HEAD.value:
        return None
    if len(_HEAD.value) > 2 or not all(re.fullmatch("[1-9][0-9]{0,8}", width) for width in _HEAD.value):
        raise cli.UsageError(f"--head_width={','.join(_HEAD.value)} must be one width or two, as in 64,80")
    return int(_HEAD.value[0]), int(_HEAD.value[-1])


def _export(source: Path, out: Path) -> None:
    from ddpm_jax.storage import model_directory as converted

    family = converted.read_description(source)["family"]
    if family != _TO.value:
        raise cli.UsageError(f"--to={_TO.value}: {source} is a converted {family}, which is written as --to={family}")
    read = converted.load(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(out.with_name(f".{secrets.token_hex(8)}.tmp")) as new:
        new.mkdir(mode=0o700)
        families.FAMILIES[family].write(read, new)
        families.restore_source_files(source, new)
        mask = os.umask(0)
        os.umask(mask)
        new.chmod(0o777 & ~mask)
        os.replace(new, out)


if __name__ == "__main__":
    cli.run(main, FLAGS)
