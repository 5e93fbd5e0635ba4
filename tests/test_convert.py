"""`python -m ddpm_jax.convert`: what it writes loads without flags, and converts back to the original files."""

import hashlib
import json

import jax
import numpy as np
import pytest
import test_interop_clip
import test_interop_glide
import test_interop_guided
import test_interop_karlo
import test_interop_karlo_original
import test_interop_latent_diffusion
import test_interop_stable_diffusion
from PIL import Image
from random_weights import random_weights
from safetensors.numpy import load_file, save_file
from tiny_run import finish, start

from ddpm_jax import cli, convert
from ddpm_jax.interop import ReadError, families, glide, guided
from ddpm_jax.interop.clip import load_clip
from ddpm_jax.interop.config_fields import clip_towers
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.transformer import gelu, quick_gelu
from ddpm_jax.pipelines import Cascade, LoadError, load
from ddpm_jax.pipelines.karlo import Karlo, open_karlo
from ddpm_jax.pipelines.stable_diffusion import StableDiffusion
from ddpm_jax.storage import model_directory as converted

OPTIONS = {
    "model": "ViT-L/14",
    "head_width": "64",
    "activation": "gelu",
    "prior_clip": 5,
    "prediction": "eps",
    "image_size": 512,
    "part": "ema",
}
USED = {
    "clip": {"model", "head_width", "activation", "part"},
    "karlo": {"prior_clip"},
    "stable-diffusion": set(),  # of a directory
    "guided": {"model", "part"},
    "score-sde": {"model", "part"},
    "glide": {"model", "part"},
    "noised-clip": {"part"},
    "inception": {"part"},
}


def run(capsys, **flags):
    """Run the program in this process and return what it printed."""
    given = [f"--{name.rstrip('_')}={value}" for name, value in flags.items() if value is not None]
    convert.FLAGS.unparse_flags()
    for name in ("from", "to", "src", "out", *OPTIONS):
        convert.FLAGS[name].value = None
    convert.FLAGS["dtype"].value = "float32"
    convert.FLAGS(["convert", *given])
    convert.main()
    return capsys.readouterr().out


def equal(one, other):
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, other)  # assert_array_equal broadcasts
    jax.tree.map(np.testing.assert_array_equal, one, other)


def same_tensors(one, other):
    assert set(one) == set(other)
    for name, array in other.items():
        assert one[name].shape == array.shape and one[name].dtype == array.dtype, name
        np.testing.assert_array_equal(one[name], array, err_msg=name)


def test_a_pipeline_of_karlo(tmp_path, capsys):
    source = test_interop_karlo.write_directory(tmp_path / "karlo")
    (source / "model_index.json").write_text('{"_class_name": "UnCLIPPipeline"}')
    printed = run(capsys, from_="karlo", src=source, out=tmp_path / "ours", prior_clip=7)
    file = source / "prior" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for line in (
        "# karlo, converted by ddpm_jax 0.1.0",
        f"| prior | DiffusionPrior | {sum(x.size for x in load_file(file).values()) - 2 * 32 + 32:,} |",
        "- prior_clip: 7.0",
        f"- prior/diffusion_pytorch_model.safetensors: {digest}",
    ):
        assert line in printed.splitlines(), line
    assert (tmp_path / "ours" / "model_card.md").read_text() in printed
    opened, ours = open_karlo(source), load(tmp_path / "ours")
    assert isinstance(ours, Karlo) and ours.tokenizer.pad == ours.tokenizer.eot
    assert ours.sampling["prior"].threshold == 7.0
    equal(ours.params, opened.params)
    equal(ours.statistics, opened.statistics)
    for name in ("text", "image", "prior", "decoder", "upsampler", "sizes"):
        assert getattr(ours, name) == getattr(opened, name), name
    draw = lambda karlo: karlo.replace(tokenizer=test_interop_karlo.Bytes()).generate(
        ["a cat"], prior_steps=1, prior_threshold=5.0, decoder_steps=1, upsampler_steps=1
    )
    np.testing.assert_array_equal(draw(ours), draw(opened))
    run(capsys, to="karlo", src=tmp_path / "ours", out=tmp_path / "back")
    files = lambda place: {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert files(tmp_path / "back") == files(source)
    for name in files(source):
        if name.endswith(".safetensors"):
            same_tensors(load_file(tmp_path / "back" / name), load_file(source / name))
        else:
            assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    (tmp_path / "ours" / "source").rename(tmp_path / "ours" / "peer")  # its name in earlier versions
    families.restore_source_files(tmp_path / "ours", tmp_path / "again")
    small = {name for name in files(source) if not name.endswith(".safetensors")}
    assert files(tmp_path / "again") == small


def test_stable_diffusion_draws_by_the_command(tmp_path, capsys):
    source = test_interop_stable_diffusion.directory(tmp_path / "sd")
    text = source / "text_encoder" / "diffusion_pytorch_model.safetensors"
    shapes = {name: array.shape for name, array in load_file(text).items()}
    shapes |= {"text_model.embeddings.token_embedding.weight": (49408, 24)}
    save_file(random_weights(shapes), text)
    described = text.with_name("config.json")
    described.write_text(json.dumps(json.loads(described.read_text()) | {"vocab_size": 49408}))
    run(capsys, from_="stable-diffusion", src=source, out=tmp_path / "ours")
    ours = load(tmp_path / "ours")
    assert isinstance(ours, StableDiffusion) and (ours.prediction, ours.image_size) == ("eps", 16)
    drawn = start("sample", "--prompt=a cat", f"--workdir={tmp_path / 'ours'}", f"--out={tmp_path / 'cat.png'}")
    status, out, err = finish(drawn)
    assert status == 0 and "1 image of 16 x 16 pixels" in out, err
    assert np.asarray(Image.open(tmp_path / "cat.png")).std() > 1
    run(capsys, to="stable-diffusion", src=tmp_path / "ours", out=tmp_path / "back")
    for part in ("vae", "unet"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        same_tensors(load_file(tmp_path / "back" / name), load_file(source / name))
    same_tensors(load_file(tmp_path / "back" / "text_encoder" / "model.safetensors"), load_file(text))


def test_stable_diffusion_in_one_file(tmp_path, capsys, monkeypatch):
    tensors = test_interop_latent_diffusion.write(tmp_path / "model.safetensors")
    opened = test_interop_latent_diffusion.read(tmp_path / "model.safetensors")
    monkeypatch.setattr(families.latent_diffusion, "read_stable_diffusion_file", lambda *_, **__: opened)
    flags = {"src": tmp_path / "model.safetensors", "out": tmp_path / "ours"}
    assert "- prediction: eps" in run(capsys, from_="stable-diffusion", **flags).splitlines()
    equal(load(tmp_path / "ours").params, opened.params)
    run(capsys, to="stable-diffusion", src=tmp_path / "ours", out=tmp_path / "back")
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), tensors)


