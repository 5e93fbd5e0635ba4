"""BSR degradation: each operation against its closed form, and what the whole keeps of an image."""

import math

import numpy as np
import pytest
from scipy.ndimage import convolve

from ddpm_jax.data import degradation as module
from ddpm_jax.data.degradation import DegradeBSR, gaussian_kernel

RNG = np.random.default_rng(0)
NOTHING = {"blurs": 0, "noise": (0, 0), "half_rate": 0.0, "quality": (100, 100)}


def image(height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def ramp(size, slope):
    """Each channel grows along another direction."""
    x = np.arange(size) + 0.5
    return np.stack([x[:, None] + 0 * x, x + 0 * x[:, None], (x[:, None] + x) / 2], axis=-1) * slope


# ---- Operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 0.7, 2.5])
def test_a_kernel_has_the_moments_of_its_gaussian(angle):
    """Mean `shift`, covariance R diag(variances) R^T; 31 pixels hold all of it."""
    kernel = gaussian_kernel(31, (6.0, 1.5), angle=angle, shift=1.5)
    offsets = np.stack(np.meshgrid(np.arange(31) - 15.0, np.arange(31) - 15.0, indexing="ij"), -1)
    mean = (kernel[..., None] * offsets).sum((0, 1))
    spread = np.einsum("ij,ija,ijb->ab", kernel, offsets - mean, offsets - mean)
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(kernel.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(mean, [1.5, 1.5], atol=1e-3)
    np.testing.assert_allclose(spread, axes @ np.diag([6.0, 1.5]) @ axes.T, atol=2e-3)


def test_a_blur_mirrors_the_edges():
    x = RNG.random((12, 15, 3)).astype(np.float32)
    kernel = gaussian_kernel(7, (2.0, 0.5), angle=0.4)
    expected = convolve(x.astype(np.float64), kernel[::-1, ::-1, None].astype(np.float64), mode="mirror")
    np.testing.assert_allclose(module._convolve(x, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_a_shifted_kernel_reads_further_down_and_right(shift):
    x = ramp(40, 0.02).astype(np.float32)
    moved = module._convolve(x, gaussian_kernel(25, (1.0, 1.0), shift=shift)) - x
    np.testing.assert_allclose(moved[14:26, 14:26], 0.02 * shift, atol=1e-4)


def cubic(distance, a=-0.75):
    d = np.abs(distance)
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def weights(new, old, filter):
    """[new, old]: what each new pixel takes of the old ones, pixels being at half numbers and edges repeated."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    found = np.zeros((new, old))
    for row, center in enumerate(at):
        for tap in range(int(np.floor(center)) - 1, int(np.floor(center)) + 3):
            weight = max(1 - abs(center - tap), 0) if filter == "linear" else cubic(center - tap)
            found[row, min(max(tap, 0), old - 1)] += weight
    return found


@pytest.mark.parametrize("filter", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(5, 7), (16, 20), (30, 23)])
def test_linear_and_cubic_resizes_read_the_nearest_pixels(filter, size):
    x = RNG.uniform(0.3, 0.7, (16, 20, 3)).astype(np.float32)
    down, across = (weights(new, old, filter) for new, old in zip(size, x.shape))
    expected = np.einsum("ia,jb,abc->ijc", down, across, x.astype(np.float64))
    np.testing.assert_allclose(module._resize(x, size, filter), expected, atol=1e-5)


def test_an_area_is_averaged():
    x = RNG.random((16, 24, 3)).astype(np.float32)
    blocks = x.reshape(4, 4, 6, 4, 3).mean((1, 3))
    np.testing.assert_allclose(module._resize(x, (4, 6), "area"), blocks, atol=1e-6)


def test_the_levels_of_the_noise():
    """Per channel and grey noise have a standard deviation of whole levels; correlated noise at most the largest."""
    x, kinds = np.full((64, 64, 3), 0.5, np.float32), {"channels": 0, "grey": 0, "correlated": 0}
    for seed in range(200):
        noise = 255 * (module._add_noise(x, (3, 6), np.random.default_rng(seed)).astype(np.float64) - 0.5)
        deviation, correlation = noise.std((0, 1)), np.corrcoef(noise.reshape(-1, 3).T)[0, 1]
        grey = np.allclose(noise[..., 0], noise[..., 1], atol=1e-4)
        apart = abs(correlation) < 0.1 and np.ptp(deviation) < 0.1 * deviation.mean()
        kinds["grey" if grey else "channels" if apart else "correlated"] += 1
        if grey:
            assert abs(deviation[0] - round(deviation[0])) < 0.25 and 2.5 < deviation[0] < 6.5
        assert deviation.max() < 6.5 and abs(noise.mean()) < 0.5
    for kind, share in {"channels": 0.4, "grey": 0.4, "correlated": 0.2}.items():
        assert abs(kinds[kind] / 200 - share) < 4 * np.sqrt(share * (1 - share) / 200), kinds


def test_every_order_but_the_second_resize_comes_after_the_first():
    orders = {tuple(module._in_order(1, np.random.default_rng(seed))) for seed in range(2000)}
    assert len(orders) == 60  # 5! / 2
    assert all(order.index("shrink") < order.index("finish") for order in orders)


# ---- The whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "size"), [(2, (16, 24)), (4, (32, 16)), (4, (4, 4)), (3, (12, 12)), (8, (64, 64))])
def test_shape_dtype_and_the_original(factor, size):
    record = {"image": image(*size), "label": 3}
    found = DegradeBSR(factor).random_map(record, np.random.default_rng(0))
    assert found["low_res"].shape == (size[0] // factor, size[1] // factor, 3) and found["low_res"].dtype == np.uint8
    assert found["image"] is record["image"] and found["label"] == 3 and "low_res" not in record


def test_it_depends_on_the_generator_and_the_image_alone():
    make = lambda seed, x: DegradeBSR().degrade(x, np.random.default_rng(seed))
    np.testing.assert_array_equal(make(5, image()), make(5, image()))
    assert (make(5, image()) != make(6, image())).any() and (make(5, image()) != make(5, image(seed=1))).any()


def test_it_neither_moves_an_image_nor_changes_its_brightness():
    """Of a ramp of 3.5 levels a pixel, half a pixel is 1.75 levels; the mean of 60 copies is closer."""
    smooth = np.rint(ramp(64, 3.5)).astype(np.uint8)
    copies = [DegradeBSR().degrade(smooth, np.random.default_rng(seed)).astype(np.float64) for seed in range(60)]
    expected = smooth.reshape(16, 4, 16, 4, 3).mean((1, 3))
    error = (np.mean(copies, axis=0) - expected)[2:-2, 2:-2]
    assert np.abs(error.mean((0, 1))).max() < 0.6


def test_without_its_operations_a_flat_image_stays():
    flat = np.full((32, 32, 3), (200, 90, 30), np.uint8)
    found = DegradeBSR(**NOTHING).degrade(flat, np.random.default_rng(0))
    assert np.abs(found.astype(int) - flat[:8, :8]).max() <= 1


def test_the_original_model_degrades_more_than_the_milder_one():
    strong = DegradeBSR(blurs=2, blur_width=1.0, kernel=(7, 25), resize_rate=0.75, noise=(2, 25), quality=(30, 95))
    smooth = np.rint(ramp(64, 3.5)).astype(np.uint8)
    expected = smooth.reshape(16, 4, 16, 4, 3).mean((1, 3))
    error = {
        name: np.mean([np.square(d.degrade(smooth, np.random.default_rng(s)) - expected).mean() for s in range(20)])
        for name, d in {"mild": DegradeBSR(), "strong": strong}.items()
    }
    assert error["strong"] > 2 * error["mild"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, "factor=1 must be at least 2"),
        ({"factor": 2.0}, "factor=2.0 must be an integer"),
        ({"blurs": -1}, "blurs=-1 must be a number of blurs"),
        *[
            ({"blur_width": width}, f"blur_width={width} must be a finite number, at least 0")
            for width in (-1.0, math.inf, math.nan)
        ],
        ({"jpeg_rate": 1.5}, "jpeg_rate=1.5 must lie between 0 and 1"),
        ({"noise": (2, 1)}, r"noise=\(2, 1\) must be two whole numbers, the first not larger"),
        ({"quality": (0, 50)}, r"quality=\(0, 50\) must be two whole numbers, .* in \[1, 100\]"),
        ({"kernel": (4, 9)}, r"kernel=\(4, 9\) must be two odd numbers"),
    ],
)
def test_ranges(options, message):
    with pytest.raises(ValueError, match=message):
        DegradeBSR(**options)


def test_images_that_cannot_be_degraded():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="factor=4 must divide the image's 30 x 32 pixels"):
        DegradeBSR().degrade(image(30, 32), rng)
    with pytest.raises(ValueError, match=r"must be uint8\[H, W, 3\], got float32\[4, 4, 3\]"):
        DegradeBSR().degrade(np.zeros((4, 4, 3), np.float32), rng)
