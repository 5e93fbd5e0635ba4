"""Tasks: losses per example that reach every parameter, and conditions that are dropped at their rates."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_networks import fast_jit, normal, random_params

from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.losses import min_snr
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.models.clip import CLIP, VisionTransformer, normalize
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import RecurrentTextEncoder, TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.parallel.mesh import make_mesh, replicated, shard_batch
from ddpm_jax.storage.model_directory import Model
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import make_train_step
from ddpm_jax.training.tasks import (
    Captions,
    ContrastiveTask,
    DiffusionTask,
    Embeddings,
    ImageEmbedding,
    Images,
    LowResolution,
)
from ddpm_jax.training.tasks.conditions import gaussian_blur3

B, L, D, VOCAB, SIZE = 8, 5, 6, 11, 8
DIFFUSION = Diffusion("cosine", 100)
PROCESS = DIFFUSION.process
CLIP_NETWORK = CLIP(VisionTransformer(SIZE, 4, 8, 1, 2), TextEncoder(VOCAB, L, 8, 1, 2), D)
CONTRASTIVE = ContrastiveTask(CLIP_NETWORK, CompactTokenizer(("a", "b")))
LENGTHS = np.arange(B) % 4 + 2


def images(n=B, size=SIZE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)), jnp.uint8)


def make_batch(n=B):
    rng = np.random.default_rng(1)
    mask = np.arange(L) < np.resize(LENGTHS, n)[:, None]
    return {
        "image": images(n),
        "tokens": jnp.asarray(rng.integers(1, VOCAB, (n, L)) * mask, jnp.int32),
        "mask": jnp.asarray(mask),
        "z_image": normalize(normal(2, n, D)),
        "z_text": normalize(normal(3, n, D)),
    }


def unet(out_channels=3, channel_mult=(1,), attention=(SIZE,), **options):
    return UNet(16, out_channels, channel_mult, 1, attention, head_channels=8, groups=4, **options)


def frozen_clip():
    return {"clip": Model(random_params(CONTRASTIVE.init, make_batch()), CLIP_NETWORK)}


def make_task(name, **options):
    """Return (task, frozen models)."""
    if name == "clip":
        return CONTRASTIVE, None
    if name == "upsampler":
        return (
            DiffusionTask(
                model=Upsampler(unet(attention=(), mid_attention=False)),
                diffusion=DIFFUSION.replace(prediction="v"),
                x0=Images(2 * SIZE),
                conditions=(LowResolution(SIZE, 2, noise=0.1),),
                weighting=min_snr(5.0, "v"),
                **options,
            ),
            None,
        )
    own = name.endswith("own text")
    captions, frozen = Captions(L, drop=0.5, own_tokens=own), None if own else frozen_clip()
    if name.startswith("prior"):
        encoder = TextEncoder(VOCAB, L, 8, 1, 2, name="text_encoder") if own else None
        task = DiffusionTask(
            model=DiffusionPrior(D, L, 8, 2, 2, encoder),
            diffusion=DIFFUSION.replace(prediction="x0"),
            x0=Embeddings(D, 2.0),
            conditions=(captions,),
        )
        return task, frozen
    if name == "decoder":
        network, loss = Decoder(unet(attention=(), dropout=0.1), D, 8), {"weighting": min_snr(5.0, "v")}
        diffusion = DIFFUSION.replace(prediction="v")
    else:
        network = Decoder(
            unet(6, (1, 2), (4,), modulate=True),
            D,
            8,
            text_embedding=False,
            word_vectors=VOCAB,
            cond_map_channels=3,
            cond_map_heads=2,
            text_encoder=RecurrentTextEncoder(VOCAB, 8, name="text_encoder"),
        )
        diffusion, loss = DIFFUSION.replace(variance="learned_range"), {"objective": "hybrid"}
    conditions = (ImageEmbedding(drop=0.5), captions)
    return DiffusionTask(model=network, diffusion=diffusion, x0=Images(SIZE), conditions=conditions, **loss), frozen


def prepared(task, frozen, batch):
    return batch if frozen is None else task.prepare(frozen, batch)


TASKS = ["clip", "prior own text", "decoder", "decoder hybrid own text", "upsampler"]


@pytest.mark.parametrize("name", ["clip", "decoder"])
def test_a_step_is_the_same_on_one_device_and_on_eight(name):
    """CLIP compares images on one device with captions on others; the decoder's frozen tower runs before the step."""
    results, tx = [], optax.sgd(0.1)
    for devices in (jax.devices()[:1], jax.devices()):
        (task, frozen), mesh = make_task(name), make_mesh({"data": -1}, devices=devices)
        batch = shard_batch(jax.device_get(make_batch()), mesh)
        if frozen is not None:
            batch = fast_jit(task.prepare)(jax.device_put(frozen, replicated(mesh)), batch)
        state = create_state(task, tx, jax.random.key(0), mesh, batch)
        step = fast_jit(make_train_step(task, tx, ema_decay=0.9))
        results.append(jax.device_get(step(state, batch, jax.device_put(jax.random.key(1), replicated(mesh)))))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    before = jax.tree.leaves(jax.device_get(state.params))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, jax.tree.leaves(results[0][0].params), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_one_of_every_example_and_reaches_every_parameter(name):
    """The upsampler is given crops: half of its images' size."""
    task, frozen = make_task(name)
    batch = make_batch()
    example = prepared(task, frozen, batch)
    params = random_params(task.init, example)

    def total(params, batch, key):
        loss, aux = task.loss(params, prepared(task, frozen, batch), key)
        return loss.sum(), (loss, aux)

    grads, (loss, aux) = fast_jit(jax.grad(total, has_aux=True))(params, batch, jax.random.key(0))
    assert loss.shape == (B,) and loss.dtype == jnp.float32
    assert np.isfinite(loss).all() and (loss > 0).all() and len(np.unique(loss)) == B
    assert all(value.shape in ((), (B,)) for value in aux.values())
    assert ("vlb" in aux) == ("hybrid" in name)
    sizes = {jax.tree_util.keystr(path): np.abs(g).max() for path, g in jax.tree_util.tree_leaves_with_path(grads)}
    assert all(np.isfinite(size) for size in sizes.values())
    # The noise of float32 in a gradient that is zero is below this.
    dead = {path: size for path, size in sizes.items() if size < 1e-5 * max(sizes.values())}
    assert not dead
    assert jax.tree.structure(grads) == jax.tree.structure(jax.eval_shape(task.init, jax.random.key(0), example))


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_prepare_adds_the_hidden_states_of_the_frozen_text_tower(name):
    (task, frozen), batch = make_task(name), make_batch()
    found = fast_jit(task.prepare)(frozen, batch)
    assert set(found) == {*batch, "hidden"}
    _, hidden = CLIP_NETWORK.apply(frozen["clip"].params, batch["tokens"], batch["mask"], method=CLIP.encode_text)
    np.testing.assert_allclose(found["hidden"], hidden, atol=1e-5)
    x0 = task.x0(found)
    np.testing.assert_array_equal(task.conditions[-1](found, x0, None)["text"], found["hidden"])
    own, nothing = make_task(f"{name} own text" if name == "prior" else "decoder hybrid own text")
    assert nothing is None
    np.testing.assert_array_equal(own.conditions[-1](batch, x0, None)["text"], batch["tokens"])


