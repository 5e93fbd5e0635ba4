"""Train the decoder of configs/unclip.py:smoke on several meshes and compare the losses and the samples.

    python tests/same_meshes.py [--dtype float32] [--steps 50] [MESH ...]

A mesh is written as data=2,fsdp=4; by default those of `MESHES`, on 8 CPU devices. Prints the largest relative
difference of the loss from one device's over the steps, and the largest difference of the samples' grey levels; the
exit status is 1 if a loss differs by more than 1e-5. Takes about a minute a mesh on two cores.

With --dtype bfloat16 each device rounds its part of a gradient before the sum, so the losses differ by more.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Eight devices share the cores: one that is late by 40 seconds is not stuck.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=900"

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from ddpm_jax.parallel.mesh import make_mesh  # noqa: E402
from ddpm_jax.training import train  # noqa: E402
from ddpm_jax.training.metrics import read_metrics  # noqa: E402

RECIPE = Path(__file__).parents[1] / "configs" / "unclip.py"
ONE = "data=1"
MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2")


def load_stages(dtype: str, steps: int) -> dict:
    """Return the stages clip and decoder of the recipe, by name."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config("smoke")
    config.dtype, config.progress, config.clip.training.preview_every = dtype, False, 0
    config.decoder.training.update(num_steps=steps, log_every=1, checkpoint_every=steps, preview_every=steps)
    return {stage.name: stage for stage in recipe.stages(config) if stage.name in ("clip", "decoder")}


def run(stages: dict, trained: Path, workdir: Path, mesh: str) -> tuple[np.ndarray, np.ndarray]:
    """Train the decoder on a mesh; return the losses, float64[steps], and the preview of the averaged parameters."""
    axes = {name: int(size) for name, size in (part.split("=") for part in mesh.split(","))}
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    shutil.copytree(trained, workdir)
    train(tuple(stages.values()), workdir, names=["decoder"], mesh=make_mesh(axes, devices=devices))
    losses = np.array([row["loss"] for row in read_metrics(workdir / "decoder")])
    (preview,) = (workdir / "decoder" / "previews").glob("*_ema.png")
    return losses, np.asarray(Image.open(preview)).astype(int)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=MESHES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    stages, worst = load_stages(arguments.dtype, arguments.steps), 0.0
    with tempfile.TemporaryDirectory() as directory:
        trained = Path(directory) / "clip"
        one = make_mesh({"data": 1}, devices=jax.devices()[:1])
        train(tuple(stages.values()), trained, names=["clip"], mesh=one)
        losses, image = run(stages, trained, Path(directory) / "one", ONE)
        print(f"{ONE}: loss {losses[0]:.6f} to {losses[-1]:.6f}, {arguments.dtype}", flush=True)
        for mesh in arguments.meshes:
            begin = time.perf_counter()
            found, other = run(stages, trained, Path(directory) / mesh, mesh)
            difference = float(np.max(np.abs(found / losses - 1)))
            worst = max(worst, difference)
            levels = np.max(np.abs(other - image))
            taken = time.perf_counter() - begin
            print(
                f"{mesh}: loss differs by {difference:.1e}, samples by {levels} of 255 levels, {taken:.0f} s",
                flush=True,
            )
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
