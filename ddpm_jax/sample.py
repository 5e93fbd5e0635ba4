"""Draw pictures for prompts: `python -m ddpm_jax.sample --prompt "a small red star" --out grid.png [--workdir DIR]`.

Without a workdir the small weights that the package carries are used.
"""

from ddpm_jax import cli

# isort: split
from typing import Any

from absl import flags

FLAGS = flags.FlagValues()
_PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; may be repeated.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "PNG file to write.", flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Workdir of a training run, directory of ddpm_jax.convert, or weights file; bundled weights if none.",
    flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all random numbers.", lower_bound=0, upper_bound=cli.MAX_SEED, flag_values=FLAGS
)
_COUNT = flags.DEFINE_integer("count", 1, "Pictures a prompt.", lower_bound=1, flag_values=FLAGS)
_SCALE = cli.define_finite(
    "scale", None, "Guidance scale of the decoder; that of the config if none.", flag_values=FLAGS
)
_PRIOR_SCALE = cli.define_finite(
    "prior_scale", None, "Guidance scale of the prior; that of the config if none.", flag_values=FLAGS
)
_COLUMNS = flags.DEFINE_integer("columns", None, "Pictures a row.", lower_bound=1, flag_values=FLAGS)
_RAW = flags.DEFINE_bool("raw_weights", False, "Use raw instead of averaged weights of a workdir.", flag_values=FLAGS)


def main() -> None:
    """Run the program."""
    if not _PROMPT.value or not _OUT.value:
        raise cli.UsageError("--prompt and --out are needed")
    if not _OUT.value.lower().endswith(".png"):
        raise cli.UsageError(f"--out={_OUT.value} must end in .png")
    # Wrong flags are reported before the weights are loaded.
    cli.check_exists(_WORKDIR.value, what="--workdir")
    texts = [cli.as_utf8(prompt, what="--prompt") for prompt in _PROMPT.value]
    cli.check_can_write(_OUT.value, what="--out")
    from ddpm_jax.data import image_grid as pictures
    from ddpm_jax.parallel.mesh import make_local_mesh
    from ddpm_jax.pipelines import UnCLIP, load
    from ddpm_jax.pipelines.weights import read_tokenizer
    from ddpm_jax.progress import progress_bar
    from ddpm_jax.storage import model_directory as converted

    # The empty caption is the unconditional one of released pipelines; those trained here have none.
    allow_empty = _WORKDIR.value is not None and converted.is_model_directory(_WORKDIR.value)
    _check_prompts(texts, read_tokenizer(_WORKDIR.value), allow_empty)
    cli.use_cpu_devices()
    pipeline = load(_WORKDIR.value, ema=not _RAW.value)
    if not hasattr(pipeline, "generate"):
        raise cli.UsageError(f"--workdir={_WORKDIR.value} holds {pipeline.family} alone, which draws no captions")
    if _PRIOR_SCALE.value is not None and not hasattr(pipeline, "prior"):
        raise cli.UsageError(f"--prior_scale={_PRIOR_SCALE.value}: {_WORKDIR.value} has no prior")
    prompts = [prompt for prompt in texts for _ in range(_COUNT.value)]
    options = {"decoder_scale": _SCALE.value, "prior_scale": _PRIOR_SCALE.value}
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(pipeline, UnCLIP):
        options["mesh"] = make_local_mesh(at_most=len(prompts))
    with progress_bar(len(prompts), description="sample", unit="image") as bar:
        images = pipeline.generate(prompts, seed=_SEED.value, report=bar.update, **options)
    pictures.save_png(_OUT.value, pictures.grid(images, prompts, columns=_COLUMNS.value))
    size = pipeline.image_size
    cli.show(f"wrote {_OUT.value}: {len(images)} pictures of {size} x {size} pixels")


def _check_prompts(prompts: list[str], tokenizer: Any, allow_empty: bool) -> None:
    """Raise UsageError for the first prompt that the tokenizer refuses."""
    for number, prompt in enumerate(prompts, 1):
        which = f' "{prompt}"' + (f" ({number} of {len(prompts)})" if len(prompts) > 1 else "")
        try:
            empty = not prompt.strip() or (tokenizer is not None and not tokenizer.ids(prompt))
        except ValueError as error:
            raise cli.UsageError(f"--prompt{which}: {error}") from error
        if empty and not allow_empty:
            raise cli.UsageError(f"--prompt{which} is empty; say what to show, in at least one word")


if __name__ == "__main__":
    cli.run(main, FLAGS)
