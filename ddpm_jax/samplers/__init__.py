"""Samplers: a ``Step`` each, all run by ``sample`` along a time grid."""

from ddpm_jax.samplers.ancestral import ancestral_step
from ddpm_jax.samplers.ddim import ddim_step
from ddpm_jax.samplers.grid import Point, time_grid
from ddpm_jax.samplers.loop import sample
from ddpm_jax.samplers.noise import example_keys

__all__ = ["Point", "ancestral_step", "ddim_step", "example_keys", "sample", "time_grid"]
