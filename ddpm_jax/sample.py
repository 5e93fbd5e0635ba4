"""Sample images: `python -m ddpm_jax.sample --prompt "a small red star" --out grid.png [--workdir DIR]`.

Without a workdir the small pipeline that the package carries is used. Captions are given as --prompt; a pipeline
without captions takes --label, --num_images or both. --classifier and --noised_clip add a model of another run that
guides the base, by --classifier_scale and a label, or by --clip_scale and a prompt. Options of the sampler are for the
main stage (the decoder of unCLIP, the base of a cascade); an option of any stage is --<stage>_<option>, such as
--prior_steps=50, --upsampler_sampler=dpm_solver or --decoder_scale=3; an autoregressive prior takes --prior_scale,
--prior_temperature and --prior_top_p. What the prior predicts is clipped by --prior_threshold, or brought to the norm
of the training data by --prior_l2_clamp. --embedding and --[no]use_text say what unCLIP's decoder is conditioned on:
both, either, neither.
"""

from ddpm_jax import cli, cli_hosts, cli_sampling

# isort: split
import re
import sys
from typing import Any

import numpy as np
from absl import flags

from ddpm_jax.errors import counted

FLAGS = flags.FlagValues()
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Caption of an image; may be repeated.", flag_values=FLAGS)
_NEGATIVE = flags.DEFINE_multi_string(
    "negative_prompt", None, "Negative prompt of guidance: one, or one for each prompt.", flag_values=FLAGS
)
_LABEL = flags.DEFINE_multi_string("label", None, "A class, by name or index; may be repeated.", flag_values=FLAGS)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "Number of images of a pipeline without captions.", lower_bound=1, flag_values=FLAGS
)
_COUNT = flags.DEFINE_integer("count", 1, "Images per prompt or label.", lower_bound=1, flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "PNG file to write.", flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Workdir of a training run, or directory of ddpm_jax.convert; the bundled pipeline if none.",
    flag_values=FLAGS,
)
_CLASSIFIER = flags.DEFINE_string(
    "classifier", None, "Directory of a classifier of noised images, for --classifier_scale.", flag_values=FLAGS
)
_NOISED_CLIP = flags.DEFINE_string(
    "noised_clip", None, "Directory of a noised CLIP, for --clip_scale and --prompt.", flag_values=FLAGS
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all random numbers.", lower_bound=0, upper_bound=cli.MAX_SEED, flag_values=FLAGS
)
_START = flags.DEFINE_integer(
    "start", 0, "Index of the first image; reproduces a part of a larger set.", lower_bound=0, flag_values=FLAGS
)
_BATCH = flags.DEFINE_integer("batch_size", None, "Images sampled together.", lower_bound=1, flag_values=FLAGS)
_COLUMNS = flags.DEFINE_integer("columns", None, "Images per row of the PNG.", lower_bound=1, flag_values=FLAGS)
_SPACE = flags.DEFINE_integer(
    "space", 1, "Devices that share the rows of each image in upsampling.", lower_bound=1, flag_values=FLAGS
)
_LOW_RES = flags.DEFINE_bool("low_res", False, "Images of the main stage, not upsampled.", flag_values=FLAGS)
_EMBEDDING = flags.DEFINE_enum(
    "embedding",
    None,
    ["prior", "text", "none"],
    "What the decoder of unCLIP is given as image embedding: the prior's, CLIP's text embedding, or none.",
    flag_values=FLAGS,
)
_USE_TEXT = flags.DEFINE_bool("use_text", None, "Give the decoder of unCLIP the caption.", flag_values=FLAGS)
_CANDIDATES = flags.DEFINE_integer(
    "candidates",
    None,
    "Embeddings that unCLIP's prior samples for a caption, of which the one nearest to it is taken.",
    lower_bound=1,
    upper_bound=1000,
    flag_values=FLAGS,
)
_RAW = flags.DEFINE_bool("raw_weights", False, "Use raw instead of averaged weights of a workdir.", flag_values=FLAGS)
cli_sampling.define_sampling_flags(FLAGS)


