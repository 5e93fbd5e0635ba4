"""Train the decoder of configs/unclip.py:smoke on several meshes and compare the losses and the samples.

    python tests/same_meshes.py [--dtype float32] [--steps 50] [--channels 32] [MESH[:MESH] ...]

A mesh is written as data=2,fsdp=4; by default those of `MESHES`, on 8 CPU devices. Prints the largest relative
difference of the loss from one device's over the steps, and the largest difference of the samples' grey levels; the
exit status is 1 if a loss differs by more than 1e-5. Takes about a minute a mesh on two cores.

Then the training is stopped half-way on eight devices and continued on four, for each pair of `RESUMED`, written as
data=8:data=4. Prints the largest difference of the state at the end from that of the run that stayed on eight devices,
and of the losses; the exit status is 1 for more than 1e-5.

With 32 channels, those of the recipe, some norms have one channel in a group. The gradient of a bias before such a norm
is nothing but rounding, which Adam scales up, so a few biases differ by more; with --channels 64 no norm is like that.

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
from several_hosts import trees  # noqa: E402

from ddpm_jax.parallel.mesh import make_mesh  # noqa: E402
from ddpm_jax.training import train  # noqa: E402
from ddpm_jax.training.metrics import read_metrics  # noqa: E402

RECIPE = Path(__file__).parents[1] / "configs" / "unclip.py"
ONE = "data=1"
MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=4", "fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2")
RESUMED = ("data=8:data=4", "data=2,fsdp=4:data=2,fsdp=2")


def load_stages(dtype: str, steps: int, channels: int) -> dict:
    """Return the stages clip and decoder of the recipe, by name."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config("smoke")
    config.dtype, config.progress, config.clip.training.preview_every = dtype, False, 0
    config.decoder.unet.channels = channels
    config.decoder.training.update(num_steps=steps, log_every=1, checkpoint_every=steps // 2, preview_every=steps)
    return {stage.name: stage for stage in recipe.stages(config) if stage.name in ("clip", "decoder")}


def run(stages: dict, workdir: Path, mesh: str) -> tuple[np.ndarray, np.ndarray]:
    """Train the decoder on a mesh; return the losses, float64[steps], and the preview of the averaged parameters."""
    axes = {name: int(size) for name, size in (part.split("=") for part in mesh.split(","))}
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    train(tuple(stages.values()), workdir, names=["decoder"], mesh=make_mesh(axes, devices=devices))
    losses = np.array([row["loss"] for row in read_metrics(workdir / "decoder")])
    (preview,) = (workdir / "decoder" / "previews").glob("*_ema.png")
    return losses, np.asarray(Image.open(preview)).astype(int)


def resume(stages: dict, workdir: Path, other: Path, mesh: str) -> tuple[dict[str, float], float]:
    """Continue a finished run from its middle on another mesh.

    Returns:
        The largest difference of each array of the state, the largest first, and the largest of the loss, relative.
    """
    shutil.copytree(workdir, other)
    last = max((other / "decoder" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(last)
    shutil.rmtree(other / "decoder" / "previews")
    losses = np.array([row["loss"] for row in read_metrics(workdir / "decoder")])
    found, _ = run(stages, other, mesh)
    ours, theirs = trees(other, "decoder"), trees(workdir, "decoder")
    differences = {name: float(np.max(np.abs(ours[name].astype(float) - theirs[name]))) for name in theirs}
    ordered = dict(sorted(differences.items(), key=lambda item: -item[1]))
    return ordered, float(np.max(np.abs(found / losses - 1)))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("meshes", nargs="*", default=(*MESHES, *RESUMED))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--channels", type=int, default=32)
    arguments = parser.parse_args()
    stages, worst = load_stages(arguments.dtype, arguments.steps, arguments.channels), 0.0
    with tempfile.TemporaryDirectory() as directory:
        trained = Path(directory) / "clip"
        one = make_mesh({"data": 1}, devices=jax.devices()[:1])
        train(tuple(stages.values()), trained, names=["clip"], mesh=one)

        def run_on(mesh: str) -> tuple[np.ndarray, np.ndarray]:
            shutil.copytree(trained, Path(directory) / mesh)
            return run(stages, Path(directory) / mesh, mesh)

        if not all(":" in mesh for mesh in arguments.meshes):
            losses, image = run_on(ONE)
            print(f"{ONE}: loss {losses[0]:.6f} to {losses[-1]:.6f}, {arguments.dtype}", flush=True)
        for mesh in arguments.meshes:
            begin = time.perf_counter()
            first, _, second = mesh.partition(":")
            if second:
                if not (Path(directory) / first).exists():
                    run_on(first)
                state, difference = resume(stages, Path(directory) / first, Path(directory) / mesh, second)
                largest = max(state.values())
                worst = max(worst, largest, difference)
                shown = f"state differs by {largest:.1e} at most, loss by {difference:.1e}"
                for name, value in state.items():
                    if value > 1e-5:
                        print(f"  {name} differs by {value:.1e}", flush=True)
            else:
                found, other = run_on(mesh)
                difference = float(np.max(np.abs(found / losses - 1)))
                worst = max(worst, difference)
                levels = np.max(np.abs(other - image))
                shown = f"loss differs by {difference:.1e}, samples by {levels} of 255 levels"
            print(f"{mesh}: {shown}, {time.perf_counter() - begin:.0f} s", flush=True)
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
