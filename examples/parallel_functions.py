"""The pure functions of the package under `jax.pmap` and `jax.shard_map`, in a training step and a sampler.

    JAX_NUM_CPU_DEVICES=8 python examples/parallel_functions.py

The network is the optimal denoiser of data that are one number, scaled by a trainable parameter w, so that the loss has
its minimum at w = 1. Both ways must give the numbers of one device; the largest difference is printed.
"""

import functools
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ddpm_jax import cosine_betas, ddim_step, denoising_loss, make_process, respace, sample
from ddpm_jax.diffusion.samplers import example_keys

MEAN, SHAPE, STEPS = 0.5, (4, 4, 3), 20
PROCESS = make_process(cosine_betas(1000))
SHORT = respace(PROCESS, str(STEPS))


def denoise(w, xt, t):
    """Predict the noise of data that are MEAN everywhere, times w."""
    wide = lambda table: jnp.asarray(table)[t].reshape(-1, 1, 1, 1)
    return w * (xt - wide(PROCESS.alpha) * MEAN) / wide(PROCESS.sigma)


def loss(w, keys, x0):
    """Return the mean loss of a part of a batch; a key for each example, so that the part does not matter."""
    one = lambda key, x: denoising_loss(PROCESS, functools.partial(denoise, w), key, x[None])[0][0]  # float32[]
    return jax.vmap(one)(keys, x0).mean()


def step(w, keys, x0):
    """Return w after a step of gradient descent on the whole batch, of which this device has a part."""
    return w - 0.1 * jax.lax.pmean(jax.grad(loss)(w, keys, x0), "data")


def generate(w, keys):
    """Sample an image for each key."""
    return sample(SHORT, functools.partial(denoise, w), keys, SHAPE, step=ddim_step())


def main() -> None:
    """Run the program."""
    devices = jax.local_device_count()
    w, keys = jnp.float32(0.8), example_keys(jax.random.key(0), 2 * devices)
    x0 = jnp.full((2 * devices, *SHAPE), MEAN)
    expected = w - 0.1 * jax.grad(loss)(w, keys, x0), jax.jit(generate)(w, keys)

    split = lambda x: x.reshape(devices, -1, *x.shape[1:])
    new = jax.pmap(step, axis_name="data", in_axes=(None, 0, 0))(w, split(keys), split(x0))
    images = jax.pmap(generate, in_axes=(None, 0))(w, split(keys))
    show("pmap", (new[0], images.reshape(-1, *SHAPE)), expected)

    mesh, whole, parts = Mesh(jax.devices(), ("data",)), PartitionSpec(), PartitionSpec("data")
    # With check_vma=True the gradient by w, which is the same on all devices, would be summed over them already.
    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    new = jax.jit(mapped(step, in_specs=(whole, parts, parts), out_specs=whole))(w, keys, x0)
    images = jax.jit(mapped(generate, in_specs=(whole, parts), out_specs=parts))(w, keys)
    show("shard_map", (new, images), expected)


def show(name: str, found: tuple, expected: tuple) -> None:
    """Print the differences of a step and of the samples."""
    after, images = (float(jnp.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    print(f"{name} on {jax.local_device_count()} devices: w {after:.1e}, samples {images:.1e}")


if __name__ == "__main__":
    main()
