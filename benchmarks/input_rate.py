"""Images that a host must read for the training of each stage, and the cores that it takes to decode them.

    python benchmarks/input_rate.py --config configs/unclip.py [--utilization 0.5] [--rates 64=2900 256=700]

For each stage of a recipe: operations of a training step for an image (three times those of the loss), and for each
chip the images/s of a host of four, as if the chips reached this model utilization. The rates are images/s of a core,
by the side of the records in pixels, as examples/loader_throughput.py measures them.
"""

import argparse
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import jax

from ddpm_jax.parallel.chips import CHIPS
from ddpm_jax.parallel.mesh import make_mesh
from ddpm_jax.training.flops import count_flops
from ddpm_jax.training.lowered import lower_stage

TPUS = [chip for chip in CHIPS if chip.name in ("v4", "v5e", "v5p", "v6e")]


def load_recipe(path: str) -> ModuleType:
    """Import a recipe."""
    spec = importlib.util.spec_from_file_location("recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def image_flops(stages: list, name: str) -> float:
    """Return the operations of a training step for an example."""
    lowered = lower_stage(stages, name, make_mesh({"data": 1}, devices=jax.devices()[:1]))
    loss, args = lowered.loss()
    training = lowered.stage.training
    return 3 * training.gradients * count_flops(loss, *args) / training.batch_size


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, with a variant after a colon")
    parser.add_argument("--utilization", type=float, default=0.5, help="model operations over the chip's peak")
    parser.add_argument("--rates", nargs="+", default=["64=2900", "256=700"], help="SIDE=IMAGES_PER_SECOND of a core")
    arguments = parser.parse_args()
    rates = {side: float(rate) for side, rate in (text.split("=") for text in arguments.rates)}
    path, _, variant = arguments.config.partition(":")
    recipe = load_recipe(path)
    config = recipe.get_config(variant)
    if "path" in config.data and not Path(config.data.path or "?").exists():
        config.data.path = "zeros:image=256x256,labels=1000,captions"
    stages = recipe.stages(config)
    columns = ["stage", "TFLOP an image", "chip", "images/s of a host", *(f"cores, {side} px" for side in rates)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for stage in stages:
        flops = image_flops(stages, stage.name)
        for chip in TPUS:
            needed = arguments.utilization * chip.peak_flops * chip.chips_per_host / flops
            cores = " | ".join(str(math.ceil(needed / rate)) for rate in rates.values())
            print(f"| {stage.name} | {flops / 1e12:.3f} | {chip.name} | {needed:,.0f} | {cores} |", flush=True)


if __name__ == "__main__":
    main()
