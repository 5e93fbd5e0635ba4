"""Karlo's original release: what its own code returned, its stages in a row, its five files, and the way back."""

import json
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax import RecordedNoise
from ddpm_jax.data.tokenizer import ClipTokenizer, CompactTokenizer
from ddpm_jax.interop import ReadError, karlo, karlo_original, read_tensors
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.pipelines import karlo as pipeline

REFERENCE = np.load(Path(__file__).parent / "data" / "karlo_original.npz")
D = 32
SIZES = {"heads": 2, "head_channels": 16, "head_width": (8, 64), "image_sizes": (16, 32)}


def weights(name):
    return random_weights(json.loads(str(REFERENCE[f"shapes/{name}"])))


def statistics():
    found = random_weights({"mean": (D,), "std.weight": (D,)})
    return {"0": found["mean"], "1": found["std.weight"]}


def given(name):
    array = REFERENCE[name]
    array = array.astype(np.float32) if array.dtype == np.float16 else array
    return jnp.asarray(np.moveaxis(array, -3, -1) if array.ndim >= 4 else array)


def same(one, other):
    assert set(one) == set(other)
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array, err_msg=name)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


# ---- One network after another ---------------------------------------------------------------------------------------


def test_the_prior():
    reference = weights("prior")
    prior = karlo_original.load_prior(reference, statistics(), heads=2)
    run = fast_jit(lambda p, *inputs: prior.model.apply({"params": p}, *inputs))
    ours = run(prior.params, given("zt"), given("t"), given("z_text") / D**0.5, given("hidden"), given("mask"))
    np.testing.assert_allclose(ours, REFERENCE["out/prior"], atol=2e-5)
    tensors, pair = karlo_original.export_prior(prior)
    same(tensors, reference)
    same(pair, statistics())


def test_the_decoder_with_and_without_an_image():
    reference = weights("decoder")
    decoder = karlo_original.load_decoder(reference, image_size=16, head_channels=16)
    run = fast_jit(lambda p, *inputs: decoder.model.apply({"params": p}, *inputs))
    z_image, z_text = (given(name) / D**0.5 for name in ("z_image", "z_text"))
    text = z_text, given("hidden"), given("mask")
    for name, keep in (("with", True), ("without", False)):
        ours = run(decoder.params, given("xt"), given("t"), z_image, *text, jnp.full(2, keep))
        np.testing.assert_allclose(ours, given(f"out/decoder/{name}"), atol=2e-5)
    same(karlo_original.export_decoder(decoder, image_size=16), reference)


def test_the_upsamplers():
    reference = weights("sr")
    upsamplers = karlo_original.load_upsamplers(reference, image_size=32)
    run = fast_jit(lambda p, *inputs: upsamplers.model.apply({"params": p}, *inputs))
    for name in ("first", "last"):
        ours = run(upsamplers.params[name], given("large"), given("t"), given("small"))
        np.testing.assert_allclose(ours, given(f"out/{name}"), atol=2e-5)
    same(karlo_original.export_upsamplers(upsamplers, image_size=32), reference)


def read_by(table, tensors, shapes):
    """Read every entry of a table by itself, and return the numbers of parameters here and in the reference."""
    flat = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert sorted(flat) == sorted(entry.ours for entry in table)
    assert sorted(tensors) == sorted(name for entry in table for name in entry.theirs)
    ours = 0
    for entry in table:
        assert entry.layout.read(*(tensors[name] for name in entry.theirs)).shape == flat[entry.ours].shape, entry.ours
        ours += flat[entry.ours].size * bool(entry.theirs)
    return ours, sum(array.size for array in tensors.values())


