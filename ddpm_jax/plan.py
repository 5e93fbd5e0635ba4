"""Plan a run on TPUs before one is paid for: `python -m ddpm_jax.plan --config R --stage S --topology v5p:4x4x4`.

Compiles the training step of a stage, or with --sampler its sampler, by the TPU's own compiler, which needs no TPU.
Prints whether it fits, how fast it is, and how many days and chip-hours the configured run takes. --topology,
--batch_size and --mesh may be repeated: the table has a line for each combination. Needs ddpm_jax[plan];
docs/performance.md explains the columns.

    python -m ddpm_jax.plan --config configs/unclip.py --stage decoder --topology v5p:4x4x4 --topology v6e-64

Where the recipe's data is not on this machine, records of zeros stand in (data.path=zeros:..., see docs/data.md).
"""

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_jax import cli

# isort: split
from absl import flags
from ml_collections import config_flags

FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with a variant after a colon.", lock_config=True, flag_values=FLAGS
)
_STAGE = flags.DEFINE_multi_string("stage", None, "Stage to plan; all by default.", flag_values=FLAGS)
_TOPOLOGY = flags.DEFINE_multi_string(
    "topology", None, "Slice: chip and shape, as v5p:4x4x4, or accelerator type, as v5p-128.", flag_values=FLAGS
)
_BATCH_SIZE = flags.DEFINE_multi_integer(
    "batch_size", None, "Batch size; the recipe's by default.", lower_bound=1, flag_values=FLAGS
)
_MESH = flags.DEFINE_multi_string(
    "mesh", None, "Mesh, as data=4,fsdp=16; -1 takes the rest. By default those worth trying.", flag_values=FLAGS
)
_SAMPLER = flags.DEFINE_bool("sampler", False, "Plan the stage's sampler in place of its training.", flag_values=FLAGS)
_METHOD = flags.DEFINE_enum(
    "method",
    "auto",
    ["auto", "whole", "blocks"],
    "Compile the whole step, or its blocks and add them up; auto: blocks for networks of many different ones.",
    flag_values=FLAGS,
)
_FAST = flags.DEFINE_bool(
    "fast", False, "Compile with little effort, in a fifth of the time; see docs/performance.md.", flag_values=FLAGS
)
_JSON = flags.DEFINE_string("json", None, "File to write everything to.", flag_values=FLAGS)
_DETAILS = flags.DEFINE_bool("details", True, "Also print a line of details for each plan.", flag_values=FLAGS)


def main() -> None:
    """Run the program."""
    if not _CONFIG.value:
        raise cli.UsageError("--config is needed")
    if not _TOPOLOGY.value:
        raise cli.UsageError("--topology is needed, as in --topology=v5p:4x4x4 or --topology=v6e-64")
    if _JSON.value:
        cli.check_can_write(_JSON.value, what="--json")
        Path(_JSON.value).parent.mkdir(parents=True, exist_ok=True)
    import jax

    # The devices are those of the topology; a TPU of this machine is left alone.
    jax.config.update("jax_platforms", "cpu")
    from ddpm_jax.planning import report
    from ddpm_jax.planning.plan import parse_mesh
    from ddpm_jax.planning.topology import parse_topology, topology_devices

    try:
        topologies = [parse_topology(text) for text in _TOPOLOGY.value]
        meshes = [parse_mesh(text) for text in _MESH.value or ()]
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    config = _CONFIG.value
    cli.check_config_numbers(config)
    _stand_in_for_data(config)
    recipe = cli.load_recipe(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0])
    stages = cli.call_recipe(recipe, "stages", config)
    names = [stage.name for stage in stages]
    unknown = [name for name in _STAGE.value or () if name not in names]
    if unknown:
        raise cli.UsageError(f"--stage={unknown[0]} is not a stage of this recipe, which has {', '.join(names)}")
    chosen = [name for name in names if not _STAGE.value or name in _STAGE.value]
    chosen = _with_steps(stages, chosen)
    samplings = getattr(cli.call_recipe(recipe, "pipeline", config), "sampling", {})
    if _SAMPLER.value:
        chosen = _with_sampler(stages, chosen, samplings)
    for topology in topologies:
        topology_devices(topology)
    plans = _plan_all(_all_lowered(stages, chosen, topologies, meshes, dict(config.get("mesh", {}))), samplings)
    cli.show(report.table(plans))
    if _DETAILS.value:
        for plan in plans:
            cli.show(report.details(plan))
    notes = report.notes(plans)
    if notes:
        cli.show(notes)
    cli.show(report.suggestions(plans))


