"""A recipe of two tiny stages, for runs of several processes: CLIP, and a network trained on its embeddings.

Records are read slowly where DDPM_JAX_TEST_SLOW says so, "embed:0.05,head:0.05" (seconds each), so that a signal finds
the run where a test wants it. DDPM_JAX_TEST_SEEN names a directory in which a file of the source's name is written when
one of its records is read. The metrics of the second stage say which records a batch had.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.training import ContrastiveTask, Stage, Training
from ddpm_jax.training.embeddings import Embedded

SIZE, LENGTH, WIDTH = 4, 4, 8
TOKENIZER = CompactTokenizer(["red", "green", "blue", "star"])


def get_config(variant=""):
    del variant
    training = {"batch_size": 8, "num_steps": 12, "learning_rate": 0.01, "checkpoint_every": 4, "log_every": 1}
    training |= {"preview_every": 0, "ema_decay": 0.9, "progress": False, "seed": 0}
    # Biases of keys have no gradient but rounding, which a small eps would make as large as the others.
    training["eps"] = 1e-3
    later = training | {"eval_every": 4, "eval_batches": 2, "preview_every": 6, "num_previews": 3}
    return ConfigDict({"count": 48, "clip": {"training": training}, "head": {"training": later}, "nan_at": -1})


@dataclasses.dataclass(frozen=True)
class Source:
    """Random images with captions; record i is a function of i."""

    count: int
    nan_at: int = -1
    name: str = "train"

    def __len__(self):
        return self.count

    def fingerprint(self):
        return f"{self.count} {self.nan_at} {self.name}"

    def __getitem__(self, index):
        slow = dict(each.split(":") for each in os.environ.get("DDPM_JAX_TEST_SLOW", "").split(",") if each)
        time.sleep(float(slow.get(self.name, 0)))
        if directory := os.environ.get("DDPM_JAX_TEST_SEEN"):
            (Path(directory) / self.name).touch()
        rng = np.random.default_rng(int(index))
        tokens, mask = TOKENIZER([" ".join(rng.permutation(["red", "green", "blue", "star"])[:2])], LENGTH)
        weight = np.float32(np.nan if index == self.nan_at else 1.0)
        image = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        record = {"image": image, "tokens": tokens[0], "mask": mask[0], "weight": weight}
        return record | {"record": np.float32(index)}


class HeadTask:
    """Linear regression of the text embedding on that of the image, with noise."""

    def init(self, key, batch):
        return {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / 4}

    def prepare(self, frozen, batch):
        return batch

    def loss(self, params, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["z_text"].shape)
        error = batch["z_image"] @ params["kernel"] - batch["z_text"] - noise
        record = batch["record"]
        return jnp.mean(error**2, axis=-1) * batch["weight"], {"record": record, "record_squared": record**2}

    def preview(self, params, batch, key):
        level = jax.nn.sigmoid(batch["z_image"] @ params["kernel"])
        return np.broadcast_to(np.uint8(255 * level[:, :1, None, None]), (len(level), 8, 8, 3))


def stages(config):
    vision = VisionTransformer(SIZE, 2, WIDTH, 1, 2)
    text = TextEncoder(TOKENIZER.vocab_size, LENGTH, WIDTH, 1, 2)
    clip = Stage(
        name="clip",
        task=ContrastiveTask(CLIP(vision, text, WIDTH), TOKENIZER),
        source=Source(config.count),
        training=Training(**config.clip.training),
    )
    source = Source(config.count, config.nan_at, "head")
    head = Stage(
        name="head",
        task=HeadTask(),
        source=Embedded(source, (), Source(config.count, name="embed"), batch_size=8),
        eval_source=Embedded(Source(16, name="eval"), (), batch_size=8),
        needs={"clip": "clip"},
        training=Training(**config.head.training),
    )
    return clip, head
