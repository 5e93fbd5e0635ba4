"""DDPM's networks in diffusers' layout: diffusers' own outputs and samples, the released sizes, and the way back."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from random_networks import fast_jit
from random_weights import random_weights
from safetensors.numpy import load_file, save_file

from ddpm_jax import RecordedNoise, cli, convert
from ddpm_jax.interop import ReadError
from ddpm_jax.interop.ddpm import ddpm_of, ddpm_shapes, ddpm_table, diffusion_of, export_ddpm, load_ddpm, read_ddpm
from ddpm_jax.interop.diffusers_layout import OLD_NAMES
from ddpm_jax.interop.table import ConvertError, to_reference
from ddpm_jax.pipelines import Cascade, cascade, load
from ddpm_jax.storage.metadata import diffusion_from

REFERENCE = np.load(Path(__file__).parent / "data" / "ddpm.npz")
WEIGHTS = "diffusion_pytorch_model.safetensors"
DDPM = {"schedule": "linear", "num_steps": 1000, "prediction": "eps", "variance": "fixed_large"}


def text(name):
    return json.loads(str(REFERENCE[name]))


def weights(name):
    return random_weights(text(f"{name}/shapes"))


def loaded(name, tensors=None):
    """Return a network, its parameters, and what its export needs besides."""
    config = text(f"{name}/config")
    how = {"flip_sin_to_cos": config.get("flip_sin_to_cos", True)}
    model = ddpm_of(config)
    tensors = weights(name) if tensors is None else tensors
    return model, load_ddpm(tensors, model, **how, channels=config.get("in_channels", 3)), how


def same(one, other):
    assert set(one) == set(other)
    for name, array in other.items():
        assert one[name].shape == array.shape and one[name].dtype == array.dtype, name
        np.testing.assert_array_equal(one[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["released", "defaults", "bare"])
def test_the_outputs_equal_the_reference(name):
    """With the options of the released networks, with diffusers' defaults and eps=0.1, and without any attention."""
    model, params, how = loaded(name)
    fields = {
        "released": (1e-6, 1, True, 1, 16, (1,), True),
        "defaults": (0.1, 0, False, None, 16, (0, 2), True),
        "bare": (1e-6, 1, True, 1, 8, (), False),
    }
    assert fields[name] == (
        *(model.norm_eps, model.frequency_shift, model.pad_after, model.heads),
        *(model.groups, model.attention_levels, model.mid_attention),
    )
    x, theirs = (jnp.asarray(REFERENCE[f"{name}/{key}"].transpose(0, 2, 3, 1)) for key in ("x", "out"))
    with jax.default_matmul_precision("highest"):
        ours = fast_jit(lambda params: model.apply({"params": params}, x, REFERENCE["t"]))(params)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    same(export_ddpm(params, model, **how), weights(name))


def test_the_old_names_of_attention():
    old, reference = {}, weights("defaults")
    for name, array in reference.items():
        for before, now in OLD_NAMES.items():
            name = name.replace(f".{now}.", f".{before}.")
        old[name] = array
    assert len(set(old) - set(reference)) == 8 * (2 + 1 + 4)  # one of a level on the way down, two on the way up
    model, params, how = loaded("defaults", old)
    same(export_ddpm(params, model, **how), reference)


