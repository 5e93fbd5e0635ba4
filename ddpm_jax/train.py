"""Train the stages of a recipe: `python -m ddpm_jax.train --config configs/shapes.py --workdir DIR [--stage NAME ...]`.

All stages in order, or those named. Re-running the command resumes. Any field of the config may be given on the command
line, as in --config.decoder.training.batch_size=32. A recipe is a Python file with `get_config(variant)`, which returns
the numbers, and `stages(config)`, which returns what is trained; it may have `pipeline(config)`, how the stages are
sampled together, and `evaluate(config, pipeline, workdir, show)`, called at the end of a run of all stages. The field
`mesh` of the config says how the devices share the work: "data" of them have a copy of the parameters and a part of the
batch, "fsdp" a part of both, "tensor" a part of the parameters and of the computation (`ddpm_jax.parallel`).
"""

import re
import time

from ddpm_jax import cli

# isort: split
from absl import flags
from ml_collections import config_flags

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with a variant after a colon.", lock_config=True, flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if missing.", flag_values=FLAGS)
_STAGE = flags.DEFINE_multi_string(
    "stage", None, "Train this stage only; may be repeated. All stages by default.", flag_values=FLAGS
)
_PROFILE = flags.DEFINE_string(
    "profile_steps", None, "Write a profiler trace of these steps, such as 100-105.", flag_values=FLAGS
)
_EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "Evaluate after all stages, if the recipe has an evaluate function.", flag_values=FLAGS
)


def main() -> None:
    """Run the program."""
    for name, value in (("config", _CONFIG.value), ("workdir", _WORKDIR.value)):
        if not value:
            raise cli.UsageError(f"--{name} is needed")
    profile = None
    if _PROFILE.value is not None:
        match = re.fullmatch(r"(\d+)-(\d+)", _PROFILE.value)
        profile = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= profile[0] <= profile[1]:
            raise cli.UsageError(f"--profile_steps={_PROFILE.value} must be FIRST-LAST, such as 100-105")
    config = _CONFIG.value
    cli.check_config_numbers(config)
    cli.use_cpu_devices(config.get("cpu_devices", 0))
    import ddpm_jax
    from ddpm_jax.parallel.mesh import make_mesh
    from ddpm_jax.paths import as_path
    from ddpm_jax.training.run import is_trained, train

    recipe = cli.load_recipe(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0])
    stages, pipeline = cli.call_recipe(recipe, "stages", config), cli.call_recipe(recipe, "pipeline", config)
    names = [stage.name for stage in stages]
    unknown = [name for name in _STAGE.value or () if name not in names]
    if unknown:
        raise cli.UsageError(f"--stage={unknown[0]} is not a stage of this recipe, which has {', '.join(names)}")
    chosen = [name for name in names if not _STAGE.value or name in _STAGE.value]
    try:
        mesh = make_mesh(dict(config.get("mesh", {"data": -1})))
    except ValueError as error:
        raise cli.UsageError(f"config.mesh: {error}") from None
    begin = time.perf_counter()
    settings = {"pipeline": pipeline, "config": plain(config.to_dict()), "mesh": mesh, "profile_steps": profile}
    train(stages, _WORKDIR.value, names=chosen, **settings)
    cli.show(f"trained {', '.join(chosen)} in {time.perf_counter() - begin:.0f} s")
    complete = all(is_trained(stage, _WORKDIR.value) for stage in stages)
    if _EVALUATE.value and not _STAGE.value and complete and hasattr(recipe, "evaluate"):
        begin = time.perf_counter()
        recipe.evaluate(config, ddpm_jax.load(_WORKDIR.value), as_path(_WORKDIR.value), cli.show)
        cli.show(f"measured in {time.perf_counter() - begin:.0f} s")


def plain(value):
    """Return a config as dicts, lists and numbers, as JSON would give it back."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


if __name__ == "__main__":
    cli.keep_memory()
    cli.run(main, FLAGS, config="config", distributed=True)
