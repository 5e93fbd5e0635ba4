"""Health of the diffusion prior on captioned shapes, and of the same with faults: docs/prior.md shows its table.

    python examples/prior_health.py --workdir DIR [--num_steps 400] [--num_examples 20000]

Trains the prior of configs/shapes.py on the CLIP that the package carries, once as the recipe has it and once with each
fault, and prints the metrics that evaluations write to metrics.jsonl, on 512 held-out records. It goes on where it was
interrupted.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import shapes  # noqa: E402
from ddpm_jax.compilation_cache import use_compilation_cache  # noqa: E402
from ddpm_jax.diffusion.sampling import Sampling  # noqa: E402
from ddpm_jax.pipelines.directory import BUNDLED  # noqa: E402
from ddpm_jax.storage.checkpoint import restore_params  # noqa: E402
from ddpm_jax.storage.model_directory import open_model  # noqa: E402
from ddpm_jax.training import train  # noqa: E402

NAMES = ("cosine_predicted", "cosine_text", "cosine_other_image", "cosine_mean_image", "cosine_predicted_text")
NAMES += ("norm_predicted", "rank_predicted", "rank_text")
BATCH = 128


class Misaligned:
    """A source whose captions are those of the following records."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        other = self.source[(int(index) + 1) % len(self)]
        return self.source[index] | {"caption": other["caption"], "z_text": other["z_text"]}

    def fingerprint(self):
        """Return a text that differs if the records differ."""
        return f"misaligned {self.source.fingerprint()}"


def trained(workdir, name, arguments, *, misaligned=False, **fields):
    """Train a prior with other fields of the recipe; return its task, averaged parameters and frozen models."""
    config = shapes.get_config()
    config.data.num_examples = arguments.num_examples
    config.prior.training.update(num_steps=arguments.num_steps, eval_every=0)
    for field, value in fields.items():
        (config.prior.training if field == "num_steps" else config.prior)[field] = value
    clip = {"clip": str(BUNDLED / "clip")}
    models = {"clip": open_model(BUNDLED / "clip")}
    stages = [stage for stage in shapes.stages(config) if stage.name in ("statistics", "prior")]
    source = stages[0].source.compute(models, workdir / "embeddings")
    source = Misaligned(source) if misaligned else source
    stages = [dataclasses.replace(stage, source=source, needs=stage.needs | clip) for stage in stages]
    train(stages, workdir / name)
    stage = stages[-1]
    if "statistics" in stage.needs:
        models["statistics"] = open_model(workdir / name / "statistics")
    params, _ = restore_params(workdir / name / "prior", step=stage.training.num_steps)
    return stage, params, models


def held_out(workdir, stage, models):
    """Return the held-out records in prepared batches."""
    config = shapes.get_config()
    evaluated = next(each for each in shapes.stages(config) if each.name == "prior").eval_source
    source, found = evaluated.compute(models, workdir / "embeddings_held_out"), []
    for start in range(0, len(source), BATCH):
        records = []
        for index in range(start, start + BATCH):
            record = source[index]
            for transform in stage.transforms:
                record = transform(record)
            records.append(record)
        found.append({name: np.stack([record[name] for record in records]) for name in records[0]})
    return [stage.task.prepare(models, batch) for batch in found]


def measure(workdir, stage, params, models, **options):
    """Return the means of the metrics over the held-out records."""
    sampling = Sampling("ancestral", 25).with_options(**options)
    task = dataclasses.replace(stage.task, sampling=sampling)
    frozen = {role: models[role] for role in task.health_needs}
    health = jax.jit(lambda params, batch, key: task.health(params, frozen, batch, key))
    batches = held_out(workdir, stage, models)
    rows = [health(params, batch, jax.random.key(number)) for number, batch in enumerate(batches)]
    return {name: float(np.mean([row[name] for row in rows])) for name in NAMES}


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--num_steps", type=int, default=400)
    parser.add_argument("--num_examples", type=int, default=20_000)
    arguments = parser.parse_args()
    use_compilation_cache()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    early = arguments.num_steps // 10
    cases = {
        "healthy": ({}, {}),
        "healthy, best of its clamps: l2": ({}, {"l2_clamp": True}),
        "healthy, standardized": ({"embed_norm": "standardize"}, {}),
        "a tenth of the steps": ({"num_steps": early}, {}),
        "captions of other images": ({"misaligned": True}, {}),
        "captions always dropped": ({"drop_text": 1.0}, {}),
        "scale of 1: unit vectors in unit noise": ({"embed_scale": 1.0}, {}),
        "scale of sqrt(D) * 8": ({"embed_scale": 64.0}, {}),
        "clipped to +-0.5": ({}, {"threshold": 0.5}),
        "guidance of 8": ({}, {"scale": 8.0}),
    }
    print("| prior | " + " | ".join(NAMES) + " |\n|" + " --- |" * (1 + len(NAMES)))
    found = {}
    for case, (fields, options) in cases.items():
        name = "-".join(f"{field}_{value}" for field, value in fields.items()) or "healthy"
        stage, params, models = trained(arguments.workdir, name, arguments, **fields)
        found[case] = measure(arguments.workdir, stage, params, models, **options)
        print(f"| {case} | " + " | ".join(f"{found[case][name]:.3g}" for name in NAMES) + " |", flush=True)
    (arguments.workdir / "health.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
