"""Manipulations of images: what they compute, with random parameters, and `python -m ddpm_jax.edit`."""

import functools

import flax.traverse_util
import numpy as np
import pytest
from commands import assert_one_sentence
from PIL import Image
from programs import compile_manipulations_quickly
from random_networks import fast_jit
from test_interop_karlo import Bytes, write_directory
from tiny_pipelines import HIGH, LOW, cascade, unclip

from ddpm_jax.data.transforms import resize_center_crop
from ddpm_jax.interop.karlo import read_karlo
from ddpm_jax.pipelines import directory, inversion, karlo, save
from ddpm_jax.pipelines import manipulation as edit
from ddpm_jax.pipelines import unclip as unclip_pipeline
from ddpm_jax.pipelines.latents import BipartiteLatent, load_latents
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.storage.model_directory import save as save_converted
from ddpm_jax.types import to_float

PIPELINES = pytest.mark.parametrize("name", ["unclip", "karlo"])
SMALL = {"low_res": True, "batch_size": 1}  # few programs: all tests take images one by one
WHOLE = {"batch_size": 1}
CAPTIONS = ("a red circle", "a blue star")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Programs that compile quickly, and Karlo with the tokenizer of its tiny text tower."""
    with pytest.MonkeyPatch.context() as patch:
        compile_manipulations_quickly(patch)
        generate = fast_jit(unclip_pipeline._generate.__wrapped__, static_argnames=("embedding", "use_text", "low_res"))
        patch.setattr(unclip_pipeline, "_generate", generate)
        patch.setattr(karlo, "tokenizer_from_config", lambda config: Bytes())
        patch.setattr(directory, "load", functools.cache(directory.load))  # each is opened by several commands
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Directories of pipelines, a folder of two images, and a mask."""
    place = tmp_path_factory.mktemp("edit")
    save(unclip(), place / "unclip")
    save(cascade(), place / "ddpm")
    save_converted(read_karlo(write_directory(place / "diffusers")), place / "karlo")
    (place / "images").mkdir()
    for name, image in zip("ab", images(2)):
        Image.fromarray(image).save(place / "images" / f"{name}.png")
    mask = np.zeros((40, 47), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(place / "mask.png")
    return place


@pytest.fixture(scope="module")
def pipelines(place):
    return {"unclip": unclip(), "karlo": karlo.open_karlo(place / "diffusers", tokenizer=Bytes())}


@pytest.fixture(scope="module")
def latents(pipelines):
    """Latents of three images, by two steps."""
    return {name: edit.encode(pipeline, images(3), steps=2, batch_size=1) for name, pipeline in pipelines.items()}


def images(count, seed=0):
    """Smooth images, so that resizing does not matter much."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return [np.asarray(Image.fromarray(image).resize((47, 40), Image.Resampling.BICUBIC)) for image in small]


def close(ours, theirs, levels=1):
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= levels


def far(ours, theirs):
    return (np.abs(ours.astype(int) - theirs) > 2).any()


# ---- Inversion -------------------------------------------------------------------------------------------------------


def test_inversion_of_a_constant_prediction_is_exact(pipelines):
    """x_T = alpha x0 + sigma eps in closed form, and the way back gives the image, at the decoder's size."""
    params = flax.traverse_util.flatten_dict(dict(pipelines["karlo"].params))
    place = ("decoder", "unet", "out_conv")
    params[*place, "kernel"] = np.zeros_like(params[*place, "kernel"])
    eps = np.asarray(params[*place, "bias"], np.float64)[:3]
    pipeline = pipelines["karlo"].replace(params=flax.traverse_util.unflatten_dict(params))
    x0 = resize_center_crop(images(2), 16)
    latent = edit.encode(pipeline, images(2), steps=2, batch_size=1)
    # The cosine schedule: the product of its steps, each of at most 0.999.
    at = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = np.prod(1 - np.minimum(1 - at[1:] / at[:-1], 0.999))
    wanted = np.sqrt(alpha_bar) * np.asarray(to_float(x0), np.float64) + np.sqrt(1 - alpha_bar) * eps
    np.testing.assert_allclose(latent.x_T, wanted, atol=2e-5)
    close(edit.decode(pipeline, latent, **SMALL), x0)


def test_inversion_begins_where_noise_is_visible(pipelines):
    """At the first timestep with sigma >= 0.05, of a cosine schedule in closed form; the last is that of pure noise."""
    at = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    first = int(np.argmax(1 - at[1:] / at[0] >= 0.05**2))
    for pipeline in pipelines.values():
        steps = edit.inversion_steps(pipeline)
        assert len(steps) == 250 and (steps[0], steps[-1]) == (first, 999) and list(steps) == sorted(set(steps))
    assert edit.inversion_steps(pipeline, 2) == (first, 999)
    assert edit.inversion_steps(pipeline, 5000) == tuple(range(first, 1000))


@PIPELINES
def test_encode_embeds_as_the_pipeline_does(pipelines, latents, name):
    pipeline, z = pipelines[name], latents[name].z_image
    pixels = images(3) if name == "karlo" else to_float(resize_center_crop(images(3), 32))
    np.testing.assert_allclose(z, pipeline.encode_image(pixels), atol=1e-5)
    assert latents[name].steps == 2 and np.isfinite(latents[name].x_T).all()


def test_images_of_any_mode_and_size(pipelines, latents):
    """As everywhere in the package: arrays of floats, alpha, grey."""
    first = Image.fromarray(images(1)[0])
    given = [
        first.convert("RGBA"),
        first,
        np.asarray(first) / 255.0,
        first.resize((470, 400), Image.Resampling.NEAREST),
    ]
    found = edit.embed_images(pipelines["unclip"], given, batch_size=1)
    np.testing.assert_allclose(found[:3], np.repeat(latents["unclip"].z_image[:1], 3, axis=0), atol=1e-5)
    assert np.sum(found[3] * found[0]) > 0.9


def test_an_image_does_not_depend_on_its_batch(pipelines, latents):
    pipeline, latent = pipelines["unclip"], latents["unclip"]
    whole = edit.decode(pipeline, latent, eta=0.5, batch_size=3)
    assert whole.shape == (3, HIGH, HIGH, 3) and whole.std() > 3
    close(edit.decode(pipeline, latent.take([2]), eta=0.5, start=2, **WHOLE), whole[2:])
    assert far(edit.decode(pipeline, latent.take([2]), eta=0.5, **WHOLE), whole[2:])
    close(edit.decode(pipeline, latent.take([2, 2]), eta=0.5, noise_index=[2, 2], **WHOLE), whole[[2, 2]])
    before = inversion._decode._cache_size()
    for options in ({"eta": 0.7}, {"seed": 4}, {"start": 9}, {"prompts": "a red star", "eta": 0.3}):
        edit.decode(pipeline, latent, **{"eta": 0.5} | options, **WHOLE)
    assert inversion._decode._cache_size() == before  # other numbers run the same program
    with pytest.raises(NotFiniteError, match=r"the decoder returned values .* for latent\[1\]: "):
        edit.decode(pipeline, latent.replace(z_image=latent.z_image * np.array([[1], [3e38], [1]])), eta=0.5, **WHOLE)


# ---- Several images of each ------------------------------------------------------------------------------------------


def test_without_noise_images_are_those_of_generate(pipelines, latents):
    given = {"embedding": "image", "images": images(3), "batch_size": 1, "seed": 5}
    latent = latents["unclip"].without_noise()
    close(edit.decode(pipelines["unclip"], latent, seed=5, **WHOLE), pipelines["unclip"].generate([""] * 3, **given))
    words = [*CAPTIONS, "a green ring"]
    ours = edit.decode(pipelines["unclip"], latent, prompts=words, seed=5, **WHOLE)
    close(ours, pipelines["unclip"].generate(words, **given))


def test_variations(pipelines, latents):
    """With eta = 0 the image, with more another one; each has its own noise, whatever the other images are."""
    pipeline, latent = pipelines["unclip"], latents["unclip"].take([0])
    itself = edit.decode(pipeline, latent, **SMALL)
    close(edit.variations(pipeline, latent, count=2, eta=0.0, **SMALL), np.stack([itself, itself], axis=1))
    found = edit.variations(pipeline, latent, count=3, eta=0.5, **WHOLE)
    assert far(found[0, 0], found[0, 1]) and far(found[0, 1], found[0, 2])
    two = edit.variations(pipeline, latents["unclip"].take([1, 0]), count=3, eta=0.5, **WHOLE)
    close(edit.variations(pipeline, latent, count=3, eta=0.5, start=1, **WHOLE)[0], two[1])


@PIPELINES
def test_interpolation_has_the_images_at_its_ends(pipelines, latents, name):
    ends = latents[name].take([0]), latents[name].take([1])
    found = edit.interpolate(pipelines[name], *ends, weights=3, **SMALL)[0]
    close(found[[0]], edit.decode(pipelines[name], ends[0], **SMALL))
    close(found[[2]], edit.decode(pipelines[name], ends[1], **SMALL))
    assert far(found[1], found[0]) and far(found[1], found[2])


def test_interpolation_with_fixed_noise(pipelines, latents):
    ends = latents["unclip"].take([0]), latents["unclip"].take([1])
    found = edit.interpolate(pipelines["unclip"], *ends, weights=[0.0, 1.0], noise="fixed", **WHOLE)[0]
    close(found[[1]], edit.decode(pipelines["unclip"], ends[1].without_noise(), **WHOLE))  # noise 0, as of the first


@PIPELINES
def test_text_differences_begin_at_the_image(pipelines, latents, name):
    pipeline, latent = pipelines[name], latents[name].take([0, 1])
    captions = CAPTIONS if name == "unclip" else ("a cat", "a dog")
    found = edit.text_diff(pipeline, latent, *captions, thetas=[0.0, 0.5], **SMALL)
    close(found[:, 0], edit.decode(pipeline, latent, **SMALL))
    before, after = edit.embed_texts(pipeline, captions)
    np.testing.assert_allclose(np.linalg.norm([before, after], axis=1), 1.0, atol=1e-5)
    turned = edit.text_difference(latent.z_image, before, after, 0.5)
    close(found[:, 1], edit.decode(pipeline, latent.replace(z_image=turned), **SMALL))


def test_captions_and_components_of_one_embedding(pipelines, latents):
    latent = latents["unclip"].take([0, 1]).without_noise()
    found = edit.recaption(pipelines["unclip"], latent, CAPTIONS, **WHOLE)
    assert found.shape == (2, 2, HIGH, HIGH, 3) and (found[0, 0] != found[0, 1]).any()
    close(found[1, :1], edit.decode(pipelines["unclip"], latent.take([1]), prompts=CAPTIONS[0], start=1, **WHOLE))
    pca = edit.fit_pca(edit.embed_images(pipelines["unclip"], images(20, seed=3), batch_size=1))
    found = edit.reconstruct(pipelines["unclip"], latent, pca, [1, 4], **WHOLE)
    z = edit.truncated(latent.z_image, pca, 4)
    close(found[:, 1], edit.decode(pipelines["unclip"], BipartiteLatent(z), **WHOLE))


def test_what_clip_takes_images_for(pipelines, latents):
    """The softmax of scaled cosines; the scale is the one that CLIP was trained with."""
    found = edit.label_probabilities(pipelines["unclip"], latents["unclip"].z_image, CAPTIONS)
    scale = np.exp(np.float64(pipelines["unclip"].clip.params["params"]["log_scale"]))
    text = edit.embed_texts(pipelines["unclip"], CAPTIONS)
    weights = np.exp(scale * latents["unclip"].z_image.astype(np.float64) @ text.T)
    np.testing.assert_allclose(found, weights / weights.sum(1, keepdims=True), atol=1e-5)


# ---- Inpainting ------------------------------------------------------------------------------------------------------


def test_inpainting_keeps_what_is_known_and_reads_nothing_else(pipelines):
    side = 4 * HIGH
    given, keep = np.stack(resize_center_crop(images(1), side)), np.ones((side, side), bool)
    keep[:, side // 2 :] = False
    keep[9] = False  # a line of one pixel, in row 2 of the images and in row 1 of the decoder's
    few = WHOLE | {"resample": 2}
    found, small = edit.inpaint(pipelines["unclip"], given, keep, **few), resize_center_crop(given, HIGH)
    rest = HIGH // 2 - 2  # away from the edge, beyond which the filter of the resize reads what is filled in
    close(found[:, 5:, :rest], small[:, 5:, :rest])
    assert far(found[:, 2, :rest], small[:, 2, :rest]) and far(found[:, :, HIGH // 2 :], small[:, :, HIGH // 2 :])
    other = np.where(keep[..., None], given, 255 - given)
    np.testing.assert_array_equal(edit.inpaint(pipelines["unclip"], other, keep, **few), found)
    by_image = [edit.inpaint(pipelines["unclip"], each, keep, embedding="image", **few) for each in (given, other)]
    assert (by_image[0] != by_image[1]).any()


def test_outpainting(pipelines):
    pipeline, known = pipelines["unclip"], resize_center_crop(images(1), HIGH // 2)
    found = edit.outpaint(pipeline, images(1), extent=0.5, place="top right", resample=2, **WHOLE)
    close(found[:, : HIGH // 2, HIGH // 2 :], known)
    assert far(found[:, HIGH // 2 :], np.full_like(found[:, HIGH // 2 :], 128))


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_wrong_arguments(pipelines, latents):
    pipeline, latent, other = pipelines["unclip"], latents["unclip"], pipelines["karlo"]
    encode, decode, one, mask = edit.encode, edit.decode, images(1), np.ones((40, 47), bool)
    pca = edit.fit_pca(latent.z_image)
    narrow = edit.fit_pca(latent.z_image[:, :4])
    for wrong, message in (
        (lambda: encode(cascade(), one), "by an UnCLIP or a Karlo, got a Cascade, which has no image embed"),
        (lambda: encode(other.replace(image=None), one), "this Karlo has no image encoder"),
        (lambda: encode(other.replace(tokenizer=None), one), "has no tokenizer"),
        (lambda: encode(pipeline, one, steps=0), "steps=0 must be at least 1"),
        (lambda: encode(pipeline, one, steps=1), "steps=1 is one timestep, and inversion walks from a first to a last"),
        (lambda: encode(pipeline, one, steps=(999,)), r"steps=\(999,\) is one timestep"),
        (lambda: encode(pipeline, one, steps=2000), "decoder_steps=2000 selects 2000 steps where there are"),
        (lambda: encode(pipeline, one, iterations=0), "iterations=0 must be at least 1"),
        (lambda: encode(pipeline, []), "images must hold at least one image"),
        (lambda: encode(pipeline, one * 3, prompts=["a", "b"]), "prompts must be one caption or one for each of 3"),
        (lambda: decode(pipeline, latent, steps="ddim3"), "steps='ddim3' begin at timestep 668, and the x_T of"),
        (lambda: decode(pipeline, latents["karlo"]), r"z_image must be float32\[N, 16\] for this pipeline, got"),
        (lambda: decode(pipeline, latent.replace(x_T=latent.x_T[:, :4])), r"x_T must be float32\[3, 8, 8, 3\]"),
        (lambda: decode(pipeline, latent.replace(steps=None)), "needs the steps with which it was found"),
        (lambda: decode(pipeline, latent.z_image), "latent must be a BipartiteLatent, as encode returns it"),
        (lambda: decode(pipeline, latent, eta=2.0), r"eta=2.0 must be in \[0, 1\]"),
        (lambda: decode(pipeline, latent, stepps=2), "there is no option 'stepps'"),
        (lambda: decode(pipeline, latent, noise_index=[0]), "noise_index must be 3 integers"),
        (lambda: decode(pipeline, latent.replace(z_image=np.nan * latent.z_image)), r"latent.z_image\[0\] holds NaN"),
        (lambda: decode(pipeline, latent.replace(x_T=np.inf * latent.x_T)), r"latent.x_T\[0\] holds NaN or infinity"),
        (
            lambda: edit.interpolate(pipeline, latent, None),
            "second must be a BipartiteLatent, as encode returns it, got a",
        ),
        (
            lambda: edit.interpolate(pipeline, latent, latent.replace(z_image=-latent.z_image)),
            r"first.z_image\[0\] and second.z_image are opposite",
        ),
        (lambda: edit.variations(pipeline, None), "latent must be a BipartiteLatent, as encode returns it, got a None"),
        (lambda: edit.text_diff(pipeline, None, *CAPTIONS), "latent must be a BipartiteLatent"),
        (lambda: edit.recaption(pipeline, None, CAPTIONS), "latent must be a BipartiteLatent"),
        (lambda: edit.text_diff(pipeline, latent, *CAPTIONS, thetas=["a"]), r"thetas=\['a'\] must be numbers in"),
        (lambda: edit.reconstruct(pipeline, latent, None, [2]), "pca=None must be a Pca, as fit_pca and pca_of return"),
        (lambda: edit.reconstruct(pipeline, latent, pca, 2), "dims=2 must be a sequence of numbers of components"),
        (lambda: edit.reconstruct(pipeline, latent, pca, []), r"dims=\[\] must be a sequence of numbers"),
        (
            lambda: edit.reconstruct(pipeline, latent, narrow, [1]),
            r"z_image must be float32\[N, 4\], got shape \(3, 16\)",
        ),
        (
            lambda: edit.label_probabilities(pipeline, np.ones((1, 4)), CAPTIONS),
            r"z_image must be float32\[N, 16\], got",
        ),
        (lambda: edit.variations(pipeline, latent, count=0), "count=0 must be at least 1"),
        (lambda: edit.interpolate(pipeline, latent, latent.take([0])), "as many first as second latents, got 3 and"),
        (lambda: edit.interpolate(pipeline, latent, latent, weights=[2.0]), r"weights must be numbers in \[0, 1\]"),
        (lambda: edit.interpolate(pipeline, latent, latent.without_noise(), noise="slerp"), "needs the x_T of both"),
        (lambda: edit.text_diff(pipeline, latent, *CAPTIONS[:1] * 2), "the captions have the same text embedding"),
        (lambda: edit.text_diff(pipeline, latent, "a crimson star", ""), r"prompts\[0\] = 'a crimson star'"),
        (lambda: edit.pca_of(pipeline), "this pipeline has no codes of embeddings; fit principal components"),
        (lambda: edit.inpaint(pipeline, one, mask[:4]), r"keep_masks\[0\] is of 4 x 47 pixels, and its image of 40"),
        (lambda: edit.inpaint(pipeline, one, mask, embedding="prior"), "embedding='prior' needs prompts"),
        (lambda: edit.inpaint(pipeline, one, mask, sampler="unipc"), "decoder_sampler='unipc' cannot repeat steps"),
        (lambda: edit.inpaint(pipeline, one, None), "keep_masks must be PIL images or arrays, got None"),
        *[
            (
                lambda place=place: edit.outpaint(pipeline, one, place=place),
                "must be two shares .*, or one of center, left",
            )
            for place in ("middle", None, (0.2,), 0.5, (0.1, 0.2, 0.3))
        ],
        (lambda: edit.outpaint(pipeline, one, place=("a", 0.2)), "place='a' must be a finite number"),
        (lambda: edit.outpaint(pipeline, one, extent=0.01), "extent=0.01 leaves 0 of the 8 pixels of the decoder"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


# ---- python -m ddpm_jax.edit -----------------------------------------------------------------------------------------


@pytest.fixture
def run(call, place, tmp_path):
    """Return run(command, *flags) -> what it said, and the grid."""

    def run(command, *flags, image="images/a.png", pipeline="unclip"):
        given = ["--workdir", place / pipeline, "--out", tmp_path / "out.png", "--batch_size=1"]
        given += ["--image", place / image] if image else []
        status, said, err = call("edit", command, *given, *flags)
        assert status == 0, err
        assert err.splitlines()[-1].startswith("edit: 100%")  # the progress of what was done first ends first
        return said, np.asarray(Image.open(tmp_path / "out.png"))

    return run


def cells(grid, size, rows=1):
    """Return the images of a grid, [rows, columns, ...]; each of their pixels is repeated."""
    scale = -(-96 // size)
    across, down = size * scale + 6, (grid.shape[0] - 6) // rows
    tops, lefts = 6 + down * np.arange(rows), 6 + across * np.arange((grid.shape[1] - 6) // across)
    cut = lambda top, left: grid[top : top + size * scale : scale, left : left + size * scale : scale]
    return np.array([[cut(top, left) for left in lefts] for top in tops])


LOWER = ("--steps=2", "--low_res")


@PIPELINES
def test_commands_of_latents(call, run, place, tmp_path, name):
    """Interpolations end, text differences begin, and variations with eta = 0 are where decode leads."""
    file, size = tmp_path / "latents.safetensors", LOW if name == "unclip" else 16
    flags = ["--workdir", place / name, "--image", place / "images", "--out", file, "--steps=2", "--batch_size=1"]
    status, said, err = call("edit", "encode", *flags)
    assert status == 0 and said.endswith("the latents of 2 images\n"), err
    assert load_latents(file).steps == 2 and load_latents(file).x_T.shape == (2, size, size, 3)
    of = {"image": None, "pipeline": name}
    captions = ["--source", CAPTIONS[0], "--target", CAPTIONS[1]] if name == "unclip" else ["--source=", "--target=a"]
    _, grid = run("text_diff", *LOWER, "--latent", file, *captions, "--theta=0", "--theta=0.3", **of)
    begin, changed = cells(grid, size, 2).swapaxes(0, 1)
    assert far(begin, changed)
    if name == "unclip":
        said, grid = run("decode", *LOWER, "--out_dir", tmp_path / "each", image="images")
        assert said.endswith(f"out.png: 2 images of {size} x {size} pixels\n")
        np.testing.assert_array_equal(cells(grid, size, 2)[:, 1], begin)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "each" / "001_000.png")), begin[1])
        return
    _, grid = run("interpolate", *LOWER, "--latent", file, "--count=3", **of)
    np.testing.assert_array_equal(cells(grid, size)[0, [0, 2]], begin)
    said, grid = run("variations", *LOWER, "--latent", file, "--eta=0", "--count=2", **of)
    np.testing.assert_array_equal(cells(grid, size, 2)[:, 1], begin)
    assert "4 images" in said


def test_commands_of_embeddings(run, place):
    """From random noise, with the pipeline's own sampling."""
    pca = ["--pca", place / "images", "--dims=0", "--dims=1"]
    labels = ["--label", CAPTIONS[0], "--label", CAPTIONS[1]]
    for command, flags in {
        "variations": ["--noise=random", "--count=2"],
        "reconstruct": pca,
        "caption": ["--prompt", CAPTIONS[0], "--prompt", CAPTIONS[1], "--negative_prompt", "a ring"],
        "probe": [*labels, "--degrees=0", "--degrees=60"],
    }.items():
        said, grid = run(command, *flags)
        (row,) = cells(grid, HIGH)
        assert len(row) == 3 and (row[1] != row[2]).any(), command
    assert said.count("a red circle ") == 2 and "image 0, 60 degrees: a red circle " in said


def test_inpaint_and_outpaint(run, place):
    said, grid = run("inpaint", "--mask", place / "mask.png", "--resample=2")
    given, found = cells(grid, HIGH)[0]
    assert "out.png: 1 image of" in said and np.abs(given[:, :7].astype(int) - found[:, :7]).max() <= 1
    assert far(given[:, 10:], found[:, 10:])
    said, _ = run("outpaint", "--extent=0.5", "--place", "top left", "--resample=2")
    assert "1 image of" in said


@pytest.mark.parametrize(
    "flags,parts",
    [
        ([], ["a command is needed; there are encode, decode, variations"]),
        (["paint"], ["'paint' is no command; there are encode, decode"]),
        (["decode"], ["--image is needed, a file or a folder of images, or --latent"]),
        (["inpaint", "--image=a.png", "--theta=0.2"], ["--theta is not used by inpaint"]),
        (["encode", "--image=a.png", "--latent=b"], ["--latent is not used by encode"]),
        (["decode", "--image=a.png", "--latent=b"], ["--image and --latent both say what is changed"]),
        (["decode", "--latent=nowhere", "--out=a.png"], ["--latent=nowhere does not exist"]),
        (["decode", "--image={place}/images", "--out=a.jpg"], ["--out=a.jpg must end in .png"]),
        (["encode", "--image={place}/images", "--out=a.png"], ["--out=a.png must end in .safetensors"]),
        (["decode", "--image=nowhere.png", "--out={out}"], ["--image=nowhere.png does not exist"]),
        (["decode", "--image={place}/unclip/pipeline.json", "--out={out}"], ["not that of a JPEG, PNG, WebP or GIF"]),
        (["decode", "--image={place}/ddpm", "--out={out}"], ["has no image, no file that ends in .gif"]),
        (["decode", "--image={place}/images", "--out={out}", "--workdir={place}/ddpm"], ["got a Cascade, which has"]),
        (["variations", "--image={place}/images", "--out={out}", "--eta=2"], ["--eta=2 must be in [0, 1]"]),
        (["variations", "--image={place}/images", "--out={out}", "--eta=much"], ["--eta=much is not a number"]),
        (["decode", "--image={place}/images", "--out={out}", "--eta=0", "--eta=1"], ["--eta is given 2 times"]),
        (["text_diff", "--image={place}/images", "--out={out}", "--source="], ["--source and --target are needed"]),
        (["interpolate", "--image={place}/mask.png", "--out={out}"], ["interpolate needs at least two images"]),
        (["caption", "--image={place}/images", "--out={out}"], ["--prompt is needed, a caption"]),
        (["encode", "--image={place}/images", "--out={file}", "--scale=3"], ["--scale is not used by encode, whose"]),
        (
            ["encode", "--image={place}/images", "--out={file}", "--upsampler_steps=9"],
            ["--upsampler_steps is not used"],
        ),
        (["encode", "--image={place}/images", "--out={file}", "--steps=1"], ["steps=1 is one timestep, and inversion"]),
        (["probe", "--image={place}/images", "--out={out}", "--iterations=2"], ["--iterations is not used: no image"]),
        (
            ["decode", "--image={place}/images", "--out={out}", "--prior_steps=7"],
            ["--prior_steps is not used by decode"],
        ),
        (
            ["decode", "--image={place}/images", "--out={out}", "--low_res", "--upsampler_steps=7"],
            ["--upsampler_steps is not used by decode with --low_res"],
        ),
        (
            ["decode", "--image={place}/images", "--out={out}", "--negative_prompt=a ring"],
            ["and nothing is guided; add"],
        ),
        (
            ["decode", "--image={place}/images", "--out={out}", "--scale=2", *["--negative_prompt=a ring"] * 3],
            ["--negative_prompt is given 3 times; give one caption or one for each of 2 images"],
        ),
        (
            ["variations", "--image={place}/images", "--out={out}", "--start=2147483646"],
            ["--start=2147483646 must be at most 536870909"],  # so that all of 4 * (start + 2) are below 2**31
        ),
        (["decode", "--image={place}/images", "--out={out}", "--start=99999999999"], ["must be at most 2147483645"]),
        (
            ["text_diff", "--image={place}/images", "--out={out}", "--source=a red circle", "--target=a red circle"],
            ["--source and --target are the same caption"],
        ),
        (
            ["reconstruct", "--image={place}/images", "--out={out}", "--pca={place}/images", "--dims=2"],
            ["--dims=2 must be at most 1, the number of components"],
        ),
        (
            ["reconstruct", "--image={place}/images", "--out={out}", "--pca={place}/mask.png"],
            ["--pca={place}/mask.png has one image, and principal components need at least two"],
        ),
        (["inpaint", "--image={place}/images", "--out={out}"], ["--mask is needed, an image that is white where"]),
        (
            ["reconstruct", "--image={place}/images", "--out={out}"],
            ["--pca is needed, a folder of images to fit"],
        ),
    ],
)
def test_errors(call, place, tmp_path, flags, parts):
    words = [flag.format(place=place, out=tmp_path / "out.png", file=tmp_path / "a.safetensors") for flag in flags]
    parts = [part.format(place=place) for part in parts]
    if "--workdir" not in " ".join(words):
        words += ["--workdir", str(place / "unclip"), "--batch_size=1"]
    assert_one_sentence(call("edit", *words), 2, *parts)  # and no progress: nothing was computed
    assert not (tmp_path / "out.png").exists()
