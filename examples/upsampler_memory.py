"""Memory of a 256 -> 1024 pass of DALL-E 2's upsampler: `python examples/upsampler_memory.py [--channels 8]`.

Compiles, for one image, sampling of the network of configs/unclip.py's up_1024 (6 levels, 2 residual blocks each) with
few channels, and prints the temporary memory of the compiled program on each device: of the whole image, of tiles, and
of rows on several devices. It runs the first and the others and prints how far their images are apart. With
--width_only nothing is run.
"""

import argparse
import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ddpm_jax.diffusion.samplers import example_keys  # noqa: E402
from ddpm_jax.diffusion.sampling import Sampling  # noqa: E402
from ddpm_jax.models.unet import UNet  # noqa: E402
from ddpm_jax.models.upsampler import Upsampler  # noqa: E402
from ddpm_jax.parallel.mesh import make_local_mesh, replicated  # noqa: E402
from ddpm_jax.pipelines.enlarging import Enlarging, in_context  # noqa: E402
from ddpm_jax.pipelines.upsampling import upsample  # noqa: E402
from ddpm_jax.storage.metadata import freeze  # noqa: E402
from ddpm_jax.storage.model_directory import Model  # noqa: E402

FLAT = {"attention_resolutions": (), "attention_levels": (), "mid_attention": False}


def make_model(channels: int, groups: int, size: int, dtype) -> Model:
    """Return the upsampler with random parameters of small size, as a trained network's are."""
    unet = UNet(channels, 3, (1, 1, 2, 2, 4, 4), 2, groups=groups, dtype=dtype, **FLAT)
    low, network = size // 4, Upsampler(unet)
    inputs = (jnp.zeros((1, 64, 64, 3)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 16, 16, 3)))
    shapes, key = jax.eval_shape(network.init, jax.random.key(0), *inputs), jax.random.key(1)
    leaves, tree = jax.tree.flatten(shapes)
    scale = lambda leaf: 0.5 * np.prod(leaf.shape[:-1]) ** -0.5 if len(leaf.shape) > 1 else 0.1  # noqa: E731
    keys = jax.random.split(key, len(leaves))
    params = jax.tree.unflatten(tree, [scale(x) * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
    metadata = {"diffusion": {"schedule": "linear", "num_steps": 1000, "prediction": "x0", "variance": "fixed_small"}}
    metadata |= {"image_size": size, "channels": 3, "conditions": ["low_resolution"], "low_resolution": {"size": low}}
    return Model(params, network, freeze(metadata))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=8, help="of the first level; 192 in the paper")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tiles", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--devices", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--width_only", action="store_true", help="compile and do not run")
    arguments = parser.parse_args()
    size = arguments.size
    model = make_model(arguments.channels, arguments.groups, size, jnp.dtype(arguments.dtype))
    sampling = Sampling("ddim", arguments.steps, threshold=1.0).checked()
    low = np.random.default_rng(0).uniform(-1, 1, (1, size // 4, size // 4, 3)).astype(np.float32)
    inputs = (model, low, example_keys(jax.random.key(0), 1))

    def run(model, low, keys, enlarging):
        return upsample(model, sampling, low, keys, enlarging=enlarging)

    program = jax.jit(run, static_argnums=3)
    cases = [("whole image", Enlarging(), None)]
    cases += [(f"tiles of {tile}", Enlarging(tile=tile), None) for tile in arguments.tiles]
    cases += [(f"rows on {count} devices", Enlarging(), count) for count in arguments.devices]
    print("| sampled | temporary memory of a device, MiB | largest difference | root mean square |")
    print("| --- | --- | --- | --- |")
    whole = None
    for name, enlarging, count in cases:
        mesh = None if count is None else make_local_mesh(1, space=count)
        own = inputs if mesh is None else jax.device_put(inputs, replicated(mesh))
        compiled = in_context(mesh, program.lower)(*own, enlarging).compile()
        memory, difference = compiled.memory_analysis().temp_size_in_bytes / 2**20, ("", "")
        if not arguments.width_only:
            image = np.asarray(compiled(*own))
            whole = image if whole is None else whole
            error = image - whole
            difference = (f"{np.abs(error).max():.2g}", f"{np.sqrt(np.square(error).mean()):.2g}")
        print(f"| {name} | {memory:.1f} | {' | '.join(difference)} |", flush=True)


if __name__ == "__main__":
    main()
