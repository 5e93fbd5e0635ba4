"""Transforms of single records, in numpy, for `make_loader`.

A transform is a callable record -> record; one that needs randomness has a method `random_map(record, rng)` instead,
and gets a generator that depends on the loader's seed and the record's position alone. Records are never changed in
place. Instances can be pickled, so that worker processes can run them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.extras import needs_extra

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Replace the string `key` by "tokens" int32[length] and "mask" bool[length].

    A tuple of strings, the captions of a family, gives int32[size, length] and bool[size, length].
    """

    tokenizer: Tokenizer
    length: int
    key: str = "caption"

    def __call__(self, record: dict) -> dict:
        text = record[self.key]
        tokens, mask = self.tokenizer([text] if isinstance(text, str) else list(text), self.length)
        rest = {name: value for name, value in record.items() if name != self.key}
        return rest | (
            {"tokens": tokens[0], "mask": mask[0]} if isinstance(text, str) else {"tokens": tokens, "mask": mask}
        )


@dataclasses.dataclass(frozen=True)
class Keep:
    """Drop every entry that is not named."""

    names: tuple[str, ...]

    def __call__(self, record: dict) -> dict:
        return {name: record[name] for name in self.names}


def clip_pixels(images: Sequence[np.ndarray], size: int = 224) -> np.ndarray:
    """Bring pictures to what OpenAI's and open_clip's image towers were trained on.

    The short side becomes `size` by Pillow's antialiased bicubic resize in 8 bits, the middle is cut out, and channels
    are normalised by CLIP's means and standard deviations. images: uint8[H, W, 3] each, of any sizes.

    Returns:
        float32[N, size, size, 3].

    Raises:
        ValueError: if a picture is not uint8[H, W, 3].
    """
    with needs_extra("train"):
        from PIL import Image

    done = []
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"images must be uint8[H, W, 3], got {image.dtype}{list(image.shape)}.")
        height, width = image.shape[:2]
        short = min(height, width)
        new = int(size * width / short), int(size * height / short)
        resized = np.asarray(Image.fromarray(image).resize(new, Image.Resampling.BICUBIC))
        left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
        done.append(resized[top : top + size, left : left + size])
    return (np.stack(done).astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cut a random square window of `size` pixels out of the picture `key`, uint8[H, W, C] -> uint8[size, size, C].

    Super-resolution networks are fully convolutional and are trained on crops (Dhariwal and Nichol 2021, unCLIP
    section 2.2).

    Raises:
        ValueError: on a picture smaller than the window.
    """

    size: int
    key: str = "image"

    def random_map(self, record: dict, rng: np.random.Generator) -> dict:
        image = record[self.key]
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise ValueError(f"size must be at most the picture's {height} x {width} pixels, got {self.size}.")
        top, left = int(rng.integers(height - self.size + 1)), int(rng.integers(width - self.size + 1))
        return record | {self.key: image[top : top + self.size, left : left + self.size]}


@dataclasses.dataclass(frozen=True)
class AverageDown:
    """Shrink the picture `key` by averaging factor x factor pixels, uint8[H, W, C] -> uint8[H/factor, W/factor, C].

    Raises:
        ValueError: on a picture whose sides `factor` does not divide.
    """

    factor: int
    key: str = "image"

    def __call__(self, record: dict) -> dict:
        image = record[self.key]
        height, width, channels = image.shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor={self.factor} must divide the picture's {height} x {width} pixels.")
        # Axis by axis: numpy sums over two axes at once far more slowly.
        rows = image.reshape(height // self.factor, self.factor, width * channels).sum(1, dtype=np.int32)
        sums = rows.reshape(height // self.factor, width // self.factor, self.factor, channels).sum(2)
        return record | {self.key: np.rint(sums / self.factor**2).astype(np.uint8)}
