"""Compare the losses of the shapes upsampler with those of commit c024709, before stages were built by recipes.

    python tests/same_losses.py

trains the upsampler of configs/shapes.py for 20 steps, on two CPU devices (about a minute on two cores), and prints the
largest relative difference of the loss and of the gradient's norm over the steps. The exit status is 1 unless all
differences are 0. The other stages of the recipe are trained in another way since then (captions that leave more open,
conditions dropped as in the paper), so their recorded losses hold for the recipe of commit 1a1f88c only.

The numbers of tests/data/shapes_losses.json were recorded at commit c024709 with

    python -m ddpm_jax.train --config configs/shapes.py --workdir DIR --noevaluate --config.data.num_examples=2000

and, for each stage, `num_steps=20`, `warmup_steps=5`, `log_every=1`, `preview_every=0` and `checkpoint_every=20`, from
"loss" and "grad_norm" of its metrics.jsonl. The tasks of that commit split the key of a step into as many keys as they
used; `named_keys` derives a key from the name of its use. So that the noise is the same, this command puts the keys of
the old positions in place of `named_keys`; all else is the package as it is.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 2)

from ddpm_jax.training import train  # noqa: E402
from ddpm_jax.training.tasks import classifier, conditions, data, diffusion  # noqa: E402

ROOT = Path(__file__).parents[1]
RECORDED = Path(__file__).parent / "data" / "shapes_losses.json"
# What each task used the keys of `jax.random.split(key, n)` for, in this order.
USES = {
    "upsampler": ("noise", "blur", "dropout", "noise_level", "low_resolution_noise", "mix_colours"),
}


def keys_by_position(uses):
    """Return a function like `named_keys` that splits the key; what is not in `uses` was not random."""

    def named_keys(key, *names):
        keys = dict(zip(uses, jax.random.split(key, max(len(uses), 1))))
        return tuple(keys.get(name, key) for name in names)

    return named_keys


def load_recipe():
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "configs" / "shapes.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def make_stages():
    recipe = load_recipe()
    config = recipe.get_config()
    config.data.num_examples = 2000
    config.progress = False
    for name in USES:
        config[name].training.update(
            num_steps=20, warmup_steps=5, log_every=1, preview_every=0, checkpoint_every=20, eval_every=0
        )
    return recipe.stages(config)


def largest_difference(found, expected):
    """Return the largest relative difference of two lists of numbers of the same length."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def main():
    recorded, stages, same = json.loads(RECORDED.read_text()), make_stages(), True
    with tempfile.TemporaryDirectory() as workdir:
        for stage in (stage for stage in stages if stage.name in USES):
            for module in (classifier, conditions, data, diffusion):
                module.named_keys = keys_by_position(USES[stage.name])
            train(stages, workdir, names=[stage.name])
            lines = (Path(workdir) / stage.name / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            for quantity, expected in recorded[stage.name].items():
                difference = largest_difference([row[quantity] for row in rows], expected)
                same &= difference == 0
                what = f"{stage.name} {quantity}, {len(rows)} steps"
                print(f"{what}: largest relative difference {difference:g}", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
