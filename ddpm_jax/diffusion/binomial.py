r"""The binomial noise process of binary data (Sohl-Dickstein et al. 2015, table C.1): bits that are forgotten.

Each step replaces a bit by a fair coin with probability beta_t; with alpha_bar as of a Gaussian process,

    (1)  q(x_t = 1 | x_{t-1}) = (1 - beta_t) x_{t-1} + beta_t / 2
    (2)  q(x_t = 1 | x0) = alpha_bar_t x0 + (1 - alpha_bar_t) / 2
    (3)  q(x_{t-1} = 1 | x_t, x0) = r l_1 / (r l_1 + (1 - r) l_0),
         r = alpha_bar_{t-1} x0 + (1 - alpha_bar_{t-1}) / 2,   l_b = q(x_t | x_{t-1} = b)

for every bit alone, with t = 0 .. T - 1 and alpha_bar_{-1} = 1. A network returns logits of x0, whose rate is p, and

    (4)  p(x_{t-1} = 1 | x_t) = p q(x_{t-1} = 1 | x_t, x0 = 1) + (1 - p) q(x_{t-1} = 1 | x_t, x0 = 0)

so that the bits of x_{t-1} are independent given all of x_t. The variational bound of -log2 p(x0) is

    (5)  L_T + sum_t KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),   L_T = KL(q(x_T | x0) || fair coins)

where the term at t = 0 is -log p(x0 | x_0), since (3) is x0 itself there. The tables are those of
`process.GaussianProcess`, which has the same betas and alpha_bar.
"""

import math

import jax
import jax.numpy as jnp

from ddpm_jax.checks import look_up
from ddpm_jax.diffusion.keys import fold_in, key_vector, one_key
from ddpm_jax.diffusion.process import GaussianProcess
from ddpm_jax.types import Denoiser


def q_sample_bits(process: GaussianProcess, key: jax.Array, x0: jax.Array, t: jax.Array) -> jax.Array:
    """Sample (2). x0: float[B, ...], 0 or 1; t: int32[B] in [0, T). Returns float[B, ...], 0 or 1."""
    return jax.random.bernoulli(key, _rate(x0, _wide(process.alpha_bar, t, x0))).astype(x0.dtype)


def q_posterior_bits(process: GaussianProcess, x0: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
    """Return (3). x0, xt: float[B, ...], 0 or 1; t: int32[B] in [0, T). Returns rates, float[B, ...]."""
    rate = _rate(x0, _wide(process.alpha_bar_prev, t, x0))
    same = 1.0 - 0.5 * _wide(process.betas, t, x0)
    one = rate * jnp.where(xt == 1, same, 1.0 - same)
    zero = (1.0 - rate) * jnp.where(xt == 0, same, 1.0 - same)
    return one / (one + zero)


def reverse_log_rates(
    process: GaussianProcess, logits: jax.Array, xt: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return log p(x_{t-1} = 1 | x_t) and log p(x_{t-1} = 0 | x_t), (4). logits: of x0, float[B, ...]."""
    one, zero = (q_posterior_bits(process, jnp.full_like(xt, bit), xt, t) for bit in (1.0, 0.0))
    log_p, log_q = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    mix = lambda a, b: jnp.logaddexp(log_p + jnp.log(a), log_q + jnp.log(b))  # noqa: E731
    return mix(one, zero), mix(1.0 - one, 1.0 - zero)


def binomial_terms(
    process: GaussianProcess, denoise: Denoiser, x0: jax.Array, xt: jax.Array, t: jax.Array
) -> jax.Array:
    """Return the term of (5) at each example's timestep, in bits, a sum over all bits of x0; float32[B]."""
    posterior = q_posterior_bits(process, x0, xt, t)
    log_one, log_zero = reverse_log_rates(process, denoise(xt, t), xt, t)
    entropy = jax.scipy.special.xlogy(posterior, posterior) + jax.scipy.special.xlogy(1 - posterior, 1 - posterior)
    # 0 times minus infinity is 0 here.
    cross = jnp.where(posterior > 0, posterior * log_one, 0.0) + jnp.where(
        posterior < 1, (1 - posterior) * log_zero, 0.0
    )
    return jnp.sum(entropy - cross, axis=tuple(range(1, x0.ndim))) / math.log(2.0)


def binomial_bound(process: GaussianProcess, denoise: Denoiser, key: jax.Array, x0: jax.Array) -> jax.Array:
    """Return the bound (5) of each example in bits, float32[B]; every term is estimated with one sample of x_t.

    Args:
        process: T steps.
        denoise: the network, (xt, t) -> logits of x0; it is called T times, in one `lax.scan`.
        key: one key.
        x0: float[B, ...], 0 or 1.
    """
    key = one_key(key)

    def term(total: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        t = jnp.broadcast_to(step, x0.shape[:1])
        xt = q_sample_bits(process, jax.random.fold_in(key, step), x0, t)
        return total + binomial_terms(process, denoise, x0, xt, t), None

    rate = _rate(x0, process.alpha_bar[-1])
    entropy = jax.scipy.special.xlogy(rate, 2 * rate) + jax.scipy.special.xlogy(1 - rate, 2 * (1 - rate))
    prior = jnp.sum(entropy, axis=tuple(range(1, x0.ndim))) / math.log(2.0)
    return jax.lax.scan(term, prior, jnp.arange(process.num_steps, dtype=jnp.int32))[0]


def sample_bits(process: GaussianProcess, denoise: Denoiser, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sample the reverse chain (4) from fair coins.

    Args:
        process: T steps.
        denoise: the network, (xt, t) -> logits of x0.
        keys: typed keys [B]; example i depends on keys[i] alone.
        shape: of one example.

    Returns:
        float32[B, *shape], 0 or 1.
    """
    keys = key_vector(keys)

    def coins(step: jax.Array | int, rates: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.bernoulli)(fold_in(keys, step), rates).astype(jnp.float32)

    def back(xt: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        t = jnp.broadcast_to(step, xt.shape[:1])
        log_one, _ = reverse_log_rates(process, denoise(xt, t), xt, t)
        return coins(step, jnp.exp(log_one)), None

    start = coins(process.num_steps, jnp.full((keys.shape[0], *shape), 0.5, jnp.float32))
    return jax.lax.scan(back, start, jnp.arange(process.num_steps - 1, -1, -1, dtype=jnp.int32))[0]


def _rate(x0: jax.Array, alpha_bar: jax.Array) -> jax.Array:
    return alpha_bar * x0 + 0.5 * (1.0 - alpha_bar)


def _wide(table: jax.Array, t: jax.Array, like: jax.Array) -> jax.Array:
    return look_up(table, t).reshape(t.shape + (1,) * (like.ndim - 1))
