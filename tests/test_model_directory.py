"""Model directories: what is written comes back, and every field of a file is checked before anything is built."""

import json
import shutil
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_networks import fast_jit, normal, random_params

import ddpm_jax
from ddpm_jax.errors import LoadError
from ddpm_jax.models.clip import CLIP, VisionTransformer
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import RecurrentTextEncoder, TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.storage import network_check, networks
from ddpm_jax.storage.checkpoint import Checkpoints
from ddpm_jax.storage.fingerprint import tree_fingerprint
from ddpm_jax.storage.model_directory import Model, open_model, save_model, write_description
from ddpm_jax.training.state import TrainState

PRIOR = DiffusionPrior(8, 4, 16, 2, 2, text_encoder=TextEncoder(11, 4, 8, 1, 2))
UNET = UNet(8, 6, (1, 2), 1, (2,), groups=4, head_channels=8)
METADATA = {
    "diffusion": {"schedule": "cosine", "num_steps": 100, "prediction": "x0", "variance": "fixed_small"},
    "embedding": {"scale": 4.3, "size": 8},
    "conditions": ["caption"],
    "caption": {"length": 4, "own_tokens": True},
    "needs": {"clip": "0" * 64},
}


def prior_inputs():
    return normal(0, 2, 8), jnp.array([3, 50]), normal(1, 2, 8), jnp.array([[1, 5, 2, 0]] * 2), jnp.ones((2, 4), bool)


def prior():
    return Model(random_params(PRIOR.init, *prior_inputs()), PRIOR, network_metadata())


def network_metadata():
    from ddpm_jax.storage.metadata import freeze

    return freeze(METADATA)


def equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_fields_that_were_renamed_are_read():
    decoder = Decoder(
        UNET, 8, 4, word_vectors=11, cond_map_channels=3, cond_map_heads=2, text_encoder=PRIOR.text_encoder
    )
    described = networks.describe(decoder)
    older = {name.replace("cond_map", "layout"): value for name, value in described.items()}
    assert "layout_heads" in older and networks.build(older) == networks.build(described) == decoder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "prior"
    save_model(prior(), place)
    return place


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A stage as training leaves it: the averaged parameters are twice the raw ones."""
    place, params = tmp_path_factory.mktemp("run") / "prior", prior().params
    write_description(place, {"model": PRIOR}, METADATA)
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, twice, optax.sgd(0.1).init(params))
    checkpoints = Checkpoints(place)
    checkpoints.save(state.trees(), step=3, data={}, config={}, version="0.1.0", stage="prior")
    checkpoints.close()
    return place


def test_a_model_comes_back_bit_for_bit(directory):
    ours, theirs = prior(), open_model(directory)
    equal(ours.params, theirs.params)
    assert theirs.network == PRIOR and theirs.metadata == ours.metadata and theirs.family == "ddpm_jax"
    assert theirs.diffusion.process.num_steps == 100 and theirs.diffusion.prediction == "x0"
    assert tree_fingerprint(ours.params) == tree_fingerprint(theirs.params)
    np.testing.assert_array_equal(ours.apply(*prior_inputs()), theirs.apply(*prior_inputs()))


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    save_model(prior(), tmp_path / "half", dtype=np.float16)
    for ours, theirs in zip(
        *(jax.tree.leaves(m.params) for m in (prior(), open_model(tmp_path / "half"))), strict=True
    ):
        assert theirs.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(ours).astype(np.float16).astype(np.float32), theirs)
    large = prior().replace(params=jax.tree.map(lambda leaf: leaf + 1e6, prior().params))
    with pytest.raises(ValueError, match="has values that float16 cannot hold"):
        save_model(large, tmp_path / "large", dtype=np.float16)
    with pytest.raises(FileExistsError, match="exists already"):
        save_model(prior(), tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_model_is_an_argument_of_a_compiled_function(directory):
    """Parameters are arguments and the rest is compared by value, so that a copy takes the same program."""
    run = fast_jit(lambda model, *inputs: model.apply(*inputs) / model.metadata["embedding"]["scale"])
    first = run(prior(), *prior_inputs())
    other = open_model(directory)
    np.testing.assert_array_equal(first, run(other, *prior_inputs()))
    twice = run(other.replace(params=jax.tree.map(lambda leaf: 2 * leaf, other.params)), *prior_inputs())
    assert run._cache_size() == 1 and (first != twice).any()


def test_a_trained_stage_is_a_model(stage):
    equal(open_model(stage, ema=False).params, prior().params)
    equal(open_model(stage).params, jax.tree.map(lambda leaf: 2 * leaf, prior().params))
    assert open_model(stage).metadata == network_metadata()
    assert open_model(stage, dtype=jnp.bfloat16).network.dtype == jnp.bfloat16


def test_a_stage_without_a_checkpoint_is_one_sentence(tmp_path):
    write_description(tmp_path / "prior", {"model": PRIOR}, METADATA)
    with pytest.raises(LoadError, match="prior cannot be loaded: there is no checkpoint in"):
        open_model(tmp_path / "prior")


def test_a_checkpoint_of_another_format_is_named(stage, tmp_path):
    """It is not answered with what helps against a damaged one."""
    shutil.copytree(stage, tmp_path / "prior")
    for file in (tmp_path / "prior" / "checkpoints" / "3" / "meta").iterdir():
        if "format" in (text := file.read_text()):
            file.write_text(json.dumps(json.loads(text) | {"format": 9}))
    message = "prior cannot be loaded: checkpoint .* has format 9 .* this version reads format 1; use that version"
    with pytest.raises(LoadError, match=message):
        open_model(tmp_path / "prior")


def test_a_checkpoint_of_another_network_is_one_sentence(stage, tmp_path):
    wide = PRIOR.clone(width=32)
    write_description(tmp_path, {"model": wide}, METADATA)
    (tmp_path / "checkpoints").symlink_to(stage / "checkpoints")
    with pytest.raises(LoadError, match=r"ln_final/bias is \[16\] in the file and \[32\] in the network"):
        open_model(tmp_path)


def test_every_network_can_be_described_and_checked():
    assert set(network_check._INPUTS) == set(networks.NETWORKS.values())
    encoder = RecurrentTextEncoder(11, 8, dtype=jnp.bfloat16)
    clip = CLIP(VisionTransformer(8, 4, 8, 1, 2, (8, 8)), TextEncoder(11, 4, 8, 1, 2, mlp_width=8), 8)
    for network in (PRIOR, UNET, clip, PRIOR.clone(text_encoder=encoder), encoder):
        described = networks.describe(network)
        assert networks.build(json.loads(json.dumps(described))) == network
    with pytest.raises(ValueError, match="UNet.channel_mult=1j cannot be stored"):
        networks.describe(UNET.clone(channel_mult=(1, 1j)))


class Own(nn.Module):
    """A network that this package does not have."""

    width: int = 4
    act: Callable = nn.relu

    @nn.compact
    def __call__(self, x, t):
        return nn.Dense(x.shape[-1])(self.act(nn.Dense(self.width)(x)))


def test_a_network_of_the_users_own_is_given_and_not_imported(tmp_path):
    params = Own().init(jax.random.key(0), jnp.zeros((1, 3)), None)
    save_model(Model(params, Own()), tmp_path / "own")
    described = json.loads((tmp_path / "own" / "model.json").read_text())["networks"]["model"]
    assert described["class"].endswith(".Own") and described["width"] == 4 and "relu" in described["act"]["text"]
    message = r"there is no network .*Own' in this version, .* custom network as ddpm_jax.load\(path, network=...\)"
    with pytest.raises(LoadError, match=message):
        ddpm_jax.load(tmp_path / "own")
    equal(ddpm_jax.load(tmp_path / "own", network=Own()).params, params)


def test_a_network_of_the_users_own_must_have_the_shapes_of_its_parameters(tmp_path):
    params = Own().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), None)
    metadata = {"diffusion": {"schedule": "cosine", "num_steps": 10}, "image_size": 8, "channels": 3, "conditions": []}
    save_model(Model(params, Own()), tmp_path / "own", metadata=metadata)
    equal(ddpm_jax.load(tmp_path / "own", network=Own()).params, params)
    for network, message in (
        (Own(5), r"network=Own.*: Dense_0/kernel is \[4, 3\] in the file and \[5, 3\] in the network"),
        (Own, r"network must be a model, got the class Own; write Own\(...\)"),
        ("Own", "network must be a model such as a flax.linen.Module, with init and apply, got 'Own'"),
    ):
        with pytest.raises(LoadError, match=message):
            ddpm_jax.load(tmp_path / "own", network=network)
    with pytest.raises(LoadError, match="path=3 must be the path of a directory"):
        ddpm_jax.load(3)


def test_metadata_that_cannot_be_stored_writes_nothing(tmp_path):
    for metadata, message in (
        ({"when": object()}, "metadata.when is a object, which cannot be stored"),
        ({"diffusion": {"num_steps": 0}}, "metadata.diffusion: num_steps=0 must be between 1 and 100000"),
    ):
        with pytest.raises(ValueError, match=message):
            write_description(tmp_path / "stage", {"model": PRIOR}, metadata)
    assert not list(tmp_path.iterdir())


# -- Files that anyone may have written --------------------------------------------------------------------------------


def changed(value, path, new):
    """Return a copy of nested objects in which the value at a path is another one."""
    first, _, rest = path.partition(".")
    return value | {first: changed(value[first], rest, new) if rest else new}


HUGE = 10**9
WRONG = [
    ("format", "ddpm_jax model 9", "has the format 'ddpm_jax model 9', and this version reads 'ddpm_jax model 2'"),
    ("format", 3, "is not the description of a model"),
    ("version", "-1", "version='-1' must be a version such as"),
    ("version", 10**400, "must be a version such as"),
    ("family", "../x", "family='../x' must be a name"),
    ("networks", {}, "networks is empty"),
    ("networks", [1], "networks must be an object"),
    ("networks.model", 3, "networks.model=3 must be an object with the class"),
    ("networks.model.class", "os.system", "there is no network 'os.system' in this version"),
    ("networks.model.class", ["CLIP"], r"there is no network \['CLIP'\]"),
    ("networks.model.layers", HUGE, r"networks.model.layers=1000000000 must be an integer in \[1, 1000\]"),
    ("networks.model.layers", 1000, r"has 1000 layers or blocks, and .* has \d+ arrays"),
    ("networks.model.layers", 2.0, r"networks.model.layers=2.0 must be an integer"),
    ("networks.model.layers", True, r"networks.model.layers=True must be an integer"),
    ("networks.model.layers", -1, r"networks.model.layers=-1 must be an integer"),
    ("networks.model.layers", "2", r"networks.model.layers='2' must be an integer"),
    ("networks.model.heads", 0, r"networks.model.heads=0 must be an integer in \[1, 4096\]"),
    ("networks.model.heads", 3, "cannot work as it is described: heads=3 must divide width=16"),
    ("networks.model.width", HUGE, r"networks.model.width=1000000000 must be an integer in \[1, 65536\]"),
    ("networks.model.width", 65536, r"is \[16\] in the file and \[65536\] in the network"),
    ("networks.model.context", 10**40, "networks.model.context=1000"),
    ("networks.model.context", 60000, "tokens have length 60000, the text encoder was built for at most 4"),
    ("networks.model.activation", {"function": "exec"}, "must name a function, one of gelu, quick_gelu"),
    ("networks.model.activation", None, "must name a function"),
    ("networks.model.dtype", "object", "networks.model.dtype='object' must be one of 'float32'"),
    ("networks.model.remat", 1, "networks.model.remat=1 must be true, false or 'products'"),
    ("networks.model.widht", 16, "has no field 'widht' in this version; did you mean width"),
    ("networks.model.parent", 16, "has no field 'parent'"),
    ("networks.model.text_encoder.class", "UNet", "text_encoder has the class UNet, and must be TextEncoder or"),
    ("networks.model.text_encoder.layers", HUGE, r"model.text_encoder.layers=1000000000 must be an integer"),
    ("networks.model.text_encoder.vocab_size", HUGE, r"vocab_size=1000000000 must be an integer in \[1, 10000000\]"),
    ("metadata", None, "metadata must be an object, got NoneType"),
    ("metadata.diffusion.num_steps", HUGE, "diffusion: num_steps=1000000000 must be between 1 and 100000"),
    ("metadata.diffusion.num_steps", 0, "num_steps=0 must be between"),
    ("metadata.diffusion.num_steps", float("nan"), "diffusion.num_steps=nan must be a finite number"),
    ("metadata.diffusion.schedule", "exotic", "schedule='exotic' must be one of 'linear'"),
    ("metadata.diffusion.schedule", [0.5, 2.0], "metadata.diffusion: "),
    ("metadata.diffusion.variance", 3, "variance=3 must be one of"),
    ("metadata.diffusion.steps", 3, "diffusion has no field 'steps'"),
    ("metadata.diffusion", [1], "diffusion must be an object"),
    ("metadata.embedding.scale", float("inf"), "embedding.scale=inf must be a finite number"),
    ("metadata.embedding.scale", -1, r"embedding.scale=-1 must be a number in \[1e-06, 1e\+06\]"),
    ("metadata.caption.length", HUGE, r"caption.length=1000000000 must be an integer in \[3, 65536\]"),
    ("metadata.needs", {"clip": "?"}, "must be an object of SHA-256 sums"),
    ("metadata.labels", {"num_classes": HUGE}, "labels.num_classes=1000000000 must be an integer"),
    ("metadata.labels", {"num_classes": 3, "names": ["a"]}, "has 1 names for num_classes=3"),
    ("metadata.labels", {"num_classes": 3, "null": -1}, "labels.null=-1 must be an integer"),
    ("metadata.tokenizer", {"kind": "clip", "pad": 7}, "metadata.tokenizer is not a tokenizer of this version"),
    ("metadata.other", 2**70, "metadata.other is an integer of more than 63 bits"),
    ("shapes.model", {"a": [-1]}, "which is not a shape"),
    ("shapes.model", [1], "shapes.model must be an object"),
    ("shapes", {}, "has no shapes of the parameters of the network model"),
]


@pytest.mark.parametrize("path,value,message", WRONG, ids=[f"{path}={value!r:.20}" for path, value, _ in WRONG])
def test_a_wrong_field_is_one_sentence_that_names_the_file_and_the_field(directory, tmp_path, path, value, message):
    described = json.loads((directory / "model.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    (tmp_path / "model.json").write_text(json.dumps(changed(described, path, value)))
    begin = time.process_time()
    with pytest.raises(LoadError, match=message) as caught:
        open_model(tmp_path)
    assert time.process_time() - begin < 5 and "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("[" * 100_000, "its JSON is nested too deeply"),
        ('{"format": "ddpm_jax model 2", "metadata": ' + "[" * 500 + "]" * 500 + "}", "version=None must be a version"),
        ("{", "is not the description of a model"),
        ("", "it is empty"),
        ("null", "it has no format"),
    ],
)
def test_a_file_that_is_no_description_is_one_sentence(tmp_path, text, message):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(LoadError, match=message):
        open_model(tmp_path)


def test_metadata_that_is_nested_deeply_is_one_sentence(directory, tmp_path):
    described = json.loads((directory / "model.json").read_text())
    text = json.dumps(changed(described, "metadata.other", "X")).replace('"X"', "[" * 500 + "]" * 500)
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(LoadError, match="is nested more than 16 levels deep"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"patch": 0}, r"vision.patch=0 must be an integer in \[1, 1024\]"),
        ({"heads": 0}, r"vision.heads=0 must be an integer"),
        ({"patch": 3}, "a size that patch=3 must divide"),
        ({"layers": HUGE}, r"vision.layers=1000000000 must be an integer in \[1, 1000\]"),
        ({"image_size": 65536, "patch": 1, "stem": []}, "has 4294967296 positions of width=8"),
        ({"stem": [8] * 17}, "vision.stem=.* must be a list with at most 16 entries"),
        ({"class": "ModifiedResNet"}, "ModifiedResNet has no field 'patch'"),
    ],
)
def test_a_wrong_field_of_a_clip(tmp_path, changes, message):
    clip = CLIP(VisionTransformer(8, 4, 8, 1, 2, (8, 8)), TextEncoder(11, 4, 8, 1, 2), 8)
    params = random_params(clip.init, jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 4), int), jnp.ones((1, 4), bool))
    save_model(Model(params, clip), tmp_path / "clip")
    file = tmp_path / "clip" / "model.json"
    described = json.loads(file.read_text())
    described["networks"]["model"]["vision"] |= changes
    file.write_text(json.dumps(described))
    with pytest.raises(LoadError, match=message):
        open_model(tmp_path / "clip")


def test_a_unet_is_found_to_fit_whatever_the_size_of_its_images(tmp_path):
    """Its attention is where images of 4 x 4 have feature maps of height 2, which its description does not say."""
    params = random_params(UNET.init, jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, int))
    save_model(Model(params, UNET), tmp_path / "unet")
    equal(open_model(tmp_path / "unet").params, params)
    file = tmp_path / "unet" / "model.json"
    described = json.loads(file.read_text())
    for changes, message in (
        ({"channel_mult": [1, HUGE]}, r"channel_mult\[1\]=1000000000 must be a number in \[0.001, 1024\]"),
        ({"channel_mult": []}, "must be a list with at most 16 entries, and not empty"),
        ({"groups": 3}, "groups=3 must divide the number of channels"),
        ({"attention_levels": [7]}, r"attention_levels=\(7,\) must lie between 0 and 1"),
        ({"dropout": float("nan")}, r"dropout=nan must be a number in \[0, 0.999\]"),
    ):
        wrong = described | {"networks": {"model": described["networks"]["model"] | changes}}
        file.write_text(json.dumps(wrong))
        with pytest.raises(LoadError, match=message):
            open_model(tmp_path / "unet")
