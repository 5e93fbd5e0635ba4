"""NCSN++ and DDPM++: scores of score_sde_pytorch, its checkpoints there and back, the published sizes, FIR filters."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from random_networks import fast_jit, normal
from random_weights import random_weights
from safetensors.numpy import load_file, save_file

from ddpm_jax import convert
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.interop import score_sde
from ddpm_jax.interop.score_sde import PUBLISHED, export_score_sde, load_score_sde, score_sde_shapes, score_sde_table
from ddpm_jax.interop.table import ConvertError, to_reference
from ddpm_jax.models.ncsnpp import FourierEmbedding, NCSNpp
from ddpm_jax.models.resampling import FirConv, fir_downsample2, fir_upsample2
from ddpm_jax.pipelines import Cascade, cascade, load

REFERENCE = np.load(Path(__file__).parent / "data" / "score_sde.npz")
TINY = {"channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (1,)}
VE = TINY | {"embedding": "fourier", "scale_by_sigma": True, "sigma_unit": 2.0}
DDPM = TINY | {"biggan": False, "time_scale": 1.0}
FIELDS = {
    "ve": VE | {"input_pyramid": "residual"},
    "vp": TINY | {"fir_taps": ()},
    "sub_vp": TINY | {"input_pyramid": "residual"},
    "skips": VE | {"channel_mult": (1, 2, 2), "input_pyramid": "skip", "output_pyramid": "skip", "combine": "cat"},
    "smld": VE | {"embedding": "positional", "sigma_range": (0.01, 50.0), "time_scale": 8.0, "input_pyramid": "skip"},
    "ddpm": DDPM
    | {"fir_taps": (), "skip_rescale": False, "input_pyramid": "residual", "output_pyramid": "skip"},
    "filters": DDPM | {"fir_taps": (1, 2, 4, 1), "input_pyramid": "residual", "output_pyramid": "residual"}
    | {"time_scale": 999.0},
    "bare": DDPM | {"fir_taps": (), "conv_resample": False, "skip_rescale": False, "time_scale": 999.0}
    | {"input_pyramid": "skip", "output_pyramid": "residual"},
}  # fmt: skip
PROCESSES = {"ve": Diffusion("ve", 9, "score", span=(0.02, 100.0), time="sigma"), "vp": Diffusion("vp", 9)}
PROCESSES |= {"sub_vp": Diffusion("sub_vp", 9), "ddpm": Diffusion(tuple(np.linspace(0.1 / 9, 5.0 / 9, 9)), 9)}
PROCESSES |= {"skips": PROCESSES["ve"], "smld": PROCESSES["ve"], "filters": PROCESSES["vp"], "bare": PROCESSES["vp"]}


def text(name):
    return json.loads(str(REFERENCE[name]))


def weights(name):
    return random_weights(text(f"{name}/shapes"))


def same(one, other):
    assert set(one) == set(other)
    for name, array in other.items():
        np.testing.assert_array_equal(one[name], array, err_msg=name)


@pytest.mark.parametrize("name", FIELDS)
def test_the_scores_equal_the_reference(name):
    """As noise, -sigma score, where the reference is given x in [0, 1] for the VE-SDE and we are in [-1, 1]."""
    model, diffusion = NCSNpp(**FIELDS[name]), PROCESSES[name]
    params = load_score_sde(weights(name), model)
    x, score = (jnp.asarray(REFERENCE[f"{name}/{key}"].transpose(0, 2, 3, 1)) for key in ("x", "score"))
    t, centred = jnp.asarray(REFERENCE[f"{name}/t"]), diffusion.schedule != "ve"
    if name == "ddpm":
        step = jnp.round(8 * t).astype(jnp.int32)
        given, sigma = step, diffusion.process.sigma[step]
    else:
        given, sigma = diffusion.network_time(t), diffusion.continuous.sigma(t)
    with jax.default_matmul_precision("highest"):
        run = fast_jit(lambda params, x: model.apply({"params": params}, x, given))
        ours = run(params, x if centred else 2.0 * x - 1.0)
    wide = sigma[:, None, None, None]
    ours = -wide * ours if diffusion.prediction == "score" else ours
    theirs = -wide * score / (1.0 if centred else 2.0)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    state = export_score_sde(params, model, (0.01, 50.0, 9))
    np.testing.assert_allclose(state.pop("sigmas")[[0, 8]], (50.0, 0.01), rtol=1e-6)
    same(state, weights(name))


@pytest.mark.parametrize("name", ["ve", "skips", "ddpm"])
def test_averages_are_in_the_order_of_the_parameters(name):
    names, tensors = text(f"{name}/trained"), weights(name)
    averages = {f"ema.shadow_params.{i}": tensors[key] + 1.0 for i, key in enumerate(names)}
    file = {f"model.module.{key}": array for key, array in tensors.items()} | averages
    model = NCSNpp(**FIELDS[name])
    state = export_score_sde(load_score_sde(file, model), model, (0.01, 50.0, 9))
    del state["sigmas"]
    same(state, {key: array + (1.0 if key in names else 0.0) for key, array in tensors.items()})
    assert set(tensors) - set(names) == ({"all_modules.0.W"} if model.embedding == "fourier" else set())
    del file["ema.shadow_params.3"]
    with pytest.raises(ConvertError, match=f"it has {len(names) - 1} averages, of {len(names)} parameters"):
        load_score_sde(file, model)


def published_state(name):
    """Return the names and shapes of a published network, and its number of parameters."""
    model = PUBLISHED[name].model()
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), score_sde_shapes(model))
    shapes = {key: list(array.shape) for key, array in to_reference(score_sde_table(model), params, np.int8).items()}
    return shapes, sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize("name", ["ve/cifar10_ncsnpp_continuous", "vp/cifar10_ddpmpp", "ve/ffhq_ncsnpp_continuous"])
def test_the_published_networks(name):
    """Names and shapes of the state; tests/recipes has all of them. NCSN++ for CIFAR-10 has 62.8M (appendix H)."""
    shapes, count = published_state(name)
    shapes["sigmas"] = [PUBLISHED[name].num_steps]
    found = json.dumps(sorted((key, shape) for key, shape in shapes.items()))
    assert hashlib.sha256(found.encode()).hexdigest() == str(REFERENCE[f"published/{name}/sha256"])
    assert count == REFERENCE[f"published/{name}/count"]
    if name == "ve/cifar10_ncsnpp_continuous":
        assert count / 1e6 == pytest.approx(62.8, abs=0.05)


def run(program, **flags):
    program.FLAGS.unparse_flags()
    for name in ("from", "to", "src", "out", "part", "model"):
        program.FLAGS[name].value = None
    program.FLAGS(["program", *(f"--{name.rstrip('_')}={value}" for name, value in flags.items())])
    program.main()


def test_a_checkpoint_there_and_back(tmp_path, monkeypatch):
    """What is converted loads, is sampled as published by default, and by the ODE; and it is written as it was."""
    tiny = {name: value for name, value in FIELDS["ve"].items() if name not in ("embedding", "scale_by_sigma")}
    monkeypatch.setitem(PUBLISHED, "tiny", score_sde.Published("ve", tiny, 8, num_steps=9))
    tensors = weights("ve")
    file = {f"model.module.{key}": array for key, array in tensors.items()}
    file["model.module.sigmas"] = np.zeros(9, np.float32)
    averages = {key: 0.9 * tensors[key] for key in text("ve/trained")}
    save_file(file | {f"ema.shadow_params.{i}": a for i, a in enumerate(averages.values())}, tmp_path / "c.safetensors")
    run(convert, from_="score-sde", src=tmp_path / "c.safetensors", model="tiny", out=tmp_path / "ours")
    model = load(tmp_path / "ours")
    assert model.network == NCSNpp(**FIELDS["ve"]) and model.diffusion == PROCESSES["ve"]
    run(convert, to="score-sde", src=tmp_path / "ours", out=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_allclose(back.pop("sigmas"), 0.01 * 5000.0 ** np.linspace(1, 0, 9), rtol=1e-6)
    same(back, tensors | averages)
    run(convert, from_="score-sde", src=tmp_path / "c.safetensors", model="tiny", part="model", out=tmp_path / "raw")
    frequencies, raw = tensors["all_modules.0.W"], load(tmp_path / "raw").params["params"]
    np.testing.assert_array_equal(raw["time"]["frequencies"], frequencies)
    np.testing.assert_array_equal(raw["in_conv"]["bias"], tensors["all_modules.3.bias"])
    monkeypatch.setattr(cascade, "_generate", fast_jit(cascade._generate.__wrapped__))
    pipeline = Cascade(model).checked()
    sampling = pipeline.sampling["base"]
    assert (sampling.sampler, sampling.steps, sampling.snr) == ("predictor_corrector", 9, 0.16)
    assert sampling.threshold is None
    images = pipeline.generate(2, steps=2)
    assert images.shape == (2, 8, 8, 3) and images.std() > 1
    assert not np.array_equal(images, pipeline.generate(2, steps=2, sampler="dpm_solver"))
    with pytest.raises(ConvertError, match="model=None is not a released network of this family: vp/cifar10_ddpmpp"):
        run(convert, from_="score-sde", src=tmp_path / "c.safetensors", out=tmp_path / "no")


# ---- Filters and features --------------------------------------------------------------------------------------------


def upfirdn(x, taps, up, down, pad):
    """StyleGAN2's operation by scipy, of one channel: zeros inserted, padded, convolved in full and cut, decimated."""
    taps = np.outer(taps, taps) / np.sum(taps) ** 2
    stuffed = np.zeros([up * n for n in x.shape])
    stuffed[::up, ::up] = x
    return scipy.signal.convolve2d(np.pad(stuffed, pad), up**2 * taps, mode="valid")[::down, ::down]


