"""Samplers: a ``Step`` each, all run by ``sample`` along a time grid; ``invert`` walks it the other way.

`SAMPLERS` lists those that a config, a file or the command line may name.
"""

from collections.abc import Callable
from typing import NamedTuple

from ddpm_jax.diffusion.samplers.ancestral import ancestral_step
from ddpm_jax.diffusion.samplers.ddim import ddim_step
from ddpm_jax.diffusion.samplers.deis import deis_step
from ddpm_jax.diffusion.samplers.dpm_solver import dpm_solver_step
from ddpm_jax.diffusion.samplers.editing import (
    average_of,
    colorization,
    ddnm_projection,
    grey_of,
    measured,
    repaint_step,
    sdedit,
    super_resolution,
    truncate,
)
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
from ddpm_jax.types import Step

__all__ = [
    "SAMPLERS",
    "NamedSampler",
    "Point",
    "RecordedNoise",
    "analytic_moments",
    "analytic_step",
    "ancestral_step",
    "average_of",
    "colorization",
    "ddim_step",
    "ddnm_projection",
    "deis_step",
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
    "super_resolution",
    "time_grid",
    "truncate",
    "unipc_step",
]


class NamedSampler(NamedTuple):
    """Sampler as selected by name.

    Attributes:
        make: returns the step; it takes the options as keyword arguments, all with defaults. That of "ancestral" also
            takes ``guide``, that of "heun" ``process``, and that of "analytic" needs ``moments``.
        options: the fields of `diffusion.sampling.Sampling` that apply to it; those of "ancestral" are not arguments of
            make, but change what `diffusion.sampling.sample_with` gives it.
    """

    make: Callable[..., Step]
    options: tuple[str, ...] = ()


SAMPLERS: dict[str, NamedSampler] = {
    "ancestral": NamedSampler(ancestral_step, ("variance_share", "variance_weighted")),
    "analytic": NamedSampler(analytic_step),
    "ddim": NamedSampler(ddim_step, ("eta",)),
    "deis": NamedSampler(deis_step, ("order",)),
    "dpm_solver": NamedSampler(dpm_solver_step, ("order", "sde")),
    "euler_maruyama": NamedSampler(euler_maruyama_step),
    "heun": NamedSampler(lambda churn=0.0, process=None: heun_step(churn, process=process), ("churn",)),
    "plms": NamedSampler(plms_step),
    "predictor_corrector": NamedSampler(predictor_corrector_step, ("corrector_steps", "snr")),
    "reverse_diffusion": NamedSampler(reverse_diffusion_step),
    "unipc": NamedSampler(unipc_step, ("order",)),
}