def main() -> None:
    """Run the program."""
    if not _OUT.value:
        raise cli.UsageError("--out is needed, a PNG file to write")
    if not _OUT.value.lower().endswith(".png"):
        raise cli.UsageError(f"--out={_OUT.value} must end in .png")
    # Wrong flags are reported before the weights are loaded.
    for flag in (_WORKDIR, _CLASSIFIER, _NOISED_CLIP):
        cli.check_exists(flag.value, what=f"--{flag.name}")
    texts = [cli.as_utf8(prompt, what="--prompt") for prompt in _PROMPT.value or ()]
    cli.check_can_write(_OUT.value, what="--out")
    import jax

    from ddpm_jax.data import image_grid
    from ddpm_jax.pipelines.cascade import Cascade
    from ddpm_jax.pipelines.directory import load, read_tokenizer
    from ddpm_jax.pipelines.request import NotFiniteError
    from ddpm_jax.pipelines.sharing import generate_on_all_hosts
    from ddpm_jax.pipelines.unclip import UnCLIP
    from ddpm_jax.progress import progress_bar
    from ddpm_jax.storage.model_directory import Model

    if texts:
        cli_sampling.check_captions(texts, read_tokenizer(_WORKDIR.value), what="--prompt")
    cli.use_cpu_devices()
    pipeline = load(_WORKDIR.value, ema=not _RAW.value)
    if isinstance(pipeline, Model) and {"diffusion", "image_size", "conditions"} <= set(pipeline.metadata):
        try:
            pipeline = Cascade(base=pipeline).checked()
        except ValueError as error:
            raise cli.UsageError(f"--workdir={_WORKDIR.value} cannot be sampled alone: {error}") from error
    pipeline = _guided(pipeline)
    given, captions = _request(pipeline, texts)
    if _CANDIDATES.value is not None and isinstance(pipeline, UnCLIP):
        pipeline = pipeline.replace(candidates=_CANDIDATES.value)
    count = len(captions)
    share = -(-count // jax.process_count())
    with progress_bar(share, description="sample", unit="image", shown=cli_hosts.is_first_host()) as bar:
        try:
            kwargs = _how(pipeline, count) | {"report": bar.update, "space": _SPACE.value}
            images = generate_on_all_hosts(pipeline.generate, count, given, **kwargs)
        except NotFiniteError:
            raise
        except ValueError as error:
            raise cli.UsageError(str(error)) from error
    grid = image_grid.grid(_shown(images), captions if any(captions) else None, columns=_COLUMNS.value)
    if cli_hosts.is_first_host():
        image_grid.save_png(_OUT.value, grid)
    height, width = images.shape[1:3]
    cli.show(f"wrote {_OUT.value}: {counted(len(images), 'image')} of {height} x {width} pixels")


def _guided(pipeline: Any) -> Any:
    """Return the pipeline with the models of --classifier and --noised_clip."""
    from ddpm_jax.pipelines import Cascade
    from ddpm_jax.pipelines.directory import load
    from ddpm_jax.storage.model_directory import Model

    for role, flag in (("classifier", _CLASSIFIER), ("noised_clip", _NOISED_CLIP)):
        if flag.value is None:
            continue
        if not isinstance(pipeline, Cascade):
            raise cli.UsageError(f"--{role} is not used: it guides the base of a Cascade")
        model = load(flag.value, ema=not _RAW.value)
        if not isinstance(model, Model):
            raise cli.UsageError(
                f"--{role}={flag.value} holds a {type(model).__name__}; give the directory of one model, such as "
                f"{flag.value}/{role}"
            )
        try:
            pipeline = pipeline.replace(**{role: model}).checked()
        except ValueError as error:
            raise cli.UsageError(f"--{role}={flag.value}: {error}") from error
    return pipeline


def _request(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what to generate, as arguments of `generate`, and a caption for each image."""
    from ddpm_jax.pipelines import Cascade

    where = "the bundled pipeline" if _WORKDIR.value is None else f"--workdir={_WORKDIR.value}"
    if not hasattr(pipeline, "generate"):
        name = type(getattr(pipeline, "network", pipeline)).__name__
        raise cli.UsageError(f"{where} holds the network {name} alone, which generates no images")
    of_cascade = isinstance(pipeline, Cascade)
    captioned = not of_cascade or (pipeline.captioned and bool(prompts))
    wrong = ("label", "num_images") if captioned else ("prompt", "negative_prompt")
    for name in wrong:
        if FLAGS[name].value is not None:
            takes = "--prompt" if captioned else "--label and --num_images"
            raise cli.UsageError(f"--{name} is not used: {where} is a {type(pipeline).__name__}, which takes {takes}")
    if captioned:
        if not prompts:
            raise cli.UsageError(f"--prompt is needed: {where} generates images of captions")
        captions = [prompt for prompt in prompts for _ in range(_COUNT.value)]
        if of_cascade:
            if _NEGATIVE.value:
                raise cli.UsageError(f"--negative_prompt is not used: {where} is a Cascade, which has none")
            return {"prompts": captions}, captions
        negative = _NEGATIVE.value and [cli.as_utf8(text, what="--negative_prompt") for text in _NEGATIVE.value]
        if negative and len(negative) > 1:
            if len(negative) != len(prompts):
                raise cli.UsageError(
                    f"--negative_prompt is given {len(negative)} times; give one, or one for each of "
                    f"{len(prompts)} prompts"
                )
            negative = [text for text in negative for _ in range(_COUNT.value)]
        return {"prompts": captions, "negative_prompts": negative or None}, captions
    labels = [int(text) if re.fullmatch(r"-?\d{1,9}", text) else text for text in _LABEL.value or ()]
    if len(labels) == 1 and _NUM_IMAGES.value is not None:
        labels *= _NUM_IMAGES.value
    labels = [label for label in labels for _ in range(_COUNT.value)]
    count = len(labels) or (_NUM_IMAGES.value or 1) * _COUNT.value
    if labels and _NUM_IMAGES.value is not None and len(_LABEL.value) > 1:
        raise cli.UsageError("--num_images is for one --label; give --count images for each of several labels")
    return {"num_images": count, "labels": labels or None}, [str(label) for label in labels] or [""] * count


def _how(pipeline: Any, count: int) -> dict[str, Any]:
    """Return the other arguments of `generate`."""
    from ddpm_jax.pipelines import Cascade, UnCLIP

    kwargs: dict[str, Any] = {"seed": _SEED.value, "start": _START.value}
    if isinstance(pipeline, (UnCLIP, Cascade)):
        kwargs["batch_size"] = min(pipeline.batch_size, count)
    if _LOW_RES.value:
        if not isinstance(pipeline, (UnCLIP, Cascade)):
            raise cli.UsageError(f"--low_res is not used: a {type(pipeline).__name__} returns images of one size")
        kwargs["low_res"] = True
    for name in ("embedding", "use_text", "candidates"):
        if FLAGS[name].value is None:
            continue
        if not isinstance(pipeline, UnCLIP):
            raise cli.UsageError(f"--{name} is not used: it is for unCLIP, and this is a {type(pipeline).__name__}")
        kwargs |= {} if name == "candidates" else {name: FLAGS[name].value}
    _check_used(pipeline)
    if _BATCH.value is not None:
        kwargs["batch_size"] = _BATCH.value
    return kwargs | cli_sampling.sampling_options(FLAGS)


def _check_used(pipeline: Any) -> None:
    """Refuse flags of stages that are not run."""
    unused = list(getattr(pipeline, "names", ())) if _LOW_RES.value else []
    if unused:
        cli_sampling.refuse_stages(FLAGS, unused, "with --low_res")
    if _EMBEDDING.value not in (None, "prior"):
        where = f"with --embedding={_EMBEDDING.value}"
        cli_sampling.refuse_stages(FLAGS, ["prior"], where)
        if _CANDIDATES.value is not None:
            raise cli.UsageError(f"--candidates is not used {where}")


def _shown(images: np.ndarray) -> np.ndarray:
    """Return images of one or three channels as uint8[N, H, W, 3]."""
    if images.shape[-1] not in (1, 3):
        raise cli.UsageError(f"images of {images.shape[-1]} channels cannot be written as PNG; call generate in Python")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


if __name__ == "__main__":
    cli_sampling.define_stage_flags(FLAGS, sys.argv[1:])
    cli.run(main, FLAGS, distributed=True)
