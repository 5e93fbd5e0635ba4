"""Fields of the config.json of diffusers and transformers: which are used, and which may have one value only.

Such a file holds what shapes of tensors do not say: activations, widths of heads, schedules. A field that was ignored
would give a network that runs and returns other numbers. So a table for every class lists the fields that are used,
each with the kind of value that it must have, the fields that must have the supported value, and the fields that have
no effect on what is computed here; every other field is refused by name, unless it is None or False, which in both
libraries is an option that is switched off.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ddpm_jax.interop.field_kinds import (
    ANY,
    FLAG,
    NUMBER,
    OBJECT,
    POSITIVE,
    SIDE,
    WHOLE,
    WHOLES,
    WIDTHS,
    WORD,
    WORDS,
    Kind,
    optional,
)
from ddpm_jax.interop.table import ConvertError

# Fields that describe the file, or how another program runs the network, beside names that begin with "_".
BOOKKEEPING = frozenset({"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"})
_CLASS = ("_class_name", "model_type")
# Options that older versions of transformers wrote into every config: labels, and how to generate text.
_TRANSFORMERS = frozenset({
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_factor", "initializer_range", "label2id", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k",
    "top_p", "torchscript", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip


class Fields(NamedTuple):
    """Fields in the config of a class.

    Attributes:
        used: name -> required kind of value, of fields that are read where the network is made, or compared with the
            shapes of its tensors.
        fixed: name -> supported values; _class_name and model_type name the class that wrote the config.
        without_effect: names of fields that do not change the results, such as dropout.
    """

    used: Mapping[str, Kind]
    fixed: Mapping[str, tuple[Any, ...]]
    without_effect: frozenset[str] = frozenset()


def check_fields(config: Mapping[str, Any], fields: Fields, whose: str) -> None:
    """Check that every field of a config is used and of its kind, or has a supported value, or has no effect.

    whose: a sentence that says what the config is not of, for the message.

    Raises:
        ConvertError: otherwise; it lists the fields and the values that are supported.
    """
    problems = []
    for name, value in config.items():
        kind = fields.used.get(name, WORD if name in _CLASS and name in fields.fixed else ANY)
        if not kind.holds(value):
            problems.append(f"{name}={_short(value)} (it must be {kind.meaning})")
        elif name in fields.fixed:
            if not any(_same(value, supported) for supported in fields.fixed[name]):
                known = " or ".join(map(repr, fields.fixed[name]))
                problems.append(f"{name}={_short(value)} (supported: {known})")
        elif {name} & (fields.used.keys() | fields.without_effect | BOOKKEEPING) or name.startswith("_"):
            continue
        elif value is not None and value is not False:
            problems.append(f"{name}={_short(value)} (unknown field)")
    if problems:
        raise ConvertError(f"{whose}: it has {', '.join(problems)}")


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], whose: str) -> None:
    """Check that the sizes in a config are those of the tensors; a field that is absent or None is not checked.

    sizes: of the network that was made of the tensors, by field. whose: as for `check_fields`.

    Raises:
        ConvertError: otherwise; it names the fields.
    """
    wrong = [name for name in sizes if config.get(name) is not None and config[name] != sizes[name]]
    if wrong:
        pairs = ", ".join(f"{name}={_short(config[name])} where the weights have {sizes[name]}" for name in wrong)
        raise ConvertError(f"{whose}: its config has {pairs}")


def tower_sizes(tower: Any, embed_dim: int | None = None) -> dict[str, int]:
    """Return the sizes of a tower of CLIP (`TextEncoder`, `VisionTransformer`) under transformers' names.

    embed_dim: of the projection after it, if it has one.
    """
    sizes = {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width or 4 * tower.width,
        "num_hidden_layers": tower.layers,
    }
    if embed_dim is not None:
        sizes["projection_dim"] = embed_dim
    if hasattr(tower, "patch"):
        return sizes | {"image_size": tower.image_size, "patch_size": tower.patch}
    return sizes | {"max_position_embeddings": tower.context, "vocab_size": tower.vocab_size}


def check_width(
    config: Mapping[str, Any], tensors: Mapping[str, Any], whose: str, towers: tuple[str, ...] = ("text", "vision")
) -> None:
    """Check that hidden_size is the width of the towers of transformers' CLIP, before heads are made of it.

    Raises:
        ConvertError: otherwise.
    """
    marks = {"text": "embeddings.token_embedding.weight", "vision": "embeddings.class_embedding"}
    for name, array in tensors.items():
        if name.endswith(tuple(marks[tower] for tower in towers)) and array.ndim:
            check_sizes(config, {"hidden_size": array.shape[-1]}, whose)


def head_width(config: Mapping[str, Any], whose: str) -> int:
    """Return the width of a head of a tower of CLIP.

    Raises:
        ConvertError: if the number of heads does not divide the width.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise ConvertError(f"{whose}: num_attention_heads={heads} must divide hidden_size={width}")
    return width // heads