@pytest.mark.parametrize("taps", [(1, 3, 3, 1), (1, 2, 4, 1), (3, 1, 4, 1, 5)])
def test_fir_resampling_equals_scipy(taps):
    x, p = np.random.default_rng(0).normal(size=(2, 6, 8, 3)), len(taps) - 2
    pads = {"up": ((p + 1) // 2 + 1, p // 2), "down": ((p + 1) // 2, p // 2)}
    for way, function, up, down in (("up", fir_upsample2, 2, 1), ("down", fir_downsample2, 1, 2)):
        channel = lambda i, c: upfirdn(x[i, :, :, c], taps, up, down, pads[way])  # noqa: B023
        want = np.stack([np.stack([channel(i, c) for c in range(3)], -1) for i in range(2)])
        np.testing.assert_allclose(function(jnp.asarray(x, jnp.float32), taps), want, atol=1e-6)


def test_a_filter_of_two_equal_taps_averages_and_repeats():
    x = normal(1, 1, 4, 6, 2)
    np.testing.assert_allclose(fir_downsample2(x, (1, 1)), x.reshape(1, 2, 2, 3, 2, 2).mean((2, 4)), atol=1e-6)
    np.testing.assert_allclose(fir_upsample2(x, (1, 1)), x.repeat(2, 1).repeat(2, 2), atol=1e-6)
    for taps in ((1,), (1, -1), ()):
        with pytest.raises(ValueError, match="must be at least two numbers whose sum is not 0"):
            fir_downsample2(x, taps)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_convolution_with_a_filter_equals_scipy(direction):
    x, module, taps = np.random.default_rng(0).normal(size=(1, 6, 8, 2)), FirConv(3, direction), (1, 3, 3, 1)
    x = np.asarray(x, np.float32)
    params = module.init(jax.random.key(0), x)["params"]
    params["bias"] = jnp.arange(3.0)
    kernel = np.asarray(params["kernel"], np.float64)

    def one(i, o):
        if direction == "down":
            smooth = upfirdn(x[0, :, :, i], taps, 1, 1, (2, 2))
            return scipy.signal.correlate2d(smooth, kernel[:, :, i, o], mode="valid")[::2, ::2]
        stuffed = np.zeros((11, 15))  # no zero after the last pixel
        stuffed[::2, ::2] = x[0, :, :, i]
        wide = scipy.signal.correlate2d(stuffed, kernel[:, :, i, o], mode="full")
        return 4.0 * upfirdn(wide, taps, 1, 1, (1, 1))

    want = np.stack([sum(one(i, o) for i in range(2)) + o for o in range(3)], -1)
    np.testing.assert_allclose(module.apply({"params": params}, x)[0], want, atol=2e-5)


def test_fourier_features_equal_their_formula():
    module, v = FourierEmbedding(4, 8, scale=2.0), jnp.array([-4.0, 0.3])
    params = module.init(jax.random.key(0), v)["params"]
    w = np.asarray(params["frequencies"], np.float64)
    params["dense_0"]["kernel"] = jnp.eye(8)  # silu(features) is what is left
    params["dense_1"]["kernel"] = jnp.eye(8)
    angles = 2.0 * np.pi * np.asarray(v, np.float64)[:, None] * w
    features = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(module.apply({"params": params}, v), features / (1.0 + np.exp(-features)), atol=1e-5)
    grads = jax.grad(lambda params: module.apply({"params": params}, v).sum())(params)
    assert not np.any(grads["frequencies"]) and np.any(grads["dense_0"]["kernel"])
    drawn = FourierEmbedding(4096, 1, scale=16.0).init(jax.random.key(1), v)["params"]["frequencies"]
    assert abs(drawn.std() / 16.0 - 1.0) < 0.05


def test_fields_that_contradict_each_other_are_named():
    x, t = jnp.zeros((1, 8, 8, 3)), jnp.ones(1)
    for changes, message in (
        ({"embedding": "words"}, "embedding='words' must be one of 'fourier', 'positional'"),
        ({"input_pyramid": "input_skip"}, "input_pyramid='input_skip' must be one of 'none', 'skip', 'residual'"),
        ({"output_pyramid": "skip", "out_channels": 6}, "out_channels=6 must be those of the image, 3"),
        ({"attention_levels": (2,)}, r"attention_levels=\(2,\) must lie in \[0, 2\)"),
        ({"sigma_range": (2.0, 1.0)}, r"sigma_range=\(2.0, 1.0\) must be two positive numbers, the smaller one first"),
        ({"dropout": 1.5}, r"dropout=1.5 must be in \[0, 1\)"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"num_res_blocks": 0}, "num_res_blocks=0 must be at least 1"),
        ({"sigma_unit": 0.0}, "sigma_unit=0.0 must be a positive number"),
        ({"out_channels": 0}, "out_channels=0 must be at least 1"),
        ({"channel_mult": (0.01, 1)}, r"channel_mult=\(0.01, 1\) gives a level of channels=\d+ no channel"),
        ({"sigma_range": (1.0, 2.0), "embedding": "fourier"}, "sigma_range=.* is of embedding='positional'"),
        ({"channel_mult": (1,) * 5, "attention_levels": ()}, "image size 8 cannot be halved"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(NCSNpp(**(TINY | changes)).init, jax.random.key(0), x, t)


def test_widths_of_levels_are_rounded_down():
    """As those of ADM, whose multipliers include 0.5."""
    network = NCSNpp(**(TINY | {"channels": 8, "channel_mult": (0.6, 1)}))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.ones(1))["params"]
    assert shapes["down_0_0"]["conv_1"]["kernel"].shape == (3, 3, 8, 4)
    assert shapes["down_1_0"]["conv_1"]["kernel"].shape == (3, 3, 4, 8)
