"""Classification accuracy score: a classifier that is trained on samples alone is tested on real images.

It falls when classes lack variety or images are not of their class, which FID hardly sees (Ravuri and Vinyals 2019).
The published numbers train a ResNet-50 on ImageNet; here it is a small network of this package, so that numbers compare
models on one data set.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.errors import counted
from ddpm_jax.evaluation.compare import Measure
from ddpm_jax.evaluation.images import ImageSet, class_labels, share_of
from ddpm_jax.evaluation.summary import gather_arrays
from ddpm_jax.models.adm import Classifier
from ddpm_jax.storage.checkpoint import restore_params
from ddpm_jax.training import ClassifierTask, Images, Stage, Training
from ddpm_jax.training.run import train
from ddpm_jax.types import to_float

CHANNELS, LEVELS = 32, (1, 2, 2)
_CLEAN = Diffusion("cosine", 1)  # a classifier of clean images sees none of it


class Labelled:
    """Images and labels of a set, in memory: 3 bytes a pixel.

    Args:
        name: of the set, for messages.
        test_shape: (H, W, C) that its images must have, that of the test images; None takes any.
    """

    def __init__(self, name: str, test_shape: tuple[int, ...] | None = None):
        self._name, self._test_shape = name, test_shape
        self._images: list[np.ndarray] = []
        self._labels: list[int] = []

    def add(self, batch: dict[str, Any]) -> None:
        """Add a batch of an `ImageSet`; raise ValueError if it has no labels, or images of another size."""
        if "label" not in batch:
            raise ValueError(f"{self._name} has no labels, which classification accuracy needs")
        if self._test_shape is not None:
            _check_sizes(batch["image"].shape[1:], self._test_shape)
        self._images.append(batch["image"])
        self._labels += [int(label) for label in batch["label"]]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of all hosts, uint8[N, H, W, 3], and their labels, int32[N]; all hosts call it."""
        own = {"images": np.concatenate(self._images), "labels": np.array(self._labels, np.int32)}
        parts = [own] if jax.process_count() == 1 else gather_arrays(own)
        images, labels = (np.concatenate([part[name] for part in parts]) for name in ("images", "labels"))
        check_labels(labels, None, self._name)
        return images, labels


