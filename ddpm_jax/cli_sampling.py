"""Flags of how the stages of a pipeline are sampled, for the commands that sample."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

from absl import flags

from ddpm_jax import cli
from ddpm_jax.diffusion.samplers import SAMPLERS
from ddpm_jax.diffusion.sampling import Sampling

_HELP = {
    "sampler": "Sampler of the main stage; docs/samplers.md compares them.",
    "steps": 'Its steps: a number, a spec like "ddim25" or "10,10,3,2,2", or timesteps.',
    "order": "Of the samplers that have orders: 1, 2 or 3.",
    "sde": "Add noise in dpm_solver.",
    "corrector_steps": "Of predictor_corrector.",
    "eta": "Noise of ddim, from 0 to 1.",
    "churn": "Noise of heun.",
    "snr": "Of the corrector of predictor_corrector.",
    "variance_share": "Of ancestral: where the variance lies between its bounds, from 0 to 1.",
    "scale": "Scale of classifier-free guidance; 1 does not guide.",
    "rescale": "Rescaling of guidance, from 0 to 1.",
    "variance_weighted": "Weight classifier-free guidance by the variance of the step; of ancestral.",
    "classifier_scale": "Scale of classifier guidance; 0 does not guide.",
    "clip_scale": "Scale of guidance by a noised CLIP; 0 does not guide.",
    "threshold": "Bound of estimates of clean images; inf for no threshold at all.",
    "quantile": "Dynamic threshold: quantile of the estimates' sizes, up to 1; 0 for none.",
    "l2_clamp": "Bring estimates of embeddings to the norm of the training data; of a diffusion prior.",
}
OPTIONS = tuple(field.name for field in dataclasses.fields(Sampling))
_OF_A_STAGE = (*OPTIONS, "noise_level", "truncated", "tile", "overlap", "temperature", "top_p")


def define_sampling_flags(flag_values: flags.FlagValues, *, without: Collection[str] = ()) -> None:
    """Define the flags of the main stage, without those of some options."""
    for option in OPTIONS:
        if option not in without:
            _define(flag_values, option, option, _HELP[option])


def define_stage_flags(flag_values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Define the flags --<stage>_<option> that stand in a command line; stages have any names."""
    for word in arguments:
        match = re.match(r"--?(?:no)?([A-Za-z]\w*?)_(" + "|".join(_OF_A_STAGE) + r")(=|$)", word)
        name = match and f"{match[1]}_{match[2]}"
        if name and name not in flag_values:
            _define(flag_values, name, match[2], f"Option {match[2]} of the stage {match[1]}.")


def sampling_options(flag_values: flags.FlagValues, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the options that were given, as `generate` of a pipeline takes them."""
    ends = tuple(f"_{field}" for field in _OF_A_STAGE)
    names = [name for name in flag_values if name not in without and (name in OPTIONS or name.endswith(ends))]
    return {name: flag_values[name].value for name in names if flag_values[name].value is not None}


def refuse_stages(flag_values: flags.FlagValues, stages: Collection[str], where: str) -> None:
    """Raise UsageError for a flag that was given for one of some stages, which are not run `where`."""
    for name in sampling_options(flag_values):
        if name not in OPTIONS and name.startswith(tuple(f"{stage}_" for stage in stages)):
            raise cli.UsageError(f"--{name} is not used {where}")


def check_captions(captions: Sequence[str], tokenizer: Any, *, what: str) -> None:
    """Raise UsageError, naming the flag `what`, for the first caption that the tokenizer refuses; it may be None."""
    for number, caption in enumerate(captions, 1):
        which = f' "{caption}"' + (f" ({number} of {len(captions)})" if len(captions) > 1 else "")
        try:
            if tokenizer is not None:
                tokenizer.ids(caption)
        except ValueError as error:
            raise cli.UsageError(f"{what}{which}: {error}") from error


def _define(flag_values: flags.FlagValues, name: str, option: str, help: str) -> None:
    """Define the flag of an option of a sampler."""
    if option == "sampler":
        flags.DEFINE_enum(name, None, list(SAMPLERS), help, flag_values=flag_values)
    elif option == "steps":
        flags.DEFINE_string(name, None, help, flag_values=flag_values)
    elif option in ("order", "corrector_steps", "tile", "overlap"):
        flags.DEFINE_integer(name, None, help, flag_values=flag_values)
    elif option in ("sde", "l2_clamp", "truncated", "variance_weighted"):
        flags.DEFINE_bool(name, None, help, flag_values=flag_values)
    elif option == "threshold":
        flags.DEFINE_float(name, None, help, flag_values=flag_values)  # which may be inf
    else:
        cli.define_finite(name, None, help, flag_values=flag_values)
