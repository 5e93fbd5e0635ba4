"""Train a pipeline: `python -m ddpm_jax.train --config configs/shapes.py --workdir DIR [--stage NAME ...]`.

All stages in order, or those named. The same command again continues where it stopped. At the end, if every stage is
trained, it writes samples.png and faithfulness.json into the workdir and prints the faithfulness table.
"""

import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from ddpm_jax import cli

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with a variant after a colon.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if missing.")
_STAGE = flags.DEFINE_multi_string("stage", None, "Train this stage only; may be repeated. All stages by default.")
_EVALUATE = flags.DEFINE_bool("evaluate", True, "Measure faithfulness when every stage is trained.")


def main(argv: list[str]) -> None:
    """Run the program."""
    if argv[1:]:
        raise ValueError(f"unknown argument {argv[1]!r}; flags begin with --")
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            raise ValueError(f"--{name} is needed")
    from ddpm_jax import build, report
    from ddpm_jax.pipelines import load
    from ddpm_jax.training.run import run_stages

    config = plain(_CONFIG.value.to_dict())
    names = _STAGE.value or config["stages"]
    unknown = [name for name in names if name not in config["stages"]]
    if unknown:
        raise ValueError(f"--stage={unknown[0]} is not a stage of this config, which has {', '.join(config['stages'])}")
    begin = time.perf_counter()
    run_stages(config, _WORKDIR.value, names)
    print(f"trained {', '.join(names)} in {time.perf_counter() - begin:.0f} s", flush=True)
    ready = all((Path(_WORKDIR.value) / stage / "checkpoints").is_dir() for stage in build.STAGES)
    if _EVALUATE.value and ready and _STAGE.value is None:
        begin = time.perf_counter()
        pipeline = load(_WORKDIR.value)
        print(report.write_faithfulness(pipeline, Path(_WORKDIR.value), **config["evaluation"]), flush=True)
        print(f"measured in {time.perf_counter() - begin:.0f} s", flush=True)


def plain(value):
    """Return a config as dicts, lists and numbers, as JSON would give it back."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


if __name__ == "__main__":
    cli.run(main)