class Recorder:
    """A network that records what it was given and answers with zeros."""

    def __init__(self):
        self.xt, self.t, self.options = None, None, None

    def apply(self, params, xt, t, **options):
        self.xt, self.t, self.options = xt, t, options
        return jnp.zeros_like(xt)


def decoder_task(network, *, drop_image=0.1, drop_text=0.5, size=SIZE, **options):
    conditions = (ImageEmbedding(drop=drop_image), Captions(L, drop=drop_text, own_tokens=True))
    return DiffusionTask(model=network, diffusion=DIFFUSION, x0=Images(size), conditions=conditions, **options)


def drops(seed, n=4000):
    network = Recorder()
    batch = make_batch(n) | {"image": jnp.zeros((n, 1, 1, 3), jnp.uint8)}
    decoder_task(network, size=1).loss({}, batch, jax.random.key(seed))
    return (np.asarray(network.options[name]) for name in ("keep_image", "keep_text"))


def test_images_and_captions_are_dropped_at_their_rates_and_independently():
    """The expected counts are products of the rates: 0.1 and 0.5, so that 0.05 see the caption without the image."""
    image, text = drops(0)
    n = len(image)
    expected = n * np.array([[0.45, 0.45], [0.05, 0.05]])
    counts = np.array([[np.sum((image == i) & (text == j)) for j in (True, False)] for i in (True, False)])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    other_image, other_text = drops(1)
    assert (image != other_image).any() and (text != other_text).any()


