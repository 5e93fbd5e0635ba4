"""Sampling options of a network as plain data: the sampler, its steps, guidance and thresholds."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_static, is_finite, plain, shown
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.guidance import (
    classifier_free,
    classifier_guided,
    dynamic_threshold,
    implicit_gradient,
    log_prob_gradient,
)
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.diffusion.samplers import SAMPLERS, RecordedNoise, sample
from ddpm_jax.diffusion.schedules import respaced_timesteps
from ddpm_jax.types import Denoiser, Step

_RANGES: dict[str, tuple[float, float]] = {
    "eta": (0.0, 1.0),
    "churn": (0.0, math.sqrt(2.0) - 1.0),
    "snr": (0.0, 1.0),
    "variance_share": (0.0, 1.0),
    "scale": (0.0, 1e4),
    "rescale": (0.0, 1.0),
    "classifier_scale": (0.0, 1e4),
    "clip_scale": (0.0, 1e4),
    "threshold": (0.0, 1e6),
    "quantile": (0.0, 1.0),
}
NO_MOMENTS = (
    "needs the second moments of the network: a stage that was trained with training.moment_examples, such as 256, has "
    "them for its averaged parameters, and a converted checkpoint has none"
)
NO_NORM = "l2_clamp=True is for a diffusion prior, whose data are embeddings of one norm"
_POSITIVE = ("snr", "threshold")
_BELOW = ("snr",)  # the end of the range, which is not in it
_COUNTS = {"order": (1, 3), "corrector_steps": (0, 100)}
_FLAGS = ("sde", "l2_clamp", "variance_weighted")
# A number at which an option does nothing. There it is left out of the compiled program, which has one form without
# the option and one with it, for every number.
_NEUTRAL = {"eta": 0.0, "churn": 0.0, "scale": 1.0, "rescale": 0.0, "classifier_scale": 0.0, "clip_scale": 0.0}
_NEUTRAL |= {"threshold": math.inf, "quantile": 0.0}


def _static(default: Any) -> Any:
    return flax.struct.field(pytree_node=False, default=default)


@flax.struct.dataclass
class Sampling:
    """A sampler with its options. A tree whose leaves are the numbers, so that jitted functions take it as an argument.

    An option that is None is not used: no guidance, no threshold, the sampler's default.

    Attributes:
        sampler: a name in `diffusion.samplers.SAMPLERS`; docs/samplers.md compares them. "analytic" needs the second
            moments of the network, see `analytic_moments`.
        steps: a number of steps, a spec such as "ddim25" or "10,10,3,2,2", or increasing timesteps; see
            `schedules.respaced_timesteps`.
        order: 1, 2 or 3, of the samplers that have orders; 2 by default.
        sde: True adds noise in "dpm_solver" (SDE-DPM-Solver++).
        corrector_steps: of "predictor_corrector"; 1 by default.
        eta: noise of "ddim", in [0, 1]; None and 0 are deterministic, 1 is the distribution of ancestral sampling.
        churn: gamma of "heun" (EDM, algorithm 2), in [0, sqrt(2) - 1].
        snr: of the corrector of "predictor_corrector", in (0, 1); 0.16 by default.
        variance_share: of "ancestral" with a variance that is not learned: v in [0, 1] of Ho and Salimans 2022, by
            which the logarithm of the variance lies between those of "fixed_small" and "fixed_large"; None takes the
            variance of the `Diffusion`.
        scale: of classifier-free guidance, null + scale (cond - null); None and 1 do not guide.
        rescale: phi in [0, 1] of Lin et al. 2024, section 3.4.
        variance_weighted: True weights classifier-free guidance by the variance of the step, which a network with
            variance="learned_range" has learned for every channel of every pixel, see `guidance.implicit_gradient`; of
            "ancestral", without `rescale`. Classifier and CLIP guidance are weighted so in "ancestral" in any case.
        classifier_scale: of classifier guidance (Dhariwal and Nichol 2021, algorithms 1 and 2).
        clip_scale: of guidance by a noised CLIP (GLIDE, section 2.4).
        threshold: estimates of x0 are clipped to [-threshold, threshold], 1 for images. Infinity turns all thresholds
            off, also `quantile`.
        quantile: in [0, 1], dynamic thresholding (Imagen, section 2.3): estimates are clipped to that quantile of |x0|
            of the example, where it is above `threshold` (1 by default), and divided by it. None and 0 turn it off.
        l2_clamp: True brings estimates of x0, after any threshold, to the norm of the training data, for data that
            nearly have one norm: the embeddings of a diffusion prior.
    """

    sampler: str = _static("ancestral")
    steps: int | str | tuple[int, ...] = _static(250)
    order: int | None = _static(None)
    sde: bool = _static(False)
    corrector_steps: int | None = _static(None)
    eta: float | None = None
    churn: float | None = None
    snr: float | None = None
    variance_share: float | None = None
    scale: float | None = None
    rescale: float | None = None
    variance_weighted: bool = _static(False)
    classifier_scale: float | None = None
    clip_scale: float | None = None
    threshold: float | None = None
    quantile: float | None = None
    l2_clamp: bool = _static(False)

    def checked(self, prefix: str = "") -> "Sampling":
        """Return the same in one form: Python numbers, and None for an option that does nothing.

        Args:
            prefix: put before the names of options in messages, such as "decoder_".

        Raises:
            ValueError: if an option is unknown to the sampler, of another type or out of its range.
        """
        if not isinstance(self.sampler, str) or self.sampler not in SAMPLERS:
            raise ValueError(f"{prefix}sampler={shown(self.sampler)} must be one of {', '.join(map(repr, SAMPLERS))}")
        options = SAMPLERS[self.sampler].options
        foreign = {name for sampler in SAMPLERS.values() for name in sampler.options} - set(options)
        found: dict[str, Any] = {"steps": as_steps(f"{prefix}steps", self.steps)}
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("sampler", "steps") or value is None or value is False:
                continue
            value = _checked_option(prefix + name, name, value)
            neutral = not _is_traced(value) and value == _NEUTRAL.get(name)
            if name in foreign and not neutral:
                takes = ", ".join(options) or "no options"
                raise ValueError(f"{prefix}{name}={value} is no option of sampler={self.sampler!r}, which has {takes}")
            found[name] = None if neutral else value
        if self.threshold is not None and found["threshold"] is None:
            found["quantile"] = None
        if self.variance_weighted:
            self._check_weighted(prefix)
            found["variance_weighted"] = found["scale"] is not None
        return self.replace(**found)

    def _check_weighted(self, prefix: str) -> None:
        """Raise ValueError if guidance cannot be weighted by the variance of the step."""
        name = f"{prefix}variance_weighted=True"
        if self.scale is None:
            raise ValueError(f"{name} needs {prefix}scale, the scale of the guidance that it weights")
        if self.rescale is not None:
            raise ValueError(f"{name} excludes {prefix}rescale={self.rescale}, which changes the guided prediction")

    def with_options(self, prefix: str = "", **options: Any) -> "Sampling":
        """Return a copy in which the options that are not None take the place of the fields, `checked`.

        With another sampler, options of the old one that it does not have are dropped.
        """
        options = {name: value for name, value in options.items() if value is not None}
        if options.get("sampler", self.sampler) != self.sampler:
            known = isinstance(options["sampler"], str) and options["sampler"] in SAMPLERS
            has = SAMPLERS[options["sampler"]].options if known else ()
            dropped = set(SAMPLERS[self.sampler].options) - set(has)
            self = self.replace(**{name: False if name in _FLAGS else None for name in dropped})
        return self.replace(**options).checked(prefix)

    def describe(self) -> dict[str, Any]:
        """Return the fields that are used, as plain data; `Sampling(**description)` gives them back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None and value is not False}

    def process(self, diffusion: Diffusion) -> GaussianProcess:
        """Return the respaced process that is sampled.

        Raises:
            ValueError: if the process has no such steps.
        """
        steps = as_steps("steps", self.steps)
        try:
            return diffusion.respaced(steps)
        except ValueError as error:
            raise ValueError(str(error).replace("spec=", "steps=", 1)) from None

    def step(self, guide: Any = None, moments: jax.Array | None = None, process: GaussianProcess | None = None) -> Step:
        """Return the sampler's step.

        Args:
            guide: for "ancestral", see `ancestral_step`.
            process: all steps of the process, for the churn of "heun".
            moments: float32[T] at the steps of the respaced process, for "analytic", see `analytic_moments`.
        """
        make, names = SAMPLERS[self.sampler]
        if self.sampler == "ancestral":
            return make(guide)
        if self.sampler == "analytic":
            if moments is None:
                raise ValueError(f"sampler='analytic' {NO_MOMENTS}")
            return make(moments)
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        return make(**options, process=process) if self.sampler == "heun" else make(**options)

    def x0_transform(
        self, project: Callable[[jax.Array], jax.Array] | None = None
    ) -> Callable[[jax.Array], jax.Array] | None:
        """Return the thresholds as `sample` takes them; infinity becomes NaN, since it would pass when clipped.

        Args:
            project: brings data to the norm of the training data, for `l2_clamp`.

        Raises:
            ValueError: if `l2_clamp` is set and `project` is None.
        """
        clip = self._clip()
        if not self.l2_clamp:
            return clip
        if project is None:
            raise ValueError(NO_NORM)
        return project if clip is None else lambda x0: project(clip(x0))

    def _clip(self) -> Callable[[jax.Array], jax.Array] | None:
        if self.threshold is None and self.quantile is None:
            return None
        bound = 1.0 if self.threshold is None else self.threshold
        if self.quantile is None:
            return lambda x0: bounded(x0, bound)
        threshold = dynamic_threshold(self.quantile, bound)
        return lambda x0: jnp.where(jnp.isfinite(x0), threshold(x0), jnp.nan)