@pytest.mark.parametrize("name,millions", [("cifar10-32", 35.7), ("celebahq-256", 113.7)])
def test_the_released_networks(name, millions):
    """Names, shapes and count of google/ddpm-NAME, whose sizes are those of the paper (section 4, appendix B)."""
    config = text(f"published/{name}/config")
    model = ddpm_of(config)
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), ddpm_shapes(model))
    tensors = to_reference(ddpm_table(model, False), params, np.int8)
    assert {key: list(array.shape) for key, array in tensors.items()} == text(f"published/{name}/shapes")
    assert sum(array.size for array in tensors.values()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert (model.channels, model.heads, config["sample_size"]) == (128, 1, int(name.split("-")[1]))


@pytest.mark.parametrize("name", ["released", "cosine", "scaled", "betas", "steep"])
def test_the_schedulers(name):
    """alpha_bar and the variance of the reverse steps; theirs are float32."""
    fields = diffusion_of(text(f"scheduler/{name}/config"))
    diffusion = diffusion_from(json.loads(json.dumps(fields)))
    if name == "released":
        assert fields == DDPM
    process = diffusion.process
    np.testing.assert_allclose(process.alpha_bar, REFERENCE[f"scheduler/{name}/alpha_bar"], rtol=2e-4, atol=1e-7)
    large = diffusion.variance == "fixed_large"
    variance = process.betas if large else process.posterior_variance
    np.testing.assert_allclose(variance[1:], REFERENCE[f"scheduler/{name}/variance"], rtol=2e-3)


def directory(path, name="released", layout="pipeline", scheduler="released", config=(), **options):
    """Write a directory as diffusers saves it; of layout "pipeline", "flat" (its first releases) or "network"."""
    unet = path / "unet" if layout == "pipeline" else path
    where = path / "scheduler" if layout == "pipeline" else path
    for place in {unet, where}:
        place.mkdir(parents=True, exist_ok=True)
    save_file(weights(name), unet / WEIGHTS)
    (unet / "config.json").write_text(json.dumps(text(f"{name}/config") | dict(config)))
    if layout != "network":
        given = text(f"scheduler/{scheduler}/config") | options
        (where / "scheduler_config.json").write_text(json.dumps(given))
        parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        (path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"} | parts))
    return path


def run(program, capsys, **flags):
    """Run a command in this process and return what it printed."""
    program.FLAGS.unparse_flags()
    for name in set(program.FLAGS) & {"from", "to", "src", "out", "part", "workdir", "num_images", "steps"}:
        program.FLAGS[name].value = None
    program.FLAGS(["program", *(f"--{name.rstrip('_')}={value}" for name, value in flags.items())])
    program.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("layout", ["pipeline", "flat", "network"])
def test_a_directory_there_and_back(tmp_path, capsys, layout):
    source = directory(tmp_path / "source", layout=layout)
    printed = run(convert, capsys, from_="ddpm", src=source, out=tmp_path / "ours")
    assert "| model | UNet | 1,334,387 |" in printed
    ours = load(tmp_path / "ours")
    alone = layout == "network"
    assert ours.diffusion == diffusion_from(DDPM | {"variance": "fixed_small" if alone else "fixed_large"})
    assert ("- diffusion: that of Ho et al. (2020), since there is no scheduler" in printed) == alone
    assert (ours.metadata["image_size"], ours.metadata["channels"], ours.metadata["conditions"]) == (8, 3, ())
    assert ours.network == ddpm_of(text("released/config"))
    jax.tree.map(np.testing.assert_array_equal, ours.params["params"], loaded("released")[1])
    run(convert, capsys, to="ddpm", src=tmp_path / "ours", out=tmp_path / "back")
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert files == {str(path.relative_to(tmp_path / "back")) for path in (tmp_path / "back").rglob("*.*")}
    for name in files:
        one, other = source / name, tmp_path / "back" / name
        if name.endswith(".json"):
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        else:
            same(load_file(other), load_file(one))


def test_the_samples_are_those_of_the_pipeline(tmp_path, capsys, monkeypatch):
    """All five steps of a scheduler from recorded noise; and from the command line."""
    source = directory(tmp_path / "source", scheduler="steep")
    run(convert, capsys, from_="ddpm", src=source, out=tmp_path / "ours")
    monkeypatch.setattr(cascade, "_generate", fast_jit(cascade._generate.__wrapped__))
    program = importlib.import_module("ddpm_jax.sample")
    run(program, capsys, workdir=tmp_path / "ours", num_images=2, out=tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert np.asarray(grid).std() > 1
    pipeline = Cascade(load(tmp_path / "ours")).checked()
    # No noise leads into the data, and theirs is not even drawn.
    noise = jnp.asarray(REFERENCE["noises"].transpose(1, 0, 3, 4, 2))
    with jax.default_matmul_precision("highest"):
        ours = fast_jit(lambda pipeline: pipeline.sample_base(RecordedNoise(noise)))(pipeline)
    theirs = REFERENCE["sampled"]
    assert theirs.std() > 0.1
    np.testing.assert_allclose(np.clip(ours / 2 + 0.5, 0, 1), theirs, atol=2e-5)


def test_what_is_not_supported_is_refused():
    config = text("released/config")
    for changes, message in (
        ({"norm_epsilon": 1e-6}, r"it has norm_epsilon=1e-06 \(unknown field\)"),
        ({"act_fn": "gelu"}, "it has act_fn='gelu' .supported: 'silu' or 'swish'"),
        ({"num_class_embeds": 10}, "it has num_class_embeds=10 .supported: None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "it has resnet_time_scale_shift='scale_shift'"),
        ({"time_embedding_type": "fourier"}, "it has time_embedding_type='fourier'"),
        ({"freq_shift": 2}, "it has freq_shift=2 .supported: 0 or 1"),
        ({"downsample_padding": 2}, "it has downsample_padding=2"),
        ({"_class_name": "UNet2DConditionModel"}, "it has _class_name='UNet2DConditionModel'"),
        ({"block_out_channels": 32}, "it has block_out_channels=32 .it must be a list of whole numbers"),
        ({"block_out_channels": [32, 40, 64]}, r"norm_num_groups=16 must divide block_out_channels=\[32, 40, 64\]"),
        ({"attention_head_dim": 9}, r"attention_head_dim=9 must divide the widths with attention, \[48, 64\]"),
        ({"out_channels": 6}, "it has in_channels=3 and out_channels=6, which must be equal"),
        ({"down_block_types": ["SkipDownBlock2D"] * 3}, "it has down_block_types=.'SkipDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "it has up_block_types=.'UpBlock2D'"),
    ):
        with pytest.raises(ConvertError, match=f"^the network is not one of DDPM's that is supported: {message}"):
            ddpm_of(config | changes)
    config = text("scheduler/released/config")
    for changes, message in (
        ({"beta_schedule": "sigmoid"}, "it has beta_schedule='sigmoid' .supported: linear, scaled_linear, squared"),
        ({"variance_type": "learned_range"}, "it has variance_type='learned_range' .supported: fixed_small, "),
        ({"prediction_type": "flow"}, "it has prediction_type='flow' .supported: epsilon, v_prediction, sample"),
        ({"clip_sample": False}, "it has clip_sample=False .supported: True"),
        ({"thresholding": True}, "it has thresholding=True"),
        ({"rescale_betas_zero_snr": True}, "it has rescale_betas_zero_snr=True"),
        ({"_class_name": "EDMEulerScheduler"}, "it has _class_name='EDMEulerScheduler'"),
        ({"beta_end": 1.5}, "its betas do not fit: "),
        ({"trained_betas": [0.1]}, "its betas do not fit: schedule has 1 betas, and num_steps=1000"),
        ({"trained_betas": 7}, "its betas do not fit: "),
        ({"sigma": 7}, r"it has sigma=7 \(unknown field\)"),
    ):
        with pytest.raises(ConvertError, match=f"^the scheduler is not supported: {message}"):
            diffusion_of(config | changes)


def test_files_that_do_not_fit_are_refused(tmp_path, capsys):
    flags = {"from_": "ddpm", "src": directory(tmp_path / "source"), "out": tmp_path / "ours"}
    for change, kind, message in (
        ({"part": "ema"}, cli.UsageError, "--part=ema is not used: --from=ddpm has no such option; it has none"),
        ({"src": tmp_path / "source" / "unet" / WEIGHTS}, ReadError, "is not a directory; ddpm is read from a dir"),
        ({"src": tmp_path}, ReadError, "cannot be read as a part of ddpm"),
    ):
        with pytest.raises(kind, match=message):
            run(convert, capsys, **(flags | change))
    assert not (tmp_path / "ours").exists()
    deeper = {"layers_per_block": 3}
    with pytest.raises(ConvertError, match="the file does not fit: it lacks down_blocks.0.resnets.2"):
        read_ddpm(directory(tmp_path / "deeper", config=deeper))
    with pytest.raises(ConvertError, match="sample_size=10, which must be a multiple of 4"):
        read_ddpm(directory(tmp_path / "odd", config={"sample_size": 10}))
    (tmp_path / "source" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ReadError, match="scheduler cannot be read as a part of ddpm"):
        read_ddpm(tmp_path / "source")