@pytest.mark.parametrize("dialect", ["openai", "hf"])
def test_a_clip(tmp_path, capsys, dialect):
    """A config.json beside the file is used; other options are arguments."""
    reference = test_interop_clip.weights(dialect)
    save_file(reference, tmp_path / "model.safetensors")
    flags = {"from_": "clip", "src": tmp_path, "out": tmp_path / "ours"}
    if dialect == "hf":
        towers = {
            name: {"hidden_size": size, "num_attention_heads": heads, "hidden_act": "gelu"}
            for name, size, heads in (("text_config", 32, 4), ("vision_config", 48, 3))
        }
        (tmp_path / "config.json").write_text(json.dumps(towers))
    else:
        flags |= {"head_width": "8,16", "activation": "gelu"}
    printed = run(capsys, **flags)
    assert "- head_width: 8 in the text tower, 16 in the image tower" in printed and "- activation: gelu" in printed
    ours = load(tmp_path / "ours")
    assert ours.network == load_clip(reference, head_width=(8, 16), activation="gelu").model
    pixels = np.zeros((1, 24, 24, 3), np.float32)
    assert np.isfinite(ours.apply(pixels, method="encode_image")).all()
    run(capsys, to="clip", src=tmp_path / "ours", out=tmp_path / "back")
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), reference)


def test_every_tower_of_a_clip_has_its_own_activation_and_heads(tmp_path):
    """Fields that a config lacks have transformers' defaults: 8 heads of a text tower, 12 of a vision tower."""
    save_file(test_interop_clip.weights("hf"), tmp_path / "model.safetensors")
    text = {"hidden_size": 32, "num_attention_heads": 4, "hidden_act": "gelu", "top_k": 50, "eos_token_id": 2}
    vision = {"hidden_size": 48, "num_attention_heads": 3, "torch_dtype": "float32", "id2label": {"0": "a"}}
    whole = {"model_type": "clip", "text_config": text, "vision_config": vision, "logit_scale_init_value": 2.6592}
    read = lambda config: [
        (tmp_path / "config.json").write_text(json.dumps(config)),
        families.FAMILIES["clip"].read(tmp_path, families.Options()),
    ][1]
    model = read(whole).converted.models["clip"]
    assert (model.text.activation, model.vision.activation) == (gelu, quick_gelu)
    assert (model.text.heads, model.vision.heads) == (4, 3)
    older = whole | {"text_config_dict": text | {"hidden_act": "quick_gelu"}, "vision_config_dict": None}
    assert read(older).converted.models["clip"].text.activation is quick_gelu
    assert (
        "the first id 63, as" in read(whole | {"text_config": text | {"eos_token_id": 63}}).assumed["end of a caption"]
    )
    towers = clip_towers({"text_config": {}, "vision_config": {"num_attention_heads": 16}})
    assert (towers["text"]["hidden_size"], towers["text"]["num_attention_heads"]) == (512, 8)
    assert (towers["vision"]["hidden_size"], towers["vision"]["hidden_act"]) == (768, "quick_gelu")
    assert clip_towers({"model_type": "clip_vision_model", "patch_size": 8})["vision"]["num_attention_heads"] == 12
    for changes, message in (
        ({"model_type": "siglip"}, "is not of a CLIP: it has model_type='siglip'"),
        ({"vision_config": vision | {"hidden_act": "gelu_new"}}, "the vision tower .* it has hidden_act='gelu_new'"),
        ({"text_config": text | {"layer_norm_eps": 1e-6}}, "the text tower .* it has layer_norm_eps=1e-06"),
        ({"text_config": text | {"rope_theta": 1e4}}, r"it has rope_theta=10000.0 \(unknown field\)"),
        ({"vision_config": vision | {"num_attention_heads": 5}}, "num_attention_heads=5 must divide hidden_size=48"),
        ({"use_towers": "both"}, "the CLIP is not supported: it has use_towers='both'"),
    ):
        with pytest.raises(ConvertError, match=message):
            read(whole | changes)


