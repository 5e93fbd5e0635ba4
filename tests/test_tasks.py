"""Tasks: losses per example that reach every parameter, and conditions that are dropped at their rates."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_networks import fast_jit, normal, random_params

from ddpm_jax.diffusion.losses import min_snr
from ddpm_jax.diffusion.process import make_process
from ddpm_jax.diffusion.schedules import cosine_betas
from ddpm_jax.models.clip import CLIP, VisionTransformer, normalize
from ddpm_jax.models.decoder import Decoder
from ddpm_jax.models.prior import DiffusionPrior
from ddpm_jax.models.text_encoder import RecurrentTextEncoder, TextEncoder
from ddpm_jax.models.unet import UNet
from ddpm_jax.models.upsampler import Upsampler
from ddpm_jax.parallel.mesh import make_mesh, replicated, shard_batch
from ddpm_jax.pipelines.stages import Sampling
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import make_train_step
from ddpm_jax.training.tasks import ClipTask, DecoderTask, PriorTask, UpsamplerTask, gaussian_blur3

B, L, D, VOCAB, SIZE = 8, 5, 6, 11, 8
PROCESS = make_process(cosine_betas(100))
SAMPLING = Sampling("2", 0.0)
CLIP_NETWORK = CLIP(VisionTransformer(SIZE, 4, 8, 1, 2), TextEncoder(VOCAB, L, 8, 1, 2), D)
LENGTHS = np.arange(B) % 4 + 2


def pictures(n=B, size=SIZE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)), jnp.uint8)


def make_batch(n=B):
    rng = np.random.default_rng(1)
    mask = np.arange(L) < np.resize(LENGTHS, n)[:, None]
    return {
        "image": pictures(n),
        "tokens": jnp.asarray(rng.integers(1, VOCAB, (n, L)) * mask, jnp.int32),
        "mask": jnp.asarray(mask),
        "z_image": normalize(normal(2, n, D)),
        "z_text": normalize(normal(3, n, D)),
    }


def unet(out_channels=3, channel_mult=(1,), attention=(SIZE,), **options):
    return UNet(16, out_channels, channel_mult, 1, attention, head_channels=8, groups=4, **options)


def make_task(name):
    own = TextEncoder(VOCAB, L, 8, 1, 2, name="text_encoder") if name.endswith("own text") else None
    if name == "decoder hybrid own text":
        own = RecurrentTextEncoder(VOCAB, 8, name="text_encoder")
    frozen = random_params(ClipTask(CLIP_NETWORK).init) if own is None else None
    if name == "clip":
        return ClipTask(CLIP_NETWORK)
    if name.startswith("prior"):
        return PriorTask(DiffusionPrior(D, L, 8, 2, 2, own), CLIP_NETWORK, frozen, PROCESS, 2.0, drop_text=0.5)
    if name.startswith("decoder"):
        learned = name == "decoder hybrid own text"
        options = {"objective": "hybrid", "variance": "learned_range"} if learned else {"weighting": min_snr(5.0, "v")}
        network = Decoder(unet(dropout=0.1), D, 8)
        if learned:
            network = Decoder(
                unet(6, (1, 2), (4,), modulate=True),
                D,
                8,
                text_embedding=False,
                word_vectors=VOCAB,
                layout_channels=3,
                layout_heads=2,
                text_encoder=own,
            )
        return DecoderTask(
            network,
            CLIP_NETWORK,
            frozen,
            PROCESS,
            SIZE,
            SAMPLING,
            kind="eps" if learned else "v",
            drop_image=0.5,
            drop_text=0.5,
            **options,
        )
    network = Upsampler(unet(attention=(), mid_attention=False))
    return UpsamplerTask(network, PROCESS, 2 * SIZE, SIZE, SAMPLING, kind="v", weighting=min_snr(5.0, "v"), noise=0.1)


TASKS = ["clip", "prior own text", "decoder", "decoder hybrid own text", "upsampler"]


@pytest.mark.parametrize("name", ["clip", "decoder"])
def test_a_step_is_the_same_on_one_device_and_on_eight(name):
    """CLIP compares pictures on one device with captions on others; the decoder's frozen tower runs before the step."""
    results, tx = [], optax.sgd(0.1)
    for devices in (jax.devices()[:1], jax.devices()):
        task, mesh = make_task(name), make_mesh({"data": -1}, devices=devices)
        state = create_state(task, tx, jax.random.key(0), mesh)
        batch = shard_batch(jax.device_get(make_batch()), mesh)
        if task.frozen is not None:
            batch = fast_jit(task.prepare)(jax.device_put(task.frozen, replicated(mesh)), batch)
        step = fast_jit(make_train_step(task, tx, ema_decay=0.9))
        results.append(jax.device_get(step(state, batch, jax.device_put(jax.random.key(1), replicated(mesh)))))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    before = jax.tree.leaves(jax.device_get(state.params))
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, jax.tree.leaves(results[0][0].params), strict=True))


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_one_of_every_example_and_reaches_every_parameter(name):
    """The upsampler is given crops: half of its pictures' size."""
    task = make_task(name)
    batch = make_batch()
    params = random_params(task.init)

    def total(params, batch, key):
        batch = batch if task.frozen is None else task.prepare(task.frozen, batch)
        loss, aux = task.loss(params, batch, key)
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
    assert jax.tree.structure(grads) == jax.tree.structure(jax.eval_shape(task.init, jax.random.key(0)))


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_prepare_adds_the_hidden_states_of_the_frozen_text_tower(name):
    task, batch = make_task(name), make_batch()
    prepared = fast_jit(task.prepare)(task.frozen, batch)
    assert set(prepared) == {*batch, "hidden"}
    z, hidden = CLIP_NETWORK.apply(task.frozen, batch["tokens"], batch["mask"], method=CLIP.encode_text)
    np.testing.assert_allclose(prepared["hidden"], hidden, atol=1e-5)
    np.testing.assert_array_equal(task.text(prepared).hidden, prepared["hidden"])
    own = make_task(f"{name} own text" if name == "prior" else "decoder hybrid own text")
    assert own.frozen is None
    np.testing.assert_array_equal(own.text(batch).hidden, batch["tokens"])


