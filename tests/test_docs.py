"""Every Python block of the README and of docs/ runs as it stands, in order, after its page's earlier blocks."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import test_interop_karlo as karlo
import test_interop_stable_diffusion as stable_diffusion
import tiny_pipelines
from image_files import pixels, write
from programs import compile_manipulations_quickly
from random_networks import fast_jit
from random_weights import random_weights
from safetensors.numpy import save_file

from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.tokenizer import ClipTokenizer
from ddpm_jax.pipelines import cascade, directory, load, save, unclip
from ddpm_jax.pipelines import karlo as karlo_pipeline
from ddpm_jax.pipelines import stable_diffusion as stable_diffusion_pipeline

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Return the Python blocks of a page, each after as many empty lines as make tracebacks name the page's line."""
    text = (ROOT / page).read_text()
    return ["\n" * text.count("\n", 0, block.start(1)) + block[1] for block in BLOCK.finditer(text)]


TOKENS, LENGTH = ClipTokenizer.vocab_size, 77
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def run(page):
    """Return the names that a page's blocks leave behind."""
    names = {"__name__": page}
    for code in blocks(page):
        with jax.numpy_rank_promotion("allow"):  # a user's own network may broadcast
            exec(compile(code, str(ROOT / page), "exec"), names)
    return names


def test_the_readme():
    (code,) = blocks("README.md")
    assert run("README.md")["x0"].shape == (16, 2)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14


def test_the_samplers():
    """Both networks are exact for data of deviation 1, which a few steps miss by some hundredths."""
    names = run("docs/samplers.md")
    for x0 in (names["x0"], names["x0_edm"]):
        assert x0.shape == (16, 16, 16, 3) and abs(np.std(x0) - 1.0) < 0.1


def test_the_design():
    names = run("docs/design.md")
    assert names["state"].step == 2 and names["metrics"]["finite"]
    assert names["images"].shape == (8, 16, 16, 3) and np.isfinite(names["images"]).all()


def test_the_checkpoints(tmp_path, monkeypatch):
    """The files that the page names are there, of tiny networks with random weights."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for module in (karlo_pipeline, stable_diffusion_pipeline):
        generate = fast_jit(module._generate.__wrapped__)
        monkeypatch.setattr(module, "_generate", generate)
    names = run("docs/checkpoints.md")
    assert names["z_text"].shape == (1, 24) and np.isfinite(names["z_text"]).all()
    assert names["others"].shape == (1, 32, 32, 3) and names["images"].shape == (1, 16, 16, 3)


def test_the_pipelines(tmp_path, monkeypatch):
    """The directories that the page names are there, of tiny networks with random weights."""
    save(tiny_pipelines.unclip(), tmp_path / "bundled")
    save(tiny_pipelines.cascade("labels", guided=True), tmp_path / "runs" / "adm")
    save(tiny_pipelines.cascade(), tmp_path / "runs" / "ddpm")
    save(tiny_pipelines.cascade("guided"), tmp_path / "runs" / "guided")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(directory, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setattr(cascade, "_generate", fast_jit(cascade._generate.__wrapped__))
    static = ("embedding", "use_text", "low_res")
    monkeypatch.setattr(unclip, "_generate", fast_jit(unclip._generate.__wrapped__, static_argnames=static))
    names = run("docs/pipelines.md")
    assert names["images"].shape == names["again"].shape == (1, 16, 16, 3)
    assert names["cats"].shape == (2, 8, 8, 3) and names["eps"].shape == (1, 8, 8, 3)
    assert len(np.unique(names["images_of_scales"].reshape(3, -1), axis=0)) == 3
    assert load("cascade").sampling["base"].steps == 50


def write_files(place):
    sizes = {32: 64, 48: 64, 96: 192, 144: 192, 128: 256, 192: 256, 16: LENGTH}  # one head of 64 channels in a layer
    file = np.load(Path(__file__).parent / "data" / "clip" / "openai_gelu.npz")
    shapes = {name: [sizes.get(n, n) for n in shape] for name, shape in json.loads(str(file["shapes"])).items()}
    save_file(random_weights(shapes | {"token_embedding.weight": [TOKENS, 64]}), place / "ViT-L-14.pt")
    both, variations = place / "karlo-v1-alpha", place / "karlo-v1-alpha-image-variations"
    karlo.write_directory(both)
    text = json.loads(str(karlo.REFERENCE["shapes/text"])) | words("text_model.embeddings", 32)
    save_file(random_weights(text), both / "text_encoder" / "model.safetensors")
    describe(both / "text_encoder", max_position_embeddings=LENGTH, vocab_size=TOKENS)
    prior = json.loads(str(karlo.REFERENCE["shapes/prior"]))
    prior["positional_embedding"][1] = LENGTH + 4
    save_file(random_weights(prior), both / "prior" / "diffusion_pytorch_model.safetensors")
    describe(both / "prior", num_embeddings=LENGTH)
    shutil.copytree(both, variations)
    shutil.rmtree(variations / "prior")
    opened = stable_diffusion.directory(place / "stable-diffusion-v1-5")
    text = json.loads(str(stable_diffusion.REFERENCE["shapes/text"])) | words("text_model.embeddings", 24)
    save_file(random_weights(text), opened / "text_encoder" / "diffusion_pytorch_model.safetensors")
    describe(opened / "text_encoder", max_position_embeddings=LENGTH, vocab_size=TOKENS)


def describe(part, **sizes):
    """Write the sizes of a part's weights into its config."""
    file = part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))