def test_the_original_karlo_comes_back(tmp_path, capsys, monkeypatch):
    (tmp_path / "original").mkdir()
    source = test_interop_karlo_original.write_directory(tmp_path / "original")
    original = families.karlo_original.read_karlo_original
    read_tiny = lambda place: original(place, **test_interop_karlo_original.SIZES)
    monkeypatch.setattr(families.karlo_original, "read_karlo_original", read_tiny)
    run(capsys, from_="karlo", src=source, out=tmp_path / "ours")
    run(capsys, to="karlo", src=tmp_path / "ours", out=tmp_path / "back")
    one, other = read_tiny(tmp_path / "back"), read_tiny(source)
    equal(one.params, other.params)


def small_published(monkeypatch):
    tiny = guided.Published(lambda: test_interop_guided.MODELS["new_order"], 16, new_attention_order=True)
    monkeypatch.setitem(guided.PUBLISHED, "tiny", tiny)
    monkeypatch.setitem(families.GLIDE_MODELS, "base", (lambda: test_interop_glide.MODEL, 16))


@pytest.mark.parametrize("family", ["guided", "glide"])
def test_a_network_alone(tmp_path, capsys, monkeypatch, family):
    """In shards, since a file may be large; and back, bit for bit."""
    small_published(monkeypatch)
    reference = (
        test_interop_guided.weights("new_order") if family == "guided" else test_interop_glide.weights("upsampler")
    )
    save_file(reference, tmp_path / "model.safetensors")
    monkeypatch.setattr(converted, "SHARD_BYTES", 10**6)
    name = "tiny" if family == "guided" else "base"
    printed = run(capsys, from_=family, src=tmp_path / "model.safetensors", out=tmp_path / "ours", model=name)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    ours = load(tmp_path / "ours")
    assert (ours.family, ours.metadata["image_size"]) == (family, 16)
    if family == "guided":
        assert Cascade(base=ours).checked().image_size == 16 and ours.diffusion.variance == "learned_range"
        assert ours.network == test_interop_guided.MODELS["new_order"]
        assert "- new_attention_order: True" in printed
        equal(
            ours.params["params"],
            guided.load_guided(reference, ours.network, image_size=16, new_attention_order=True),
        )
    else:
        equal(ours.params["params"], glide.load_glide(reference, ours.network, image_size=16))
    run(capsys, to=family, src=tmp_path / "ours", out=tmp_path / "back")
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), reference)


def test_half_the_bytes_and_what_they_cannot_hold(tmp_path, capsys, monkeypatch):
    small_published(monkeypatch)
    reference = test_interop_guided.weights("new_order")
    save_file(reference, tmp_path / "model.safetensors")
    flags = {"from_": "guided", "src": tmp_path / "model.safetensors", "model": "tiny"}
    for dtype in ("float16", "bfloat16"):
        run(capsys, **flags, out=tmp_path / dtype, dtype=dtype)
        file = tmp_path / dtype / "model.safetensors"
        assert file.stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size
        kernel = load(tmp_path / dtype).params["params"]["in_conv"]["kernel"]
        exact = reference["input_blocks.0.0.weight"].transpose(2, 3, 1, 0)
        assert 0 < np.abs(kernel - exact).max() < (1e-3 if dtype == "float16" else 1e-2)
    reference["out.2.bias"] = reference["out.2.bias"] + 1e6
    save_file(reference, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="out_conv/bias has values that float16 cannot hold"):
        run(capsys, **flags, out=tmp_path / "large", dtype="float16")
    assert not [path for path in tmp_path.iterdir() if "large" in path.name]