def published(name):
    """Tensors of the published shapes, which take no memory."""
    shapes = json.loads(str(REFERENCE[f"published/{name}"]))
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def test_the_published_networks_are_those_of_diffusers():
    tensors = published("decoder")
    decoder = karlo_original.decoder_of(tensors)
    assert decoder == karlo.DECODER()
    shapes = karlo_original.decoder_shapes(decoder, 64)
    ours, theirs = read_by(karlo_original.decoder_table(decoder, 64), tensors, shapes)
    assert ours == theirs
    tensors = published("sr")
    upsampler = karlo_original.upsampler_of(tensors)
    assert upsampler == karlo.UPSAMPLER()
    shapes = dict.fromkeys(("first", "last"), karlo_original.upsampler_shapes(upsampler, 256))
    ours, theirs = read_by(karlo_original.upsampler_table(upsampler, 256), tensors, shapes)
    assert ours == theirs


def test_the_published_prior_is_that_of_diffusers():
    tensors = published("prior")
    table, other = karlo_original.prior_table(2048, 20, 32), karlo.prior_table(81, 2048, 20)
    assert [entry.ours for entry in table] == [entry.ours for entry in other]
    model, shapes = karlo_original.prior_of(tensors)
    assert (model.embed_dim, model.context, model.width, model.layers, model.heads) == (768, 77, 2048, 20, 32)
    ours, theirs = read_by(table, tensors, shapes)
    assert ours == theirs > 1e9


# ---- The pipeline ----------------------------------------------------------------------------------------------------


class Bytes(CompactTokenizer):
    """The tokenizer that the reference implementation was given."""

    pad, sot, eot, vocab_size = 0, 298, 299, 300

    def __init__(self):
        pass

    def ids(self, text):
        return list(text.encode())


def torch_zip(path, saved):
    """Write a file as torch.save does; tensors are float32 arrays."""
    members = {}

    def pickled(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(pickled(part) for item in value.items() for part in item) + b"u"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(pickled, value)) + b"t"
        if not isinstance(value, np.ndarray):
            return pickle.dumps(value, 2)[2:-1]
        key, strides = str(len(members)), tuple(stride // 4 for stride in np.zeros(value.shape, "f4").strides)
        members[f"archive/data/{key}"] = value.astype("<f4").tobytes()
        storage = pickled("storage") + b"ctorch\nFloatStorage\n" + b"".join(map(pickled, (key, "cpu", value.size)))
        view = b"".join(map(pickled, (0, value.shape, strides, False, {})))
        return b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + view + b"tR"

    program = b"\x80\x02" + pickled(saved) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"archive/data.pkl": program, **members, "archive/version": b"3\n"}.items():
            archive.writestr(name, data)


def checkpoint(name):
    """A checkpoint as training leaves it: the weights under state_dict, and other things beside them."""
    return {"epoch": 3, "global_step": 1000000, "state_dict": weights(name), "loops": {"seen": np.ones(3, np.float32)}}


def write_directory(place):
    """Write the five files of the release."""
    torch_zip(place / "prior-ckpt-step=01000000-of-01000000.ckpt", checkpoint("prior"))
    torch_zip(place / "decoder-ckpt-step=01000000-of-01000000.ckpt", checkpoint("decoder"))
    torch_zip(place / "improved-sr-ckpt-step=1.2M.ckpt", checkpoint("sr"))
    torch_zip(place / "ViT-L-14_stats.th", tuple(statistics().values()))
    mask = {f"transformer.resblocks.{i}.attn_mask": np.full((12, 12), -np.inf, np.float32) for i in range(2)}
    torch_zip(place / "ViT-L-14.pt", weights("clip") | mask)
    return place


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("karlo"))


@pytest.fixture(scope="module")
def opened(directory):
    return pipeline.open_karlo_original(directory, tokenizer=Bytes(), **SIZES)


def recorded(stage):
    """Return the noise of a stage: the initial one and those of two transitions; none was drawn in the last."""
    noises = given(f"noise/{stage}")
    return RecordedNoise(jnp.concatenate([noises, jnp.zeros_like(noises[:1])]).swapaxes(0, 1))