def words(name, width):
    """Return the shapes of embeddings of CLIP's whole vocabulary."""
    return {f"{name}.token_embedding.weight": [TOKENS, width], f"{name}.position_embedding.weight": [LENGTH, width]}


def test_links_and_images_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, image in enumerate(pixels(20, low=40, high=90)):
        write(f"photos/{('cat', 'dog')[number % 2]}/{number:03d}.png", image)
    names = run("docs/data.md")
    assert len(names["train"]) == 18 and len(names["validation"]) == 2 and names["source"].class_names == ("cat", "dog")
    assert names["batch"]["image"].shape == (8, 64, 64, 3) and names["batch"]["label"].dtype == np.int32
    assert len(names["prepared"]) == 20 and set(names["prepared"][3]) == {"image", "label"}
    assert names["summary"].records == 20 and not names["summary"].skipped
    assert names["digits"][13]["label"] == 3 and names["digits"][13]["image"].shape == (28, 28, 3)
    batch = next(make_loader(names["Squares"](), batch_size=8, seed=0))
    assert batch["image"].shape == (8, 64, 64, 3) and batch["label"].dtype == np.int32


def test_no_page_with_python_blocks_is_forgotten():
    ran = re.findall(r"run\(\"(.*)\"\)", Path(__file__).read_text())
    assert sorted(ran) == sorted(page for page in PAGES if blocks(page))


def test_the_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("docs/training.md")
    assert names["samples"].shape == (4, 16, 16, 3) and names["samples"].dtype == np.uint8
    (stage,) = names["stages"](names["get_config"]())
    assert stage.name == "base" and stage.training.num_steps == 2


def test_the_manipulations(tmp_path, monkeypatch):
    """The bundled pipeline is a tiny one with random weights, and the image is noise."""
    save(tiny_pipelines.unclip(), tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(directory, "BUNDLED", tmp_path / "bundled")
    write("photo.png", pixels(1, low=40, high=90)[0])
    compile_manipulations_quickly(monkeypatch)
    names = run("docs/manipulations.md")
    assert names["latent"].z_image.shape == (1, 16) and names["latent"].x_T.shape == (1, 8, 8, 3)
    assert names["others"].shape == names["changed"].shape == (1, 2, 16, 16, 3)