@pytest.mark.parametrize("without,kept", [("z_image", ("hidden", "z_text")), ("caption", ("z_image",))])
def test_a_network_trained_without_a_condition_never_sees_it(without, kept):
    """In its loss, in evaluations and in samples: another condition changes no bit, and the others still matter."""
    image, captions = ImageEmbedding(float(without == "z_image")), Captions(L, drop=float(without == "caption"))
    network = Decoder(unet(attention=()), D, 8)
    task = DiffusionTask(model=network, diffusion=DIFFUSION, x0=Images(SIZE), conditions=(image, captions))
    batch = make_batch() | {"hidden": normal(4, B, L, 8)}
    other = {"z_image": batch["z_text"], "z_text": batch["z_image"], "hidden": normal(5, B, L, 8)}
    params, key = random_params(task.init, batch), jax.random.key(0)
    run = fast_jit(lambda batch: (task.loss(params, batch, key)[0], task.eval_loss(params, batch, key)[0]))
    before = run(batch)
    dropped = {name: other[name] for name in other if name not in kept}
    for a, b in zip(before, run(batch | dropped)):
        np.testing.assert_array_equal(a, b)
    for name in kept:
        for a, b in zip(before, run(batch | {name: other[name]})):
            assert (a != b).all(), name


def test_dropout_is_on_in_training_and_the_conditions_arrive_where_they_belong():
    network, batch = Recorder(), make_batch()
    decoder_task(network).loss({}, batch, jax.random.key(0))
    assert network.options["train"] is True and set(network.options["rngs"]) == {"dropout"}
    assert network.xt.shape == (B, SIZE, SIZE, 3) and network.t.shape == (B,)
    for argument, name in {"z_image": "z_image", "z_text": "z_text", "text": "tokens", "text_mask": "mask"}.items():
        np.testing.assert_array_equal(network.options[argument], batch[name])
    decoder_task(network).eval_loss({}, batch, jax.random.key(0))
    assert set(network.options) == {"z_image", "keep_image", "z_text", "text", "text_mask", "keep_text"}
    assert network.options["keep_image"].all() and network.options["keep_text"].all()


def test_the_network_receives_scaled_timesteps():
    plain, scaled = Recorder(), Recorder()
    for network, options in ((plain, {}), (scaled, {"timestep_scale": 0.25})):
        task = decoder_task(network, **options)
        task.loss({}, make_batch(), jax.random.key(0))
        assert task.metadata().get("timestep_scale") == options.get("timestep_scale")
    np.testing.assert_allclose(scaled.t, 0.25 * plain.t)
    with pytest.raises(ValueError, match="timestep_scale=0.0 must be positive"):
        decoder_task(plain, timestep_scale=0.0)


