"""Diffusion models in JAX: pure functions over arrays, a network seen only as a callable.

Importing this package loads jax, flax and numpy; data, training and pipelines are imported from their own modules.
`load`, which opens models and pipelines, is imported when it is used.
"""

import signal as _signal
import sys as _sys

# Run as a command (python -m ddpm_jax.train): until it installs signal handlers, Ctrl-C ends it by the system's default
# and not with the traceback of an import. runpy has put "-m" in place of the program's name. A program that imports
# this package keeps its handlers.
if _sys.argv[:1] == ["-m"] and "ddpm_jax." in _sys.orig_argv[-len(_sys.argv)]:
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if hasattr(_signal, "pthread_sigmask"):  # `cli.keep_memory` starts a command with it blocked
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGINT})

from ddpm_jax.diffusion import continuous, guidance, importance, losses, process, samplers, schedules
from ddpm_jax.diffusion.guidance import classifier_free, drop, keep_mask, static_threshold
from ddpm_jax.diffusion.losses import contrastive_loss, denoising_loss, min_snr, vlb_terms
from ddpm_jax.diffusion.process import (
    GaussianProcess,
    Prediction,
    make_process,
    predict,
    q_posterior,
    q_sample,
    respace,
    target,
)
from ddpm_jax.diffusion.samplers import RecordedNoise, ancestral_step, ddim_step, example_keys, sample
from ddpm_jax.diffusion.schedules import cosine_betas, linear_betas, respaced_timesteps
from ddpm_jax.types import Denoiser, Source, Step, Task
from ddpm_jax.version import __version__ as __version__

__all__ = [
    "Denoiser",
    "GaussianProcess",
    "Prediction",
    "RecordedNoise",
    "Source",
    "Step",
    "Task",
    "ancestral_step",
    "classifier_free",
    "continuous",
    "contrastive_loss",
    "cosine_betas",
    "ddim_step",
    "denoising_loss",
    "drop",
    "example_keys",
    "guidance",
    "importance",
    "keep_mask",
    "linear_betas",
    "load",
    "losses",
    "make_process",
    "min_snr",
    "predict",
    "process",
    "q_posterior",
    "q_sample",
    "respace",
    "respaced_timesteps",
    "sample",
    "samplers",
    "schedules",
    "static_threshold",
    "target",
    "vlb_terms",
]


def __getattr__(name: str) -> object:
    """Import `load` when it is used."""
    if name == "load":
        from ddpm_jax.pipelines import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