def side_of(config: Mapping[str, Any], whose: str) -> int:
    """Return the side of the square arrays that a U-Net is for, from sample_size: a number, or a pair of equal ones.

    Raises:
        ConvertError: if the levels of the U-Net cannot halve it.
    """
    side, factor = config["sample_size"], 2 ** (len(config["block_out_channels"]) - 1)
    side = side[0] if isinstance(side, (list, tuple)) else side
    if side % factor:
        raise ConvertError(
            f"{whose}: it has sample_size={side}, which must be a multiple of {factor}, as "
            f"block_out_channels={_short(config['block_out_channels'])} has {len(config['block_out_channels'])} levels"
        )
    return side


def check_blocks(config: Mapping[str, Any], kinds: Mapping[str, str], whose: str) -> None:
    """Check that every block of a U-Net is known, and that those on the way up mirror those on the way down.

    kinds: of blocks on the way down, with that of the same level on the way up. whose: as for `check_fields`.

    Raises:
        ConvertError: otherwise; it names the field.
    """
    down = list(config["down_block_types"])
    odd = [kind for kind in down if kind not in kinds]
    if odd or len(down) != len(config["block_out_channels"]):
        raise ConvertError(
            f"{whose}: it has down_block_types={_short(down)} (supported: one of {', '.join(kinds)} a level)"
        )
    up = [kinds[kind] for kind in reversed(down)]
    if list(config.get("up_block_types", up)) != up:
        raise ConvertError(f"{whose}: it has up_block_types={_short(config['up_block_types'])} (supported: {up})")


def _same(value: Any, supported: Any) -> bool:
    """Return whether two values are equal; True is not 1, a list is a tuple, and a list of one value is that value."""
    if isinstance(value, (list, tuple)) and not isinstance(supported, (list, tuple)):
        return bool(value) and all(_same(each, supported) for each in value)
    if isinstance(value, (list, tuple)):
        return len(value) == len(supported) and all(map(_same, value, supported))
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_SILU = ("silu", "swish")
# Fields of both U-Nets of diffusers.
_UNET = {
    "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "downsample_padding": (1,),
    "mid_block_scale_factor": (1,), "act_fn": _SILU, "norm_num_groups": (32,), "norm_eps": (1e-5,),
    "num_class_embeds": (None,), "time_embedding_type": ("positional",), "time_embedding_dim": (None,),
}  # fmt: skip
_CONDITIONED = _UNET | {
    "addition_embed_type": (None,), "addition_time_embed_dim": (None,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "cross_attention_norm": (None,), "dual_cross_attention": (False,), "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,), "mid_block_only_cross_attention": (None, False), "num_attention_heads": (None,),
    "only_cross_attention": (False,), "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1,), "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,), "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,), "transformer_layers_per_block": (1,),
}  # fmt: skip
_BLOCKS = {
    "block_out_channels": WIDTHS, "layers_per_block": WHOLE, "down_block_types": WORDS,
    "up_block_types": WORDS, "out_channels": WHOLE, "sample_size": SIDE,
}  # fmt: skip
_WITHOUT = frozenset({"dropout", "upcast_attention", "addition_embed_type_num_heads"})

