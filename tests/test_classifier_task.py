"""The classifier's task: cross-entropy on noised images against optax and numpy, and every pooling layer trained."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_networks import fast_jit, random_params

from ddpm_jax.data.tokenizer import CompactTokenizer
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.models.adm import POOLS, Classifier
from ddpm_jax.models.noised_clip import NoisedCLIP, NoisedVisionTransformer
from ddpm_jax.models.text_encoder import TextEncoder
from ddpm_jax.training.tasks import ClassifierTask, Images, NoisedContrastiveTask

B, K, SIZE = 400, 5, 4
DIFFUSION = Diffusion("cosine", 50)
PROCESS = DIFFUSION.process
KEY = jax.random.key(1)


class Linear:
    """A network whose logits are the first pixels, and which records what it was given."""

    num_classes = K

    def apply(self, params, xt, t, **options):
        self.xt, self.t, self.options = xt, t, options
        return 3.0 * xt.reshape(xt.shape[0], -1)[:, :K]


def make_batch(n=B, size=SIZE):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, size, size, 3), np.uint8)
    return {"image": jnp.asarray(image), "label": jnp.asarray(rng.integers(0, K, n), jnp.int32)}


def run(method="loss", **options):
    network, batch = Linear(), make_batch()
    task = ClassifierTask(model=network, diffusion=DIFFUSION, x0=Images(SIZE), **options)
    loss, metrics = getattr(task, method)({}, batch, KEY)
    return network, batch, np.asarray(loss), np.asarray(metrics["accuracy"])


@pytest.mark.parametrize("method", ["loss", "eval_loss"])
@pytest.mark.parametrize("noised", [True, False])
def test_the_loss_is_the_cross_entropy_of_what_the_network_sees(method, noised):
    network, batch, loss, accuracy = run(method, noised=noised)
    logits = 3.0 * np.asarray(network.xt, np.float64).reshape(B, -1)[:, :K]
    labels = np.asarray(batch["label"])
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(B), labels]
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        loss,
        optax.losses.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits, jnp.float32), labels),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(accuracy, logits.argmax(1) == labels)
    assert 0 < accuracy.mean() < 1
    assert network.options.get("train", False) == (method == "loss")


def test_images_are_noised_to_a_uniform_timestep():
    """(x_t - alpha x0) / sigma is standard normal, at timesteps that are all equally frequent."""
    network, batch, *_ = run()
    x0, t = np.asarray(batch["image"], np.float64) / 127.5 - 1, np.asarray(network.t)
    alpha_bar = np.asarray(PROCESS.alpha_bar, np.float64)[t].reshape(-1, 1, 1, 1)
    noise = (np.asarray(network.xt) - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)
    error = 1 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * error and abs(noise.std() - 1) < 4 * error
    counts = np.bincount(t, minlength=50)
    assert counts.size == 50 and ((counts - B / 50) ** 2 / (B / 50)).sum() < 49 + 5 * np.sqrt(2 * 49)


def test_without_noise_it_sees_clean_images_at_timestep_zero():
    network, batch, *_ = run(noised=False)
    np.testing.assert_allclose(network.xt, np.asarray(batch["image"], np.float64) / 127.5 - 1, atol=1e-6)
    assert not np.asarray(network.t).any()


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_trains_one_step(pool):
    """The gradient reaches every parameter, and a small step against it lowers the loss of the same noise."""
    network = Classifier(
        8, K, 8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), head_channels=8, pool=pool, groups=4
    )
    task, batch = ClassifierTask(model=network, diffusion=DIFFUSION, x0=Images(8)), make_batch(8, 8)
    params = random_params(task.init, batch)
    value_and_grad = fast_jit(jax.value_and_grad(lambda params: task.loss(params, batch, KEY)[0].mean()))
    loss, grads = value_and_grad(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    size = optax.tree.norm(grads)
    lower, _ = value_and_grad(jax.tree.map(lambda p, g: p - 1e-2 * g / size, params, grads))
    # To first order the loss falls by the length of the step times that of the gradient.
    assert 0.5 < (loss - lower) / (1e-2 * size) < 1.5


def test_what_a_pipeline_has_to_know():
    task = ClassifierTask(model=Linear(), diffusion=DIFFUSION, x0=Images(SIZE), names=("a", "b", "c", "d", "e"))
    found = task.metadata()
    assert found["labels"] == {"num_classes": K, "null": None, "names": ["a", "b", "c", "d", "e"]}
    assert Diffusion(**found["diffusion"]) == DIFFUSION and found["noised"] is True and found["image_size"] == SIZE
    assert task.preview({}, make_batch(), KEY) is None


def test_a_noised_clip_has_the_symmetric_cross_entropy_of_pairs():
    """On images of the process' variance at uniform timesteps, against numpy in float64."""
    network = NoisedCLIP(NoisedVisionTransformer(8, 4, 8, 1, 2, 50), TextEncoder(11, 5, 8, 1, 2), 6, scale=4.0)
    task = NoisedContrastiveTask(model=network, diffusion=DIFFUSION, tokenizer=CompactTokenizer(("a", "b")))
    rng, seen = np.random.default_rng(0), {}
    batch = {"image": jnp.asarray(rng.integers(0, 256, (8, 8, 8, 3), np.uint8))}
    batch |= {"tokens": jnp.asarray(rng.integers(1, 11, (8, 5)), jnp.int32), "mask": jnp.ones((8, 5), bool)}
    params = random_params(task.init, batch)
    clone = NoisedContrastiveTask(model=network, diffusion=DIFFUSION, tokenizer=task.tokenizer)

    def apply(params, xt, t, *rest):
        seen.update(xt=np.asarray(xt), t=np.asarray(t), z=network.apply(params, xt, t, *rest))
        return seen["z"]

    object.__setattr__(clone, "model", SimpleNamespace(apply=apply, scale=4.0))
    loss, metrics = clone.loss(params, batch, KEY)
    logits = 4.0 * np.asarray(seen["z"][0], np.float64) @ np.asarray(seen["z"][1], np.float64).T
    log_softmax = lambda x: x - np.log(np.exp(x).sum(1, keepdims=True))
    expected = -0.5 * (np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T)))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert set(metrics) == {"image_to_text", "text_to_image"} and len(set(seen["t"])) > 3
    x0, alpha = np.asarray(batch["image"], np.float64) / 127.5 - 1.0, np.asarray(PROCESS.alpha)[seen["t"]]
    noise = (seen["xt"] - alpha[:, None, None, None] * x0) / np.asarray(PROCESS.sigma)[seen["t"]][:, None, None, None]
    assert abs(noise.std() - 1.0) < 0.06


@pytest.mark.parametrize("diffusion", [Diffusion("vp", 50), Diffusion("cosine", 50, time="log_snr")])
def test_what_guides_by_its_gradient_is_trained_in_discrete_time(diffusion):
    with pytest.raises(ValueError, match="is of continuous time; what guides by its gradient"):
        ClassifierTask(model=Classifier(32, 2, 8), diffusion=diffusion, x0=Images(8))


def test_a_noised_clip_has_as_many_timesteps_as_the_process():
    network = NoisedCLIP(NoisedVisionTransformer(8, 4, 8, 1, 2, 1000), TextEncoder(11, 5, 8, 1, 2), 6)
    with pytest.raises(ValueError, match="model.vision.num_steps=1000 must be the 50 steps of the diffusion"):
        NoisedContrastiveTask(model=network, diffusion=DIFFUSION, tokenizer=CompactTokenizer(("a", "b")))
