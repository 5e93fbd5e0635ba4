"""Configs: every variant is plain data, builds, and takes a step; the full-size one has the size that it documents."""

import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal, random_params

from ddpm_jax import build
from ddpm_jax.models.clip import normalize
from ddpm_jax.pipelines import stages
from ddpm_jax.train import plain
from ddpm_jax.training import run
from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import make_train_step
from ddpm_jax.training.tasks import ClipTask, UpsamplerTask

CONFIGS = Path(__file__).parents[1] / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = {name: load(name) for name in ("shapes", "unclip")}
EVERY = [(name, variant) for name, module in FILES.items() for variant in module.VARIANTS]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def make_tasks(config, clip_params):
    """The tasks as a run makes them. `clip_params` may be any tree where nothing is computed."""
    own = run._Run(config, Path("unused"), build.make_tokenizer(config))
    return {
        "clip": ClipTask(own.clip),
        "prior": run._prior_task(own, clip_params),
        "decoder": run._decoder_task(own, clip_params),
        "upsampler": run._upsampler_task(own),
    }


@pytest.mark.parametrize("name,variant", EVERY)
def test_a_variant_is_plain_data_and_describes_networks_that_can_be_built(name, variant):
    config = plain(FILES[name].get_config(variant).to_dict())
    assert json.loads(json.dumps(config)) == config
    build.check_config(config)
    for stage in build.STAGES:
        build.make_stage_optimizer(config[stage])
    for resolution in (
        config["clip"]["image_size"],
        config["decoder"]["image_size"],
        config["upsampler"]["image_size"],
    ):
        build.make_source(config, resolution=resolution)


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_variant_is_named_and_every_config_has_the_same_fields(name):
    with pytest.raises(ValueError, match="variant must be one of '', .*'huge'"):
        FILES[name].get_config("huge")

    def fields(config):
        # What may be None in one config and a part of its own in the other.
        parts = {path: value for path, value in config.items() if path not in ("text_encoder", "weighting")}
        return {path: fields(value) if isinstance(value, dict) else None for path, value in parts.items()}

    ours, reference = fields(FILES[name].get_config().to_dict()), fields(FILES["shapes"].get_config().to_dict())
    assert ours == reference


def test_word_vectors_without_a_text_encoder_are_refused_by_name():
    config = plain(FILES["shapes"].get_config("smoke").to_dict())
    config["decoder"]["text_encoder"] = None
    with pytest.raises(ValueError, match="decoder: word_vectors=True needs a text_encoder"):
        build.check_config(config)


