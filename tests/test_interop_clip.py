"""CLIP in the layouts of OpenAI, open_clip and transformers: their own outputs, and the way back."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import fast_jit
from random_weights import random_weights

from ddpm_jax.data.transforms import clip_pixels
from ddpm_jax.interop.clip import clip_table, end_mask, export_clip, load_clip
from ddpm_jax.interop.table import ConvertError

FILES = Path(__file__).parent / "data" / "clip"
HEADS = {"hf": (8, 16), "openai": (8, 16)}


def weights(dialect):
    return random_weights(json.loads(str(np.load(FILES / f"{dialect}_gelu.npz")["shapes"])))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dialect", HEADS)
def test_the_outputs_equal_the_reference(dialect, activation):
    reference = np.load(FILES / f"{dialect}_{activation}.npz")
    clip = load_clip(weights(dialect), head_width=HEADS[dialect], activation=activation)
    assert clip.dialect == dialect
    pixels, tokens = jnp.asarray(reference["pixels"].transpose(0, 2, 3, 1)), jnp.asarray(reference["tokens"], jnp.int32)
    mask = end_mask(tokens, 63 if dialect == "hf" else None)

    @fast_jit
    def run(params):
        given = {"params": params}
        z_text, hidden = clip.model.apply(given, tokens, mask, method="encode_text")
        z_image = clip.model.apply(given, pixels, method="encode_image")
        unit_image, unit_text, log_scale = clip.model.apply(given, pixels, tokens, mask)
        logits = jnp.exp(log_scale) * unit_image @ unit_text.T
        return {"z_text": z_text, "hidden": hidden, "z_image": z_image, "logits": logits}

    with jax.default_matmul_precision("highest"):
        ours = run(clip.params)
    for name in ("z_text", "z_image", "logits", *(["hidden"] if "out/hidden" in reference.files else [])):
        np.testing.assert_allclose(ours[name], reference[f"out/{name}"], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dialect", HEADS)
def test_import_and_export_are_one_truth(dialect):
    reference = weights(dialect)
    clip = load_clip(reference, head_width=HEADS[dialect])
    back = export_clip(clip.params, dialect)
    assert set(back) == set(reference)
    for name, array in reference.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    other = "openai" if dialect == "hf" else "hf"
    again = load_clip(export_clip(clip.params, other), head_width=HEADS[dialect])
    jax.tree.map(np.testing.assert_array_equal, again.params, clip.params)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tower_alone(prefix):
    """CLIPTextModelWithProjection and CLIPVisionModelWithProjection; transformers 5 saves them without prefix."""
    reference, whole = weights("hf"), load_clip(weights("hf"), head_width=HEADS["hf"])
    for tower, starts in (("text", ("text_",)), ("vision", ("vision_", "visual_"))):
        part = {n: a for n, a in reference.items() if n.startswith(starts)}
        part = part if prefix else {n.removeprefix(f"{tower}_model."): a for n, a in part.items()}
        alone = load_clip(part, head_width=HEADS["hf"])
        assert (alone.model.text is None) == (tower == "vision") and (alone.model.vision is None) == (tower == "text")
        projection = {"text": "text_projection", "vision": "image_projection"}[tower]
        assert set(alone.params) == {tower, projection, "log_scale"}
        jax.tree.map(np.testing.assert_array_equal, alone.params[tower], whole.params[tower])
        back = export_clip(alone.params, "hf")
        assert set(back) == {n if "projection" in n or prefix else f"{tower}_model.{n}" for n in part}


def test_preprocessing_equals_the_reference():
    file = np.load(FILES / "pixels.npz")
    ours = clip_pixels([file[f"image_{i}"] for i in range(3)], 24)
    np.testing.assert_allclose(ours, file["made"].transpose(0, 2, 3, 1), atol=1e-6)


def test_the_end_of_a_caption():
    tokens = jnp.asarray([[62, 5, 63, 0, 0], [62, 5, 63, 63, 63], [62, 5, 2, 63, 0]])
    np.testing.assert_array_equal(end_mask(tokens).sum(1), [3, 3, 4])
    np.testing.assert_array_equal(end_mask(tokens, 63).sum(1), [3, 3, 4])
    np.testing.assert_array_equal(end_mask(tokens, 2).sum(1)[2], 3)


def test_what_does_not_fit_is_listed():
    good = weights("openai")
    load = lambda tensors, **options: load_clip(tensors, **({"head_width": HEADS["openai"]} | options))
    load(good | {"input_resolution": np.asarray(24), "vocab_size": np.asarray(64)})
    with pytest.raises(ConvertError, match=r"it lacks ln_final\.bias, visual\.ln_pre\.weight$"):
        load({name: array for name, array in good.items() if name not in ("ln_final.bias", "visual.ln_pre.weight")})
    with pytest.raises(ConvertError, match="it has, unknown to this network, logit_bias, visual.extra$"):
        load(good | {"visual.extra": np.zeros(3), "logit_bias": np.zeros(())})
    with pytest.raises(
        ConvertError, match=r"of another shape, ln_final.weight \[31\] \(for a parameter of shape \[32\]\)"
    ):
        load(good | {"ln_final.weight": np.ones(31, np.float32)})
    with pytest.raises(ConvertError, match="it has, not finite, text_projection$"):
        load(good | {"text_projection": np.full_like(good["text_projection"], np.nan)})
    with pytest.raises(
        ConvertError, match=r"not of a CLIP with a vision transformer: it lacks token_embedding\.weight"
    ):
        load({"conv.weight": np.zeros(3)})
    with pytest.raises(ValueError, match="head_width=20 must divide the text width, which is 32"):
        load(good, head_width=20)
    with pytest.raises(ValueError, match="activation='relu' must be one of"):
        load(good, activation="relu")
    with pytest.raises(ValueError, match="dialect='torch' must be one of openai, hf"):
        export_clip(load(good).params, "torch")


@pytest.mark.parametrize("dialect", HEADS)
def test_every_tensor_of_the_reference_is_named_once(dialect):
    names = [name for entry in clip_table(dialect, 2, 1) for name in entry.theirs]
    assert len(names) == len(set(names)) and set(names) == set(weights(dialect))
