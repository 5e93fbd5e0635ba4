"""Check and time the package on the accelerator that JAX finds: `python benchmarks/accelerator.py [--tiny]`.

1. Trains the shapes recipe (its variant "quick") for a few minutes: images/s and losses of each stage.
2. Times a training step and a sampler of an ADM U-Net in bfloat16, beside guided-diffusion's module in PyTorch
   (bfloat16, channels_last, compiled) where torch and guided-diffusion-sdk are installed.
3. Runs the tests against exact answers and against reference implementations' outputs, in ten minutes at most.

--tiny does the same in a few minutes on a CPU, with tiny networks, PyTorch's not compiled, and with two files of tests.
Run it in a checkout, whose tests it needs.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling, sample_with
from ddpm_jax.models.adm import ClassUNet
from ddpm_jax.models.unet import UNet
from ddpm_jax.parallel.chips import device_peak_flops
from ddpm_jax.parallel.mesh import make_mesh, shard_batch
from ddpm_jax.training import DiffusionTask, Images, Labels
from ddpm_jax.training.flops import count_flops
from ddpm_jax.training.metrics import read_metrics
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import make_train_step

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("samplers", "solvers", "losses", "process", "layers", "likelihood", "guidance", "published", "interop_guided")
TINY_TESTS = ("process", "samplers")
LARGE = {"channels": 192, "mult": (1, 2, 3, 4), "blocks": 3, "levels": (1, 2, 3), "size": 64, "batch": 32, "steps": 50}
LARGE |= {"compiled": True}
TINY = {"channels": 32, "mult": (1, 2), "blocks": 1, "levels": (1,), "size": 16, "batch": 4, "steps": 4}
TINY |= {"compiled": False}  # PyTorch's compiler takes longer than all the rest


def main() -> int:
    """Run everything; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny networks, for a CPU")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--skip", nargs="*", default=[], choices=("train", "unet", "tests"), help="parts to leave out")
    flags = parser.parse_args()
    device = jax.devices()[0]
    found: dict[str, Any] = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__}
    print(f"{jax.device_count()} x {device.device_kind}, JAX {jax.__version__}", flush=True)
    sizes = TINY if flags.tiny else LARGE
    parts: dict[str, Callable[[], Any]] = {
        "train": lambda: train_shapes("smoke" if flags.tiny else "quick"),
        "unet": lambda: time_unet(sizes) | time_torch(sizes),
        "tests": lambda: run_tests(TINY_TESTS if flags.tiny else TESTS, seconds=600),
    }
    for name, run in parts.items():
        if name not in flags.skip:
            found[name] = run()
            if flags.json:
                Path(flags.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found.get("tests", {}).get("status", 0) == 0 else 1


def train_shapes(variant: str) -> dict[str, Any]:
    """Train the shapes recipe by the command; return what its metrics say of each stage."""
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "ddpm_jax.train", f"--config={ROOT}/configs/shapes.py:{variant}"]
        subprocess.run([*command, f"--workdir={workdir}", "--config.progress=False"], check=True, cwd=ROOT)
        found: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        for directory in sorted(Path(workdir).iterdir()):
            rows = [row for row in read_metrics(directory) if "loss" in row]
            if rows:
                speed = float(np.median([row["images_per_second"] for row in rows]))
                found[directory.name] = {"images_per_second": speed, "losses": [rows[0]["loss"], rows[-1]["loss"]]}
                first, last = (row["loss"] for row in (rows[0], rows[-1]))
                print(f"train {directory.name}: {speed:.4g} images/s, loss {first:.4g} to {last:.4g}", flush=True)
    return found


