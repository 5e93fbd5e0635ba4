"""Conditioning augmentation in sampling: truncated and non-truncated, and how it is asked for and stored."""

import jax
import numpy as np
import pytest
from random_networks import fast_jit
from tiny_pipelines import LOW, base, diffusion, upsampler

from ddpm_jax.diffusion.samplers import example_keys, sample
from ddpm_jax.diffusion.samplers.noise import transition_keys
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.parallel.mesh import make_local_mesh
from ddpm_jax.pipelines import Cascade, load, save
from ddpm_jax.pipelines import cascade as module
from ddpm_jax.pipelines.enlarging import Enlarging, enlarging_options, stored_enlarging, with_stops
from ddpm_jax.pipelines.request import image_keys
from ddpm_jax.pipelines.upsampling import upsample
from ddpm_jax.types import to_uint8

AUGMENTED = {"noise": 0.8, "noise_level_input": True, "variance_preserving": True}
SAMPLING = {"base": Sampling("ddim", 8, threshold=1.0), "up": Sampling("ddim", 1, threshold=1.0)}


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    monkeypatch.setattr(module, "_generate", _generate)


_generate = fast_jit(module._generate.__wrapped__)


def pipeline(**fields):
    models = base("unconditional"), (upsampler(**AUGMENTED),)
    return Cascade(*models, sampling=SAMPLING, names=("up",), **{"batch_size": 2} | fields).checked()


def stops(level, steps=8, **low):
    stages = {"base": base("unconditional"), "up": upsampler(**AUGMENTED | low)}
    sampling = SAMPLING | {"base": Sampling("ddim", steps)}
    return with_stops({"up": Enlarging(truncated=True)}, stages, sampling, {"up": level})


def cosine_sigma(steps):
    """Standard deviations of the noise after each transition of evenly spaced steps, from the definition."""
    f = lambda t: np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - f(np.arange(1, 1001)) / f(np.arange(1000)), 0.999)
    alpha_bar = np.cumprod(1 - betas)
    kept = np.round(np.linspace(0, 999, steps)).astype(int)[::-1]
    return np.append(np.sqrt(1 - alpha_bar[kept[1:]]), 0.0)


@pytest.mark.parametrize("level", [0.05, 0.3, 0.5, 0.79])
def test_the_stage_before_stops_at_the_step_nearest_to_the_level(level):
    ((name, own),), levels = stops(level)
    sigma = cosine_sigma(8)[:-1]  # without the data
    allowed = sigma[sigma <= 0.8]
    assert name == "up" and levels["up"] == pytest.approx(allowed[np.abs(allowed - level).argmin()], abs=1e-5)
    assert sigma[own.stop - 1] == pytest.approx(levels["up"], abs=1e-5)


def test_sampling_that_stops_returns_the_state_of_that_step():
    process, keys = Sampling(steps=5).process(base("unconditional").diffusion), example_keys(jax.random.key(0), 2)
    denoise = lambda xt, t: 0.5 * xt + 0.001 * t[:, None]
    final, states = sample(process, denoise, keys, (3,), trajectory=True)
    for stop in (1, 3, 5):
        np.testing.assert_allclose(sample(process, denoise, keys, (3,), stop=stop), states[stop - 1], atol=1e-6)
    np.testing.assert_array_equal(final, states[-1])
    for stop in (0, 6):
        with pytest.raises(ValueError, match=rf"stop={stop} must be a number of transitions in \[1, 5\]"):
            sample(process, denoise, keys, (3,), stop=stop)


