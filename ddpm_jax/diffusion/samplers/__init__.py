"""Samplers: a ``Step`` each, all run by ``sample`` along a time grid; ``invert`` walks it the other way."""

from ddpm_jax.diffusion.samplers.ancestral import ancestral_step
from ddpm_jax.diffusion.samplers.ddim import ddim_step
from ddpm_jax.diffusion.samplers.dpm_solver import dpm_solver_step
from ddpm_jax.diffusion.samplers.editing import average_of, grey_of, measured, repaint_step, sdedit, truncate
from ddpm_jax.diffusion.samplers.grid import Point, time_grid
from ddpm_jax.diffusion.samplers.heun import heun_step
from ddpm_jax.diffusion.samplers.inversion import invert
from ddpm_jax.diffusion.samplers.loop import sample
from ddpm_jax.diffusion.samplers.noise import RecordedNoise, example_keys
from ddpm_jax.diffusion.samplers.plms import plms_step
from ddpm_jax.diffusion.samplers.stochastic import (
    analytic_moments,
    analytic_step,
    euler_maruyama_step,
    predictor_corrector_step,
    reverse_diffusion_step,
)
from ddpm_jax.diffusion.samplers.unipc import unipc_step

__all__ = [
    "Point",
    "RecordedNoise",
    "analytic_moments",
    "analytic_step",
    "ancestral_step",
    "average_of",
    "ddim_step",
    "dpm_solver_step",
    "euler_maruyama_step",
    "example_keys",
    "grey_of",
    "heun_step",
    "invert",
    "measured",
    "plms_step",
    "predictor_corrector_step",
    "repaint_step",
    "reverse_diffusion_step",
    "sample",
    "sdedit",
    "time_grid",
    "truncate",
    "unipc_step",
]