class Recorder:
    """A network that keeps what it was given and answers with zeros."""

    def __init__(self):
        self.args, self.options = None, None

    def apply(self, params, *args, **options):
        self.args, self.options = args, options
        return jnp.zeros_like(args[0])


def drops(seed, n=4000):
    network = Recorder()
    task = DecoderTask(network, CLIP_NETWORK, None, PROCESS, SIZE, SAMPLING, drop_image=0.1, drop_text=0.5)
    batch = make_batch(n) | {"image": jnp.zeros((n, 1, 1, 3), jnp.uint8)}
    task.loss({}, batch, jax.random.key(seed))
    return (np.asarray(mask) for mask in network.args[-2:])


def test_images_and_captions_are_dropped_at_their_rates_and_independently():
    """The expected counts are products of the rates: 0.1 and 0.5, so that 0.05 see the caption without the image."""
    image, text = drops(0)
    n = len(image)
    expected = n * np.array([[0.45, 0.45], [0.05, 0.05]])
    counts = np.array([[np.sum((image == i) & (text == j)) for j in (True, False)] for i in (True, False)])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    other_image, other_text = drops(1)
    assert (image != other_image).any() and (text != other_text).any()


def test_dropout_is_on_in_training_and_the_conditions_arrive_where_they_belong():
    network, batch = Recorder(), make_batch()
    DecoderTask(network, CLIP_NETWORK, None, PROCESS, SIZE, SAMPLING).loss({}, batch, jax.random.key(0))
    assert network.options["train"] is True and set(network.options["rngs"]) == {"dropout"}
    xt, t, z_image, z_text, text, mask, *_ = network.args
    assert xt.shape == (B, SIZE, SIZE, 3) and t.shape == (B,)
    for given, name in ((z_image, "z_image"), (z_text, "z_text"), (text, "tokens"), (mask, "mask")):
        np.testing.assert_array_equal(given, batch[name])


def test_timesteps_are_drawn_by_importance():
    """With a history that favours two steps almost only those are drawn, and the weights keep the mean over all."""
    network = Recorder()
    task = DecoderTask(network, CLIP_NETWORK, None, PROCESS, SIZE, SAMPLING, timesteps="importance")
    assert task.memory.losses.shape == (PROCESS.num_steps, 10)
    losses = jnp.full((PROCESS.num_steps, 10), 1e-6).at[jnp.array([3, 40])].set(1.0)
    memory = task.memory.replace(losses=losses, counts=jnp.full(PROCESS.num_steps, 10))
    n = 400
    batch = make_batch(n) | {"image": jnp.zeros((n, 1, 1, 3), jnp.uint8)}
    loss, metrics = task.loss({}, batch, jax.random.key(0), memory)
    t, unweighted = metrics["kept"]
    np.testing.assert_array_equal(network.args[1], PROCESS.timestep_map[t])
    assert np.isin(t, (3, 40)).mean() > 0.99
    p = 0.999 / 2 + 0.001 / PROCESS.num_steps
    seen = np.isin(t, (3, 40))
    np.testing.assert_allclose(loss[seen], unweighted[seen] / (PROCESS.num_steps * p), rtol=1e-3)
    factor = np.asarray(loss) / np.asarray(unweighted)
    plain = DecoderTask(network, CLIP_NETWORK, None, PROCESS, SIZE, SAMPLING, timesteps="uniform")
    assert plain.memory is None
    np.testing.assert_allclose(metrics["mse"], factor * unweighted, rtol=1e-5)  # simple: the loss is the squared error
    for wrong, given in ((task, ()), (plain, (memory,)), (dataclasses.replace(plain, timesteps="often"), ())):
        with pytest.raises(ValueError, match="timesteps='(importance|uniform|often)' with (no|a) memory"):
            wrong.loss({}, batch, jax.random.key(0), *given)
    counts = task.remember(memory, metrics["kept"]).counts
    np.testing.assert_array_equal(counts - 10, np.bincount(t, minlength=PROCESS.num_steps))