def test_what_is_refused_leaves_nothing(tmp_path, capsys, monkeypatch):
    small_published(monkeypatch)
    reference = test_interop_guided.weights("new_order")
    save_file(reference, tmp_path / "model.safetensors")
    save_file(reference | {"out.2.bias": np.full(6, np.nan, np.float32)}, tmp_path / "nan.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    before = sorted(tmp_path.iterdir())
    flags = {"from_": "guided", "src": tmp_path / "model.safetensors", "out": tmp_path / "ours", "model": "tiny"}
    for change, kind, message in (
        ({"src": tmp_path / "none"}, cli.UsageError, "none does not exist"),
        ({"src": tmp_path / "nan.safetensors"}, ConvertError, r"it has, not finite, out\.2\.bias"),
        ({"src": tmp_path / "cut.safetensors"}, ReadError, "cut.safetensors cannot be read"),
        ({"model": "64x64_diffusion"}, ConvertError, "the file does not fit: it lacks"),
        ({"model": "other"}, ConvertError, "model='other' is not a released network of this family: 64x64_diffusion"),
        ({"from_": "clip", "model": "ViT-L/14"}, ConvertError, "not of a CLIP"),
        ({"from_": "inception", "model": None}, ConvertError, "not of FID's Inception"),
        ({"from_": "karlo", "model": None}, ReadError, "is not a directory; karlo is read from a directory"),
        (
            {"from_": "noised-clip", "src": tmp_path, "model": None},
            ReadError,
            "must hold one file with image in its name, and holds 0",
        ),
        ({"src": tmp_path}, ReadError, "must hold one weights file to be read as one network; it holds cut"),
        ({"out": tmp_path}, cli.UsageError, "exists already; give a new directory"),
        ({"to": "clip"}, cli.UsageError, "either --from or --to are needed"),
    ):
        with pytest.raises(kind, match=message):
            run(capsys, **(flags | change))
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ReadError, match="is not a model directory of this package"):
        run(capsys, to="guided", src=tmp_path, out=tmp_path / "back")


@pytest.mark.parametrize("family", USED)
def test_options_of_another_family_are_refused(tmp_path, capsys, family):
    """Before anything is read: the directory is empty."""
    (tmp_path / "src").mkdir()
    for name, value in OPTIONS.items():
        flags = {"src": tmp_path / "src", "out": tmp_path / "ours", name: value}
        if name not in USED[family]:
            with pytest.raises(cli.UsageError, match=rf"--{name}={value}(\.0)? is not used: .*--from={family} "):
                run(capsys, from_=family, **flags)
        with pytest.raises(cli.UsageError, match=rf"--{name}={value}(\.0)? is not used: --to={family} writes"):
            run(capsys, to=family, **flags)
    for name in USED[family]:
        with pytest.raises((ReadError, ConvertError)):
            run(capsys, from_=family, src=tmp_path / "src", out=tmp_path / "ours", **{name: OPTIONS[name]})


def test_a_damaged_conversion_is_refused(tmp_path, capsys, monkeypatch):
    small_published(monkeypatch)
    save_file(test_interop_guided.weights("new_order"), tmp_path / "model.safetensors")
    out = tmp_path / "ours"
    run(capsys, from_="guided", src=tmp_path / "model.safetensors", out=out, model="tiny")
    with pytest.raises(cli.UsageError, match="is a converted guided, which is written as --to=guided"):
        run(capsys, to="clip", src=out, out=tmp_path / "back")
    described = json.loads((out / "model.json").read_text())
    for change, message in (
        ({"format": "other"}, "has the format 'other'"),
        ({"networks": {"model": {"class": "Trainer"}}}, "there is no network 'Trainer' in this version"),
        ({"networks": {"model": described["networks"]["model"] | {"strange": 1}}}, "UNet has no field 'strange'"),
        ({"shapes": {"model": {"in_conv/bias": [3]}}}, "does not hold what model.json says: "),
        ({"metadata": None}, "model.json: metadata must be an object, got NoneType"),
        ({"networks": None}, "model.json: networks must be an object"),
    ):
        (out / "model.json").write_text(json.dumps(described | change))
        with pytest.raises(LoadError, match=message):
            load(out)
    (out / "model.json").write_text("{")
    with pytest.raises(LoadError, match="is not the description of a model of this package"):
        load(out)


def test_the_status_and_the_sentence(tmp_path):
    """Through a process of its own: a wrong file ends with one line and status 1."""
    (tmp_path / "model.pt").write_bytes(b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03.")
    flags = "--from=clip", f"--src={tmp_path / 'model.pt'}", f"--out={tmp_path / 'out'}"
    status, out, err = finish(start("convert", *flags))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1 and err.startswith("error: weights file") and "os.system" in err
    assert not (tmp_path / "out").exists()
