"""Reference implementations load what this package exports, and return what the committed files say.

    pip install -e '.[test,parity]' && pip install --no-deps -r tests/parity/requirements.txt
    python -m pytest tests/parity

The tests beside this directory compare with files, so that they need no torch; here the files are regenerated. Each
reference network gets its weights from a file that `export_*` wrote (strictly: names, shapes, nothing over), runs, and
has to return what it returned with the weights that were imported. Nothing is skipped: without a library this fails.
GLIDE, Karlo's original code, score_sde_pytorch and guided-diffusion's evaluator are on no package registry; their files
are made from a copy of their repositories.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import test_guided_loops  # noqa: E402
import test_interop_clip  # noqa: E402
import test_interop_ddpm  # noqa: E402
import test_interop_guided  # noqa: E402
import test_interop_karlo  # noqa: E402
import test_interop_stable_diffusion  # noqa: E402
from random_weights import random_weights  # noqa: E402
from run_maker import key  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from ddpm_jax.interop import ddpm, guided, karlo, stable_diffusion  # noqa: E402
from ddpm_jax.interop.clip import export_clip, load_clip  # noqa: E402
from ddpm_jax.interop.inception import export_inception, load_inception  # noqa: E402

DATA = HERE.parent / "data"


def shapes_in(file: str, name: str = "shapes") -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network that a committed file holds."""
    return json.loads(str(np.load(DATA / file)[name]))


def exported_guided() -> list:
    """Return (shapes, seed, exported tensors) of every network."""
    found = []
    for name, model in (test_interop_guided.MODELS | test_interop_guided.OTHERS).items():
        how = {"image_size": 16, "new_attention_order": name in ("new_order", "heads_up")}
        shapes = shapes_in("guided.npz", f"{name}/shapes")
        params = guided.load_guided(random_weights(shapes), model, **how)
        found.append((shapes, 0, guided.export_guided(params, model, **how)))
    return found


def exported_loops() -> list:
    """Return those of the sampling loops."""
    found = []
    for name, model in test_guided_loops.MODELS.items():
        shapes = shapes_in("guided_loops.npz", f"{name}/shapes")
        params = guided.load_guided(random_weights(shapes), model, image_size=16)
        found.append((shapes, 0, guided.export_guided(params, model, image_size=16)))
    return found


def exported_clip() -> list:
    """Return those of open_clip and of transformers."""
    found = []
    for dialect, heads in test_interop_clip.HEADS.items():
        shapes = shapes_in(f"clip/{dialect}_gelu.npz")
        clip = load_clip(random_weights(shapes), head_width=heads)
        found.append((shapes, 0, export_clip(clip.params, dialect)))
    return found


def exported_ddpm() -> list:
    """Return those of diffusers' UNet2DModel."""
    found = []
    for name in ("released", "defaults", "bare"):
        model, params, how = test_interop_ddpm.loaded(name)
        found.append((shapes_in("ddpm.npz", f"{name}/shapes"), 0, ddpm.export_ddpm(params, model, **how)))
    return found


def exported_inception() -> list:
    """Return that of torch-fidelity."""
    shapes = shapes_in("inception.npz")
    return [(shapes, 0, export_inception(load_inception(random_weights(shapes))))]


def exported_karlo() -> list:
    """Return those of diffusers' UnCLIP and of the towers that its pipelines have."""
    net, found = test_interop_karlo, []
    for part, heads in (("text", 8), ("vision", 16)):
        shapes = shapes_in("karlo.npz", f"shapes/{part}")
        clip = load_clip(random_weights(shapes), head_width=heads)
        found.append((shapes, 0, export_clip(clip.params, "hf")))
    shapes = {name: shapes_in("karlo.npz", f"shapes/{name}") for name in ("prior", "decoder", "text_proj", "upsampler")}
    found.append((shapes["prior"], 0, karlo.export_prior(karlo.load_prior(net.weights("prior"), heads=2))))
    params = karlo.load_decoder(net.weights("decoder"), net.weights("text_proj"), net.DECODER, image_size=16)
    unet, text_proj = karlo.export_decoder(params, net.DECODER, image_size=16)
    found += [(shapes["decoder"], 0, unet), (shapes["text_proj"], 0, text_proj)]
    for seed in (0, 1):
        params = karlo.load_upsampler(net.weights("upsampler", seed), net.UPSAMPLER, image_size=32)
        found.append((shapes["upsampler"], seed, karlo.export_upsampler(params, net.UPSAMPLER, image_size=32)))
    return found


