"""Degraded low-resolution copies of images, for blind super-resolution (BSR).

The model is that of Zhang et al. 2021, "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution"
(BSRGAN): blur, two resizes, noise and JPEG in random order. The default numbers are those of the milder variant that
latent diffusion was trained with ("bsrgan_light"; Rombach et al. 2022, appendix D.5, which found the original numbers
very strong).
"""

import dataclasses
import io
from typing import Any

import numpy as np

from ddpm_jax.checks import check_count, check_number
from ddpm_jax.extras import needs_extra

_FILTERS = ("linear", "cubic", "area")


@dataclasses.dataclass(frozen=True)
class DegradeBSR:
    """Add a degraded copy of the image `key`, smaller by a factor: uint8[H, W, 3] -> `name` uint8[H/f, W/f, 3].

    With a factor that 4 divides, the image is halved first at the rate `half_rate`. Then, in random order:

    - `blurs` Gaussian blurs, half of them anisotropic, with a kernel of random odd size;
    - a resize by 1 / u, u uniform in [1, 2 f), or at the rate 1 - `resize_rate` a Gaussian blur of standard deviation
      in [0.1, 0.6 f) of which every f-th pixel is taken;
    - after it a resize to the size of the result;
    - Gaussian noise: per channel (40 %), grey (40 %) or with random correlations of the channels (20 %);
    - JPEG, at the rate `jpeg_rate`.

    JPEG comes last in any case. Resizes are linear or cubic, without antialiasing as cv2's, or by area. What differs
    from the published code: kernels of odd size alone, which leave the image in place, as in the paper; the
    correlations are those of an exact covariance matrix; the camera's sensor noise, for which it needs a network, is
    left out there too.

    The original model is DegradeBSR(blurs=2, blur_width=1.0, kernel=(7, 25), resize_rate=0.75, noise=(2, 25),
    quality=(30, 95)).

    Attributes:
        factor: f, at least 2.
        blurs: number of blurs, at least 0.
        blur_width: scales the blurs: eigenvalues of the covariance of anisotropic ones are uniform in
            [0, blur_width (4 + f)) pixels^2, standard deviations of isotropic ones in [0, blur_width (2 + 0.2 f)).
        kernel: smallest and largest size of the kernels, odd numbers.
        resize_rate: in [0, 1].
        noise: smallest and largest standard deviation of the noise, whole grey levels of 255.
        jpeg_rate: in [0, 1].
        quality: smallest and largest quality of JPEG, in [1, 100].
        half_rate: in [0, 1].
        key: name of the image in the record.
        name: of the degraded copy, for `LowResolution(entry=...)`.

    Raises:
        ValueError: if a number is out of its range; on an image that is not uint8[H, W, 3], or whose sides the factor
            does not divide.
    """

    factor: int = 4
    blurs: int = 1
    blur_width: float = 0.25
    kernel: tuple[int, int] = (5, 13)
    resize_rate: float = 0.8
    noise: tuple[int, int] = (1, 2)
    jpeg_rate: float = 0.9
    quality: tuple[int, int] = (80, 95)
    half_rate: float = 0.25
    key: str = "image"
    name: str = "low_res"

    def __post_init__(self):
        check_count("factor", self.factor)
        if self.factor < 2:
            raise ValueError(f"factor={self.factor} must be at least 2")
        if not isinstance(self.blurs, int) or self.blurs < 0:
            raise ValueError(f"blurs={self.blurs} must be a number of blurs, at least 0")
        check_number(
            "blur_width", self.blur_width, lambda width: 0 <= width < np.inf, "must be a finite number, at least 0"
        )
        for name in ("resize_rate", "jpeg_rate", "half_rate"):
            check_number(name, getattr(self, name), lambda rate: 0 <= rate <= 1, "must lie between 0 and 1")
        for name, least, most in (("kernel", 1, 99), ("noise", 0, 255), ("quality", 1, 100)):
            _check_range(name, getattr(self, name), least, most)
        if any(size % 2 == 0 for size in self.kernel):
            raise ValueError(f"kernel={self.kernel} must be two odd numbers")

    def random_map(self, record: dict, rng: np.random.Generator) -> dict:
        return record | {self.name: self.degrade(record[self.key], rng)}

    def degrade(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the degraded copy, uint8[H/f, W/f, 3], of uint8[H, W, 3]; it depends on the image and rng alone."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"an image to degrade must be uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
        height, width, factor = *image.shape[:2], self.factor
        if height % factor or width % factor:
            raise ValueError(f"factor={factor} must divide the image's {height} x {width} pixels")
        size, x = (height // factor, width // factor), image.astype(np.float32) / 255
        if factor % 4 == 0 and rng.random() < self.half_rate:
            filter, factor = rng.choice(["antialiased", "antialiased", "antialiased", *_FILTERS]), factor // 2
            x = _resize(x, (height // 2, width // 2), filter)
        for step in _in_order(self.blurs, rng):
            if step == "blur":
                x = _convolve(x, self._blur_kernel(factor, rng))
            elif step == "shrink":
                x = self._shrink(x, factor, rng)
            elif step == "finish":
                x = _resize(x, size, rng.choice(_FILTERS))
            elif step == "noise":
                x = _add_noise(x, self.noise, rng)
            elif rng.random() < self.jpeg_rate:
                x = _jpeg(x, self.quality, rng)
        return _as_uint8(_jpeg(x, self.quality, rng))

    def _blur_kernel(self, factor: int, rng: np.random.Generator) -> np.ndarray:
        size = 2 * int(rng.integers(self.kernel[0] // 2, self.kernel[1] // 2 + 1)) + 1
        if rng.random() < 0.5:
            variances = self.blur_width * (4 + factor) * rng.random(2)
        else:
            variances = np.square(self.blur_width * (2 + 0.2 * factor) * rng.random(1)).repeat(2)
        return gaussian_kernel(size, variances, angle=np.pi * rng.random())

    def _shrink(self, x: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
        """Resize to a random size, or blur and take every f-th pixel."""
        if rng.random() < self.resize_rate:
            scale = 1 / rng.uniform(1, 2 * factor)
            size = tuple(max(int(scale * side), 1) for side in x.shape[:2])
            return _resize(x, size, rng.choice(_FILTERS))
        variance = rng.uniform(0.1, 0.6 * factor) ** 2
        # Shifted to the middle of f x f pixels, of which the first is taken.
        blurred = _convolve(x, gaussian_kernel(25, (variance, variance), shift=(factor - 1) / 2))
        return blurred[::factor, ::factor]


def gaussian_kernel(size: int, variances: Any, *, angle: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """Return a Gaussian, float32[size, size], of sum 1.

    Args:
        size: an odd number of pixels.
        variances: two, along and across the axis of the angle, in pixels^2.
        angle: of the axis with the rows' direction.
        shift: of its middle down and to the right, in pixels.
    """
    axes = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    offsets = np.arange(size) - size // 2 - shift
    along = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), axis=-1) @ axes.T
    power = (np.square(along) / np.maximum(variances, 1e-4)).sum(-1)
    kernel = np.exp(-0.5 * (power - power.min()))
    return (kernel / kernel.sum()).astype(np.float32)


def _check_range(name: str, value: Any, least: int, most: int) -> None:
    whole = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(end, int) for end in value)
    if not whole or not least <= value[0] <= value[1] <= most:
        raise ValueError(f"{name}={value!r} must be two whole numbers, the first not larger, in [{least}, {most}]")


def _in_order(blurs: int, rng: np.random.Generator) -> list[str]:
    """Return the steps in random order, "shrink" before "finish"."""
    steps = [str(step) for step in rng.permutation(["blur"] * blurs + ["shrink", "finish", "noise", "jpeg"])]
    first, second = sorted((steps.index("shrink"), steps.index("finish")))
    steps[first], steps[second] = "shrink", "finish"
    return steps


def _pillow() -> Any:
    with needs_extra("train"):
        from PIL import Image

    return Image


def _resize(x: np.ndarray, size: tuple[int, int], filter: str) -> np.ndarray:
    """Resize float32[H, W, 3] in [0, 1] to [height, width, 3]; filter: one of _FILTERS, or "antialiased"."""
    shrinks = size[0] <= x.shape[0] and size[1] <= x.shape[1]
    if filter == "antialiased" or (filter == "area" and shrinks):
        module = _pillow()
        how = module.Resampling.BICUBIC if filter == "antialiased" else module.Resampling.BOX
        channels = [module.fromarray(np.ascontiguousarray(x[..., channel])) for channel in range(3)]
        x = np.stack([np.asarray(channel.resize(size[::-1], how)) for channel in channels], axis=-1)
    else:
        x = _interpolate(_interpolate(x, size[0], 0, filter), size[1], 1, filter)
    return np.clip(x, 0.0, 1.0)


def _interpolate(x: np.ndarray, size: int, axis: int, filter: str) -> np.ndarray:
    """Resize an axis by its 2 or 4 nearest pixels, without antialiasing, edges repeated, as cv2.resize does."""
    old = x.shape[axis]
    at = (np.arange(size) + 0.5) * old / size - 0.5
    first, taps = np.floor(at).astype(np.int64), (-1, 0, 1, 2) if filter == "cubic" else (0, 1)
    shape, total = [size if i == axis else 1 for i in range(3)], 0.0
    for tap in taps:
        weight = _weight(np.abs(at - first - tap), filter).astype(np.float32).reshape(shape)
        total = total + weight * np.take(x, np.clip(first + tap, 0, old - 1), axis=axis)
    return total


def _weight(distance: np.ndarray, filter: str) -> np.ndarray:
    """Return the weight of a pixel at a distance: linear, or Keys' cubic with a = -0.75, as in cv2."""
    if filter != "cubic":
        return np.maximum(1 - distance, 0.0)
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1
    return np.where(distance < 1, near, -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4))


def _convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Average float32[H, W, 3] under a kernel, mirrored at its edges."""
    with needs_extra("train"):
        from scipy.signal import fftconvolve

    margin = len(kernel) // 2
    wide = np.pad(x, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return fftconvolve(wide, kernel[::-1, ::-1, None], mode="valid", axes=(0, 1))


def _add_noise(x: np.ndarray, levels: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    level, kind = int(rng.integers(levels[0], levels[1] + 1)), rng.random()
    if kind < 0.4:
        noise = level * rng.standard_normal(x.shape, np.float32)
    elif kind < 0.8:
        noise = level * rng.standard_normal((*x.shape[:2], 1), np.float32)
    else:
        directions, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        mixing = (levels[1] * np.sqrt(rng.random((3, 1))) * directions).astype(np.float32)
        noise = rng.standard_normal(x.shape, np.float32) @ mixing
    return np.clip(x + noise / 255, 0.0, 1.0).astype(np.float32)


def _jpeg(x: np.ndarray, quality: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Compress and read float32[H, W, 3] in [0, 1]."""
    module, buffer = _pillow(), io.BytesIO()
    chosen = int(rng.integers(quality[0], quality[1] + 1))
    module.fromarray(_as_uint8(x)).save(buffer, "JPEG", quality=chosen)
    return np.asarray(module.open(buffer)).astype(np.float32) / 255


def _as_uint8(x: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(x, 0.0, 1.0)).astype(np.uint8)
