"""CLIP with a ResNet: the outputs of OpenAI's code with the same weights, the way back, and the published sizes."""

import json
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax.interop.clip import clip_table, end_mask, export_clip, load_clip
from ddpm_jax.interop.modified_resnet import resnet_of
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.models.clip import CLIP
from ddpm_jax.models.modified_resnet import ModifiedResNet
from ddpm_jax.models.text_encoder import TextEncoder

REFERENCE = np.load(Path(__file__).parent / "data" / "clip_resnet.npz")
PUBLISHED = json.loads(str(REFERENCE["published"]))
HEADS = 8, 64


def weights():
    """Return tensors of the reference implementation, with the counters of a file that has been trained."""
    found = random_weights(json.loads(str(REFERENCE["shapes"])))
    found["visual.attnpool.q_proj.weight"] /= 4
    return {name: np.asarray(7) if name.endswith("num_batches_tracked") else array for name, array in found.items()}


def shapes(model):
    size, context = model.vision.image_size, model.text.context
    images, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, context), jnp.int32)
    made = jax.eval_shape(model.init, jax.random.key(0), images, tokens, tokens == 0)
    return flax.traverse_util.flatten_dict(made["params"], sep="/")


def test_the_outputs_equal_the_reference():
    clip = load_clip(weights(), head_width=HEADS)
    assert clip.dialect == "openai" and clip.model.vision == ModifiedResNet(64, 16, (1, 2, 1, 1), 24)
    pixels, tokens = (
        jnp.asarray(REFERENCE["pixels"].transpose(0, 2, 3, 1), jnp.float32),
        jnp.asarray(REFERENCE["tokens"]),
    )

    @fast_jit
    def run(params):
        given, mask = {"params": params}, end_mask(tokens)
        unit_image, unit_text, log_scale = clip.model.apply(given, pixels, tokens, mask)
        return {
            "z_image": clip.model.apply(given, pixels, method="encode_image"),
            "z_text": clip.model.apply(given, tokens, mask, method="encode_text")[0],
            "logits": jnp.exp(log_scale) * unit_image @ unit_text.T,
        }

    with jax.default_matmul_precision("highest"):
        ours = run(clip.params)
    for name, found in ours.items():
        theirs = REFERENCE[f"out/{name}"]
        assert theirs.std(0).mean() > 0.1 * np.abs(theirs).mean() or name == "logits"  # it depends on what is given
        np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-5, err_msg=name)


def test_half_precision_is_near():
    """The convolutions run in bfloat16; parameters and the embedding stay float32."""
    clip = load_clip(weights(), head_width=HEADS, dtype=jnp.bfloat16)
    pixels = jnp.asarray(REFERENCE["pixels"].transpose(0, 2, 3, 1), jnp.float32)
    kept = {"capture_intermediates": True, "mutable": "intermediates"}
    run = fast_jit(lambda params: clip.model.vision.apply({"params": params}, pixels, **kept)[1])
    kept = run(clip.params["vision"])["intermediates"]
    assert {kept[name]["__call__"][0].dtype for name in ("conv1", "bn1", "layer4_0")} == {jnp.bfloat16.dtype}
    z = kept["attnpool"]["__call__"][0]
    assert z.dtype == jnp.float32
    np.testing.assert_allclose(z, REFERENCE["out/z_image"], atol=0.03 * np.abs(REFERENCE["out/z_image"]).max())


def test_import_and_export_are_one_truth():
    reference = weights()
    clip = load_clip(reference, head_width=HEADS)
    back = export_clip(clip.params, "openai")
    # In the reference's shapes and no others: its load_state_dict is strict, and the parity script loads this export.
    assert {name: list(array.shape) for name, array in back.items()} == json.loads(str(REFERENCE["shapes"]))
    for name, array in reference.items():
        if name.endswith("num_batches_tracked"):
            assert back[name].dtype == np.int64 and back[name] == 0
        else:
            np.testing.assert_array_equal(back[name], array, err_msg=name)
    again = load_clip(back, head_width=HEADS)
    assert again.model == clip.model
    jax.tree.map(np.testing.assert_array_equal, again.params, clip.params)
    names = [name for entry in clip_table("openai", 2, (1, 2, 1, 1)) for name in entry.theirs]
    assert len(names) == len(set(names))


def test_files_without_counters_load():
    reference = {name: array for name, array in weights().items() if not name.endswith("num_batches_tracked")}
    assert load_clip(reference, head_width=HEADS).model.vision.layers == (1, 2, 1, 1)


