"""Stable Diffusion in one file: the names that diffusers' converter reads, and the way back."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import test_interop_stable_diffusion as parts
from safetensors.numpy import save_file

from ddpm_jax.interop import ReadError, latent_diffusion, read_tensors, stable_diffusion
from ddpm_jax.interop.table import ConvertError, to_reference
from ddpm_jax.pipelines.stable_diffusion import StableDiffusion, open_stable_diffusion

NAMES = json.loads((Path(__file__).parent / "data" / "latent_diffusion_names.json").read_text())


@pytest.mark.parametrize("name", ["unet1", "unet2", "autoencoder"])
def test_the_names_are_those_that_diffusers_reads(name):
    if name == "autoencoder":
        ours = latent_diffusion.autoencoder_names(parts.AUTOENCODER)
    else:
        ours = latent_diffusion.unet_names(stable_diffusion.unet_of(parts.config(name)))
    assert ours == NAMES[name]


def write(path, second=False):
    """Write a file of tiny networks, by the recorded names; of version 2 with open_clip's text tower."""
    unet, flat = parts.weights("unet2" if second else "unet1"), parts.weights("autoencoder")
    tensors = {f"model.diffusion_model.{NAMES['unet1'][name]}": array for name, array in unet.items()}
    for name, array in flat.items():
        original = NAMES["autoencoder"][name]
        array = array[..., None, None] if ".attn_1." in original and array.ndim == 2 else array
        tensors[f"first_stage_model.{original}"] = array
    if second:
        _, params = stable_diffusion.load_text_encoder(parts.weights("text"), head_width=8)
        text = to_reference(stable_diffusion.text_encoder_table(2, "openai"), params)
        text |= {"text_projection": np.zeros((24, 24), np.float32), "logit_scale": np.zeros((), np.float32)}
        tensors |= {f"cond_stage_model.model.{name}": array for name, array in text.items()}
    else:
        tensors |= {f"cond_stage_model.transformer.{name}": array for name, array in parts.weights("text").items()}
    noise = {"betas": np.zeros(1000, np.float32), "model_ema.decay": np.zeros((), np.float32)}
    save_file({f"state_dict.{name}": array for name, array in (tensors | noise).items()}, path)
    return tensors


def read(path, **options):
    unet = stable_diffusion.unet_of(parts.config(options.pop("unet", "unet1")))
    return latent_diffusion.read_stable_diffusion_file(
        path, image_size=16, unet=unet, autoencoder=parts.AUTOENCODER, head_width=8, **options
    )


def test_a_file_of_version_1(tmp_path):
    """It is the pipeline that the directory is, and goes back to the file's tensors."""
    tensors = write(tmp_path / "model.safetensors")
    file = read(tmp_path / "model.safetensors")
    ours = StableDiffusion.from_converted(file)
    directory = open_stable_diffusion(parts.directory(tmp_path / "directory"))
    jax.tree.map(np.testing.assert_array_equal, ours.params, directory.params)
    np.testing.assert_array_equal(ours.process.betas, directory.process.betas)
    assert (ours.prediction, ours.latent_size, ours.tokenizer.pad) == ("eps", 8, ours.tokenizer.eot)
    assert ours.text == directory.text
    parts.same(latent_diffusion.export_stable_diffusion_file(file), tensors)


def test_a_file_of_version_2(tmp_path):
    """Its text encoder is open_clip's without the last layer, and its projections are dense layers."""
    tensors = write(tmp_path / "model.safetensors", second=True)
    ours = read(tmp_path / "model.safetensors", unet="unet2", prediction="v")
    text = ours.models["text"]
    assert (ours.metadata["prediction"], ours.metadata["tokenizer"]["pad"], text.layers) == ("v", 0, 1)
    model, whole = stable_diffusion.load_text_encoder(parts.weights("text"), head_width=8, activation="gelu")
    assert model.layers == 2 and text == model.copy(layers=1)
    del whole["transformer"]["block_1"]
    jax.tree.map(np.testing.assert_array_equal, ours.params["text"], whole)
    back = latent_diffusion.export_stable_diffusion_file(ours)
    left = set(tensors) - set(back)
    assert set(back) <= set(tensors) and all(
        name.endswith(("text_projection", "logit_scale")) or ".resblocks.1." in name for name in left
    )
    for name, array in back.items():
        np.testing.assert_array_equal(array, tensors[name], err_msg=name)
    save_file(back, tmp_path / "back.safetensors")
    again = read(tmp_path / "back.safetensors", unet="unet2", prediction="v")
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


def test_what_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path)
    tensors = latent_diffusion.state_dict(read_tensors(path))
    for change, message in (
        ({"strange.weight": np.zeros(3, np.float32)}, "not of Stable Diffusion 1 or 2: it has strange.weight"),
        ({"model.diffusion_model.extra": np.zeros(3, np.float32)}, "it has, unknown to this network, extra"),
    ):
        save_file({name: np.array(array) for name, array in (tensors | change).items()}, tmp_path / "bad.safetensors")
        with pytest.raises(ConvertError, match=message):
            read(tmp_path / "bad.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ConvertError, match=r"it lacks model\.diffusion_model\., first_stage_model\., cond_stage_model\."
    ):
        read(tmp_path / "other.safetensors")
    with pytest.raises(ReadError, match="does not exist"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match='prediction=\'x0\' must be "eps" or "v"'):
        read(path, prediction="x0")
    with pytest.raises(ValueError, match="image_size=500 must be a multiple of 64"):
        latent_diffusion.read_stable_diffusion_file(path, image_size=500)


@pytest.mark.parametrize("channels,use", [(9, ", as U-Nets for inpainting do"), (5, ", as .* depth do"), (7, "")])
def test_a_file_with_other_channels_is_refused_when_it_is_opened(tmp_path, channels, use):
    tensors = write(tmp_path / "model.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = np.zeros((32, channels, 3, 3), np.float32)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ConvertError, match=f"it sees in_channels={channels} channels{use}, and supported are the 4 of"):
        read(tmp_path / "other.safetensors")
