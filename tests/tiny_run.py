"""The smallest run of every stage through the real commands, for the tests of what surrounds the training."""

import os
import subprocess
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]
STAGES = ("clip", "prior", "decoder", "upsampler")
FIELDS = {
    "data.num_examples": 64,
    "clip.patch": 32,
    "clip.training.batch_size": 32,
    "decoder.image_size": 16,
    "decoder.unet.channel_mult": "(1,)",
    "decoder.attention_resolutions": "()",
    "upsampler.image_size": 32,
    "upsampler.crop": 32,
    "upsampler.unet.channel_mult": "(1,)",
    "prior.training.optimizer": "adamw",  # Muon, which takes long to compile, is left to CLIP and the decoder
    "upsampler.training.optimizer": "adamw",
    "sample.prior.steps": "1",
    "sample.decoder.steps": "1",
    "sample.upsampler.steps": "1",
    "sample.batch_size": 2,
    "evaluation.num_captions": 2,
    "progress": "false",
}


def train_flags(workdir, *, num_steps=2, checkpoint_every=1, **fields):
    """Return the flags of `ddpm_jax.train`; fields of the config may be given with __ for the dots."""
    steps = {"num_steps": num_steps, "checkpoint_every": checkpoint_every, "preview_every": 0}
    values = FIELDS | {f"{stage}.training.{name}": value for stage in STAGES for name, value in steps.items()}
    values |= {name.replace("__", "."): value for name, value in fields.items()}
    config = ["--config", str(ROOT / "configs" / "shapes.py") + ":smoke", "--workdir", str(workdir)]
    return config + [f"--config.{name}={value}" for name, value in values.items()]


def start(program, *flags, devices=1):
    """Start `python -m ddpm_jax.<program>` in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", f"ddpm_jax.{program}", *map(str, flags)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=300):
    """Return (status, stdout, stderr) of a process that was started."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err