def exported_stable_diffusion() -> list:
    """Return those of diffusers' Stable Diffusion."""
    net, sd = test_interop_stable_diffusion, stable_diffusion
    shapes = {name: shapes_in("stable_diffusion.npz", f"shapes/{name}") for name in ("autoencoder", "text")}
    params = sd.load_autoencoder(net.weights("autoencoder"), net.AUTOENCODER)
    found = [(shapes["autoencoder"], 0, sd.export_autoencoder(params, net.AUTOENCODER))]
    model, params = sd.load_text_encoder(net.weights("text"), head_width=8)
    found.append((shapes["text"], 0, sd.export_text_encoder(params, model)))
    for name in ("unet1", "unet2"):
        model = sd.unet_of(net.config(name))
        params = sd.load_unet(net.weights(name), model, context_width=24)
        exported = sd.export_unet(params, model, linear_projection=name == "unet2")
        found.append((shapes_in("stable_diffusion.npz", f"shapes/{name}"), 0, exported))
    return found


MAKERS = {
    "make_guided_files": (exported_guided, ["guided.npz"]),
    "make_guided_loops": (exported_loops, ["guided_loops.npz"]),
    "make_clip_files": (exported_clip, [f"clip/{d}_{a}.npz" for d in ("hf", "openai") for a in ("gelu", "quick_gelu")]),
    "make_ddpm_files": (exported_ddpm, ["ddpm.npz"]),
    "make_inception_files": (exported_inception, ["inception.npz"]),
    "make_karlo_files": (exported_karlo, ["karlo.npz"]),
    "make_stable_diffusion_files": (exported_stable_diffusion, ["stable_diffusion.npz"]),
    "make_clip_resnet_files": (None, ["clip_resnet.npz"]),  # loads its exports itself
    "make_published_diffusion": (None, ["published_diffusion.npz"]),  # no networks
    "make_evaluation_files": (None, ["evaluation.npz"]),  # no networks
}


@pytest.mark.parametrize("maker", MAKERS)
def test_the_reference_loads_our_export_and_returns_what_the_files_say(maker, tmp_path):
    export, files = MAKERS[maker]
    weights = "random"
    if export is not None:
        weights = tmp_path / "weights"
        weights.mkdir()
        for shapes, seed, tensors in export():
            contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
            save_file(contiguous, weights / f"{key(shapes, seed)}.safetensors")
    command = [sys.executable, HERE / "run_maker.py", maker, tmp_path, weights]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if export is not None:
        loaded = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("loaded ")}
        assert loaded == {path.name for path in weights.iterdir()}
    for name in files:
        now, then = np.load(tmp_path / name), np.load(DATA / name)
        assert set(now.files) == set(then.files)
        for array in then.files:
            if then[array].dtype.kind == "f":
                scale = max(1.0, np.abs(then[array]).max())
                # PyTorch's rounding differs between processors, and the steps of Karlo's whole pipeline enlarge it.
                atol = 2e-3 if (name, array) == ("karlo.npz", "pipeline/image") else 2e-5
                np.testing.assert_allclose(now[array], then[array], atol=atol * scale, err_msg=f"{name} {array}")
            else:
                np.testing.assert_array_equal(now[array], then[array], err_msg=f"{name} {array}")


def test_the_names_of_stable_diffusion_in_one_file(tmp_path):
    """Compare the names that diffusers' converter reads."""
    command = [sys.executable, HERE / "run_maker.py", "make_latent_diffusion_names", tmp_path, "random"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    name = "latent_diffusion_names.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((DATA / name).read_text())


def test_the_formats_of_torch(tmp_path):
    """Files of the installed torch are read as the committed ones."""
    from ddpm_jax.interop import read_tensors

    command = [sys.executable, HERE / "run_maker.py", "make_torch_files", tmp_path, "random"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    read = 0
    for file in sorted((DATA / "torch").iterdir()):
        if file.suffix in (".pt", ".pth", ".bin"):
            now, then = read_tensors(tmp_path / "torch" / file.name), read_tensors(file)
            assert set(now) == set(then)
            for name, array in then.items():
                np.testing.assert_array_equal(np.asarray(now[name], np.float64), np.asarray(array, np.float64))
            read += 1
    assert read >= 5
