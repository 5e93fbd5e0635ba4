"""Conditions: what the network is given, at which rates and levels, and what frozen networks compute for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit, normal, random_params
from test_tasks import (
    CLIP_NETWORK,
    DIFFUSION,
    SIZE,
    B,
    D,
    L,
    Recorder,
    frozen_clip,
    images,
    make_batch,
    unet,
)

from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.clip import CLIP, normalize
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.training.tasks import (
    Captions,
    DiffusionTask,
    Embeddings,
    ImageEmbedding,
    Images,
    Labels,
    LowResolution,
    Tokens,
)
from ddpm_jax.training.tasks.keys import named_keys

KEY = jax.random.key(3)


# ---- Low-resolution images -------------------------------------------------------------------------------------------


def enlarged(n, size):
    """(x0, low): images whose average over 2 x 2 pixels is `low`, of unit variance."""
    low = normal(0, n, size, size, 3)
    return jnp.repeat(jnp.repeat(low, 2, axis=1), 2, axis=2), np.asarray(low, np.float64)


def test_the_level_that_the_network_gets_is_the_deviation_of_the_noise_that_was_added():
    """Measured over 3072 numbers an example, of which the standard deviation is known to 1.3 %."""
    x0, low = enlarged(40, 32)
    given = LowResolution(32, 2, blur_rate=0.0, noise=0.4, noise_level_input=True)({}, x0, KEY)
    level = np.asarray(given["noise_level"])
    assert level.shape == (40,) and level.min() >= 0 and 0.3 < level.max() < 0.4
    added = (np.asarray(given["low_res"]) - low).reshape(40, -1)
    np.testing.assert_allclose(added.std(1), level, rtol=0.06, atol=1e-5)
    assert np.abs(added.mean(1) / level).max() < 0.09


def test_preserving_the_variance_keeps_that_of_images_of_unit_variance():
    """given = sqrt(1 - level^2) low + level noise: variance 1, and covariance sqrt(1 - level^2) with the image."""
    x0, low = enlarged(40, 32)
    options = {"blur_rate": 0.0, "noise": 1.0, "noise_level_input": True}
    given = LowResolution(32, 2, variance_preserving=True, **options)({}, x0, KEY)
    level, image = np.asarray(given["noise_level"]), np.asarray(given["low_res"]).reshape(40, -1)
    assert level.max() > 0.9 and level.min() < 0.1
    np.testing.assert_allclose(image.var(1), 1.0, atol=0.11)
    low = low.reshape(40, -1)
    np.testing.assert_allclose((image * low).mean(1) / (low**2).mean(1), np.sqrt(1 - level**2), atol=0.06)
    growing = LowResolution(32, 2, **options)({}, x0, KEY)
    np.testing.assert_array_equal(growing["noise_level"], level)
    np.testing.assert_allclose(np.asarray(growing["low_res"]).reshape(40, -1).var(1), 1 + level**2, rtol=0.11)


def test_in_sampling_the_level_is_zero_and_the_image_is_the_average():
    x0, low = enlarged(4, 8)
    for preserving in (False, True):
        condition = LowResolution(8, 2, 0.6, 1.0, 0.5, variance_preserving=preserving, noise_level_input=True)
        given = condition({}, x0, None)
        np.testing.assert_array_equal(given["noise_level"], np.zeros(4, np.float32))
        np.testing.assert_allclose(given["low_res"], low, atol=1e-6)
        assert not np.allclose(condition({}, x0, KEY)["low_res"], low, atol=1e-2)


def test_without_the_input_the_network_gets_no_level():
    x0, _ = enlarged(4, 8)
    condition = LowResolution(8, 2, noise=0.5)
    assert set(condition({}, x0, None)) == set(condition({}, x0, KEY)) == {"low_res"}


def test_a_network_uses_the_level():
    """The loss of an upsampler with the input reaches its embedding, which one without does not have."""
    network = Upsampler(unet(attention=(), mid_attention=False), noise_level_input=True)
    condition = LowResolution(SIZE // 2, 2, noise=0.5, noise_level_input=True)
    task = DiffusionTask(model=network, diffusion=DIFFUSION, x0=Images(SIZE), conditions=(condition,))
    batch = {"image": images(4)}
    params = random_params(task.init, batch)
    grads = fast_jit(jax.grad(lambda params: task.loss(params, batch, KEY)[0].sum()))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["params"]["noise_level"]))
    plain = LowResolution(SIZE // 2, 2, noise=0.5)
    wrong = DiffusionTask(model=network, diffusion=DIFFUSION, x0=Images(SIZE), conditions=(plain,))
    with pytest.raises(ValueError, match="noise_level is an input if, and only if, noise_level_input=True"):
        jax.eval_shape(wrong.init, KEY, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1}, "factor=1 of enlarging must be a power of two, at least 2"),
        ({"factor": 6}, "factor=6 of enlarging must be a power of two, at least 2"),
        ({"factor": 0}, "factor=0 of enlarging"),
        ({"factor": -2}, "factor=-2 of enlarging"),
        ({"blur_sigma": 0.0}, "blur_sigma=0.0 must be positive"),
        ({"blur_rate": 1.5}, "blur_rate=1.5 must lie between 0 and 1"),
        ({"noise": -0.1}, "noise=-0.1 must lie between 0 and 1"),
        ({"noise": 1.1}, "noise=1.1 must lie between 0 and 1"),
    ],
)
def test_ranges_of_low_resolution(options, message):
    with pytest.raises(ValueError, match=message):
        LowResolution(**({"size": 8, "factor": 2} | options))


@pytest.mark.parametrize("make", [lambda rate: Labels(3, rate), lambda rate: Captions(L, rate), ImageEmbedding])
@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_lie_between_0_and_1(make, rate):
    with pytest.raises(ValueError, match=f"drop={rate} must lie between 0 and 1"):
        make(rate)


def test_copies_from_the_batch_take_the_place_of_averages():
    x0, _ = enlarged(3, 4)
    copies = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    condition = LowResolution(4, 2, blur_rate=0.0, noise=0.5, noise_level_input=True, entry="low_res")
    given = condition({"low_res": copies}, x0, None)
    np.testing.assert_allclose(given["low_res"], copies / 127.5 - 1, atol=1e-6)
    # In training the same augmentation is added to them.
    plain = LowResolution(4, 2, blur_rate=0.0, noise=0.5, noise_level_input=True)
    low = np.asarray(plain.low_res(x0))
    one, other = (c({"low_res": copies}, x0, KEY) for c in (condition, plain))
    np.testing.assert_array_equal(one["noise_level"], other["noise_level"])
    np.testing.assert_allclose(one["low_res"] - given["low_res"], other["low_res"] - low, atol=1e-5)
    with pytest.raises(ValueError, match=r"low_res must be uint8\[3, 4, 4, 3\], the images smaller by factor=2"):
        condition({"low_res": copies[:, :2]}, x0, None)
    with pytest.raises(
        ValueError, match="mix_colours=True changes the colours of the images and not those of 'low_res'"
    ):
        DiffusionTask(model=Recorder(), diffusion=DIFFUSION, x0=Images(8, mix_colours=True), conditions=(condition,))


# ---- Labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_dropped_to_the_null_class_at_their_rate():
    n, classes = 4000, 10
    labels = np.arange(n) % classes
    batch, x0 = {"label": jnp.asarray(labels, jnp.uint8)}, jnp.zeros((n, 1))
    y = np.asarray(Labels(classes, drop=0.2)(batch, x0, KEY)["y"])
    assert y.dtype == np.int32 and ((y == labels) | (y == classes)).all()
    assert abs((y == classes).mean() - 0.2) < 4 * np.sqrt(0.16 / n)
    # In sampling, and with a rate of 0, none is dropped.
    for drop, key in ((0.2, None), (0.0, KEY)):
        np.testing.assert_array_equal(Labels(classes, drop=drop)(batch, x0, key)["y"], labels)
    assert (np.asarray(Labels(classes, drop=1.0)(batch, x0, KEY)["y"]) == classes).all()


# ---- Null arguments --------------------------------------------------------------------------------------------------


def arguments_and_null(*conditions):
    task = DiffusionTask(model=Recorder(), diffusion=DIFFUSION, x0=Images(SIZE), conditions=conditions)
    batch = make_batch() | {"label": jnp.arange(B, dtype=jnp.int32) % 3}
    task.eval_loss({}, batch, KEY)
    arguments = task.model.options
    return arguments, task.null_arguments(arguments)


def test_null_arguments_drop_all_conditions_but_the_low_resolution_image():
    low = LowResolution(SIZE // 2, 2)
    captions = Captions(L, 0.1, own_tokens=True)
    arguments, null = arguments_and_null(Labels(3, drop=0.1), ImageEmbedding(0.1), captions, low)
    assert (
        set(null)
        == set(arguments)
        == {*("y", "z_image", "keep_image", "z_text", "text", "text_mask", "keep_text", "low_res")}
    )
    np.testing.assert_array_equal(null["y"], np.full(B, 3))
    for name in ("keep_image", "keep_text"):
        assert arguments[name].all() and not null[name].any()
    for name in ("low_res", "z_image", "z_text", "text", "text_mask"):
        np.testing.assert_array_equal(null[name], arguments[name])


@pytest.mark.parametrize(
    "conditions",
    [
        (),
        (LowResolution(SIZE // 2, 2),),
        (Labels(3),),
        (Labels(3), LowResolution(SIZE // 2, 2)),
        (ImageEmbedding(drop=0.1), Captions(L, drop=0.0, own_tokens=True)),
        (Labels(3, drop=0.5), ImageEmbedding(drop=0.0)),
    ],
    ids=lambda conditions: "+".join(f"{c.name}" for c in conditions) or "none",
)
def test_there_is_no_null_condition_if_one_cannot_be_dropped_or_none_is_there(conditions):
    assert arguments_and_null(*conditions)[1] is None
    guided = {"model": Recorder(), "diffusion": DIFFUSION, "x0": Images(SIZE), "conditions": conditions}
    message = (
        r"\.drop=0\.0, and sampling\.scale=2\.0 guides away from a null|no condition that is dropped, and sampling"
    )
    with pytest.raises(ValueError, match=message):
        DiffusionTask(**guided, sampling=Sampling(steps=2, scale=2.0))
    DiffusionTask(**guided, sampling=Sampling(steps=2, scale=1.0))  # which does not guide


# ---- Frozen networks -------------------------------------------------------------------------------------------------


def encoded(frozen, batch, image):
    params = frozen["clip"].params
    z_text, _ = CLIP_NETWORK.apply(params, batch["tokens"], batch["mask"], method=CLIP.encode_text)
    z_image = CLIP_NETWORK.apply(params, image.astype(jnp.float32) / 127.5 - 1, method=CLIP.encode_image)
    return normalize(z_image), normalize(z_text)


def decoder_task(**options):
    conditions = (ImageEmbedding(drop=0.1), Captions(L, drop=0.1, own_tokens=True))
    return DiffusionTask(model=Recorder(), diffusion=DIFFUSION, x0=Images(SIZE), conditions=conditions, **options)


def test_embeddings_are_computed_by_the_frozen_clip_where_they_are_missing():
    task, frozen, batch = decoder_task(), frozen_clip(), make_batch()
    bare = {name: batch[name] for name in ("image", "tokens", "mask")}
    z_image, z_text = encoded(frozen, batch, batch["image"])
    found = fast_jit(task.prepare)(frozen, bare)
    assert set(found) == {"image", "tokens", "mask", "z_image", "z_text"}
    np.testing.assert_allclose(found["z_image"], z_image, atol=1e-5)
    np.testing.assert_allclose(found["z_text"], z_text, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["z_image"], axis=-1), 1.0, rtol=1e-5)
    # Those that are there stay, and the losses are the same.
    given = bare | {"z_image": found["z_image"], "z_text": found["z_text"]}
    kept = task.prepare({}, given)
    assert kept["z_image"] is given["z_image"] and kept["z_text"] is given["z_text"]
    np.testing.assert_array_equal(task.loss({}, found, KEY)[0], task.loss({}, kept, KEY)[0])


def test_the_prior_s_embeddings_are_computed_too():
    frozen, batch = frozen_clip(), make_batch()
    task = DiffusionTask(
        model=Recorder(), diffusion=DIFFUSION, x0=Embeddings(D, 2.0), conditions=(Captions(L, drop=0.1),)
    )
    z_image, z_text = encoded(frozen, batch, batch["image"])
    found = fast_jit(task.prepare)(frozen, {name: batch[name] for name in ("image", "tokens", "mask")})
    np.testing.assert_allclose(task.x0(found), 2.0 * z_image, atol=1e-5)
    np.testing.assert_allclose(found["z_text"], z_text, atol=1e-5)
    assert found["hidden"].shape == (B, L, 8)


def test_clip_image_is_read_at_its_own_size():
    """The decoder's image is of another size; CLIP's copy is not resized, and is not kept."""
    task, frozen, batch = decoder_task(), frozen_clip(), make_batch()
    small, large = images(B, SIZE // 2, seed=4), images(B, SIZE, seed=5)
    bare = {"image": small, "clip_image": large, "tokens": batch["tokens"], "mask": batch["mask"]}
    found = fast_jit(task.prepare)(frozen, bare)
    np.testing.assert_allclose(found["z_image"], encoded(frozen, batch, large)[0], atol=1e-5)
    np.testing.assert_array_equal(found["image"], small)
    assert "clip_image" not in found
    # Without one, the image is resized to the size that CLIP reads.
    resized = jax.image.resize(small.astype(jnp.float32), (B, SIZE, SIZE, 3), "cubic")
    expected = encoded(frozen, batch, resized)[0]
    without = {name: value for name, value in bare.items() if name != "clip_image"}
    np.testing.assert_allclose(fast_jit(task.prepare)(frozen, without)["z_image"], expected, atol=1e-5)


# ---- Keys ------------------------------------------------------------------------------------------------------------


def test_named_keys_do_not_depend_on_the_other_names_or_their_order():
    a, b, c = named_keys(KEY, "noise", "blur", "dropout")
    assert named_keys(KEY, "blur", "noise") == (b, a)
    (alone,) = named_keys(KEY, "dropout")
    assert alone == c and len({tuple(map(int, jax.random.key_data(key))) for key in (a, b, c)}) == 3
    assert named_keys(jax.random.key(4), "noise")[0] != a


def test_a_condition_that_is_added_leaves_all_other_randomness_as_it_is():
    batch = make_batch() | {"label": jnp.arange(B, dtype=jnp.int32) % 3}
    low, seen = LowResolution(SIZE // 2, 2, noise=0.5, noise_level_input=True), []
    for conditions in ((low,), (Labels(3, drop=0.5), low), (low, ImageEmbedding(drop=0.5), Labels(3, drop=0.5))):
        task = DiffusionTask(
            model=Recorder(), diffusion=DIFFUSION, x0=Images(SIZE, mix_colours=True), conditions=conditions
        )
        task.loss({}, batch, KEY)
        seen.append((task.model.xt, task.model.t, task.model.options))
    for xt, t, options in seen[1:]:
        np.testing.assert_array_equal(xt, seen[0][0])
        np.testing.assert_array_equal(t, seen[0][1])
        for name in ("low_res", "noise_level"):
            np.testing.assert_array_equal(options[name], seen[0][2][name])
        assert options["rngs"]["dropout"] == seen[0][2]["rngs"]["dropout"]
    np.testing.assert_array_equal(seen[1][2]["y"], seen[2][2]["y"])


# ---- Captions as tokens ----------------------------------------------------------------------------------------------


def test_dropped_tokens_are_padding_alone():
    condition, batch = Tokens(CompactTokenizer(("a", "b")), L, drop=0.5), make_batch(400)
    given = condition(batch, batch["image"], KEY)
    np.testing.assert_array_equal(given["tokens"], batch["tokens"])
    kept = np.asarray(given["mask"]).any(1)
    np.testing.assert_array_equal(np.asarray(given["mask"])[kept], np.asarray(batch["mask"])[kept])
    assert abs(kept.mean() - 0.5) < 4 * 0.5 / 20
    complete = condition(batch, batch["image"], None)
    np.testing.assert_array_equal(complete["mask"], batch["mask"])
    assert not np.asarray(condition.null(complete)["mask"]).any()
    assert Tokens(CompactTokenizer(("a", "b")), L).null(complete) is None