def test_timesteps_are_drawn_by_importance():
    """With a history that favours two steps almost only those are drawn, and the weights keep the mean over all."""
    network = Recorder()
    task = decoder_task(network, timesteps="importance", size=1)
    assert task.extra_state.losses.shape == (PROCESS.num_steps, 10)
    losses = jnp.full((PROCESS.num_steps, 10), 1e-6).at[jnp.array([3, 40])].set(1.0)
    history = task.extra_state.replace(losses=losses, counts=jnp.full(PROCESS.num_steps, 10))
    n = 400
    batch = make_batch(n) | {"image": jnp.zeros((n, 1, 1, 3), jnp.uint8)}
    loss, metrics = task.loss({}, batch, jax.random.key(0), history)
    t, unweighted = metrics["aux"]
    np.testing.assert_array_equal(network.t, PROCESS.timestep_map[t])
    assert np.isin(t, (3, 40)).mean() > 0.99
    p = 0.999 / 2 + 0.001 / PROCESS.num_steps
    seen = np.isin(t, (3, 40))
    np.testing.assert_allclose(loss[seen], unweighted[seen] / (PROCESS.num_steps * p), rtol=1e-3)
    factor = np.asarray(loss) / np.asarray(unweighted)
    plain = decoder_task(network, timesteps="uniform", size=1)
    assert plain.extra_state is None
    np.testing.assert_allclose(metrics["mse"], factor * unweighted, rtol=1e-5)  # simple: the loss is the squared error
    for wrong, given in ((task, ()), (plain, (history,))):
        with pytest.raises(ValueError, match="timesteps='(importance|uniform)' with (no|an) extra_state"):
            wrong.loss({}, batch, jax.random.key(0), *given)
    counts = task.update_extra_state(history, metrics["aux"]).counts
    np.testing.assert_array_equal(counts - 10, np.bincount(t, minlength=PROCESS.num_steps))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timesteps": "often"}, "timesteps='often' must be one of 'uniform', 'stratified', 'importance'"),
        ({"objective": "sum"}, "objective='sum' must be one of 'simple', 'hybrid', 'vlb'"),
        ({"objective": "hybrid"}, "objective='hybrid'.*variance"),
        ({"sampling": Sampling("euler")}, "sampler='euler' must be one of"),
        ({"sampling": Sampling(steps=101)}, "101"),
    ],
)
def test_a_task_that_cannot_work_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        decoder_task(Recorder(), **options)


def test_stratified_timesteps_cover_the_process():
    """In the loss if it is chosen, and in every evaluation."""
    network = Recorder()
    decoder_task(network, timesteps="stratified").loss({}, make_batch(10), jax.random.key(0))
    # 10 of 100 steps, evenly spread up to rounding.
    assert set(np.diff(np.sort(network.t))) <= {9, 10, 11}
    decoder_task(network).eval_loss({}, make_batch(10), jax.random.key(0))
    assert set(np.diff(np.sort(network.t))) <= {9, 10, 11}


