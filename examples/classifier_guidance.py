"""Measure whether a classifier's gradient brings samples into the class that is wanted.

    python examples/classifier_guidance.py --base DIR --classifier DIR --judge DIR --out scales.png

`--base` is a class-conditional stage, `--classifier` a classifier of noised images that guides it, and `--judge` one of
clean images, which says which share of the samples is in the class that was wanted (configs/adm.py; the judge with
--config.classifier.noised=False). Prints the share for each scale with its 95 % interval, and writes a grid: a row for
each scale, a column for each class.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import ddpm_jax
from ddpm_jax.data.image_grid import grid, save_png
from ddpm_jax.evaluation.faithfulness import wilson_interval
from ddpm_jax.pipelines import Cascade
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.types import to_float


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "classifier", "judge", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 1.0, 4.0])
    parser.add_argument("--per_class", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base, classifier, judge = (ddpm_jax.load(path) for path in (args.base, args.classifier, args.judge))
    pipeline = Cascade(base=base, classifier=classifier, batch_size=32).checked()
    classes = pipeline.labels["num_classes"]
    names = pipeline.labels["names"] or tuple(map(str, range(classes)))
    labels = np.tile(np.arange(classes), args.per_class)

    @jax.jit
    def judged(model: Model, images: jax.Array) -> jax.Array:
        return model.apply(to_float(images), jnp.zeros(len(images), jnp.int32)).argmax(-1)

    rows, captions = [], []
    print(f"| scale | in the class that was wanted, of {len(labels)} | 95 % interval |\n| --- | --- | --- |")
    for scale in args.scales:
        images = pipeline.generate(
            labels=labels, seed=args.seed, sampler="ddim", steps=args.steps, threshold=1.0, classifier_scale=scale
        )
        right = int((np.asarray(judged(judge, images)) == labels).sum())
        low, high = wilson_interval(right, len(labels))
        print(f"| {scale:g} | {right / len(labels):.1%} | {low:.1%}-{high:.1%} |", flush=True)
        rows.append(images[:classes])
        captions += [f"{name}, {scale:g}" for name in names]
    save_png(args.out, grid(np.concatenate(rows), captions, columns=classes, cell_scale=2))


if __name__ == "__main__":
    main()
