"""The claims of the papers that this code follows, on a small model of handwritten digits.

    pip install -e '.[examples]'
    python examples/claims.py [--out DIR]

trains a residual MLP on scikit-learn's digits (8 x 8 pixels, 1797 images, a fifth of them held out) under several
schedules, objectives and outputs, measures what the papers measured, prints a table of what holds and draws a figure.
Where the papers have the Frechet distance of Inception features, here is the energy distance between pixels, which
needs no network; precision and recall are those of Kynkaanniemi et al. (2019), with pixels as features. A claim
holds if its sign is that of the mean difference over seeds and Student's t says so at 95 % (one-sided).
"""

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy
from sklearn.datasets import load_digits
from tqdm import tqdm

from ddpm_jax import (
    ancestral_step,
    classifier_free,
    cosine_betas,
    ddim_step,
    denoising_loss,
    drop,
    example_keys,
    linear_betas,
    make_process,
    respace,
    sample,
    static_threshold,
)
from ddpm_jax.diffusion.importance import importance_timesteps, loss_history, record_losses
from ddpm_jax.diffusion.likelihood import variational_bound
from ddpm_jax.models.layers import timestep_embedding

T, BATCH, STEPS, WIDTH, NULL, SEEDS = 1000, 128, 5000, 128, 10, 3
PROCESS = {"linear": make_process(linear_betas(T)), "cosine": make_process(cosine_betas(T))}
MODELS = {
    "simple, linear": {"schedule": "linear", "variance": "fixed_large"},
    "mean, linear": {"schedule": "linear", "variance": "fixed_large", "prediction": "mean"},
    "simple": {"schedule": "cosine", "variance": "fixed_large"},
    "hybrid": {"schedule": "cosine", "variance": "learned_range", "objective": "hybrid"},
    "vlb": {"schedule": "cosine", "variance": "learned_range", "objective": "vlb"},
    "vlb, importance": {"schedule": "cosine", "variance": "learned_range", "objective": "vlb", "importance": True},
}
COUNTS = (10, 25, 50, 100, 250, 1000)
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)


