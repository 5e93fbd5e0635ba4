"""The one diffusion task: any clean data, any conditions, any network."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.checks import check_model, check_number, check_type, shown
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.importance import (
    LossHistory,
    Timesteps,
    importance_timesteps,
    loss_history,
    record_losses,
)
from ddpm_jax.diffusion.losses import (
    Objective,
    Weighting,
    check_objective,
    continuous_loss,
    denoising_loss,
    stratified_times,
    stratified_timesteps,
)
from ddpm_jax.diffusion.samplers import analytic_moments, example_keys
from ddpm_jax.diffusion.sampling import NO_NORM, Sampling, sample_with
from ddpm_jax.parallel.placing import fetch
from ddpm_jax.training.tasks.conditions import Condition, check_guidance
from ddpm_jax.training.tasks.data import Embeddings, Images
from ddpm_jax.training.tasks.health import embedding_health
from ddpm_jax.training.tasks.keys import named_keys
from ddpm_jax.types import Denoiser, to_uint8

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DiffusionTask:
    """The denoising loss of a network (xt, t, **conditions) -> output.

    Attributes:
        model: the network; called with the keyword arguments of its conditions, and train=True in the loss.
        diffusion: the process, and what the network predicts; of continuous time, training samples any time in it.
        x0: reads clean data from a prepared batch.
        conditions: what the network is conditioned on.
        objective: "simple", "hybrid" or "vlb"; see `diffusion.losses`. In continuous time "vlb" is "likelihood".
        weighting: log_snr float32[B] -> weight float32[B] of the squared error, or None.
        vlb_weight: of the bound in the hybrid objective.
        timesteps: how t is sampled: "uniform", "stratified" or, of T timesteps, "importance" (`diffusion.importance`).
        sampling: of the previews of images, and of the embeddings that evaluations compare with the true ones
            (`tasks.health`); None makes none. In place of "analytic" they are by "ancestral", since the moments that
            it needs are estimated after training (`Training.moment_examples`).
        timestep_scale: the network receives timestep_scale * t; 1000 / T gives processes of any length timesteps of
            one range, as the published networks of improved DDPM have them.
    """

    model: nn.Module
    diffusion: Diffusion
    x0: Images | Embeddings
    conditions: Sequence[Condition] = ()
    objective: Objective = "simple"
    weighting: Weighting | None = None
    vlb_weight: float = 1e-3
    timesteps: Timesteps = "uniform"
    sampling: Sampling | None = dataclasses.field(default=None, metadata={"describe": False})
    timestep_scale: float = dataclasses.field(default=1.0, metadata={"describe": "unless default"})

    def __post_init__(self):
        check_model(self.model)
        check_type("diffusion", self.diffusion, Diffusion)
        for name in ("prepare", "metadata"):
            if inspect.isclass(self.x0) or not callable(getattr(self.x0, name, None)):
                raise ValueError(f"x0={shown(self.x0)} must be what is generated, such as Images(size)")
        _check_conditions(self.conditions)
        _check_colours(self.x0, self.conditions)
        if self.weighting is not None and not callable(self.weighting):
            raise ValueError(
                f"weighting={shown(self.weighting)} must be a function, such as losses.min_snr(...), or None"
            )
        for name, options in {"objective": get_args(Objective), "timesteps": get_args(Timesteps)}.items():
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, options))}")
        check_objective(self.objective, self.diffusion.variance, self.weighting)
        if self.timesteps == "importance" and self.diffusion.continuous is not None:
            raise ValueError("timesteps='importance' is of discrete time, and this diffusion is of continuous time")
        check_number("timestep_scale", self.timestep_scale, lambda scale: scale > 0, "must be positive")
        if self.sampling is not None:
            check_type("sampling", self.sampling, Sampling)
            self.sampling.checked().process(self.diffusion)
            check_guidance(self.sampling, self.conditions)
            if self.sampling.l2_clamp and not isinstance(self.x0, Embeddings):
                raise ValueError(NO_NORM)

    @property
    def extra_state(self) -> LossHistory | None:
        """The history of losses that importance sampling of timesteps uses."""
        return loss_history(self.diffusion.num_steps) if self.timesteps == "importance" else None

    def update_extra_state(self, extra_state: LossHistory, aux: tuple[jax.Array, jax.Array]) -> LossHistory:
        """Return the history with a step's losses in it."""
        return record_losses(extra_state, *aux)

    def clean(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Return clean data; an upsampler, whose network is given low-resolution images, may train on crops."""
        if not isinstance(self.x0, Images):
            return self.x0(batch, key)
        return self.x0(batch, key, crops=any(condition.name == "low_resolution" for condition in self.conditions))

    def init(self, key: jax.Array, batch: Batch) -> Any:
        """Return new parameters."""
        x0 = self.clean(batch)
        t = jnp.zeros(x0.shape[0], jnp.int32) if self.diffusion.continuous is None else jnp.ones(x0.shape[0])
        return self.model.init(key, x0, t, **self._arguments(batch, x0, None))

    def prepare(self, frozen: Any, batch: Batch) -> Batch:
        """Return the batch with what frozen networks compute from it."""
        for part in (self.x0, *self.conditions):
            batch = part.prepare(frozen, batch)
        return {name: value for name, value in batch.items() if name != "clip_image"}

    def loss(
        self, params: Any, batch: Batch, key: jax.Array, extra_state: LossHistory | None = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss of every example; with a history, weighted so that its mean is the mean over timesteps."""
        x0 = self.clean(batch, key)
        noise_key, dropout_key, t_key = named_keys(key, "noise", "dropout", "timesteps")
        arguments = self._arguments(batch, x0, key)
        denoise = self.denoiser(params, arguments, train=True, rngs={"dropout": dropout_key})
        if (self.timesteps == "importance") != (extra_state is not None):
            given = "no extra_state" if extra_state is None else "an extra_state"
            raise ValueError(f"timesteps={self.timesteps!r} with {given}: importance sampling, and it alone, needs one")
        t = None
        if self.timesteps == "stratified":
            t = self._spread_times(t_key, x0.shape[0])
        elif extra_state is not None:
            t, weight = importance_timesteps(t_key, x0.shape[0], extra_state)
        loss, metrics = self._denoising_loss(denoise, noise_key, x0, t)
        if extra_state is None:
            return loss, metrics
        # Weighted like the loss, so that their means are those of uniform timesteps.
        return weight * loss, {name: weight * value for name, value in metrics.items()} | {"aux": (t, loss)}

    def eval_loss(self, params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss with complete conditions, without dropout, at timesteps spread over the process."""
        x0 = self.clean(batch)
        noise_key, t_key = named_keys(key, "noise", "timesteps")
        t = self._spread_times(t_key, x0.shape[0])
        return self._denoising_loss(self.denoiser(params, self._arguments(batch, x0, None)), noise_key, x0, t)

    def moments(self, params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """Return the second moments of the predicted noise at every step, means over a prepared batch, float32[T]."""
        x0 = self.clean(batch)
        denoise, keys = self.denoiser(params, self._arguments(batch, x0, None)), example_keys(key, x0.shape[0])
        return analytic_moments(self.diffusion.process, denoise, keys, x0, prediction=self.diffusion.prediction)

    def _spread_times(self, key: jax.Array, count: int) -> jax.Array:
        """Return timesteps, or times, that are uniform each and spread evenly over the batch."""
        schedule = self.diffusion.continuous
        if schedule is None:
            return stratified_timesteps(key, count, self.diffusion.num_steps)
        return stratified_times(key, count, schedule)

    def _denoising_loss(self, denoise: Denoiser, key: jax.Array, x0: jax.Array, t: jax.Array | None) -> tuple:
        schedule = self.diffusion.continuous
        if schedule is not None:
            return continuous_loss(
                schedule,
                lambda xt, t: denoise(xt, self.diffusion.network_time(t)),
                key,
                x0,
                prediction=self.diffusion.prediction,
                objective="likelihood" if self.objective == "vlb" else "simple",
                weighting=self.weighting,
                t=t,
            )
        return denoising_loss(
            self.diffusion.process,
            denoise,
            key,
            x0,
            prediction=self.diffusion.prediction,
            objective=self.objective,
            variance=self.diffusion.variance,
            weighting=self.weighting,
            vlb_weight=self.vlb_weight,
            t=t,
        )

    def denoiser(self, params: Any, arguments: dict[str, jax.Array], **options: Any) -> Denoiser:
        """Close the network over its parameters and conditions."""
        scale = self.timestep_scale
        return lambda xt, t: self.model.apply(params, xt, t if scale == 1 else scale * t, **arguments, **options)

    def null_arguments(self, arguments: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
        """Return the arguments with all conditions dropped, or None if the network has learned no null condition."""
        found, droppable = dict(arguments), False
        for condition in self.conditions:
            without = condition.null(arguments)
            if without is None:
                return None
            droppable |= without is not arguments
            found |= {name: value for name, value in without.items() if value is not arguments.get(name)}
        return found if droppable else None

    @property
    def shares_previews(self) -> bool:
        """Whether several hosts split the examples of a preview."""
        return True

    def preview(self, params: Any, batch: Batch, key: jax.Array) -> np.ndarray | None:
        """Sample an image for every example of a prepared batch, uint8[N, S, S, C]; None for other data."""
        if self.sampling is None or not isinstance(self.x0, Images):
            return None
        images, finite = _preview(_ByIdentity(self), self._early_sampling, params, batch, key)
        if not finite:
            raise FloatingPointError("its pixels contain NaN or infinity")
        return fetch(images)

    @property
    def health_needs(self) -> tuple[str, ...] | None:
        """The roles of the models that `health` needs; None where the task is no prior, or is not sampled."""
        if self.sampling is None or not isinstance(self.x0, Embeddings):
            return None
        return () if self.x0.statistics is None else (self.x0.statistics,)

    def health(self, params: Any, frozen: Any, batch: Batch, key: jax.Array) -> Mapping[str, jax.Array]:
        """Sample an embedding for every example of a prepared batch and compare it with the true one.

        frozen: the models of `health_needs`, by role. Returns float32[] by name, see `embedding_health`.
        """
        norm = self.x0.norm(frozen)
        x0 = sample_batch(self, self._early_sampling, params, batch, key, project=norm.project)
        return embedding_health(norm.restore(x0), batch["z_image"], batch.get("z_text"), length=norm.length)

    @property
    def _early_sampling(self) -> Sampling:
        """How the network is sampled while it trains, without second moments."""
        sampling = self.sampling.checked()
        return sampling.with_options(sampler="ancestral") if sampling.sampler == "analytic" else sampling

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        found = {"diffusion": dataclasses.asdict(self.diffusion), **self.x0.metadata()}
        found |= {} if self.timestep_scale == 1 else {"timestep_scale": self.timestep_scale}
        found["conditions"] = [condition.name for condition in self.conditions]
        return found | {condition.name: condition.metadata() for condition in self.conditions}

    def _arguments(self, batch: Batch, x0: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for condition in self.conditions:
            found |= condition(batch, x0, key)
        return found


def _check_conditions(conditions: Any) -> None:
    hint = "must be a tuple of conditions"
    if not isinstance(conditions, Sequence) or isinstance(conditions, (str, bytes)):
        raise ValueError(f"conditions={shown(conditions)} {hint}; one condition is written as (condition,)")
    for number, condition in enumerate(conditions):
        methods = all(callable(getattr(condition, name, None)) for name in ("prepare", "null", "metadata"))
        if inspect.isclass(condition) or not methods or not hasattr(condition, "name"):
            raise ValueError(
                f"conditions[{number}]={shown(condition)} must be a condition, such as Labels(num_classes)"
            )


def _check_colours(x0: Any, conditions: Sequence[Condition]) -> None:
    entry = next((found for condition in conditions if (found := getattr(condition, "entry", None))), None)
    if entry is not None and getattr(x0, "mix_colours", False):
        raise ValueError(
            f"mix_colours=True changes the colours of the images and not those of {entry!r}, their low-resolution "
            "copies; mix them in a transform before the copies are made"
        )


class _ByIdentity:
    """A task as a static argument of jit: the same task compiles once."""

    def __init__(self, task: DiffusionTask):
        self.task = task

    def __hash__(self) -> int:
        return id(self.task)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.task is self.task


@functools.partial(jax.jit, static_argnums=0)
def _preview(
    held: _ByIdentity, sampling: Sampling, params: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images = sample_batch(held.task, sampling, params, batch, key)
    return to_uint8(images), jnp.isfinite(images).all()


def sample_batch(
    task: DiffusionTask,
    sampling: Sampling,
    params: Any,
    batch: Batch,
    key: jax.Array,
    *,
    project: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Sample, for every example of a prepared batch, data like its own, given its conditions.

    Args:
        task: whose network it is.
        sampling: checked.
        params: of the network.
        batch: prepared; of its clean data only the shape is read.
        key: of the noise.
        project: see `sample_with`.

    Returns:
        float32[N, ...], in the range of the network's data.
    """
    x0 = task.clean(batch)
    arguments = task._arguments(batch, x0, None)
    null = None if sampling.scale is None else task.null_arguments(arguments)
    return sample_with(
        sampling,
        task.diffusion,
        task.denoiser(params, arguments),
        example_keys(key, x0.shape[0]),
        x0.shape[1:],  # of the examples, which may be crops
        null=None if null is None else task.denoiser(params, null),
        project=project,
    )