def test_stratified_timesteps_cover_the_process():
    network = Recorder()
    task = DecoderTask(network, CLIP_NETWORK, None, PROCESS, SIZE, SAMPLING, timesteps="stratified")
    task.loss({}, make_batch(10), jax.random.key(0))
    # 10 of 100 steps, evenly spread up to rounding.
    assert set(np.diff(np.sort(network.args[1]))) <= {9, 10, 11}


def test_families_are_one_batch_of_all_their_pairs():
    task, batch = make_task("clip"), make_batch()
    families = {name: batch[name].reshape(2, B // 2, *batch[name].shape[1:]) for name in ("image", "tokens", "mask")}
    params = random_params(task.init)
    run = fast_jit(lambda batch: task.loss(params, batch, jax.random.key(0))[0])
    np.testing.assert_array_equal(run(families), run(batch))


def test_the_prior_drops_captions_and_its_loss_is_the_error_of_scaled_embeddings():
    n, network = 4000, Recorder()
    batch = make_batch(n)
    task = PriorTask(network, CLIP_NETWORK, None, PROCESS, embed_scale=17.2, drop_text=0.2)
    loss, _ = task.loss({}, batch, jax.random.key(0))
    # The network answers zero, so the error is the scaled embedding: unit length, times 17.2, mean over dimensions.
    np.testing.assert_allclose(loss, 17.2**2 / D, rtol=1e-5)
    keep = np.asarray(network.args[-1])
    assert abs(keep.mean() - 0.8) < 4 * np.sqrt(0.16 / n)
    # At the least noisy steps what it sees is the scaled embedding.
    clean = np.asarray(network.args[1]) == 0
    signal = 17.2 * np.sqrt(np.asarray(PROCESS.alpha_bar)[0]) * np.asarray(batch["z_image"])[clean]
    assert clean.sum() > 10 and np.abs(np.asarray(network.args[0])[clean] - signal).std() < 0.1


def upsampler_sees(**options):
    network, batch = Recorder(), {"image": pictures(2000, 4)}
    task = UpsamplerTask(network, PROCESS, 2 * SIZE, SIZE, SAMPLING, **options)
    loss, _ = task.loss({}, batch, jax.random.key(0))
    assert loss.shape == (2000,) and network.options["train"] is True
    x0 = np.asarray(batch["image"], np.float64) / 127.5 - 1
    low = x0.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
    return np.asarray(network.args[2]), low


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


def test_the_upsampler_mixes_colours_of_a_picture_and_of_its_small_copy_alike():
    """All 6 orders and 8 inversions occur, equally often, and the same one in what is noised and what is given."""
    network, batch = Recorder(), {"image": pictures(4000, 4)}
    task = UpsamplerTask(network, PROCESS, 2 * SIZE, SIZE, SAMPLING, blur_rate=0.0, mix_colours=True)
    task.loss({}, batch, jax.random.key(0))
    x0 = np.asarray(batch["image"], np.float64) / 127.5 - 1
    average = lambda x: x.reshape(-1, 2, 2, 2, 2, 3).mean((2, 4))
    variants = [
        x0[..., order] * np.array(signs)
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
    errors = np.stack([np.abs(average(variant) - np.asarray(network.args[2])).max((1, 2, 3)) for variant in variants])
    assert errors.min(0).max() < 1e-5 and ((errors < 1e-5).sum(0) == 1).all()
    chosen = errors.argmin(0)
    counts = np.bincount(chosen, minlength=48)
    assert counts.min() > 0 and ((counts - 4000 / 48) ** 2 / (4000 / 48)).sum() < 47 + 5 * np.sqrt(2 * 47)
    clean = np.asarray(network.args[1]) == 0
    mixed = np.stack(variants)[chosen, np.arange(4000)]
    assert clean.sum() > 10
    assert np.abs(np.asarray(network.args[0])[clean] - np.sqrt(PROCESS.alpha_bar[0]) * mixed[clean]).max() < 0.2


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_low_res_averages_blocks(factor):
    task = UpsamplerTask(None, PROCESS, 16, 16 // factor, SAMPLING)
    x = np.asarray(normal(0, 2, 8, 8, 3))
    blocks = x.astype(np.float64).reshape(2, 8 // factor, factor, 8 // factor, factor, 3).mean((2, 4))
    np.testing.assert_allclose(task.low_res(jnp.asarray(x)), blocks, atol=1e-6)


def test_previews_are_pictures_or_none():
    for name in ("clip", "prior", "decoder", "upsampler"):
        assert make_task(name).preview({}, jax.random.key(0)) is None
    task = make_task("upsampler")
    task.preview_batch = {"image": pictures(2, 2 * SIZE)}
    shown = task.preview(random_params(task.init), jax.random.key(0))
    assert isinstance(shown, np.ndarray) and shown.dtype == np.uint8 and shown.shape == (2, 2 * SIZE, 2 * SIZE, 3)
    overflown = jax.tree.map(lambda leaf: leaf * np.nan, random_params(task.init))
    with pytest.raises(FloatingPointError, match="its pixels contain NaN"):
        task.preview(overflown, jax.random.key(0))
