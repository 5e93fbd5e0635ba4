"""Diffusion probabilistic models (Sohl-Dickstein et al. 2015): a swiss roll, and binary sequences.

    python -m ddpm_jax.train --config configs/diffusion2015.py --workdir runs/swiss_roll
    python -m ddpm_jax.train --config configs/diffusion2015.py:heartbeat --workdir runs/heartbeat

The first is a Gaussian diffusion of points of the plane, the second a binomial diffusion of sequences of 20 bits with a
one in every fifth place (`diffusion.binomial`). Both train in minutes on two cores (16 on busy ones); then `evaluate`
prints what they have learned. The data are computed, so nothing has to be fetched.

Variants, with the parameters of the network (held to them by tests/recipes/test_sizes.py):

    configs/diffusion2015.py                    swiss roll: 0.17M
    configs/diffusion2015.py:heartbeat          heartbeat: 0.17M
    configs/diffusion2015.py:smoke              two steps of the swiss roll
    configs/diffusion2015.py:heartbeat_smoke    two steps of the heartbeat

Here `:heartbeat` reached a bound of -2.335 +- 0.007 bits a sequence, and all of 4096 samples are true sequences;
samples of the swiss roll lie at a mean distance of 0.053 from the curve, data at 0.056.

Published (table 1): heartbeat, a bound of the log-likelihood of -2.414 bits a sequence, and -log2 5 = -2.322 for a
perfect model; swiss roll, 2.35 bits of log-likelihood. The published networks are smaller, and return the rates of
x_{t-1}; here the network returns those of x0 (equation (4) of `diffusion.binomial`). The schedule of the heartbeat is
the published one, beta_t = 1 / (T - t + 1), in 2000 steps; that of the swiss roll, which was learned, is the cosine
here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.data.image_grid import save_png
from ddpm_jax.data.toys import Heartbeat, SwissRoll
from ddpm_jax.diffusion.binomial import binomial_bound, sample_bits
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import sample_with, sampling_from
from ddpm_jax.models.mlp import TimeMLP
from ddpm_jax.storage.json_file import write_json
from ddpm_jax.training import BinomialTask, DiffusionTask, Stage, Training, Vectors

VARIANTS = ("", "heartbeat", "smoke", "heartbeat_smoke")


def get_config(variant: str = "") -> ConfigDict:
    """Return the config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    config = ConfigDict()
    config.data = "heartbeat" if variant.startswith("heartbeat") else "swiss_roll"
    config.network = {"width": 128, "layers": 4}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "v"}
    config.sample = {"sampler": "ancestral", "steps": "250"}
    config.evaluation = {"num_samples": 4096, "rounds": 64}
    config.training = {
        "seed": 0,
        "batch_size": 128,
        "num_steps": 10_000,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "decay": "cosine",
        "final_fraction": 0.01,
        "clip_norm": 1.0,
        "ema_decay": 0.998,
        "checkpoint_every": 2_000,
        "log_every": 200,
        "preview_every": 0,
        "eval_every": 2_000,
        "num_workers": 0,
        "progress": True,
    }
    config.cpu_devices = 1
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    if config.data == "heartbeat":
        config.diffusion = {"schedule": "reciprocal", "num_steps": 2000, "prediction": "x0"}
    if variant.endswith("smoke"):
        config.network.update(width=16, layers=1)
        config.diffusion.num_steps, config.sample.steps = 8, "2"
        config.evaluation.update(num_samples=16, rounds=1)
        config.training.update(batch_size=8, num_steps=2, warmup_steps=1, checkpoint_every=1, log_every=1, eval_every=2)
    return config


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """Return the one stage."""
    if config.data not in ("swiss_roll", "heartbeat"):
        raise ValueError(f"data={config.data!r} must be 'swiss_roll' or 'heartbeat'")
    kind = Heartbeat if config.data == "heartbeat" else SwissRoll
    size = Heartbeat.size if config.data == "heartbeat" else 2
    task = BinomialTask if config.data == "heartbeat" else DiffusionTask
    return (
        Stage(
            name="base",
            task=task(model=TimeMLP(size, **config.network), diffusion=Diffusion(**config.diffusion), x0=Vectors(size)),
            source=kind(0),
            eval_source=kind(1, length=4096),
            training=Training(**config.training),
        ),
    )


def evaluate(config: ConfigDict, model, workdir, show) -> None:
    """Measure the model: the bound and the share of true sequences, or the distance from the curve."""
    measured = heartbeat(config, model) if config.data == "heartbeat" else swiss_roll(config, model, workdir)
    write_json(workdir / "evaluation.json", measured)
    show(", ".join(f"{name} {value:.4g}" for name, value in measured.items()))


def heartbeat(config: ConfigDict, model) -> dict[str, float]:
    """Return the bound in bits a sequence, the mean over the five of them, and the share of samples that are one."""
    process, true = model.diffusion.process, jnp.asarray(Heartbeat.sequences())
    denoise = lambda xt, t: model.apply(2.0 * xt - 1.0, t)  # noqa: E731
    bound = jax.jit(lambda key, x0: binomial_bound(process, denoise, key, x0))
    x0 = jnp.tile(true, (config.evaluation.rounds, 1))
    bits = bound(jax.random.key(0), x0).reshape(-1, len(true)).mean(1)
    keys = example_keys(jax.random.key(1), config.evaluation.num_samples)
    found = np.asarray(jax.jit(lambda keys: sample_bits(process, denoise, keys, true.shape[1:]))(keys))
    equal = (found[:, None] == np.asarray(true)).all(-1)
    return {
        "log_likelihood_bound": -float(bits.mean()),
        "standard_error": float(bits.std() / max(len(bits), 1) ** 0.5),
        "perfect_model": -float(np.log2(len(true))),
        "share_of_true_sequences": float(equal.any(1).mean()),
        "share_of_rarest": float(equal.mean(0).min()),
    }


def swiss_roll(config: ConfigDict, model, workdir) -> dict[str, float]:
    """Write samples.png, a plot of data and samples, and return mean distances from the curve without noise."""
    sampling = sampling_from(config.sample, name="sample")
    count, source = config.evaluation.num_samples, SwissRoll(2)
    draw = lambda keys: sample_with(sampling, model.diffusion, model.apply, keys, (2,))  # noqa: E731
    found = np.asarray(jax.jit(draw)(example_keys(jax.random.key(1), count)))
    true = np.stack([source[i]["vector"] for i in range(count)])
    curve = SwissRoll.curve(np.linspace(0.0, 1.0, 1000))
    save_png(workdir / "samples.png", np.concatenate([plot(true), plot(found)], axis=1))
    distance = lambda points: float(np.linalg.norm(points[:, None] - curve, axis=-1).min(1).mean())  # noqa: E731
    return {"distance_of_samples": distance(found), "distance_of_data": distance(true)}


def plot(points: np.ndarray, size: int = 256) -> np.ndarray:
    """Return points of [-2.5, 2.5] x [-2.5, 2.5] as black pixels, uint8[size, size, 3]."""
    image = np.full((size, size, 3), 255, np.uint8)
    x, y = np.clip((points.T + 2.5) / 5.0 * size, 0, size - 1).astype(int)
    image[size - 1 - y, x] = 0
    return image
