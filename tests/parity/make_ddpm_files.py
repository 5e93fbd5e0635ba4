"""Write tests/data/ddpm.npz: tiny networks of diffusers' UNet2DModel, their outputs, and samples of DDPMPipeline.

    pip install torch "diffusers==0.42.*"
    python tests/parity/make_ddpm_files.py

For test_interop_ddpm.py. Every weight is random (tests/random_weights.py). Of the released google/ddpm-cifar10-32 and
google/ddpm-celebahq-256 the file has the config and the names and shapes of the tensors.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

sys.path.append(str(Path(__file__).parent.parent))
from random_weights import random_weights

OUT = Path(__file__).parent.parent / "data" / "ddpm.npz"
# What the config.json of all released networks says.
RELEASED = {
    "act_fn": "silu", "attention_head_dim": None, "center_input_sample": False, "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "time_embedding_type": "positional",
}  # fmt: skip


def blocks(attends: str) -> dict:
    """Return the types of the blocks: "-a--" has attention at the second of four levels."""
    kinds = ["Attn" * (level == "a") for level in attends]
    return {
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in kinds[::-1]],
    }


PUBLISHED = {
    "cifar10-32": RELEASED | blocks("-a--") | {"sample_size": 32, "block_out_channels": [128, 256, 256, 256]},
    "celebahq-256": RELEASED | blocks("----a-")
    | {"sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512]},
}  # fmt: skip
SMALL = {"sample_size": 8, "block_out_channels": [32, 48, 64], "norm_num_groups": 16}
NETWORKS = {
    "released": RELEASED | blocks("-a-") | SMALL,
    # Everything that the configs of the released networks do not say or say otherwise; a large epsilon shows in a norm
    # that has another. Heads of 8.
    "defaults": blocks("a-a") | SMALL | {"norm_eps": 0.1, "in_channels": 1, "out_channels": 1, "layers_per_block": 1},
    "bare": RELEASED | blocks("--") | {"sample_size": 8, "block_out_channels": [24, 40], "norm_num_groups": 8,
                                       "add_attention": False},
}  # fmt: skip
SCHEDULERS = {
    "released": {"num_train_timesteps": 1000, "variance_type": "fixed_large"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50, "prediction_type": "v_prediction"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_end": 0.03, "num_train_timesteps": 40},
    "betas": {"trained_betas": [0.1, 0.2, 0.4, 0.8], "num_train_timesteps": 4, "variance_type": "fixed_small_log"},
    "steep": {"beta_start": 0.01, "beta_end": 0.7, "num_train_timesteps": 5, "variance_type": "fixed_large"},
}
STEPS = 5


def saved(made: UNet2DModel | DDPMScheduler) -> str:
    """Return what diffusers writes as a config, without its version."""
    config = {name: value for name, value in made.config.items() if not name.startswith("_")}
    return json.dumps({"_class_name": type(made).__name__} | config)


@torch.no_grad()
def main() -> None:
    """Write the file."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arrays = {"t": np.array([0, 640])}
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            state = UNet2DModel(**config).state_dict()
        arrays |= {
            f"published/{name}/config": json.dumps({"_class_name": "UNet2DModel"} | config),
            f"published/{name}/shapes": json.dumps({key: tuple(value.shape) for key, value in state.items()}),
        }
    networks = {}
    for name, config in NETWORKS.items():
        networks[name] = network = UNet2DModel(**config).eval()
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        network.load_state_dict({key: torch.from_numpy(value) for key, value in random_weights(shapes).items()})
        x = normal(2, config["in_channels"], 8, 8) if "in_channels" in config else normal(2, 3, 8, 8)
        config = json.dumps({"_class_name": "UNet2DModel"} | config) if name != "bare" else saved(network)
        arrays |= {
            f"{name}/config": config,
            f"{name}/shapes": json.dumps(shapes),
            f"{name}/x": x.numpy(),
            f"{name}/out": network(x, torch.from_numpy(arrays["t"])).sample.numpy(),
        }
        print(name, sum(int(np.prod(shape)) for shape in shapes.values()), arrays[f"{name}/out"].std())
    for name, options in SCHEDULERS.items():
        scheduler = DDPMScheduler(**options)
        variances = [float(scheduler._get_variance(t)) for t in range(1, scheduler.config.num_train_timesteps)]
        if options.get("variance_type") == "fixed_small_log":  # of which it returns the standard deviation
            variances = [std**2 for std in variances]
        arrays |= {
            f"scheduler/{name}/config": saved(scheduler),
            f"scheduler/{name}/alpha_bar": scheduler.alphas_cumprod.numpy(),
            f"scheduler/{name}/variance": np.array(variances),
        }
    noises = normal(STEPS + 1, 2, 3, 8, 8)
    arrays["noises"] = noises.numpy()
    arrays["sampled"] = sampled(networks["released"], DDPMScheduler(**SCHEDULERS["steep"]), noises)
    print("sampled", arrays["sampled"].std())
    np.savez_compressed(OUT, **arrays)
    print(OUT.name, OUT.stat().st_size)


def sampled(network: UNet2DModel, scheduler: DDPMScheduler, noises: torch.Tensor) -> np.ndarray:
    """Return what DDPMPipeline samples from noises in place of random numbers, in [0, 1]."""
    import diffusers.pipelines.ddpm.pipeline_ddpm as pipeline
    import diffusers.schedulers.scheduling_ddpm as scheduling

    left = iter(noises)
    pipeline.randn_tensor = scheduling.randn_tensor = lambda *args, **options: next(left)
    run = DDPMPipeline(network, scheduler)
    run.set_progress_bar_config(disable=True)
    return run(batch_size=2, num_inference_steps=STEPS, output_type="np").images


if __name__ == "__main__":
    main()