def test_what_does_not_fit_is_listed():
    good = weights()
    load = lambda tensors, **options: load_clip(tensors, **({"head_width": HEADS} | options))
    without = lambda part: {name: array for name, array in good.items() if part not in name}
    layer = "visual.layer4.0.conv1.weight"
    with pytest.raises(ConvertError, match=f"not of a CLIP with a ResNet: it lacks {layer}$".replace(".", r"\.")):
        load(without("visual.layer4."))
    with pytest.raises(ConvertError, match=r"not of a CLIP with a ResNet: it lacks visual\.attnpool\.positional_emb"):
        load(without("attnpool.positional_embedding"))
    with pytest.raises(ConvertError, match=r"not of a CLIP with a ResNet: it lacks token_embedding\.weight$"):
        load(without("token_embedding"))
    with pytest.raises(ConvertError, match=r"it lacks visual\.layer2\.0\.bn3\.bias, visual\.layer2\.0\.bn3\.running"):
        load(without("layer2.0.bn3"))
    with pytest.raises(ConvertError, match=r"it lacks visual\.attnpool\.k_proj\.weight$"):
        load(without("attnpool.k_proj.weight"))
    name = "visual.layer3.0.conv3.weight"
    swapped = good | {name: good[name].transpose(1, 0, 2, 3)}
    with pytest.raises(ConvertError, match=r"of another shape, visual\.layer3\.0\.conv3\.weight \[64, 256, 1, 1\] \("):
        load(swapped)
    for rows in (6, 0):
        match = rf"of another shape, .*visual\.attnpool\.positional_embedding \[{rows}, 512\] \("
        with pytest.raises(ConvertError, match=match):
            load(good | {"visual.attnpool.positional_embedding": np.ones((rows, 512), np.float32)})
    with pytest.raises(ConvertError, match=r"visual\.layer1\.0\.conv1\.weight \[16, 16\] must have 4 axes"):
        load(good | {"visual.layer1.0.conv1.weight": np.ones((16, 16), np.float32)})
    with pytest.raises(ConvertError, match=r"has, unknown to this network, visual\.extra\.num_batches_tracked$"):
        load(good | {"visual.extra.num_batches_tracked": np.asarray(7)})
    with pytest.raises(ValueError, match="head_width=24 must divide the ResNet's width times 32, which is 512"):
        load(good, head_width=(8, 24))


def test_what_cannot_be_is_refused():
    clip = load_clip(weights(), head_width=HEADS)
    with pytest.raises(ValueError, match="dialect='hf' has no CLIP with a ResNet; it must be openai"):
        export_clip(clip.params, "hf")
    init = lambda model, size: jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32, 3\); this CLIP takes \[B, 64, 64, 3\]"):
        init(clip.model.vision, 32)
    with pytest.raises(ValueError, match="a size that 32 must divide"):
        init(ModifiedResNet(48, 16, (1, 1, 1, 1), 24), 48)
    with pytest.raises(ValueError, match="width=15 must be even"):
        init(ModifiedResNet(64, 15, (1, 1, 1, 1), 24, 32), 64)
    with pytest.raises(ValueError, match="features=24 must be embed_dim=20"):
        shapes(CLIP(clip.model.vision, clip.model.text, 20))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Parameters and statistics are as many as OpenAI's class has, and the table names each of them."""
    size = PUBLISHED[name]
    layers, width = tuple(size["layers"]), size["text_width"]
    text = TextEncoder(49408, 77, width, 12, width // 64)
    vision = ModifiedResNet(size["image_size"], size["width"], layers, size["embed_dim"])
    found = shapes(CLIP(vision, text, size["embed_dim"]))
    statistics = sum(x.size for path, x in found.items() if path.endswith(("/mean", "/var")))
    assert statistics == size["statistics"]
    assert sum(x.size for x in found.values()) - statistics == size["parameters"]
    millions = {"RN50": 102.0, "RN101": 119.7, "RN50x4": 178.3, "RN50x16": 291.0, "RN50x64": 623.3}
    assert round(size["parameters"] / 1e6, 1) == millions[name]
    table = clip_table("openai", 12, layers)
    assert sorted(entry.ours for entry in table) == sorted(found)
    # A file of that network is read as that network; for this its tensors need no memory.
    tensors = {f"visual.layer{i}.{k}.conv1.weight": np.zeros(()) for i, n in enumerate(layers, 1) for k in range(n)}
    tensors |= {f"visual.layer{i}.0.conv1.weight": np.zeros((size["width"], 1, 1, 1)) for i in range(1, 5)}
    tensors["visual.attnpool.positional_embedding"] = np.zeros(((size["image_size"] // 32) ** 2 + 1, 1))
    assert resnet_of(tensors, size["embed_dim"], 64) == vision