STABLE_DIFFUSION_UNET = Fields(
    _BLOCKS | {
        "attention_head_dim": WHOLES, "cross_attention_dim": WHOLE, "in_channels": WHOLE,
        "use_linear_projection": FLAG,
    },
    _CONDITIONED | {
        "_class_name": ("UNet2DConditionModel",),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",), "class_embed_type": (None,),
        "resnet_time_scale_shift": ("default",),
    },
    _WITHOUT,
)  # fmt: skip
KARLO_DECODER = Fields(
    _BLOCKS | {"attention_head_dim": WHOLE, "cross_attention_dim": WHOLE},
    _CONDITIONED | {
        "_class_name": ("UNet2DConditionModel",),
        "mid_block_type": ("UNetMidBlock2DSimpleCrossAttn",), "class_embed_type": ("identity",), "in_channels": (3,),
        "resnet_time_scale_shift": ("scale_shift",),
    },
    _WITHOUT | {"use_linear_projection"},
)  # fmt: skip
KARLO_UPSAMPLER = Fields(
    _BLOCKS,
    _UNET | {
        "_class_name": ("UNet2DModel",),
        "add_attention": (False,), "attn_norm_num_groups": (None,), "class_embed_type": (None,), "in_channels": (6,),
        "mid_block_type": ("UNetMidBlock2D",), "resnet_time_scale_shift": ("default", "scale_shift"),
    },
    # Of blocks with attention, or without residual blocks that change the resolution.
    frozenset({"attention_head_dim", "downsample_type", "dropout", "num_train_timesteps", "upsample_type"}),
)  # fmt: skip
AUTOENCODER = Fields(
    {"block_out_channels": WIDTHS, "latent_channels": WHOLE, "layers_per_block": WHOLE, "scaling_factor": POSITIVE},
    {
        "_class_name": ("AutoencoderKL",),
        "act_fn": _SILU, "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
        "in_channels": (3,), "latents_mean": (None,), "latents_std": (None,), "mid_block_add_attention": (True,),
        "norm_num_groups": (32,), "out_channels": (3,), "shift_factor": (None, 0), "use_post_quant_conv": (True,),
        "use_quant_conv": (True,),
    },
    frozenset({"force_upcast", "sample_size"}),  # the first is for float16
)  # fmt: skip
# The schedulers whose networks predict the noise, v or x0 of a process of betas, which DDIM samples too; with what
# diffusers takes where their config has no such field. The fields that are not listed here have the same default in
# all, but for steps_offset: it is 0 in all, and the pipelines of Stable Diffusion replace 0 by 1.
_LINSPACE = {"timestep_spacing": "linspace"}
SCHEDULER_DEFAULTS = {
    "DDIMScheduler": {}, "DDPMScheduler": {}, "PNDMScheduler": {"set_alpha_to_one": False},
} | {
    f"{name}Scheduler": _LINSPACE
    for name in (
        "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "UniPCMultistep",
    )
}  # fmt: skip
SCHEDULER = Fields(
    {
        "beta_end": NUMBER, "beta_schedule": WORD, "beta_start": NUMBER, "num_train_timesteps": WHOLE,
        "prediction_type": WORD, "rescale_betas_zero_snr": FLAG, "set_alpha_to_one": FLAG, "steps_offset": ANY,
        "timestep_spacing": WORD, "trained_betas": ANY,  # the two of any kind are checked where they are read
    },
    {
        "_class_name": tuple(SCHEDULER_DEFAULTS),
        "clip_sample": (False, None), "shift_terminal": (None,), "thresholding": (False, None),
        "use_dynamic_shifting": (False,), "use_flow_sigmas": (False,),
    },
    # Bounds of what is off, and options of solvers: the sampler is DDIM, whichever solver the file names.
    frozenset({
        "algorithm_type", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final",
        "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final",
        "predict_x0", "sample_max_value", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_p",
        "solver_type", "time_shift_type", "timestep_type", "use_beta_sigmas", "use_exponential_sigmas",
        "use_karras_sigmas", "use_lu_lambdas", "variance_type",
    }),
)  # fmt: skip
_TOWER = {
    "hidden_act": WORD, "hidden_size": WHOLE, "intermediate_size": WHOLE, "num_attention_heads": WHOLE,
    "num_hidden_layers": WHOLE, "projection_dim": optional(WHOLE),
}  # fmt: skip
_ACTIVATION = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}
_DROPOUT = frozenset({"attention_dropout", "dropout"})
TEXT_TOWER = Fields(
    _TOWER | {"max_position_embeddings": WHOLE, "vocab_size": WHOLE},
    _ACTIVATION | {"model_type": ("clip_text_model", "clip")},
    _TRANSFORMERS | _DROPOUT,
)
VISION_TOWER = Fields(
    _TOWER | {"image_size": WHOLE, "patch_size": WHOLE},
    _ACTIVATION | {"num_channels": (3,), "model_type": ("clip_vision_model", "clip")},
    _TRANSFORMERS | _DROPOUT,
)
CLIP = Fields(
    {"projection_dim": optional(WHOLE)}
    | dict.fromkeys(("text_config", "text_config_dict", "vision_config", "vision_config_dict"), optional(OBJECT)),
    {},
    _TRANSFORMERS | {"logit_scale_init_value"},
)
KARLO_PRIOR = Fields(
    dict.fromkeys(("attention_head_dim", "embedding_dim", "num_attention_heads", "num_embeddings", "num_layers"), WHOLE)
    | dict.fromkeys(("clip_embed_dim", "embedding_proj_dim", "time_embed_dim"), optional(WHOLE)),
    {
        "_class_name": ("PriorTransformer",),
        "added_emb_type": ("prd",), "additional_embeddings": (4,), "embedding_proj_norm_type": (None,),
        "encoder_hid_proj_type": ("linear",), "norm_in_type": (None,), "time_embed_act_fn": _SILU,
    },
    frozenset({"dropout"}),
)  # fmt: skip
KARLO_TEXT_PROJ = Fields(
    dict.fromkeys(("clip_embeddings_dim", "clip_extra_context_tokens", "cross_attention_dim", "time_embed_dim"), WHOLE),
    {"_class_name": ("UnCLIPTextProjModel",)},
)
_UNCLIP = {
    "_class_name": ("UnCLIPScheduler",), "beta_schedule": ("squaredcos_cap_v2",), "clip_sample": (True,),
    "num_train_timesteps": (1000,),
}  # fmt: skip
_SMALL = _UNCLIP | {"variance_type": ("fixed_small_log",)}
# Defaults in diffusers of fields that a scheduler's config lacks.
UNCLIP_DEFAULTS = {"clip_sample_range": 1.0, "prediction_type": "epsilon", "variance_type": "fixed_small_log"}
KARLO_SCHEDULERS = {
    "prior_scheduler": Fields({"clip_sample_range": POSITIVE}, _SMALL | {"prediction_type": ("sample",)}),
    "decoder_scheduler": Fields(
        {},
        _UNCLIP | {
            "clip_sample_range": (1,), "prediction_type": ("epsilon",), "variance_type": ("learned_range",),
        },
    ),
    "super_res_scheduler": Fields({}, _SMALL | {"clip_sample_range": (1,), "prediction_type": ("epsilon",)}),
}  # fmt: skip