def test_groups_are_one_batch_of_all_their_pairs():
    task, batch = CONTRASTIVE, make_batch()
    groups = {name: batch[name].reshape(2, B // 2, *batch[name].shape[1:]) for name in ("image", "tokens", "mask")}
    params = random_params(task.init, batch)
    run = fast_jit(lambda batch: task.loss(params, batch, jax.random.key(0))[0])
    np.testing.assert_array_equal(run(groups), run(batch))


def test_the_prior_drops_captions_and_its_loss_is_the_error_of_scaled_embeddings():
    n, network = 4000, Recorder()
    batch = make_batch(n)
    task = DiffusionTask(
        model=network,
        diffusion=DIFFUSION.replace(prediction="x0"),
        x0=Embeddings(D, scale=17.2),
        conditions=(Captions(L, drop=0.2, own_tokens=True),),
    )
    loss, _ = task.loss({}, batch, jax.random.key(0))
    # The network answers zero, so the error is the scaled embedding: unit length, times 17.2, mean over dimensions.
    np.testing.assert_allclose(loss, 17.2**2 / D, rtol=1e-5)
    keep = np.asarray(network.options["keep_text"])
    assert abs(keep.mean() - 0.8) < 4 * np.sqrt(0.16 / n)
    # At the least noisy steps what it sees is the scaled embedding.
    clean = np.asarray(network.t) == 0
    signal = 17.2 * np.sqrt(np.asarray(PROCESS.alpha_bar)[0]) * np.asarray(batch["z_image"])[clean]
    assert clean.sum() > 10 and np.abs(np.asarray(network.xt)[clean] - signal).std() < 0.1


def upsampler_task(network, *, mix_colours=False, **options):
    return DiffusionTask(
        model=network,
        diffusion=DIFFUSION,
        x0=Images(2 * SIZE, mix_colours=mix_colours),
        conditions=(LowResolution(SIZE, 2, **options),),
    )


def upsampler_sees(**options):
    network, batch = Recorder(), {"image": images(2000, 4)}
    loss, _ = upsampler_task(network, **options).loss({}, batch, jax.random.key(0))
    assert loss.shape == (2000,) and network.options["train"] is True
    x0 = np.asarray(batch["image"], np.float64) / 127.5 - 1
    low = x0.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
    return np.asarray(network.options["low_res"]), low


def test_the_upsampler_sees_the_average_of_a_crop_blurred_at_its_rate():
    given, low = upsampler_sees(blur_rate=0.0)
    np.testing.assert_allclose(given, low, atol=1e-6)
    blurred = np.asarray(gaussian_blur3(jnp.asarray(low, jnp.float32), 0.6))
    given, _ = upsampler_sees(blur_rate=1.0)
    np.testing.assert_allclose(given, blurred, atol=1e-6)
    given, _ = upsampler_sees(blur_rate=0.3)
    is_sharp, is_blurred = (np.abs(given - x).max((1, 2, 3)) < 1e-5 for x in (low, blurred))
    assert (is_sharp != is_blurred).all()
    assert abs(is_blurred.mean() - 0.3) < 4 * np.sqrt(0.21 / 2000)


def test_the_upsampler_adds_noise_of_uniform_level():
    """Level u * noise with u uniform in [0, 1): the variance is noise^2 / 3, and every example has a level."""
    given, low = upsampler_sees(blur_rate=0.0, noise=0.3)
    added = (given - low).reshape(2000, -1)
    np.testing.assert_allclose(added.var(), 0.3**2 / 3, rtol=0.1)
    levels = added.std(1)
    assert levels.max() < 0.6 and (levels < 0.1).mean() > 0.2 and (levels > 0.2).mean() > 0.2


def test_the_upsampler_mixes_colours_of_an_image_and_of_its_small_copy_alike():
    """All 6 orders and 8 inversions occur, equally often, and the same one in what is noised and what is given."""
    network, batch = Recorder(), {"image": images(4000, 4)}
    upsampler_task(network, blur_rate=0.0, mix_colours=True).loss({}, batch, jax.random.key(0))
    x0 = np.asarray(batch["image"], np.float64) / 127.5 - 1
    average = lambda x: x.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
    variants = [
        x0[..., order] * np.array(signs)
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    low = np.asarray(network.options["low_res"])
    errors = np.stack([np.abs(average(variant) - low).max((1, 2, 3)) for variant in variants])
    assert errors.min(0).max() < 1e-5 and ((errors < 1e-5).sum(0) == 1).all()
    chosen = errors.argmin(0)
    counts = np.bincount(chosen, minlength=48)
    assert counts.min() > 0 and ((counts - 4000 / 48) ** 2 / (4000 / 48)).sum() < 47 + 5 * np.sqrt(2 * 47)
    clean = np.asarray(network.t) == 0
    mixed = np.stack(variants)[chosen, np.arange(4000)]
    assert clean.sum() > 10
    assert np.abs(np.asarray(network.xt)[clean] - np.sqrt(PROCESS.alpha_bar[0]) * mixed[clean]).max() < 0.2


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_low_res_averages_blocks(factor):
    x = np.asarray(normal(0, 2, 8, 8, 3))
    blocks = x.astype(np.float64).reshape(2, 8 // factor, factor, 8 // factor, factor, 3).mean((2, 4))
    np.testing.assert_allclose(LowResolution(16, factor).low_res(jnp.asarray(x)), blocks, atol=1e-6)


def test_previews_are_images_or_none():
    for name in ("clip", "prior", "decoder", "upsampler"):
        assert make_task(name)[0].preview({}, make_batch(), jax.random.key(0)) is None
    task, _ = make_task("upsampler", sampling=Sampling("ddim", 2))
    batch = {"image": images(2, 2 * SIZE)}
    params = random_params(task.init, batch)
    shown = task.preview(params, batch, jax.random.key(0))
    assert isinstance(shown, np.ndarray) and shown.dtype == np.uint8 and shown.shape == (2, 2 * SIZE, 2 * SIZE, 3)
    with pytest.raises(FloatingPointError, match="its pixels contain NaN"):
        task.preview(jax.tree.map(lambda leaf: leaf * np.nan, params), batch, jax.random.key(0))