def _all_lowered(
    stages: Sequence[Any], chosen: Sequence[str], topologies: Sequence[Any], meshes: list, configured: dict
) -> list:
    """Return (topology, stage on a mesh) for all that is to be planned; nothing is compiled."""
    from ddpm_jax.planning.plan import default_meshes

    lowered = []
    for name in chosen:
        for topology in topologies:
            tried = meshes or default_meshes(configured, topology)
            tried = [{"data": -1}] if _SAMPLER.value else tried
            for batch_size in _BATCH_SIZE.value or (None,):
                for mesh in tried:
                    lowered += _lowered(stages, name, topology, mesh, batch_size)
    if not lowered:
        raise cli.UsageError("none of the meshes and batch sizes fits a topology, for the reasons above")
    return lowered


def _with_steps(stages: Sequence[Any], chosen: Sequence[str]) -> list[str]:
    """Leave out the stages that are fitted in closed form; raise UsageError for one that --stage names."""
    fitted = [stage.name for stage in stages if stage.name in chosen and hasattr(stage.task, "fitted")]
    if fitted and _STAGE.value:
        raise cli.UsageError(f"--stage={fitted[0]} is fitted in closed form, so that there is no step to plan")
    if fitted:
        cli.show(f"left out, since they are fitted in closed form: {', '.join(fitted)}")
    return [name for name in chosen if name not in fitted]


def _with_sampler(stages: Sequence[Any], chosen: Sequence[str], samplings: Mapping[str, Any]) -> list[str]:
    """Leave out the stages that have no sampler; raise UsageError for one that --stage names, or if all have none."""
    from ddpm_jax.training.lowered import stage_sampling

    found = [
        stage.name for stage in stages if stage.name in chosen and stage_sampling(stage, samplings.get(stage.name))
    ]
    missing = [name for name in chosen if name not in found]
    if missing and (_STAGE.value or not found):
        raise cli.UsageError(f"--sampler: stage {missing[0]} has nothing to sample")
    if missing:
        cli.show(f"left out, since they have nothing to sample: {', '.join(missing)}")
    return found


def _lowered(stages: Sequence[Any], name: str, topology: Any, mesh: Mapping[str, int], batch_size: int | None) -> list:
    """Return [(topology, stage on a mesh)], or [] and a line for a mesh or a batch that does not fit the topology."""
    from ddpm_jax.planning.plan import can_add_up, lower_for

    try:
        (found,) = lower_for(stages, name, topology, [mesh], batch_size)
        if _METHOD.value == "blocks" and not _SAMPLER.value and not can_add_up(found):
            raise ValueError("adding up blocks knows no tensor parallelism; --method whole does")
    except ValueError as error:
        asked = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        cli.show(f"left out: {name} on {topology.name} with {asked}: {error}")
        return []
    return [(topology, found)]


def _plan_all(lowered: list, samplings: dict) -> list:
    """Compile one after the other, with a line about each; the JSON file is complete after every one."""
    from ddpm_jax.planning.plan import plan_sampler, plan_training

    plans = []
    with contextlib.ExitStack() as stack:
        # The blocks of several meshes are the same, so that there is a cache in any case.
        cache = _cache() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = {"cache": cache, "show": lambda text: cli.show("  " + text), "fast": _FAST.value}
        for topology, each in lowered:
            cli.show(f"{each.stage.name} on {topology.name}, {dict(each.mesh.shape)}")
            if _SAMPLER.value:
                plans.append(plan_sampler(each, topology, samplings.get(each.stage.name), **options))
            else:
                plans.append(plan_training(each, topology, method=_METHOD.value, **options))
            if _JSON.value:
                document = json.dumps([plan.to_json() for plan in plans], indent=1)
                Path(_JSON.value).write_text(document + "\n", encoding="utf-8")
    return plans


def _stand_in_for_data(config) -> None:
    """Use records of zeros where the recipe's data is not on this machine: only shapes are read."""
    if config.get("data", {}).get("held_out_path"):
        config.data.held_out_path = ""  # evaluations are not planned
    path = config.get("data", {}).get("path")
    if path is None or (path and Path(path).expanduser().exists()) or path in ("noise", "shapes") or ":" in path:
        return
    side = max(_image_sizes(config.to_dict()), default=256)
    config.data.path = f"zeros:image={side}x{side},labels=1000,captions"
    cli.show(f"data.path={path!r} is not on this machine: planned for {config.data.path}")


def _image_sizes(config: dict) -> list[int]:
    found = [config["image_size"]] if isinstance(config.get("image_size"), int) else []
    return found + [size for part in config.values() if isinstance(part, dict) for size in _image_sizes(part)]


def _cache() -> Path | None:
    """Return the directory for results of the compiler, which are small and need no limit; None for no cache."""
    if not FLAGS["compilation_cache"].value:
        return None
    from ddpm_jax.compilation_cache import cache_directory

    try:
        directory = cache_directory().parent.parent / "plans"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        return None
    return directory


if __name__ == "__main__":
    cli.run(main, FLAGS, config="config")
