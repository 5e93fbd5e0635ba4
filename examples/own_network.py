"""Losses and samplers with custom networks: one in plain JAX, one in Flax NNX.

    python examples/own_network.py

A network is a function (xt, t) -> output; the parameters are closed over. Both learn a spiral in the plane in half a
minute on a CPU, and print the distance from their samples to it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ddpm_jax import cosine_betas, denoising_loss, example_keys, make_process, respace, sample
from ddpm_jax.diffusion.samplers import dpm_solver_step

PROCESS = make_process(cosine_betas(1000))
PREDICTION = "v"  # eps says little about x0 at the noisy end of the cosine schedule, and would need a threshold there
WIDTH, STEPS, BATCH = 128, 1500, 256


def spiral(key: jax.Array, n: int) -> jax.Array:
    """Return n points of a spiral with a little noise, float32[n, 2]."""
    angle = 3.0 * jnp.pi * jnp.sqrt(jax.random.uniform(key, (n,)))
    points = angle[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1) / (3.0 * jnp.pi)
    return points + 0.02 * jax.random.normal(jax.random.fold_in(key, 1), (n, 2))


def features(xt: jax.Array, t: jax.Array) -> jax.Array:
    """Return the input of both networks: the point and sines of its position and of time."""
    angles = jnp.concatenate([2.0 * xt, 4.0 * xt, 8.0 * xt, t[:, None] / 1000.0 * jnp.array([[1.0, 3.0, 9.0]])], axis=1)
    return jnp.concatenate([xt, jnp.sin(angles), jnp.cos(angles)], axis=1)


# -- plain JAX: parameters are a list of arrays --------------------------------------------------------------------


def plain_init(key: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Return weights and biases of three layers."""
    sizes = [20, WIDTH, WIDTH, 2]
    keys = jax.random.split(key, 3)
    return [
        (jax.random.normal(k, (m, n)) / np.sqrt(m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def plain_network(params: list[tuple[jax.Array, jax.Array]], xt: jax.Array, t: jax.Array) -> jax.Array:
    """Run it."""
    h = features(xt, t)
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias)
    return h @ params[-1][0] + params[-1][1]


# -- Flax NNX: a module, split into its graph and its arrays -------------------------------------------------------


class Network(nnx.Module):
    """Network of the same three layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = nnx.Linear(20, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, xt: jax.Array, t: jax.Array) -> jax.Array:
        h = jax.nn.silu(self.first(features(xt, t)))
        return self.out(jax.nn.silu(self.second(h)))


def train(params: Any, apply: Callable[[Any, jax.Array, jax.Array], jax.Array]) -> Any:
    """Return trained parameters; ``apply(params, xt, t)`` is any network."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    def step(state: tuple, key: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = state
        data_key, loss_key = jax.random.split(key)
        x0 = spiral(data_key, BATCH)
        losses = lambda p: denoising_loss(PROCESS, lambda xt, t: apply(p, xt, t), loss_key, x0, prediction=PREDICTION)[
            0
        ]
        loss, grads = jax.value_and_grad(lambda p: losses(p).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    keys = jax.random.split(jax.random.key(0), STEPS)
    (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))((params, tx.init(params)))
    return params


def draw(params: Any, apply: Callable[[Any, jax.Array, jax.Array], jax.Array], n: int) -> jax.Array:
    """Return n samples: 30 steps of DPM-Solver++ 2M."""
    keys = example_keys(jax.random.key(1), n)
    process, step = respace(PROCESS, "30"), dpm_solver_step(2)
    run = lambda p, keys: sample(process, lambda xt, t: apply(p, xt, t), keys, (2,), step=step, prediction=PREDICTION)
    return jax.jit(run)(params, keys)


def distance(points: jax.Array) -> float:
    """Return the mean distance to the nearest of many points of the spiral."""
    spots = np.asarray(spiral(jax.random.key(9), 2000))
    return float(np.linalg.norm(np.asarray(points)[:, None] - spots[None], axis=-1).min(1).mean())


def main() -> None:
    """Train and sample both."""
    n = 500
    print(f"noise: {distance(jax.random.normal(jax.random.key(2), (n, 2))):.3f} from the spiral")
    params = train(plain_init(jax.random.key(3)), plain_network)
    print(f"plain JAX: {distance(draw(params, plain_network, n)):.3f}")
    graph, arrays = nnx.split(Network(nnx.Rngs(3)))
    apply = lambda arrays, xt, t: nnx.merge(graph, arrays)(xt, t)
    print(f"Flax NNX: {distance(draw(train(arrays, apply), apply, n)):.3f}")


if __name__ == "__main__":
    main()