def bounded(values: jax.Array, bound: float | jax.Array = 1.0) -> jax.Array:
    """Clip to [-bound, bound], and map infinity to NaN: clipped, it would pass for an ordinary value."""
    return jnp.where(jnp.isfinite(values), jnp.clip(values, -bound, bound), jnp.nan)


def sample_with(
    sampling: Sampling,
    diffusion: Diffusion,
    denoise: Denoiser,
    keys: jax.Array | RecordedNoise,
    shape: tuple[int, ...],
    *,
    null: Denoiser | None = None,
    log_prob: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    clip: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    moments: jax.Array | None = None,
    project: Callable[[jax.Array], jax.Array] | None = None,
    wrap_step: Callable[[Step], Step] | None = None,
    **options: Any,
) -> Any:
    """Sample a network as `sampling` says: respace, guide, threshold, and run `samplers.sample`.

    Args:
        sampling: how; numbers may be traced.
        diffusion: what the network predicts, and of which process.
        denoise: the network with its condition.
        keys: one for every example.
        shape: of one example.
        null: the network with its null condition, for `scale`.
        log_prob: (xt, t) -> float[B], the log-probability of the class that is wanted, for `classifier_scale`.
        clip: (xt, t) -> float[B], the similarity to the caption that is wanted, for `clip_scale`.
        moments: float32[T] of the whole process, for "analytic".
        project: brings data to the norm of the training data, for `l2_clamp`.
        wrap_step: makes another step of the sampler's, such as `samplers.repaint_step`.
        **options: of `samplers.sample`: x_init, stop, trajectory, progress, progress_every.

    Returns:
        As `samplers.sample`.

    Raises:
        ValueError: if an option lacks what it needs, and as `samplers.sample`.
    """
    process = sampling.process(diffusion)
    denoise, guide = _guided(sampling, diffusion, process, denoise, null, log_prob, clip)
    variance = diffusion.variance
    if sampling.variance_share is not None:
        denoise, variance = _with_variance(denoise, sampling.variance_share, variance), "learned_range"
    short_moments = None
    if moments is not None:
        short_moments = moments[jnp.asarray(respaced_timesteps(diffusion.num_steps, as_steps("steps", sampling.steps)))]
    step = sampling.step(guide, short_moments, diffusion.process)
    return sample(
        process,
        denoise,
        keys,
        shape,
        step=step if wrap_step is None else wrap_step(step),
        prediction=diffusion.prediction,
        variance=variance,
        x0_transform=sampling.x0_transform(project),
        **options,
    )


