"""UniPC: a multistep solver whose corrector costs no network call (Zhao et al. 2023, arXiv:2302.04867)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm_jax.checks import check_static
from ddpm_jax.diffusion.samplers.grid import Point
from ddpm_jax.types import PredictFn, Step


def unipc_step(order: int = 2) -> Step:
    """Return the step of UniPC in terms of x0, with B(h) = e^h - 1 (algorithm 1, "bh2").

    At each point the network's estimate m_0 first corrects the state that it was computed from (UniC, of order p + 1),
    then predicts the next one (UniP, of order p). In terms of x0 and h = lambda_there - lambda_here both read

        x_there = (sigma_there / sigma_here) x - alpha_there expm1(-h) (m_0 + sum_k rho_k (m_k - m_0) / r_k)

    where r_k is the distance of the k-th other estimate in lambda, over h; rho solves sum_k r_k^(n-1) rho_k = b_n with
    b_n = n! phi_{n+1}(-h) / phi_1(-h), the conditions that make the integral of polynomials exact (theorem 3.1). UniC's
    sum holds the new estimate as well, at r = 1. A sum of one term takes rho = 1/2, as in the published code, which is
    as good to its order.

    The first steps are of the order that the estimates so far allow, the step into the data is of order 1. One network
    call a step.

    Args:
        order: p. With the corrector the error is of order p + 1 for 1 and 2; 3 is of order 3 too, with a smaller error,
            since the first step, of order 2, leaves h^3 behind.

    Returns:
        A Step.

    Raises:
        ValueError: if order is not one of these.
    """
    check_static("order", order, "since it decides what is compiled")
    if order not in (1, 2, 3):
        raise ValueError(f"{order=} must be 1, 2 or 3")

    def init(xt: jax.Array) -> tuple:
        zero = jnp.zeros((), xt.dtype)
        return jnp.zeros_like(xt), (jnp.zeros_like(xt),) * order, (zero,) * order, (zero + 1, zero + 1), jnp.int32(0)

    def update(
        predict_fn: PredictFn, keys: jax.Array, xt: jax.Array, here: Point, there: Point, carry: Any
    ) -> tuple[jax.Array, Any]:
        del keys
        before, estimates, lambdas, (alpha, sigma), known = carry
        # Pure noise, alpha = 0, is taken for almost pure noise, so that differences stay finite.
        now = jnp.log(jnp.maximum(here.alpha, jnp.finfo(xt.dtype).tiny)) - jnp.log(here.sigma)
        new = predict_fn(xt, here).x0
        # UniC: from the point before to this one, with the estimate made here.
        past = _step(before, here.alpha, here.sigma, sigma, now, estimates, lambdas, jnp.minimum(known, order), new)
        xt = jnp.where(known > 0, past, xt)
        estimates, lambdas = (new, *estimates[:-1]), (now, *lambdas[:-1])
        usable = jnp.where(there.sigma > 0.0, jnp.minimum(known, order - 1), 0)
        ahead = jnp.where(there.sigma > 0.0, jnp.log(there.alpha) - jnp.log(there.sigma), jnp.inf)
        x = _step(xt, there.alpha, there.sigma, here.sigma, ahead, estimates, lambdas, usable + 1, None)
        return x, (xt, estimates, lambdas, (here.alpha, here.sigma), known + 1)

    return Step(update, init)


def _step(x, alpha, sigma, sigma_before, ahead, estimates, lambdas, known, new):
    """Return the state at (alpha, sigma) from x: UniP from ``known`` estimates, UniC with ``new`` beside them."""
    h = ahead - lambdas[0]
    finite = jnp.where(jnp.isfinite(h), h, 1.0)  # into the data, where only m_0 counts
    others = [(estimate, (place - lambdas[0]) / finite) for estimate, place in zip(estimates[1:], lambdas[1:])]
    valid = [known > k for k in range(1, len(estimates))]
    if new is not None:
        others, valid = [*others, (new, jnp.ones_like(h))], [*valid, known > 0]
    total = jnp.zeros_like(x)
    if others:
        # Estimates that are missing get rho = 0: a row of the identity in place of the highest conditions.
        r = jnp.stack([jnp.where(ok, place, 1.0) for (_, place), ok in zip(others, valid)])
        for weight, (estimate, _), ok, place in zip(_weights(r, jnp.stack(valid), finite), others, valid, r):
            total = total + jnp.where(ok, weight * (estimate - estimates[0]) / place, 0.0)
    return sigma / sigma_before * x - alpha * jnp.expm1(-h) * (estimates[0] + total)


def _weights(r: jax.Array, valid: jax.Array, h: jax.Array) -> jax.Array:
    """Solve sum_k r_k^(n - 1) rho_k = b_n over the valid k, n = 1 .. how many are valid."""
    count = r.shape[0]
    # phi_1(-h) = (1 - e^-h) / h and phi_{n+1} = (phi_n - 1 / n!) / z; b_n = n! phi_{n+1} / phi_1 at z = -h.
    z, phi, factorial, b = -h, jnp.expm1(-h) / -h, 1.0, []
    first = phi
    for n in range(1, count + 1):
        factorial *= n
        phi = (phi - 1.0 / factorial) / z
        b.append(factorial * phi / first)
    number = valid.sum()
    n = jnp.arange(count)
    conditions = jnp.where(valid[None, :], jnp.stack([r**k for k in range(count)]), 0.0)  # row n, column k
    # Rows past the number of valid estimates pin the invalid weights to 0, one each.
    order_of_invalid = jnp.cumsum(~valid) - 1 + number
    pins = (~valid)[None, :] & (order_of_invalid[None, :] == n[:, None])
    matrix = jnp.where((n < number)[:, None], conditions, pins.astype(r.dtype))
    b = jnp.where(n < number, jnp.stack(b), 0.0)
    return jnp.linalg.solve(matrix, b.at[0].set(jnp.where(number == 1, 0.5, b[0])))
