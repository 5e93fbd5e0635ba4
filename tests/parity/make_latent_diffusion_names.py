"""Write tests/data/latent_diffusion_names.json: original names of Stable Diffusion's tensors, as diffusers reads them.

    pip install torch "diffusers==0.42.*" transformers
    python tests/parity/make_latent_diffusion_names.py

For test_interop_latent_diffusion.py. Diffusers' converter of single files gets tensors that are numbered by their
names, and what it makes of each says which name it was read from. A name that it does not know gets lost there, which
is an error here.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

sys.path.append(str(Path(__file__).parent.parent))
from make_stable_diffusion_files import AUTOENCODER, UNETS

from ddpm_jax.interop import latent_diffusion, stable_diffusion
from ddpm_jax.models.autoencoder import Autoencoder

OUT = Path(__file__).parent.parent / "data" / "latent_diffusion_names.json"


def main() -> None:
    """Write the file."""
    found = {}
    for name, options in UNETS.items():
        reference = UNet2DConditionModel(**options)
        names = latent_diffusion.unet_names(stable_diffusion.unet_of(reference.config))
        convert = lambda tensors, reference=reference: convert_ldm_unet_checkpoint(tensors, reference.config)
        found[name] = read_back(names, "model.diffusion_model.", convert, reference)
    reference = AutoencoderKL(**AUTOENCODER)
    model = stable_diffusion.autoencoder_of(reference.config)
    assert isinstance(model, Autoencoder)
    names = latent_diffusion.autoencoder_names(model)
    convert = lambda tensors: convert_ldm_vae_checkpoint(tensors, reference.config)
    found["autoencoder"] = read_back(names, "first_stage_model.", convert, reference)
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(OUT.name, {name: len(read) for name, read in found.items()}, OUT.stat().st_size)


def read_back(names: dict[str, str], prefix: str, convert, reference: torch.nn.Module) -> dict[str, str]:
    """Return the original name that each of diffusers' names is read from."""
    shapes = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    originals = sorted(names.values())
    number = {original: i for i, original in enumerate(originals)}
    tensors = {}
    for name, original in names.items():
        shape = shapes[name]
        if ".attn_1." in original and len(shape) == 2:
            shape = (*shape, 1, 1)  # convolutions of width one in the original
        tensors[prefix + original] = torch.full(shape, float(number[original]), dtype=torch.float64)
    made = convert(tensors)
    assert {name: tuple(value.shape) for name, value in made.items()} == shapes
    return {name: originals[int(np.unique(value.numpy()).item())] for name, value in made.items()}


if __name__ == "__main__":
    main()
