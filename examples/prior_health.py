"""Health of a prior on captioned shapes, and of the same sampled with faults: docs/prior.md shows its table.

    python examples/prior_health.py [--workdir DIR] [--num_records 512]

Prints the metrics that evaluations write to metrics.jsonl while a prior trains (`training.tasks.health`), on records
that were not trained on, for the pipeline that the package carries or that of a run of configs/shapes.py.
"""

import argparse
import dataclasses

import jax
import numpy as np

from ddpm_jax.compilation_cache import use_compilation_cache
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.data.transforms import Select, Tokenize
from ddpm_jax.pipelines import load
from ddpm_jax.training import AutoregressiveTask, Captions, DiffusionTask, Embeddings

NAMES = ("cosine_predicted", "cosine_text", "cosine_other_image", "cosine_mean_image", "cosine_predicted_text")
NAMES += ("norm_predicted", "rank_predicted", "rank_text")
BATCH, SEED = 128, 1  # records of another seed than that of the training


def make_task(pipeline, drop=0.1):
    """Return the task of a pipeline's prior, which evaluations of its training have."""
    prior, sampling = pipeline.prior, pipeline.sampling["prior"]
    captions = Captions(pipeline.clip.metadata["length"], drop, own_tokens=prior.network.text_encoder is not None)
    if pipeline.codes is not None:
        return AutoregressiveTask(model=prior.network, captions=captions, sampling=sampling)
    scale = prior.metadata["embedding"].get("scale")
    x0 = Embeddings(prior.network.embed_dim, scale, statistics="statistics" if scale is None else None)
    return DiffusionTask(
        model=prior.network, diffusion=prior.diffusion, x0=x0, conditions=(captions,), sampling=sampling
    )


def held_out(pipeline, count):
    """Return batches of records that were not trained on, as tasks read them."""
    source = ShapesSource(SEED, pipeline.clip.network.vision.image_size, length=count)
    transforms = (Tokenize(pipeline.tokenizer, pipeline.clip.metadata["length"]), Select(("image", "tokens", "mask")))
    for start in range(0, count, BATCH):
        records = [source[index] for index in range(start, min(start + BATCH, count))]
        for transform in transforms:
            records = [transform(record) for record in records]
        yield {name: np.stack([record[name] for record in records]) for name in records[0]}


def measure(task, pipeline, batches):
    """Return the means of the metrics over batches."""
    models = {role: model for role, model in pipeline.models.items() if role in ("clip", "codes", "statistics")}

    @jax.jit
    def health(params, models, batch, key):
        return task.health(params, models, task.prepare(models, batch), key)

    rows = [health(pipeline.prior.params, models, batch, jax.random.key(n)) for n, batch in enumerate(batches)]
    return {name: float(np.mean([row[name] for row in rows])) for name in NAMES}


def with_sampling(task, **options):
    """Return the task with other options of its sampler."""
    return dataclasses.replace(task, sampling=task.sampling.with_options(**options))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="of a run of configs/shapes.py; by default the bundled pipeline")
    parser.add_argument("--num_records", type=int, default=512)
    arguments = parser.parse_args()
    use_compilation_cache()
    pipeline = load(arguments.workdir)
    task, batches = make_task(pipeline), list(held_out(pipeline, arguments.num_records))
    texts = ("tokens", "mask")
    shifted = [batch | {name: np.roll(batch[name], 1, axis=0) for name in texts} for batch in batches]
    untrained = jax.tree.map(
        lambda leaf: 0.02 * jax.random.normal(jax.random.key(0), leaf.shape), pipeline.prior.params
    )
    cases = {
        "as it is": (task, pipeline, batches),
        "captions dropped": (make_task(pipeline, drop=1.0), pipeline, batches),
        "captions of other records": (task, pipeline, shifted),
        "untrained": (task, pipeline.replace(prior=pipeline.prior.replace(params=untrained)), batches),
        "guidance of 3": (with_sampling(task, scale=3.0), pipeline, batches),
        "guidance of 8": (with_sampling(task, scale=8.0), pipeline, batches),
    }
    if pipeline.codes is None:
        cases["l2 clamp"] = (with_sampling(task, l2_clamp=True), pipeline, batches)
        cases["clipped to +-0.3"] = (with_sampling(task, threshold=0.3), pipeline, batches)
        cases["2 steps"] = (with_sampling(task, steps=2), pipeline, batches)
        if task.x0.statistics is None:
            double = dataclasses.replace(task, x0=Embeddings(task.x0.size, 2.0 * task.x0.scale))
            cases["sampled at twice the scale of the training"] = (double, pipeline, batches)
    print("| prior | " + " | ".join(NAMES) + " |\n|" + " --- |" * (1 + len(NAMES)))
    for case, (own, changed, records) in cases.items():
        found = measure(own, changed, records)
        print(f"| {case} | " + " | ".join(f"{found[name]:.3g}" for name in NAMES) + " |", flush=True)


if __name__ == "__main__":
    main()