def test_truncated_images_come_from_the_noisy_image_and_its_level():
    """Composed by hand: the base stops at a step, and the upsampler is given its state and its noise level."""
    cascade, seed = pipeline(), np.uint32(3)
    ((_, own),), levels = stops(0.4)

    @fast_jit
    def by_hand(cascade, keys):
        low = cascade.sample_base(transition_keys(keys, 0), stop=own.stop)
        model, up_keys = cascade.upsamplers[0], transition_keys(keys, 1)
        truncated = Enlarging(truncated=True)
        images = upsample(model, cascade.sampling["up"], low, up_keys, noise_level=levels["up"], enlarging=truncated)
        return to_uint8(images), low

    expected, low = by_hand(cascade, image_keys(seed, np.arange(2, dtype=np.int32)))
    images = cascade.generate(2, seed=3, up_noise_level=0.4, up_truncated=True)
    assert np.abs(images.astype(int) - np.asarray(expected)).max() <= 1
    assert (np.abs(low).max((1, 2, 3)) > 1).all()  # it is noisy: finished images are in [-1, 1]
    assert (images != cascade.generate(2, seed=3, up_noise_level=0.4)).any((1, 2, 3)).all()
    # The base alone is not stopped: what is asked of the upsampler changes nothing, and compiles nothing.
    low_res = {"low_res": True, "seed": 3, "up_noise_level": 0.4}
    np.testing.assert_array_equal(cascade.generate(2, up_truncated=True, **low_res), cascade.generate(2, **low_res))


def test_tiles_of_a_tile_s_size_change_nothing_and_smaller_ones_something():
    cascade, options = pipeline(), {"seed": 3, "up_noise_level": 0.4, "batch_size": 2}
    whole = cascade.generate(2, **options)
    assert np.abs(whole.astype(int) - cascade.generate(2, up_tile=16, **options)).max() <= 1
    assert (whole != cascade.generate(2, up_tile=8, up_overlap=4, **options)).any()


def test_devices_that_share_rows_return_the_same_images():
    cascade = pipeline()
    images = cascade.generate(2, mesh=make_local_mesh(1, space=4))
    assert np.abs(images.astype(int) - cascade.generate(2)).max() <= 1
    with pytest.raises(ValueError, match="the axis 'space' of the mesh has 3 devices, which do not divide 16 rows"):
        cascade.generate(2, mesh=make_local_mesh(1, space=3))


def test_options_are_stored_with_the_pipeline(tmp_path):
    own = {"up": {"tile": 8, "overlap": 4, "truncated": True}}
    cascade = pipeline(enlarging=own, noise_levels={"up": 0.4})
    assert cascade.enlarging == (("up", Enlarging(8, 4, True)),) and stored_enlarging(cascade.enlarging) == own
    save(cascade, tmp_path / "cascade")
    assert load(tmp_path / "cascade").enlarging == cascade.enlarging
    given, left = enlarging_options(["up"], dict(cascade.enlarging), {"up_tile": 16, "seed": 1})
    assert given == {"up": Enlarging(16, 4, True)} and left == {"seed": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"up_truncated": True}, "up_truncated=True needs up_noise_level above 0, where base is to stop"),
        ({"up_truncated": 1}, "up_truncated=1 must be True or False"),
        ({"up_tile": 0}, "up_tile=0 must be at least 1"),
        ({"up_tile": 8, "up_overlap": 8}, "up_overlap=8 must be below up_tile=8"),
        ({"up_overlap": 8}, "up_overlap=8 must be below up_tile=None"),
        ({"up_tile": 7}, "up_tile=7 must be a multiple of 4 pixels"),
        ({"up_tile": 8, "up_overlap": 2}, "up_overlap=2 must be a multiple of 4 pixels"),
        ({"base_tile": 8}, "there is no option 'base_tile'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline().generate(2, **options)


def test_upsamplers_that_cannot_be_given_noisy_images():
    with pytest.raises(ValueError, match="up_truncated=True needs an upsampler that was trained with"):
        stops(0.3, variance_preserving=False)
    with pytest.raises(ValueError, match=r"none of the 2 steps of base has noise of at most 0.001"):
        stops(0.001, steps=2, noise=0.001)
    with pytest.raises(ValueError, match="enlarging has no upsampler 'down'; there are up"):
        pipeline(enlarging={"down": Enlarging(tile=8)})
    with pytest.raises(ValueError, match="up_tile=30 must be a multiple of 4 pixels, so that tiles fit the network"):
        pipeline(enlarging={"up": Enlarging(tile=30)})
    assert diffusion()["schedule"] == "cosine" and LOW == 8  # which the numbers above are of