def test_what_the_networks_see_of_captions(opened):
    tokens, mask = (jnp.asarray(x) for x in Bytes()(["a cat"], 12))
    np.testing.assert_array_equal(tokens[0], REFERENCE["pipeline/tokens"][0])
    np.testing.assert_array_equal(mask[0], REFERENCE["pipeline/mask"][0])
    tokens, mask = given("pipeline/tokens"), given("pipeline/mask")
    text, z_image = fast_jit(lambda opened: (opened.encode_text(tokens, mask), opened.encode_image(given("picture"))))(
        opened
    )
    np.testing.assert_allclose(text.z * D**0.5, REFERENCE["pipeline/z_text"], atol=2e-5)
    np.testing.assert_allclose(text.hidden, REFERENCE["pipeline/hidden"], atol=2e-5)
    np.testing.assert_allclose(z_image, REFERENCE["out/image"], atol=2e-5)


def test_no_network_sees_the_padding(opened):
    tokens, mask = given("pipeline/tokens"), given("pipeline/mask")
    t, x, z = jnp.full(4, 500), jnp.ones((4, 16, 16, 3)), jnp.ones((4, D))

    @fast_jit
    def run(opened, tokens):
        text = opened.encode_text(tokens, mask)
        given = text.z, text.hidden, mask
        prior = opened.prior.apply({"params": opened.params["prior"]}, z, t, *given)
        return text.hidden, prior, opened.decoder.apply({"params": opened.params["decoder"]}, x, t, z, *given)

    hidden, *ours = run(opened, tokens)
    others, *theirs = run(opened, jnp.where(mask, tokens, 299))
    assert np.abs(hidden - others).max() > 0.1  # the text tower's states behind the end, which the others do not see
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_stages_in_a_row(opened):
    noise = {stage: recorded(stage) for stage in ("prior", "decoder", "sr")}
    tokens, mask = given("pipeline/tokens"), given("pipeline/mask")

    @fast_jit
    def run(opened, noise):
        text = opened.encode_text(tokens, mask)
        text, empty = (jax.tree.map(lambda x, rows=rows: x[rows], text) for rows in (slice(2), slice(2, 4)))
        z_image = opened.sample_embedding(text, empty, noise["prior"], steps=3, scale=16.0)
        small = opened.decode(z_image, text, empty, noise["decoder"], steps=3)
        return z_image, opened.upsample(small, noise["sr"], steps=3) / 2 + 0.5

    z_image, images = run(opened, noise)
    mean, std = statistics().values()
    reached = np.abs((REFERENCE["pipeline/z_image"] - mean) / std).max()
    assert abs(reached - 10) < 1e-4  # clipped
    np.testing.assert_allclose(z_image, REFERENCE["pipeline/z_image"], atol=1e-3)
    assert REFERENCE["pipeline/images"].std() > 0.1
    np.testing.assert_allclose(images, given("pipeline/images"), atol=2e-3)


def test_a_directory_becomes_a_pipeline(directory, opened, monkeypatch):
    prior = karlo_original.load_prior(weights("prior"), statistics(), heads=2)
    jax.tree.map(np.testing.assert_array_equal, opened.params["prior"], prior.params)
    assert opened.sizes == (16, 32) and opened.sampling["prior"].threshold == 10.0
    assert set(opened.params["text"]) == {"log_scale", "text", "text_projection"}
    assert set(opened.params["image"]) == {"log_scale", "vision", "image_projection"}
    generate = fast_jit(pipeline._generate.__wrapped__)
    monkeypatch.setattr(pipeline, "_generate", generate)
    steps = {"prior_steps": 2, "decoder_steps": 2, "upsampler_steps": 2}
    images = opened.generate(["a cat", "a tall dog"], **steps)
    assert images.shape == (2, 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images[0].astype(int) - images[1]).mean() > 1
    default = pipeline.open_karlo_original(directory, prior_clip=4.0, **SIZES)
    assert isinstance(default.tokenizer, ClipTokenizer) and default.tokenizer.pad == 0
    assert default.sampling["prior"].threshold == 4.0


# ---- What is refused -------------------------------------------------------------------------------------------------