def _guided(
    sampling: Sampling,
    diffusion: Diffusion,
    process: GaussianProcess,
    denoise: Denoiser,
    null: Denoiser | None,
    log_prob: Callable[[jax.Array, jax.Array], jax.Array] | None,
    clip: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> tuple[Denoiser, Callable[[jax.Array, jax.Array], jax.Array] | None]:
    """Return the guided network, and the gradient that an ancestral step is guided by, if there is one."""
    guides = []
    if sampling.scale is not None:
        if null is None:
            raise ValueError(f"scale={sampling.scale} needs a network with a null condition, and this one has none")
        if sampling.variance_weighted:
            more = sampling.scale - 1.0
            guides.append(implicit_gradient(process, denoise, null, more, prediction=diffusion.prediction))
        else:
            rescale = 0.0 if sampling.rescale is None else sampling.rescale
            denoise = classifier_free(denoise, null, sampling.scale, rescale=rescale)
    for option, gives, what in (("classifier_scale", log_prob, "classifier"), ("clip_scale", clip, "noised CLIP")):
        if (scale := getattr(sampling, option)) is None:
            continue
        if gives is None:
            raise ValueError(f"{option}={scale} needs a {what}, and there is none")
        if sampling.sampler == "ancestral":
            guides.append(lambda xt, t, gives=gives, scale=scale: scale * log_prob_gradient(gives, xt, t))
        else:
            # With churn the network is called at other timesteps than those of the respaced process.
            levels = process if sampling.churn is None else diffusion.process
            denoise = classifier_guided(levels, denoise, gives, scale, prediction=diffusion.prediction)
    return denoise, (lambda xt, t: sum(each(xt, t) for each in guides)) if guides else None


def _with_variance(denoise: Denoiser, share: float | jax.Array, variance: str) -> Denoiser:
    """Return a network that gives the same variance, as a share of its range, everywhere; as "learned_range"."""
    if variance == "learned_range":
        raise ValueError(f"variance_share={share} is for networks without a variance, and this one has learned it")

    def denoise_with(xt: jax.Array, t: jax.Array) -> jax.Array:
        output = denoise(xt, t)
        return jnp.concatenate([output, jnp.full_like(output, 2.0 * share - 1.0)], axis=-1)

    return denoise_with


def as_steps(name: str, value: Any) -> int | str | tuple[int, ...]:
    """Return `steps` in the form that means the same and can be hashed: "25" and np.int64(25) become 25.

    Raises:
        ValueError: if value is neither a positive integer, a string nor a sequence of integers.
    """
    check_static(name, value, "since it is the length of the loop")
    value, given = plain(value), value
    if isinstance(value, str):
        text = re.sub(r"\s*,\s*", ",", value.strip())
        value = int(text) if re.fullmatch(r"\d{1,9}", text) else text  # longer ones are refused by `respace`
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{name}={shown(given)} must be at least 1")
        return int(value)
    if isinstance(value, str) and value:
        return value
    if isinstance(value, Iterable) and not isinstance(value, (bytes, str, Mapping, Set)):
        found = [plain(step) for step in value]
        if found and all(isinstance(step, numbers.Integral) and not isinstance(step, bool) for step in found):
            return tuple(map(int, found))
    raise ValueError(
        f'{name}={shown(given)} must be a number of steps, a string like "25" or "ddim25", or increasing timesteps'
    )


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _checked_option(option: str, name: str, value: Any) -> Any:
    """Return a Python number, or a traced one as it is."""
    if name in _FLAGS or name in _COUNTS:
        check_static(option, value, "since another program is compiled for it")
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise ValueError(f"{option}={shown(value)} must be True or False")
        return value
    value, given = plain(value), value
    if name in _COUNTS:
        least, most = _COUNTS[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
            raise ValueError(f"{option}={shown(given)} must be an integer in [{least}, {most}]")
        return int(value)
    if _is_traced(value):
        return value
    least, most = _RANGES[name]
    if name == "threshold" and value == math.inf:
        return math.inf
    if not is_finite(value):
        raise ValueError(f"{option}={shown(given)} must be a finite number")
    below, above = name in _BELOW, name in _POSITIVE
    if not least <= value <= most or (above and value == least) or (below and value == most):
        raise ValueError(
            f"{option}={value} must be in {'(' if above else '['}{least:g}, {most:g}{')' if below else ']'}"
        )
    return float(value)


def sampling_from(fields: Mapping[str, Any], *, name: str = "sampling") -> Sampling:
    """Return the `Sampling` of plain data, such as a part of a config or of a file.

    Raises:
        ValueError: if a field is unknown or out of its range; the message begins with `name`.
    """
    known = [field.name for field in dataclasses.fields(Sampling)]
    unknown = [field for field in fields if field not in known]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; there are {', '.join(known)}")
    return Sampling(**fields).checked(f"{name}.")
