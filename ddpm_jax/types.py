"""The conventions every room of the house shares, and the callables the code speaks.

Arrays
    Images are uint8 up to the batch and float32 ``[B, H, W, C]`` in [-1, 1] inside losses, samplers and networks.
    A timestep ``t`` is ``int32[B]`` in [0, T); 0 is the least noisy step, T - 1 is (almost) pure noise.
    ``xt`` may have any rank: ``[B, H, W, C]`` for images, ``[B, D]`` for embeddings. The last axis holds the channels.
    Losses and samplers compute in float32 whatever the dtype of the network.

Networks
    A network is seen only as a ``Denoiser``. Parameters, conditions, guidance and precision are closed over before a
    loss or a sampler sees it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex

import jax
import numpy as np

Kind = Literal["eps", "x0", "v", "score", "mean"]
"""What a network predicts: the noise, the clean data, v = alpha eps - sigma x0 (Salimans & Ho 2022), the score
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


class Task(Protocol):
    """All that distinguishes one training stage from another."""

    name: str
    frozen: Any
    """Parameters of frozen networks, a pytree of arrays, or None: an argument of ``prepare``, since what is closed over
    becomes a constant of the compiled program."""

    def init(self, key: jax.Array) -> Any:
        """Return the parameters to train, a pytree of float32 arrays."""
        ...

    def prepare(self, frozen: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with what frozen networks compute from it; no gradient flows through here."""
        ...

    def loss(
        self, params: Any, batch: dict[str, Any], key: jax.Array, memory: Any = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss of every example, float32[B], and metrics, each a scalar or [B].

        A task may have an attribute ``memory``: arrays that it keeps from step to step besides the parameters, as they
        are at step 0. It is then given them, and returns under "kept" what ``remember`` needs: arrays [B], which are
        not averaged.
        """
        ...

    def remember(self, memory: Any, kept: Any) -> Any:
        """Return the memory after a step; only a task with a memory needs it."""
        ...

    def preview(self, params: Any, key: jax.Array) -> np.ndarray | None:
        """Return images to look at while it trains, uint8[N, H, W, 3], or None; raise FloatingPointError for NaN."""
        ...
