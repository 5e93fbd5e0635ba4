"""Draw pictures for prompts: `python -m ddpm_jax.sample --prompt "a small red star" --out grid.png [--workdir DIR]`.

Without a workdir the small weights that the package carries are used.
"""

from absl import flags

from ddpm_jax import cli

_PROMPT = flags.DEFINE_multi_string("prompt", None, "What to draw; may be repeated.")
_OUT = flags.DEFINE_string("out", None, "PNG file to write.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Workdir of a training run, or a weights file; bundled weights if none."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all noise.", lower_bound=0)
_COUNT = flags.DEFINE_integer("count", 1, "Pictures a prompt.", lower_bound=1)
_SCALE = flags.DEFINE_float("scale", None, "Guidance scale of the decoder; that of the config if none.")
_PRIOR_SCALE = flags.DEFINE_float("prior_scale", None, "Guidance scale of the prior; that of the config if none.")
_COLUMNS = flags.DEFINE_integer("columns", None, "Pictures a row.", lower_bound=1)
_RAW = flags.DEFINE_bool("raw_weights", False, "Use raw instead of averaged weights of a workdir.")


def main(argv: list[str]) -> None:
    """Run the program."""
    if argv[1:]:
        raise ValueError(f"unknown argument {argv[1]!r}; give prompts with --prompt")
    if not _PROMPT.value or not _OUT.value:
        raise ValueError("--prompt and --out are needed")
    if not _OUT.value.lower().endswith(".png"):
        raise ValueError(f"--out={_OUT.value} must end in .png")
    import tqdm

    from ddpm_jax.pipelines import load
    from ddpm_jax.training import pictures

    pipeline = load(_WORKDIR.value, ema=not _RAW.value)
    prompts = [prompt for prompt in _PROMPT.value for _ in range(_COUNT.value)]
    with tqdm.tqdm(total=len(prompts), desc="sample", unit="image", dynamic_ncols=True) as bar:
        images = pipeline.generate(
            prompts, seed=_SEED.value, decoder_scale=_SCALE.value, prior_scale=_PRIOR_SCALE.value, report=bar.update
        )
    pictures.save_png(_OUT.value, pictures.grid(images, prompts, columns=_COLUMNS.value))
    print(f"wrote {_OUT.value}: {len(images)} pictures of {pipeline.image_size} x {pipeline.image_size} pixels")


if __name__ == "__main__":
    cli.run(main)
