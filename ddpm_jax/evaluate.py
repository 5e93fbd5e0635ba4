"""Measure faithfulness: `python -m ddpm_jax.evaluate --workdir DIR [--num_captions 512] [--compare]`.

Prints a table and writes faithfulness.json and samples.png into the workdir (or --out). With --compare it also answers
"why a prior?": the same decoder given the caption alone, the text embedding, the prior's and the true image embedding.
"""

from pathlib import Path

from absl import flags

from ddpm_jax import cli

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Workdir of a training run, or a weights file; bundled weights if none."
)
_OUT = flags.DEFINE_string("out", None, "Directory for the results; the workdir if it is one.")
_NUM = flags.DEFINE_integer("num_captions", None, "Captions a row; that of the config if none.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", None, "Seed of captions and noise; that of the config if none.", lower_bound=0)
_COMPARE = flags.DEFINE_bool("compare", False, 'Also measure "why a prior?".')


def main(argv: list[str]) -> None:
    """Run the program."""
    if argv[1:]:
        raise ValueError(f"unknown argument {argv[1]!r}; flags begin with --")
    from ddpm_jax import report
    from ddpm_jax.pipelines import load

    pipeline = load(_WORKDIR.value)
    out = _OUT.value or (_WORKDIR.value if _WORKDIR.value and Path(_WORKDIR.value).is_dir() else None)
    if out is None:
        raise ValueError("--out is needed, a directory for the results")
    Path(out).mkdir(parents=True, exist_ok=True)
    settings = pipeline.config["evaluation"]
    num = _NUM.value or settings["num_captions"]
    seed = settings["seed"] if _SEED.value is None else _SEED.value
    print(report.write_faithfulness(pipeline, Path(out), num_captions=num, seed=seed), flush=True)
    if _COMPARE.value:
        print(report.write_comparison(pipeline, Path(out), num_captions=num, seed=seed), flush=True)


if __name__ == "__main__":
    cli.run(main)
