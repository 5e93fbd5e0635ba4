"""Diffusion models in JAX: pure functions over arrays, a network seen only as a callable.

Importing this package loads jax, flax and numpy; data, training and pipelines are imported from their own modules.
"""

from ddpm_jax.guidance import classifier_free, drop, static_threshold
from ddpm_jax.losses import contrastive_loss, denoising_loss, min_snr, vlb_terms
from ddpm_jax.process import GaussianProcess, Prediction, make_process, predict, q_posterior, q_sample, respace, target
from ddpm_jax.samplers import ancestral_step, ddim_step, example_keys, sample
from ddpm_jax.schedules import cosine_betas, linear_betas, respaced_timesteps
from ddpm_jax.types import Denoiser, Source, Step, Task

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "GaussianProcess",
    "Prediction",
    "Source",
    "Step",
    "Task",
    "ancestral_step",
    "classifier_free",
    "contrastive_loss",
    "cosine_betas",
    "ddim_step",
    "denoising_loss",
    "drop",
    "example_keys",
    "linear_betas",
    "make_process",
    "min_snr",
    "predict",
    "q_posterior",
    "q_sample",
    "respace",
    "respaced_timesteps",
    "sample",
    "static_threshold",
    "target",
    "vlb_terms",
]