class Network(nn.Module):
    """Four residual blocks of a layer each, which the time and the class scale and shift. x: [B, 64]; t, y: [B]."""

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        emb = nn.silu(nn.Dense(WIDTH)(timestep_embedding(t, 64)) + nn.Embed(NULL + 1, WIDTH)(y))
        h = nn.Dense(WIDTH)(x)
        for _ in range(4):
            scale, shift = jnp.split(nn.Dense(2 * WIDTH)(emb), 2, axis=-1)
            inner = nn.silu(nn.LayerNorm()(h) * (1 + scale) + shift)
            h = h + nn.Dense(WIDTH, kernel_init=nn.initializers.zeros)(nn.silu(nn.Dense(WIDTH)(inner)))
        return nn.Dense(self.outputs)(nn.silu(nn.LayerNorm()(h)))


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return digits of the training set and the held-out fifth, in the 8-bit levels of [-1, 1], and their classes."""
    images, classes = load_digits(return_X_y=True)
    images = np.round(images * 255 / 16).astype(np.float32) / 127.5 - 1.0
    order = np.random.default_rng(0).permutation(len(images))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    return images[kept], classes[kept], images[held], classes[held]


class Model:
    """One network, how it is trained and what it is asked."""

    def __init__(self, name: str, images: np.ndarray, classes: np.ndarray):
        settings = {"prediction": "eps", "objective": "simple", "importance": False} | MODELS[name]
        self.process, self.prediction, self.variance = (
            PROCESS[settings["schedule"]],
            settings["prediction"],
            settings["variance"],
        )
        self.objective, self.importance = settings["objective"], settings["importance"]
        self.network = Network(128 if self.variance == "learned_range" else 64)
        self.images, self.classes = jnp.asarray(images), jnp.asarray(classes, jnp.int32)
        schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, 1e-3, 200, STEPS, 1e-5)
        self.tx = optax.adam(schedule, b2=0.99)  # no clipping: it would change the weights of the terms of L_vlb

    def loss(self, params, key, history, importance):
        """Return the mean loss of a batch, and its timesteps and unweighted losses."""
        pick, drop_key, t_key, key = jax.random.split(key, 4)
        rows = jax.random.randint(pick, (BATCH,), 0, len(self.images))
        y = jnp.where(drop(drop_key, 0.1, BATCH), self.classes[rows], NULL)
        t, weight = jax.random.randint(t_key, (BATCH,), 0, T), 1.0
        if importance:
            t, weight = importance_timesteps(t_key, BATCH, history)
        denoise = lambda xt, t: self.network.apply(params, xt, t, y)  # noqa: E731
        options = {"prediction": self.prediction, "variance": self.variance, "objective": self.objective}
        loss, _ = denoising_loss(self.process, denoise, key, self.images[rows], t=t, **options)
        return jnp.mean(weight * loss), (t, loss)

    @functools.partial(jax.jit, static_argnums=0)
    def train_some(self, state, keys):
        """Make a step a key."""

        def step(state, key):
            params, ema, opt, history, count = state
            grads, kept = jax.grad(self.loss, has_aux=True)(params, key, history, self.importance)
            updates, opt = self.tx.update(grads, opt)
            params = optax.apply_updates(params, updates)
            rate = jnp.minimum(0.999, (1 + count) / (10 + count))
            ema = jax.tree.map(lambda e, p: rate * e + (1 - rate) * p, ema, params)
            if self.importance:
                history = record_losses(history, *kept)
            return (params, ema, opt, history, count + 1), None

        return jax.lax.scan(step, state, keys)[0]

    def train(self, seed: int, bar: tqdm) -> None:
        """Train from scratch."""
        init, keys = jax.random.split(jax.random.key(seed))
        one = jnp.zeros(1, jnp.int32)
        params = self.network.init(init, jnp.zeros((1, 64)), one, one)
        state = (params, params, self.tx.init(params), loss_history(T), jnp.zeros(()))
        for part in jax.random.split(keys, (STEPS // 500, 500)):
            state = self.train_some(state, part)
            jax.block_until_ready(state)
            bar.update(500)
        self.params, self.history = state[1], state[3]

    def bits(self, images: np.ndarray, classes: np.ndarray, seed: int) -> float:
        """Return the bound of held-out digits in bits per dimension."""
        keys = example_keys(jax.random.key(seed + 10), len(images))
        return float(self._bits(self.params, keys, jnp.asarray(images), jnp.asarray(classes, jnp.int32)).mean())

    @functools.partial(jax.jit, static_argnums=0)
    def _bits(self, params, keys, images, classes):
        denoise = lambda xt, t: self.network.apply(params, xt, t, classes)  # noqa: E731
        options = {"prediction": self.prediction, "variance": self.variance, "x0_transform": static_threshold()}
        return variational_bound(self.process, denoise, keys, images, **options)["total"]

    def draw(self, classes: np.ndarray, seed: int, steps: int = T, **options) -> np.ndarray:
        """Return a digit of each class. options: eta (None: ancestral), scale, variance (the model's own)."""
        options = {"eta": None, "scale": 1.0, "variance": self.variance} | options
        keys = example_keys(jax.random.key(seed + 20), len(classes))
        classes = jnp.asarray(classes, jnp.int32)
        return np.asarray(self._draw(steps, tuple(sorted(options.items())), self.params, keys, classes))

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def _draw(self, steps, options, params, keys, classes):
        options = dict(options)
        of = lambda y: lambda xt, t: self.network.apply(params, xt, t, y)  # noqa: E731
        denoise = classifier_free(of(classes), of(jnp.full_like(classes, NULL)), options["scale"])
        step = ancestral_step() if options["eta"] is None else ddim_step(options["eta"])
        how = {"prediction": self.prediction, "variance": options["variance"], "x0_transform": static_threshold()}
        return sample(respace(self.process, str(steps)), denoise, keys, (64,), step=step, **how)

    def gradient_norms(self, importance: bool, seed: int, count: int = 400) -> np.ndarray:
        """Return the norm of the gradient of as many batches, at the trained parameters."""
        keys = jax.random.split(jax.random.key(seed + 30), count)
        return np.asarray(self._gradient_norms(importance, self.params, self.history, keys))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _gradient_norms(self, importance, params, history, keys):
        one = lambda key: optax.tree.norm(jax.grad(self.loss, has_aux=True)(params, key, history, importance)[0])  # noqa: E731
        return jax.lax.map(one, keys)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'|, which is 0 for equal distributions only."""
    return float(2 * _distances(x, y).mean() - _pairs(x) - _pairs(y))


def precision_recall(x: np.ndarray, y: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Return the share of x within reach of y, and of y within reach of x; reach is the k-th neighbour's distance."""
    cross, reach = _distances(x, y), lambda a: np.sort(_distances(a, a), axis=1)[:, k]
    return float((cross <= reach(y)[None]).any(1).mean()), float((cross <= reach(x)[:, None]).any(0).mean())


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2.0 * x @ y.T
    return np.sqrt(np.maximum(squares, 0.0))


def _pairs(x: np.ndarray) -> float:
    return _distances(x, x).sum() / (len(x) * (len(x) - 1))


def measure(models: dict[str, Model], seed: int, bar: tqdm) -> dict[str, float | np.ndarray]:
    """Train every model from a seed and return all that the claims need."""
    images, classes, held, held_classes = data()
    real, wanted = np.concatenate([images, held]), np.concatenate([classes, held_classes])[:900]
    found = {}
    for name, model in models.items():
        bar.set_postfix_str(name)
        model.train(seed, bar)
        found[f"bits/{name}"] = model.bits(held, held_classes, seed)
        if name.startswith("vlb"):
            found[f"train bits/{name}"] = model.bits(images[: len(held)], classes[: len(held)], seed)
        distance = lambda steps, model=model, **how: energy_distance(model.draw(wanted, seed, steps, **how), real)  # noqa: E731
        if "linear" in name:
            found[f"distance/{name}"] = distance(T)
        if name in ("simple", "hybrid"):
            for steps in COUNTS:
                found[f"distance/{name}/{steps}"] = distance(steps)
                if name == "simple":
                    found[f"distance/simple, small/{steps}"] = distance(steps, variance="fixed_small")
                    found[f"distance/ddim/{steps}"] = distance(steps, eta=0.0)
        if name == "hybrid":
            for scale in SCALES:
                drawn = model.draw(wanted, seed, 50, eta=0.0, scale=scale)
                found[f"precision/{scale}"], found[f"recall/{scale}"] = precision_recall(drawn, real)
        if name == "vlb, importance":
            for importance in (False, True):
                found[f"norms/{importance}"] = model.gradient_norms(importance, seed)
    return found


def compare(runs: list[dict], worse, better) -> tuple[float, float, bool]:
    """Return the mean of both functions of a run over seeds, and whether the second is smaller at 95 %."""
    a, b = (np.array([f(run) for run in runs]) for f in (worse, better))
    error = (a - b).std(ddof=1) / np.sqrt(len(runs)) if len(runs) > 1 else 0.0
    bound = scipy.stats.t.ppf(0.95, len(runs) - 1) * error if len(runs) > 1 else 0.0
    return float(a.mean()), float(b.mean()), bool((a - b).mean() > bound)


def claims(runs: list[dict]) -> list[tuple[str, str, str, bool]]:
    """Return rows of claim, source, what was measured, and whether it holds."""
    at = lambda key: lambda run: run[key]  # noqa: E731
    loss = lambda name: lambda run: run[f"distance/{name}/25"] - run[f"distance/{name}/1000"]  # noqa: E731
    spread = lambda kind: lambda run: np.var(run[f"norms/{kind}"]) / np.mean(run[f"norms/{kind}"]) ** 2  # noqa: E731
    rows = []

    def row(claim: str, source: str, text: str, worse, better) -> None:
        a, b, holds = compare(runs, worse, better)
        rows.append((claim, source, text.format(a, b), holds))

    bits = "{1:.3f} against {0:.3f} bits/dim"
    row("The cosine schedule has a better bound than the linear one", "Improved DDPM, table 2", bits,
        at("bits/simple, linear"), at("bits/simple"))  # fmt: skip
    row("A learned variance has a better bound than a fixed one", "Improved DDPM, table 2", bits,
        at("bits/simple"), at("bits/hybrid"))  # fmt: skip
    row("Importance sampling makes the gradient of L_vlb vary less", "Improved DDPM, figure 6",
        "variance of its norm over its squared mean {1:.3g} against {0:.3g}", spread(False), spread(True))  # fmt: skip
    for key, where in (("train bits", "digits it was trained on"), ("bits", "held-out digits")):
        row(f"Importance sampling brings L_vlb to a better bound: {where}", "Improved DDPM, section 3.3", bits,
            at(f"{key}/vlb"), at(f"{key}/vlb, importance"))  # fmt: skip
    best = lambda run: min(loss("simple")(run), loss("simple, small")(run))  # noqa: E731
    row("From 1000 steps to 25, L_hybrid loses less than L_simple", "Improved DDPM, figure 8",
        "energy distance grows by {1:.3f} against {0:.3f} (the better fixed variance)",
        best, loss("hybrid"))  # fmt: skip
    for steps in COUNTS:
        ancestral = lambda run, s=steps: min(run[f"distance/simple/{s}"], run[f"distance/simple, small/{s}"])
        pair = (ancestral, at(f"distance/ddim/{steps}"))
        if steps < 50:
            row(f"DDIM beats ancestral sampling, {steps} steps", "DDIM, table 1",
                "energy distance {1:.3f} against {0:.3f}", *pair)  # fmt: skip
        if steps > 50:
            source = "DDIM, table 1; Improved DDPM, figure 8" if steps == T else "Improved DDPM, figure 8"
            row(f"Ancestral sampling beats DDIM, {steps} steps", source,
                "energy distance {1:.3f} against {0:.3f}", *pair[::-1])  # fmt: skip
    for name, sign in (("precision", -1), ("recall", 1)):
        low, high = (lambda run, s=s, n=name, k=sign: k * run[f"{n}/{s}"] for s in (1.0, 3.0))
        a, b, holds = compare(runs, low, high)
        verb = "raises" if sign < 0 else "lowers"
        rows.append((f"Guidance of 3 {verb} {name}", "Ho & Salimans 2022, section 4",
                     f"{abs(a):.3f} to {abs(b):.3f}", holds))  # fmt: skip
    row("Under L_simple, eps is a better output than the mean", "DDPM, table 2",
        "energy distance {1:.3f} against {0:.3f}",
        at("distance/mean, linear"), at("distance/simple, linear"))  # fmt: skip
    return rows


def figure(runs: list[dict], path: Path) -> None:
    """Draw distance against steps, the gradient's norms, and precision against recall."""
    mean = lambda key: np.mean([run[key] for run in runs])  # noqa: E731
    _, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    names = {"hybrid": "ancestral, L_hybrid, learned variance", "simple": "ancestral, L_simple, beta",
             "simple, small": "ancestral, L_simple, posterior variance", "ddim": "DDIM, L_simple"}  # fmt: skip
    for name, label in names.items():
        axes[0].loglog(COUNTS, [mean(f"distance/{name}/{n}") for n in COUNTS], "o-", label=label)
    axes[0].set(xlabel="steps", ylabel="energy distance to the digits", title="Sample quality against steps")
    for kind, label in ((False, "uniform"), (True, "importance")):
        norms = runs[0][f"norms/{kind}"]
        axes[1].plot(norms / norms.mean(), lw=0.8, label=label)
    axes[1].set(xlabel="batch", ylabel="norm over its mean", title="Gradient of L_vlb", yscale="log")
    points = np.array([[mean(f"recall/{s}"), mean(f"precision/{s}")] for s in SCALES])
    axes[2].plot(*points.T, "o-")
    for scale, point in zip(SCALES, points, strict=True):
        axes[2].annotate(f"{scale:g}", point, xytext=(4, 4), textcoords="offset points")
    axes[2].set(xlabel="recall", ylabel="precision", title="Guidance scale")
    for axis in axes[:2]:
        axis.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def main() -> None:
    """Measure, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="directory of the figure")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tqdm(total=arguments.seeds * len(MODELS) * STEPS, unit="step", desc="training") as bar:
        models = {name: Model(name, *data()[:2]) for name in MODELS}
        runs = [measure(models, seed, bar) for seed in range(arguments.seeds)]
    print("| claim | source | measured | holds |\n| --- | --- | --- | --- |")
    for claim, source, text, holds in claims(runs):
        print(f"| {claim} | {source} | {text} | {'yes' if holds else 'no'} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure(runs, arguments.out / "claims.png")
    print(f"wrote {arguments.out / 'claims.png'}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
