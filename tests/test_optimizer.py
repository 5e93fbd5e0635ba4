"""Schedule and optimizer against their formulas in numpy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.training.optimizer import assigned, decayed, make_optimizer, make_schedule


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule(decay, warmup):
    schedule = make_schedule(learning_rate=3e-4, warmup_steps=warmup, total_steps=50, decay=decay, final_fraction=0.1)
    n = np.arange(60)
    r = np.clip((n - warmup) / (50 - warmup), 0, 1)
    shape = {"cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * r)) / 2, "linear": 1 - 0.9 * r, "constant": np.ones(60)}[decay]
    rise = np.minimum(1, (n + 1) / warmup) if warmup else 1
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.arange(60)), 3e-4 * rise * shape, rtol=2e-5)


def test_first_update_is_not_empty_and_the_peak_is_reached():
    schedule = make_schedule(learning_rate=1.0, warmup_steps=4, total_steps=8)
    np.testing.assert_allclose([schedule(n) for n in range(5)], [0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


def test_adamw_with_clipping_equals_numpy():
    """Loshchilov & Hutter, algorithm 2, with gradients scaled to a global norm of at most 1."""
    rng = np.random.default_rng(0)
    lr, b1, b2, eps, weight_decay = 0.1, 0.8, 0.95, 1e-6, 0.03
    values = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=(2,))}
    tx, _ = make_optimizer(
        learning_rate=lr,
        warmup_steps=0,
        total_steps=10,
        decay="constant",
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        clip_norm=1.0,
    )
    params = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    m = {name: np.zeros_like(value) for name, value in values.items()}
    v = {name: np.zeros_like(value) for name, value in values.items()}
    for n, size in enumerate([5.0, 0.01, 2.0], start=1):
        grads = {name: rng.normal(size=value.shape) * size for name, value in values.items()}
        updates, state = update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, params)
        params = {name: params[name] + updates[name] for name in params}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g / max(norm, 1.0)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            adam = m[name] / (1 - b1**n) / (np.sqrt(v[name] / (1 - b2**n)) + eps)
            values[name] = values[name] - lr * (adam + (weight_decay * values[name] if name == "kernel" else 0))
    for name in values:
        np.testing.assert_allclose(params[name], values[name], rtol=2e-5, atol=1e-6)


def test_weight_decay_leaves_biases_and_scales_alone():
    zeros = jnp.zeros
    params = {"attention": {"kernel": zeros((4, 2, 3)), "bias": zeros((2, 3))}, "norm": {"scale": zeros((1, 4))}}
    params |= {"positions": zeros((7, 4)), "temperature": zeros(())}
    params |= {"gru": {"kernel_0_ahead": zeros((4, 12)), "bias_0": zeros((2, 1, 4))}}
    assert assigned(params)["gru"] == {"kernel_0_ahead": "muon", "bias_0": "adamw"}
    assert decayed(params) == {
        "gru": {"kernel_0_ahead": True, "bias_0": False},
        "attention": {"kernel": True, "bias": False},
        "norm": {"scale": False},
        "positions": True,
        "temperature": False,
    }


GOOD = {"learning_rate": 1e-3, "warmup_steps": 1, "total_steps": 10}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a positive number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be"),
        ({"warmup_steps": 11}, "warmup_steps=11 must be between 0 and total_steps=10"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"total_steps": 0, "warmup_steps": 0}, "total_steps=0 must be at least 1"),
        ({"decay": "step"}, "decay='step' must be one of"),
        ({"final_fraction": 1.5}, "final_fraction=1.5"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"b2": -0.1}, "b2=-0.1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(**(GOOD | bad))