def copy(directory, place, **changed):
    """Link the five files, but for those that are changed: to what is given, or left away."""
    place.mkdir()
    for name, pattern in karlo_original.FILES.items():
        (path,) = directory.glob(pattern)
        if name not in changed:
            (place / path.name).symlink_to(path)
        elif changed[name] is not None:
            torch_zip(place / path.name, changed[name])
    return place


def refused(place, error, message, **options):
    with pytest.raises(error, match=message) as caught:
        karlo_original.read_karlo_original(place, **(SIZES | options))
    assert "\n" not in str(caught.value)


def test_a_directory_with_other_files_is_refused(directory, tmp_path):
    refused(tmp_path, ReadError, r"it lacks prior-ckpt\*, decoder-ckpt\*, improved-sr-ckpt\*, ViT-L")
    place = copy(directory, tmp_path / "missing", upsamplers=None)
    refused(place, ReadError, r"original release: it lacks improved-sr-ckpt\*$")
    place = copy(directory, tmp_path / "twice")
    torch_zip(place / "prior-ckpt-step=2.ckpt", {})
    refused(place, ReadError, r"one file called prior-ckpt\*, and holds prior-ckpt-step=01000000.*, prior-ckpt-s")
    place = copy(directory, tmp_path / "swapped", prior=checkpoint("decoder"))
    refused(place, ConvertError, r"not of Karlo's prior: it lacks model\.positional_embedding")
    place = copy(directory, tmp_path / "statistics", statistics=(statistics()["0"],))
    refused(place, ConvertError, "statistics must be a pair of vectors of 32 numbers, got {'0': \\[32\\]}")
    bad = statistics() | {"1": np.full(D, np.nan, np.float32)}
    place = copy(directory, tmp_path / "nan", statistics=tuple(bad.values()))
    refused(place, ConvertError, "statistics must be finite")
    short = weights("clip")
    short["positional_embedding"] = short["positional_embedding"][:11]
    place = copy(directory, tmp_path / "short", clip=short)
    refused(
        place, ConvertError, "not of one Karlo: CLIP has embeddings of 32 numbers and captions of 11 tokens, the pr"
    )
    refused(directory, ValueError, "heads=3 must divide the prior's width, which is 32", heads=3)
    refused(directory, ValueError, "head_channels=48 must divide .* which is 64", head_channels=48)


def test_other_tensors_are_refused():
    with pytest.raises(ConvertError, match=r"not of Karlo's upsamplers: it lacks model_first_steps\.time_embed"):
        karlo_original.load_upsamplers(weights("decoder"))
    with pytest.raises(ConvertError, match=r"not of Karlo's decoder: it lacks model\.time_embed\.0\.weight"):
        karlo_original.load_decoder(weights("sr"))
    sizes = {"image_size": 16, "head_channels": 16}
    with pytest.raises(ConvertError, match=r"has, unknown to this network, model\.other"):
        karlo_original.load_decoder(weights("decoder") | {"model.other": np.zeros(3)}, **sizes)
    for name, shape, message in (
        ("model.clip_emb.weight", (128, 31), r"of another shape, model\.clip_emb\.weight \[128, 31\]"),
        ("model.out.2.weight", (6,), r"model\.out\.2\.weight has the shape \[6\], and needs 4 axes"),
    ):
        with pytest.raises(ConvertError, match=message):
            karlo_original.load_decoder(weights("decoder") | {name: np.zeros(shape)}, **sizes)
    doubled = weights("prior")["model.positional_embedding"].repeat(2, 0)
    with pytest.raises(ConvertError, match=r"of another shape, model\.positional_embedding \[2, 16, 32\]"):
        karlo_original.load_prior(weights("prior") | {"model.positional_embedding": doubled}, statistics(), heads=2)


def test_the_files_are_read_as_they_are(directory):
    found = read_tensors(directory / "ViT-L-14_stats.th")
    same(found, statistics())
    found = read_tensors(directory / "improved-sr-ckpt-step=1.2M.ckpt")
    assert set(found) == {f"state_dict.{name}" for name in weights("sr")} | {"loops.seen"}
