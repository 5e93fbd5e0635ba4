"""What CLIP's image embeddings of captioned shapes say: `python examples/shapes_probe.py [--clip DIR]`.

Fits a network with one hidden layer (256 units) that reads shape, colour, size, background and place from the embedding
of an image with one object, and prints how often it is right on images that it was not fitted to: of colour-shape pairs
of the training split, and of held-out pairs. What it cannot read, a prior or a decoder can hardly know. DIR is a
directory of a CLIP, such as DIR/clip of a run of configs/shapes.py; the bundled one by default. Takes about half a
minute on two cores.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax.data.shapes import scenes
from ddpm_jax.pipelines.directory import BUNDLED
from ddpm_jax.storage.clip_images import encode_images
from ddpm_jax.storage.model_directory import open_model
from ddpm_jax.types import to_float

NAMES = {
    "shape": tuple(scenes.SHAPES),
    "colour": tuple(scenes.COLOURS),
    "size": tuple(scenes.SIZES),
    "background": tuple(scenes.BACKGROUNDS),
    "place": tuple(scenes.PLACES),
}
ENDS = np.cumsum([len(names) for names in NAMES.values()])
HIDDEN, STEPS, BATCH = 256, 3000, 256


def examples(clip, split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings, float32[count, D], and attributes, int[count, 5], of images with one object."""
    source = scenes.ShapesSource(seed, clip.network.vision.image_size, split, two_fraction=0.0)
    encode = jax.jit(lambda images: encode_images(clip, to_float(images)))
    embeddings, attributes = [], []
    for start in range(0, count, BATCH):
        rows = range(start, start + BATCH)
        embeddings.append(np.asarray(encode(np.stack([source[i]["image"] for i in rows]))))
        for scene in map(source.scene, rows):
            (thing,) = scene.objects
            found = (thing.shape, thing.colour, thing.size, scene.background, scene.place)
            attributes.append([names.index(name) for names, name in zip(NAMES.values(), found, strict=True)])
    return np.concatenate(embeddings), np.array(attributes)


def init(key: jax.Array, width: int) -> dict:
    """Return new parameters of the reading network."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (width, HIDDEN)) / width**0.5,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, ENDS[-1])) / HIDDEN**0.5,
        "b2": jnp.zeros(ENDS[-1]),
    }


def logits(params: dict, z: jax.Array) -> list[jax.Array]:
    """Return the logits of each attribute, float32[B, number of its names]."""
    hidden = jax.nn.gelu(z @ params["w1"] + params["b1"][None])
    return jnp.split(hidden @ params["w2"] + params["b2"][None], ENDS[:-1], axis=-1)


def fit(z: np.ndarray, attributes: np.ndarray) -> dict:
    """Return parameters fitted by AdamW."""
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1e-3)

    def loss(params, rows):
        found = zip(logits(params, z[rows]), attributes[rows].T, strict=True)
        return sum(optax.softmax_cross_entropy_with_integer_labels(own, right).mean() for own, right in found)

    def step(state, key):
        params, opt = state
        rows = jax.random.randint(key, (BATCH,), 0, len(z))
        updates, opt = tx.update(jax.grad(loss)(params, rows), opt, params)
        return (optax.apply_updates(params, updates), opt), None

    z, attributes = jnp.asarray(z), jnp.asarray(attributes)
    params = init(jax.random.key(0), z.shape[1])
    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
    return run((params, tx.init(params)), jax.random.split(jax.random.key(1), STEPS))[0]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default=str(BUNDLED / "clip"))
    clip = open_model(parser.parse_args().clip)
    z, attributes = examples(clip, "train", 50 * BATCH, 0)
    mean, std = z.mean(0), z.std(0)
    params = fit((z - mean) / std, attributes)
    print("| images | " + " | ".join(NAMES) + " | all |\n" + "| --- " * (len(NAMES) + 2) + "|")
    for split, words in {"single": "seen pairs", "held_out": "held-out pairs"}.items():
        z, attributes = examples(clip, split, 4 * BATCH, 1)
        found = np.stack([np.argmax(own, -1) for own in logits(params, (z - mean) / std)], axis=1)
        right = found == attributes
        cells = [f"{100 * rate:.1f} %" for rate in (*right.mean(0), right.all(1).mean())]
        print(f"| {words} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