@pytest.mark.parametrize("name", ["unclip"])  # test_cli.py trains the other one
def test_smoke_takes_a_train_step_of_every_stage(name):
    config = plain(FILES[name].get_config("smoke").to_dict())
    for task in make_tasks(config, {}).values():
        jax.eval_shape(task.init, jax.random.key(0))
    # One level of one block for the step itself: compiling is what takes the time.
    for stage in ("decoder", "upsampler"):
        config[stage] |= {"channel_mult": [1], "num_res_blocks": 1}
    config["decoder"]["attention_resolutions"] = [config["decoder"]["image_size"] // config["decoder"]["patch"]]
    tokenizer = build.make_tokenizer(config)
    rng = np.random.default_rng(0)
    tokens, mask = tokenizer(["a red circle", "a blue star"], config["text"]["length"])
    picture = lambda size: rng.integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    text = {"tokens": tokens, "mask": mask}
    tasks = make_tasks(config, random_params(make_tasks(config, {})["clip"].init))
    images = picture(config["clip"]["image_size"])
    embeddings = {name: normalize(normal(1, 2, config["clip"]["embed_dim"])) for name in ("z_image", "z_text")}
    batches = {
        "clip": text | {"image": images},
        "prior": text | embeddings,
        "decoder": text | embeddings | {"image": picture(config["decoder"]["image_size"])},
        "upsampler": {"image": picture(config["upsampler"]["crop"])},
    }
    for stage, task in tasks.items():
        tx, schedule = build.make_stage_optimizer(config[stage])
        params = random_params(task.init)

        def train_once(params, batch, key, task=task, tx=tx, schedule=schedule):
            batch = batch if task.frozen is None else task.prepare(task.frozen, batch)
            state = TrainState(jnp.zeros((), jnp.int32), params, params, tx.init(params))
            return make_train_step(task, tx, ema_decay=0.9, schedule=schedule)(state, batch, key)[1]

        metrics = fast_jit(train_once)(params, batches[stage], jax.random.key(1))
        assert metrics["finite"] and metrics["grad_norm"] > 0, stage


def documented():
    """The table of the docstring: name -> (millions here, the paper's or None)."""
    rows = re.findall(r"^    (CLIP|\w[\w\d ,>-]*?) {2,}([\d.]+)   (-|[\d.]+[BM])(?: |$)", FILES["unclip"].__doc__, re.M)
    units = {"B": 1e9, "M": 1e6}
    return {
        name: (float(here) * 1e6, None if paper == "-" else float(paper[:-1]) * units[paper[-1]])
        for name, here, paper in rows
    }


def test_the_full_size_config_has_the_parameters_that_its_docstring_says_and_the_papers():
    module = FILES["unclip"]
    config = plain(module.get_config().to_dict())
    assert build.make_tokenizer(config).vocab_size == 49408
    tasks = make_tasks(config, {})
    fields = module.upsampler_1024()
    tasks["second"] = UpsamplerTask(
        build.make_upsampler({"upsampler": fields}),
        build.make_stage_process(fields),
        sampling=stages.Sampling("15", 0.0),
        **{name: fields[name] for name in ("image_size", "low_size", "kind", "blur_sigma", "blur_rate", "noise")},
    )
    shapes = {name: jax.eval_shape(task.init, jax.random.key(0)) for name, task in tasks.items()}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    sizes = {name: count(tree) for name, tree in shapes.items()}
    rows = {
        "CLIP": sizes["clip"],
        "diffusion prior": sizes["prior"],
        "decoder, 64 x 64": sizes["decoder"],
        "upsampler, 64 -> 256": sizes["upsampler"],
        "upsampler, 256 -> 1024": sizes["second"],
    }
    table = documented()
    assert set(table) == set(rows)
    for name, size in rows.items():
        here, paper = table[name]
        assert abs(size - here) <= 0.05e6, name
        if name == "diffusion prior":
            assert round(size / 1e9) == 1  # all that "1B" says
        elif paper is not None:
            assert abs(size / paper - 1) < 0.15, name
    assert f"{count(shapes['decoder']['params']['text_encoder']) / 1e6:.1f}" in module.__doc__


def test_the_full_size_transformers_have_the_parameters_of_their_closed_form():
    """A pre-norm block of width w has 12 w^2 + 13 w: qkv, out, two layers of the MLP with biases, two norms."""
    config = plain(FILES["unclip"].get_config().to_dict())
    block = lambda w: 12 * w * w + 13 * w
    tower = lambda w, n: 49408 * w + 77 * w + n * block(w) + 2 * w
    shapes = jax.eval_shape(ClipTask(build.make_clip(config, 49408)).init, jax.random.key(0))["params"]
    assert count(shapes["text"]) == tower(1024, 24)
    positions = (256 // 16) ** 2 + 1
    # patches without bias, class token, positions, norms before and after the blocks
    assert count(shapes["vision"]) == (3 * 16 * 16 + 1 + positions) * 1280 + 4 * 1280 + 32 * block(1280)
    assert count(shapes["image_projection"]) + count(shapes["text_projection"]) == (1280 + 1024) * 1024
    prior = jax.eval_shape(make_tasks(config, {})["prior"].init, jax.random.key(0))["params"]
    assert count(prior["transformer"]) == 24 * block(2048)
    assert prior["position"].shape == (77 + 4, 2048)
