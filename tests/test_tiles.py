"""Tiles and rows: what they equal, what they cost in memory, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal
from tiny_pipelines import FLAT, diffusion, image_metadata, model, zeros

from ddpm_jax.diffusion.samplers import example_keys
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.diffusion.tiles import _axis, tiled_denoiser
from ddpm_jax.models.ncsnpp import NCSNpp
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.parallel.mesh import data_sharding, make_local_mesh, replicated
from ddpm_jax.pipelines.enlarging import Enlarging, check_tile, in_context, tile_unit
from ddpm_jax.pipelines.upsampling import upsample

SIZE, LOW = 128, 32


def convolution(seed, size):
    """A linear network without statistics, (xt, t, low) -> 2 channels; it sees size // 2 pixels in each direction."""
    kernel = normal(seed, size, size, 6, 2)

    def network(xt, t, low):
        low = jnp.repeat(jnp.repeat(low, 4, axis=1), 4, axis=2)
        x = jnp.concatenate([xt, low], axis=-1)
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims) + t[:, None, None, None]

    return network


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(64, 64, 32, 16), (64, 48, 32, 16), (40, 32, 32, 16)])
def test_tiles_equal_the_whole_where_the_field_of_view_is_a_quarter_of_the_overlap(height, width, tile, overlap):
    network, t = convolution(0, 9), jnp.array([3.0, 5.0])
    xt, low = normal(1, 2, height, width, 3), normal(2, 2, height // 4, width // 4, 3)
    tiled = tiled_denoiser(network, {"low": low}, tile=tile, overlap=overlap)
    np.testing.assert_allclose(fast_jit(tiled)(xt, t), network(xt, t, low), atol=1e-4)


def test_an_image_that_is_not_larger_than_a_tile_is_not_cut():
    network, t = convolution(0, 9), jnp.zeros(1)
    xt, low = normal(1, 1, 16, 16, 3), normal(2, 1, 4, 4, 3)
    tiled = tiled_denoiser(network, {"low": low}, tile=32, overlap=8)
    np.testing.assert_allclose(tiled(xt, t), network(xt, t, low), atol=1e-5)


@pytest.mark.parametrize(
    ("side", "tile", "overlap"), [(64, 32, 0), (64, 32, 8), (72, 32, 16), (40, 32, 24), (32, 32, 8)]
)
def test_weights_sum_to_1_at_every_pixel(side, tile, overlap):
    starts, weights = _axis(side, tile, overlap)
    total = np.zeros(side)
    for start, own in zip(starts, np.asarray(weights), strict=True):
        total[start : start + tile] += own
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    assert starts[0] == 0 and starts[-1] + tile == side
    assert all(a + tile - b >= overlap for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0, "overlap": 0}, "tile=0 must be at least 1"),
        ({"tile": 32, "overlap": 32}, r"overlap=32 must be a number of pixels in \[0, 32\)"),
        ({"tile": 30, "overlap": 8}, "tile=30 must be a multiple of 4 pixels"),
        ({"tile": 32, "overlap": 6}, "overlap=6 must be a multiple of 4 pixels"),
        ({"tile": 32, "overlap": 8, "unit": 12}, "tile=32 must be a multiple of 12 pixels"),
    ],
)
def test_tiles_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        tiled_denoiser(convolution(0, 3), {"low": zeros(1, 16, 16, 3)}, **options)(zeros(1, 64, 64, 3), zeros(1))


# ---- Upsamplers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """The architecture of DALL-E 2's upsampler to 1024, of two levels and 8 channels, at 128 pixels."""
    network = Upsampler(UNet(8, 3, (1, 1), 1, groups=4, **FLAT))
    inputs = (zeros(1, SIZE, SIZE, 3), zeros(1, dtype=np.int32), zeros(1, LOW, LOW, 3))
    metadata = image_metadata(SIZE, ("low_resolution",), diffusion=diffusion(schedule="linear"))
    return model(network, inputs, metadata | {"low_resolution": {"size": LOW}})


@pytest.fixture(scope="module")
def programs(large):
    """Compiled sampling of one image: whole, by tiles, and by rows on 8 devices."""
    sampling, low = Sampling("ddim", 2, threshold=1.0).checked(), np.asarray(normal(3, 1, LOW, LOW, 3)) / 3

    def run(model, low, key, enlarging):
        return upsample(model, sampling, low, key, enlarging=enlarging)

    program, keys = jax.jit(run, static_argnums=3), example_keys(jax.random.key(0), 1)
    mesh = make_local_mesh(1, space=8)
    split = jax.device_put((large, low, keys), replicated(mesh))
    make = {
        "whole": lambda: program.lower(large, low, keys, Enlarging()),
        "tiles": lambda: program.lower(large, low, keys, Enlarging(tile=32)),
        "rows": lambda: in_context(mesh, program.lower)(*split, Enlarging()),
    }
    options = {"xla_backend_optimization_level": 0}
    compiled = {name: lower().compile(options) for name, lower in make.items()}
    inputs = {"rows": split}
    images = {name: np.asarray(run(*inputs.get(name, (large, low, keys)))) for name, run in compiled.items()}
    memory = {name: run.memory_analysis().temp_size_in_bytes for name, run in compiled.items()}
    return images, memory


def test_rows_on_several_devices_give_the_same_image(programs):
    images, _ = programs
    assert images["whole"].shape == (1, SIZE, SIZE, 3) and images["whole"].std() > 0.05
    # In 2 steps of an untrained network, eps is divided by a small alpha: rounding grows.
    np.testing.assert_allclose(images["rows"], images["whole"], atol=1e-3)


def test_memory_is_that_of_a_tile_or_of_a_device_s_rows(programs):
    """A tile is 1/16 of the image, and a device has 1/8 of it and what it exchanges with its neighbours."""
    _, memory = programs
    whole = 4 * SIZE * SIZE * 8 * 4  # bytes of four feature maps of the first level
    assert memory["whole"] > whole
    assert memory["tiles"] < memory["whole"] / 4
    assert memory["rows"] < memory["whole"] / 4


def test_a_mesh_for_rows():
    mesh = make_local_mesh(1, space=4)
    assert dict(mesh.shape) == {"data": 1, "space": 4}
    assert data_sharding(mesh).spec == jax.sharding.PartitionSpec("data")
    assert dict(make_local_mesh(space=4).shape) == {"data": 2, "space": 4}
    with pytest.raises(ValueError, match=r"space=9 must be a number of devices in \[1, 8\]"):
        make_local_mesh(space=9)


def test_tiles_of_an_upsampler_with_the_network_of_sr3():
    network = Upsampler(NCSNpp(channels=16, channel_mult=(1, 2, 4), num_res_blocks=1))
    assert tile_unit(network, 4) == 4 and tile_unit(network, 3) == 12
    check_tile("--", Enlarging(), network, 4)
    with pytest.raises(ValueError, match="--tile=6 must be a multiple of 4 pixels"):
        check_tile("--", Enlarging(tile=6), network, 4)
