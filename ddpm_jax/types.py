"""The conventions that all modules share, and the types of the callables between them.

Arrays
    Images are uint8 up to the batch and float32 ``[B, H, W, C]`` in [-1, 1] inside losses, samplers and networks.
    A timestep ``t`` is ``int32[B]`` in [0, T); 0 is the least noisy step, T - 1 is (almost) pure noise.
    ``xt`` may have any rank: ``[B, H, W, C]`` for images, ``[B, D]`` for embeddings. The last axis holds the channels.
    Losses and samplers compute in float32 whatever the dtype of the network.

Networks
    A network is seen only as a ``Denoiser``. Parameters, conditions, guidance and precision are closed over before a
    loss or a sampler sees it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

PredictionType = Literal["eps", "x0", "v", "score", "mean"]
"""Prediction type of a network: the noise, the clean data, v = alpha eps - sigma x0 (Salimans & Ho 2022), the score
grad log q(x_t) = -eps / sigma, or the mean of the reverse step (DDPM's ablation)."""

Variance = Literal["fixed_small", "fixed_large", "learned_range"]
"""The variance of the reverse step, see equations (9) to (11) of ``ddpm_jax.diffusion.process``."""

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""``(xt, t) -> output``. ``xt`` float32[B, ..., C]; ``t`` int32[B], original (never respaced) timesteps, or float32[B]
where time is continuous; ``output``
[B, ..., C], or [B, ..., 2C] when the variance is learned: the prediction first, then the v of the learned range."""

PredictFn = Callable[[jax.Array, Any], Any]
"""``(xt, point) -> Prediction``: a denoiser with its parameterisation, evaluated at one point of a time grid."""


def _no_carry(xt: jax.Array) -> tuple[()]:
    del xt  # a step without history
    return ()


class Step(NamedTuple):
    """One transition of a sampler along its time grid, as a pair of pure functions.

    Attributes:
        update: ``(predict_fn, keys, xt, here, there, carry) -> (x_there, carry)``. ``keys`` are B typed keys, new for
            every transition; ``here`` and ``there`` are points of the grid (``samplers.grid.Point``). It may call
            ``predict_fn`` more than once (Heun) and keep what it needs in ``carry`` (multistep solvers).
        init: ``xt -> carry``, the carry of the first transition; its structure must not change afterwards.
    """

    update: Callable[..., tuple[jax.Array, Any]]
    init: Callable[[jax.Array], Any] = _no_carry


class Source(Protocol):
    """Random-access examples; ``grain.sources.RandomAccessDataSource`` has the same form."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """Return a text that differs if the records differ, the same in every process; optional."""
        ...


class Task(Protocol):
    """Interface of a training task: parameters, loss and previews."""

    def init(self, key: jax.Array, batch: dict[str, Any]) -> Any:
        """Return the parameters to train, a pytree of float32 arrays, for prepared batches of this form."""
        ...

    def prepare(self, frozen: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with what frozen networks compute from it; no gradient flows through here.

        ``frozen``: role -> model, of what the stage needs. The parameters in it are arguments of the compiled program,
        since what is closed over becomes a constant of it.
        """
        ...

    def loss(
        self, params: Any, batch: dict[str, Any], key: jax.Array, extra_state: Any = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss of every example, float32[B], and metrics, each a scalar or [B].

        A task may have an attribute ``extra_state``: arrays that change from step to step besides the parameters, as
        they are at step 0. It is then given them, and returns under "aux" what ``update_extra_state`` needs: arrays
        [B], which are not averaged.
        """
        ...

    def update_extra_state(self, extra_state: Any, aux: Any) -> Any:
        """Return the extra state after a step; only a task that has one needs it."""
        ...

    def preview(self, params: Any, batch: dict[str, Any], key: jax.Array) -> np.ndarray | None:
        """Return images to look at while it trains, uint8[N, H, W, 3], or None; raise FloatingPointError for NaN.

        ``batch``: a prepared batch, the same at every preview, and ``key`` too. Several hosts all have the whole of it,
        and all call this; a task with a true attribute ``shares_previews`` is given arrays that are split over their
        devices, and returns the images whole (`parallel.placing.fetch`).
        """
        ...


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
"""What networks may compute in."""


def network_dtype(value: Any, *, name: str = "dtype") -> np.dtype:
    """Return what a network computes in.

    Args:
        value: a name of `DTYPES`, or a dtype of that name.
        name: of the argument, for the message.

    Raises:
        ValueError: if it is none of these.
    """
    for known in DTYPES.values():
        with contextlib.suppress(TypeError):  # what numpy knows no dtype of
            if value is not None and jnp.dtype(value) == jnp.dtype(known):
                return jnp.dtype(known)
    raise ValueError(f"{name}={value!r:.60} must be one of {', '.join(map(repr, DTYPES))}")


def to_float(images: jax.Array) -> jax.Array:
    """Map uint8 images to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Map images in [-1, 1] to uint8, rounding to the nearest level.

    images: float32[B, H, W, C], or any shape whose first axis counts the images. NaN becomes 0 under `jax.jit`.

    Raises:
        ValueError: if concrete images have values that are not finite; the message names the images.
    """
    if not isinstance(images, jax.core.Tracer) and not np.isfinite(images).all():
        bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))
        raise ValueError(f"images {', '.join(map(str, bad))} have values that are not finite (NaN or infinity)")
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
