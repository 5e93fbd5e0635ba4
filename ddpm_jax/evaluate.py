"""Measure faithfulness: `python -m ddpm_jax.evaluate --workdir DIR [--num_captions 512] [--compare]`.

Prints how faithful images are to captions of captioned shapes, and writes faithfulness.json and samples.png into the
workdir (or --out). With --compare it also answers "why a prior?": the same decoder given the caption alone, the
text embedding, the prior's and the true image embedding, and what it shows where caption and image embedding disagree.
"""

from ddpm_jax import cli

# isort: split
from absl import flags

from ddpm_jax.paths import as_path

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Workdir of a training run; the bundled pipeline if none.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "Directory for the results; the workdir if it is one. Created if missing.", flag_values=FLAGS
)
_NUM = flags.DEFINE_integer("num_captions", 512, "Captions per row of the table.", lower_bound=1, flag_values=FLAGS)
_SEED = flags.DEFINE_integer(
    "seed",
    1,
    "Seed of captions and random numbers.",
    lower_bound=0,
    upper_bound=cli.MAX_SEED,
    flag_values=FLAGS,
)
_COMPARE = flags.DEFINE_bool("compare", False, 'Also measure "why a prior?".', flag_values=FLAGS)


def main() -> None:
    """Run the program."""
    cli.check_exists(_WORKDIR.value, what="--workdir")
    if _WORKDIR.value is None and not _OUT.value:
        raise cli.UsageError("--out is needed, a directory for the results")
    if _COMPARE.value and _NUM.value < 2:
        raise cli.UsageError(f"--num_captions={_NUM.value} must be at least 2 with --compare")
    out = as_path(_OUT.value or _WORKDIR.value)
    if _OUT.value or out.is_dir():
        cli.check_can_write(out / "faithfulness.json", what="--out" if _OUT.value else "--workdir")
    from ddpm_jax.evaluation import report
    from ddpm_jax.pipelines import UnCLIP, load

    cli.use_cpu_devices()
    pipeline = load(_WORKDIR.value)
    if not isinstance(pipeline, UnCLIP):
        raise cli.UsageError(f"--workdir={_WORKDIR.value} holds no UnCLIP, and only that is measured on captions")
    out.mkdir(parents=True, exist_ok=True)
    kwargs = {"num_captions": _NUM.value, "seed": _SEED.value, "show": cli.show}
    report.write_faithfulness(pipeline, out, **kwargs)
    if _COMPARE.value:
        report.write_comparison(pipeline, out, **kwargs)


if __name__ == "__main__":
    cli.run(main, FLAGS, distributed=True)