def read_labelled(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Read all images of a set and their labels; see `Labelled.arrays`."""
    found, own = Labelled(images.name), share_of(len(images))
    for begin in range(own.start, own.stop, images.batch_size):
        found.add(images.read(begin, min(begin + images.batch_size, own.stop)))
    return found.arrays()


def match_classes(
    train_on: np.ndarray,
    classes: Mapping[str, Any] | None,
    test_on: np.ndarray,
    test_classes: Mapping[str, Any] | None,
    name: str,
) -> tuple[np.ndarray, int]:
    """Return test labels as those of the samples, int32[N], and the number of classes.

    Args:
        train_on: labels of the samples.
        classes: of the samples (`images.ImageSet`), or None where only the labels are known.
        test_on: labels of the test images.
        test_classes: of the test images, or None.
        name: of the test images, for messages.

    Raises:
        ValueError: if a test label is none of the samples' classes, or they cannot be matched (`images.class_labels`).
    """
    if classes is None:
        most = int(train_on.max()) + 1
        classes = {"num_classes": most if test_classes is None else max(most, test_classes["num_classes"])}
    return class_labels(test_on, test_classes, classes, name, owner="samples"), classes["num_classes"]


def check_labels(labels: Any, num_classes: int | None, name: str) -> None:
    """Raise ValueError for the first label outside of [0, num_classes)."""
    for number, label in enumerate(labels):
        if label < 0 or (num_classes is not None and label >= num_classes):
            classes = "at least 0" if num_classes is None else f"in [0, {num_classes})"
            raise ValueError(f"label {label} of image {number} of {name} must be {classes}")


def _check_sizes(samples: tuple[int, ...], test: tuple[int, ...]) -> None:
    if samples != test or samples[0] != samples[1]:
        raise ValueError(
            f"samples of {samples[0]} x {samples[1]} pixels and test images of {test[0]} x {test[1]} must be square "
            "and of one size; --size=N brings images of files to N x N pixels"
        )


def accuracy_score(
    train_on: tuple[np.ndarray, np.ndarray],
    test_on: tuple[np.ndarray, np.ndarray],
    directory: Path,
    *,
    num_classes: int | None = None,
    name: str = "classification accuracy score",
    num_steps: int = 1000,
    batch_size: int = 64,
    replicates: int = 50,
    seed: int = 0,
) -> Measure:
    """Train a classifier on images and return its accuracy on others.

    Args:
        train_on: uint8[N, H, W, 3] and int32[N], samples and the classes that they were sampled for.
        test_on: real images of the same size and their classes.
        directory: of the classifier's training run, which is in a subdirectory named after a hash of the samples and
            of the training, so that the same call resumes it, and another one trains its own.
        num_classes: of both; by default the samples' largest label says it.
        name: of the measure.
        num_steps, batch_size: of the training.
        replicates: of the bootstrap over test images.
        seed: of the training and the bootstrap.

    Raises:
        ValueError: if the images are not square and of one size, or a test label is none of the classes.
    """
    images, labels = train_on
    classes, size = num_classes or int(labels.max()) + 1, images.shape[1]
    _check_sizes(images.shape[1:], test_on[0].shape[1:])
    check_labels(labels, classes, "the samples")
    check_labels(test_on[1], classes, "the test images")
    network = Classifier(CHANNELS, classes, size, _levels(size), 1, pool="adaptive", attention_levels=(), groups=8)
    task = ClassifierTask(model=network, diffusion=_CLEAN, x0=Images(size), noised=False)
    training = Training(
        batch_size=min(batch_size, len(images)),
        num_steps=num_steps,
        learning_rate=1e-3,
        warmup_steps=min(100, num_steps // 10),
        decay="cosine",
        weight_decay=0.05,
        ema_decay=0.99,
        checkpoint_every=num_steps,
        max_to_keep=1,
        log_every=max(1, num_steps // 10),
        preview_every=0,
        seed=seed,
    )
    directory = directory / _hash(images, labels, classes, num_steps, training.batch_size, seed)
    train(Stage(name="classifier", task=task, source=ArraySource(images, labels=labels), training=training), directory)
    params, _ = restore_params(directory / "classifier", step=num_steps)
    right = _right(network, params, *test_on)
    note = f"{num_steps} steps on {counted(len(images), 'image')}, tested on {len(right)}"
    return Measure.of_means(name, right, replicates=replicates, seed=seed, note=note, most=1.0)


def _hash(images: np.ndarray, labels: np.ndarray, *numbers: int) -> str:
    """Return twelve hexadecimal digits that differ from call to call, unless samples and numbers are the same."""
    found = hashlib.sha256(repr((images.shape, *numbers)).encode())
    for array in (images, labels):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()[:12]


def _levels(size: int) -> tuple[int, ...]:
    """Return as many levels as the image can be halved for."""
    halvings = 0
    while halvings < len(LEVELS) - 1 and size % 2 ** (halvings + 1) == 0:
        halvings += 1
    return LEVELS[: halvings + 1]


def _right(network: Classifier, params: Any, images: np.ndarray, labels: np.ndarray, size: int = 128) -> np.ndarray:
    """Return whether each image is classified as its label, bool[N]."""
    predict = jax.jit(lambda params, x: network.apply(params, to_float(x), jnp.zeros(len(x), jnp.int32)).argmax(-1))
    found = []
    for begin in range(0, len(images), size):
        rows = np.minimum(np.arange(begin, begin + size), len(images) - 1)
        found.append(np.asarray(predict(params, images[rows]))[: len(images) - begin])
    return np.concatenate(found) == labels