def clip_towers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configs of the text and of the vision tower of a CLIP, with transformers' defaults where it is silent.

    config: of CLIPModel, CLIPTextModel or CLIPVisionModel, with the fields of a tower at the top in the last two.

    Raises:
        ConvertError: if it is of another model, or a field is not supported.
    """
    kind = config.get("model_type", "clip")
    if kind not in ("clip", "clip_text_model", "clip_vision_model"):
        raise ConvertError(f"the config.json beside the file is not of a CLIP: it has model_type={_short(kind)}")
    whole = any(f"{name}_config{old}" in config for name in ("text", "vision") for old in ("", "_dict"))
    alone = "vision" if kind == "clip_vision_model" or "patch_size" in config else "text"
    if whole:
        check_fields(config, CLIP, "the CLIP is not supported")
    towers = {}
    for name, fields, defaults in (
        ("text", TEXT_TOWER, {"hidden_size": 512, "num_attention_heads": 8}),
        ("vision", VISION_TOWER, {"hidden_size": 768, "num_attention_heads": 12}),
    ):
        given = config if name == alone else {}
        if whole:  # the older field wins, as in transformers
            given = config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
        check_fields(given, fields, f"the {name} tower of the CLIP is not supported")
        if whole:  # transformers makes both projections of the width at the top
            given = {key: value for key, value in given.items() if key != "projection_dim"}
            given["projection_dim"] = config.get("projection_dim")
        towers[name] = {"hidden_act": "quick_gelu"} | defaults | given
    return towers


def check_processor(config: Mapping[str, Any], image_size: int) -> None:
    """Check that a CLIPImageProcessor prepares images of this size as `data.transforms.clip_pixels` does.

    Raises:
        ConvertError: otherwise; it names the fields.
    """
    whose = "the image processor is not CLIP's"
    check_fields(config, _processor(image_size), whose)
    exact = {"rescale_factor": [1 / 255], "image_mean": _MEAN, "image_std": _STD}
    for name, wanted in exact.items():
        values = config.get(name, wanted)
        values = values if isinstance(values, list) else [values]
        try:
            same = len(values) == len(wanted) and all(abs(a - b) < 1e-5 for a, b in zip(values, wanted, strict=True))
        except TypeError:
            same = False
        if not same:
            raise ConvertError(f"{whose}: it has {name}={_short(config[name])} (supported: {wanted})")


_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _processor(size: int) -> Fields:
    on = dict.fromkeys(("do_center_crop", "do_normalize", "do_rescale", "do_resize"), (True,))
    square = {"height": size, "width": size}
    return Fields(
        dict.fromkeys(("image_mean", "image_std", "rescale_factor"), ANY),
        on | {"crop_size": (size, square), "size": (size, {"shortest_edge": size}, square), "resample": (3,)},
        frozenset({"data_format", "default_to_square", "do_convert_rgb", "feature_extractor_type",
                   "image_processor_type", "input_data_format", "processor_class"}),
    )  # fmt: skip