def time_unet(sizes: dict[str, Any]) -> dict[str, Any]:
    """Time a training step and a sampler of the package's ADM U-Net, on all devices."""
    unet = UNet(
        sizes["channels"],
        6,
        sizes["mult"],
        sizes["blocks"],
        (),
        attention_levels=sizes["levels"],
        head_channels=min(64, sizes["channels"]),
        dtype=jnp.bfloat16,
    )
    task = DiffusionTask(
        model=ClassUNet(unet, 1000),
        diffusion=Diffusion("cosine", 1000, variance="learned_range"),
        x0=Images(sizes["size"]),
        conditions=(Labels(1000),),
        objective="hybrid",
    )
    mesh, tx, key = make_mesh({"data": -1}), optax.adamw(1e-4), jax.random.key(0)
    count = sizes["batch"] * jax.device_count()
    images = np.random.default_rng(0).integers(0, 256, (count, sizes["size"], sizes["size"], 3), np.uint8)
    batch = shard_batch({"image": images, "label": np.arange(count, dtype=np.int32) % 1000}, mesh)
    state = create_state(task, tx, key, mesh, batch)
    step = jax.jit(make_train_step(task, tx, ema_decay=0.9999), donate_argnums=0)
    holder = [state]

    def train() -> None:
        holder[0], metrics = step(holder[0], batch, key)
        jax.block_until_ready(metrics)

    flops = 3 * count_flops(lambda *args: task.loss(*args)[0], state.params, batch, key)
    found = {"step_seconds": seconds_of(train), "examples": count}
    sampling = Sampling("ddim", str(sizes["steps"]), threshold=1.0).checked()
    params = jax.tree.map(jnp.copy, holder[0].ema_params)

    @jax.jit
    def sample(params: Any, keys: jax.Array, labels: jax.Array) -> jax.Array:
        denoise = task.denoiser(params, {"y": labels})
        return sample_with(sampling, task.diffusion, denoise, keys, (sizes["size"], sizes["size"], 3))

    keys = jax.device_put(example_keys(key, count), batch["label"].sharding)
    found["sampler_seconds"] = seconds_of(lambda: jax.block_until_ready(sample(params, keys, batch["label"])))
    found["model_flops_per_second"] = flops / found["step_seconds"]
    peak = device_peak_flops(jax.devices()[0].device_kind)
    found["model_utilization"] = None if peak is None else flops / found["step_seconds"] / peak / jax.device_count()
    print(
        f"ddpm_jax: {count} images, step {found['step_seconds']:.4f} s, sampler of {sizes['steps']} steps "
        f"{found['sampler_seconds']:.3f} s, {found['model_flops_per_second'] / 1e12:.3f} TFLOP/s, utilization "
        f"{found['model_utilization'] or 'unknown'}",
        flush=True,
    )
    return {"ddpm_jax": found}


def time_torch(sizes: dict[str, Any]) -> dict[str, Any]:
    """Time guided-diffusion's module of the same sizes in PyTorch, on one device; {} where it is not installed."""
    missing = [name for name in ("torch", "guided_diffusion") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"PyTorch is not timed: {' and '.join(missing)} not installed", flush=True)
        return {}
    import torch
    from guided_diffusion.unet import UNetModel

    place = "cuda" if torch.cuda.is_available() else "cpu"
    heights = tuple(2**level for level in sizes["levels"])  # guided-diffusion counts by how often the size was halved
    model = UNetModel(
        sizes["size"],
        3,
        sizes["channels"],
        6,
        sizes["blocks"],
        heights,
        channel_mult=sizes["mult"],
        num_classes=1000,
        num_head_channels=min(64, sizes["channels"]),
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    )
    model = model.to(place, memory_format=torch.channels_last)
    compiled = torch.compile(model) if sizes["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    shape = (sizes["batch"], 3, sizes["size"], sizes["size"])
    x = torch.randn(shape, device=place).to(memory_format=torch.channels_last)
    t = torch.randint(0, 1000, shape[:1], device=place)
    noise = torch.randn_like(x)

    def wait() -> None:
        if place == "cuda":
            torch.cuda.synchronize()

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place, torch.bfloat16):
            loss = (compiled(x, t, y=t)[:, :3].float() - noise).square().mean()
        loss.backward()
        optimizer.step()
        wait()

    @torch.no_grad()
    def sample() -> None:
        image = x
        with torch.autocast(place, torch.bfloat16):
            for _ in range(sizes["steps"]):
                image = image - 1e-3 * compiled(image, t, y=t)[:, :3].float()
        wait()

    try:
        found = {"step_seconds": seconds_of(train), "sampler_seconds": seconds_of(sample), "examples": sizes["batch"]}
    except Exception as error:  # torch.compile needs a C++ compiler, and has failures of many types
        print(f"PyTorch is not timed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return {"torch": {"error": f"{type(error).__name__}: {error}"}}
    print(
        f"PyTorch {torch.__version__} on {place}{', compiled' * sizes['compiled']}: {sizes['batch']} images, "
        f"step {found['step_seconds']:.4f} s, "
        f"{sizes['steps']} network calls {found['sampler_seconds']:.3f} s",
        flush=True,
    )
    return {"torch": found}


def run_tests(names: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Run test files on the accelerator, with products in float32; those that there is no time for are listed."""
    platform = jax.default_backend()
    environment = os.environ | {"JAX_PLATFORMS": "cuda" if platform == "gpu" else platform}
    environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    begin, passed, failed, left = time.perf_counter(), [], [], []
    for name in names:
        rest = seconds - (time.perf_counter() - begin)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", f"tests/test_{name}.py"]
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, timeout=max(rest, 1.0)).returncode
        except subprocess.TimeoutExpired:
            left.append(name)
            continue
        (passed if status == 0 else failed).append(name)
    print(f"tests: passed {', '.join(passed) or 'none'}; failed {', '.join(failed) or 'none'}", flush=True)
    if left:
        print(f"tests without a result in {seconds:.0f} s: {', '.join(left)}", flush=True)
    return {"status": len(failed), "passed": passed, "failed": failed, "no_time": left}


def seconds_of(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median duration of a call, after one that compiles and one that warms up."""
    run()
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


if __name__ == "__main__":
    sys.exit(main())
