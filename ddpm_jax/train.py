"""Train a pipeline: `python -m ddpm_jax.train --config configs/shapes.py --workdir DIR [--stage NAME ...]`.

All stages in order, or those named. The same command again continues where it stopped. A run of all stages ends by
writing samples.png and faithfulness.json into the workdir and printing the faithfulness table. Any field of the config
may be given on the command line, as in --config.decoder.batch_size=32.
"""

import time
from pathlib import Path

from ddpm_jax import cli

# isort: split
from absl import flags
from ml_collections import config_flags

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with a variant after a colon.", lock_config=True, flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if missing.", flag_values=FLAGS)
_STAGE = flags.DEFINE_multi_string(
    "stage", None, "Train this stage only; may be repeated. All stages by default.", flag_values=FLAGS
)
_EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "Measure faithfulness at the end of a run of all stages.", flag_values=FLAGS
)


def main() -> None:
    """Run the program."""
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            raise cli.UsageError(f"--{name} is needed")
    from ddpm_jax import build
    from ddpm_jax.evaluation import report
    from ddpm_jax.pipelines import load
    from ddpm_jax.training.run import is_trained, run_stages

    config = plain(_CONFIG.value.to_dict())
    unknown = [name for name in _STAGE.value or () if name not in config["stages"]]
    if unknown:
        raise cli.UsageError(
            f"--stage={unknown[0]} is not a stage of this config, which has {', '.join(config['stages'])}"
        )
    cli.use_cpu_devices(config["cpu_devices"])
    names = [name for name in config["stages"] if not _STAGE.value or name in _STAGE.value]
    begin = time.perf_counter()
    run_stages(config, _WORKDIR.value, names)
    print(f"trained {', '.join(names)} in {time.perf_counter() - begin:.0f} s", flush=True)
    if _EVALUATE.value and not _STAGE.value and all(is_trained(config, _WORKDIR.value, name) for name in build.STAGES):
        begin = time.perf_counter()
        pipeline = load(_WORKDIR.value)
        report.write_faithfulness(pipeline, Path(_WORKDIR.value), **config["evaluation"], show=cli.show)
        print(f"measured in {time.perf_counter() - begin:.0f} s", flush=True)


def plain(value):
    """Return a config as dicts, lists and numbers, as JSON would give it back."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


if __name__ == "__main__":
    cli.keep_memory()
    cli.run(main, FLAGS, config="config")
