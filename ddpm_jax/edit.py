"""Change images by what CLIP sees in them: `python -m ddpm_jax.edit COMMAND --image photo.jpg --out grid.png`.

Commands (docs/manipulations.md has examples, equations and the choices behind them):
  encode       write the bipartite latents (z_image, x_T) of images to --out, a .safetensors file
  decode       images of latents; of --image, what encode and decode make of it
  variations   --count other images of each, for every --eta
  interpolate  --count steps between consecutive images
  text_diff    from --source towards --target, two captions, for every --theta
  reconstruct  with every number of principal components in --dims
  caption      with every --prompt, at the image's embedding
  inpaint      replace what is white in --mask, with --prompt or without
  outpaint     continue images beyond their frame
  probe        what CLIP takes images for, of every --label, and images of embeddings turned by --degrees

Without a workdir the small pipeline that the package carries is used. The grid has a row for each image, which begins
with the image itself. Options of samplers are those of ddpm_jax.sample.
"""

from ddpm_jax import cli, cli_images, cli_sampling

# isort: split
import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from ddpm_jax.errors import counted, one_for_each

FLAGS = flags.FlagValues()
_MOST_IMAGES = 2**31 - 1  # indices of images are int32
_PLACES = ("center", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")


def _strings(name: str, help: str) -> flags.FlagHolder:
    return flags.DEFINE_multi_string(name, None, f"{help}; may be repeated.", flag_values=FLAGS)


_IMAGE = _strings("image", "An image file, or a folder of images")
_LATENT = flags.DEFINE_string("latent", None, "File of encode, in place of --image.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "PNG file to write; of encode a .safetensors file.", flag_values=FLAGS)
_OUT_DIR = flags.DEFINE_string("out_dir", None, "Also write each image into this directory.", flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Workdir of a training run, or directory of ddpm_jax.convert; the bundled pipeline if none.",
    flag_values=FLAGS,
)
_PROMPT = _strings("prompt", "Caption: of caption each for all images, otherwise one, or one for each image")
_NEGATIVE = _strings("negative_prompt", "Negative prompt of guidance: one, or one for each image")
_NOISE = flags.DEFINE_enum(
    "noise",
    None,
    ["inverted", "random"],
    "x_T: found by inversion, the default of decode, variations, interpolate and text_diff; or from --seed.",
    flag_values=FLAGS,
)
_COUNT = flags.DEFINE_integer(
    "count",
    None,
    "Images of each image; 4 variations, or 5 of an interpolation, by default.",
    lower_bound=1,
    flag_values=FLAGS,
)
_ETA = flags.DEFINE_multi_string("eta", None, "Noise of ddim, from 0 to 1; may be repeated.", flag_values=FLAGS)
_THETA = flags.DEFINE_multi_string("theta", None, "Share of a text difference; may be repeated.", flag_values=FLAGS)
_SOURCE = flags.DEFINE_string("source", None, "Caption of what the images show.", flag_values=FLAGS)
_TARGET = flags.DEFINE_string("target", None, "Caption of what they shall show.", flag_values=FLAGS)
_DIMS = flags.DEFINE_multi_integer(
    "dims", None, "Number of principal components; may be repeated.", lower_bound=0, flag_values=FLAGS
)
_PCA = flags.DEFINE_string(
    "pca",
    None,
    "Folder of images that principal components are fitted to; those of the codes if none.",
    flag_values=FLAGS,
)
_MASK = _strings("mask", "Image file, white where the image is replaced: one, or one for each image")
_EMBEDDING = flags.DEFINE_enum(
    "embedding", None, ["prior", "image", "none"], "Image embedding of what is filled in.", flag_values=FLAGS
)
_RESAMPLE = flags.DEFINE_integer(
    "resample", None, "Passes of each step, 10 by default.", lower_bound=1, flag_values=FLAGS
)
_EXTENT = cli.define_finite("extent", None, "Side of the image in the new one, 0.5 by default.", flag_values=FLAGS)
_PLACE = flags.DEFINE_enum("place", None, _PLACES, "Where the image is in the new one.", flag_values=FLAGS)
_LABEL = _strings("label", "Caption whose probability is shown")
_DEGREES = flags.DEFINE_multi_string("degrees", None, "Angle of a random turn; may be repeated.", flag_values=FLAGS)
_ITERATIONS = flags.DEFINE_integer(
    "iterations", 1, "Network calls in each step of the inversion.", lower_bound=1, upper_bound=100, flag_values=FLAGS
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all random numbers.", lower_bound=0, upper_bound=cli.MAX_SEED, flag_values=FLAGS
)
_START = flags.DEFINE_integer("start", 0, "Index of the noise of the first image.", lower_bound=0, flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch_size", None, "Images computed together.", lower_bound=1, flag_values=FLAGS)
_LOW_RES = flags.DEFINE_bool("low_res", False, "Images of the decoder, not upsampled.", flag_values=FLAGS)
_RAW = flags.DEFINE_bool("raw_weights", False, "Use raw instead of averaged weights of a workdir.", flag_values=FLAGS)
cli_sampling.define_sampling_flags(FLAGS, without=("eta",))


class _Run:
    """A pipeline, and how the flags want it to be used."""

    def __init__(self, name: str, pipeline: Any, bars: contextlib.ExitStack):
        self.name, self.pipeline, self._bars = name, pipeline, bars

    def shared(self, count: int, *, description: str = "edit", rounds: int = 1) -> dict[str, Any]:
        """Return the arguments of every computation of `count` images; a bar counts `rounds` of them."""
        from ddpm_jax.parallel.mesh import make_local_mesh
        from ddpm_jax.progress import progress_bar

        self._bars.close()  # that of the computation before
        bar = self._bars.enter_context(progress_bar(count * rounds, description=description, unit="image"))
        own = getattr(self.pipeline, "batch_size", None)
        batch_size = min(own, count) if _BATCH.value is None and own else _BATCH.value
        mesh = make_local_mesh(at_most=min(count, batch_size or count))
        return {"batch_size": batch_size, "mesh": mesh if mesh.size > 1 else None, "report": bar.update}

    def sampling(self, count: int, *, rounds: int = 1) -> dict[str, Any]:
        """Return the arguments of sampling `count` images."""
        how = {"seed": _SEED.value, "start": _START.value, "low_res": _LOW_RES.value}
        if self.name != "variations" and _ETA.value:
            how["eta"] = _numbers(_ETA)[0]
        options = cli_sampling.sampling_options(FLAGS, without=("eta",))
        return self.shared(count, rounds=rounds) | how | options

    def check(self, inverts: bool, count: int) -> None:
        """Refuse wrong options for `count` images before anything is computed."""
        of_each = (_COUNT.value or 4) if self.name == "variations" else 1
        if _START.value > (most := _MOST_IMAGES // of_each - count):
            raise cli.UsageError(f"--start={_START.value} must be at most {most}")
        if self.name == "reconstruct" and _PCA.value is None and getattr(self.pipeline, "codes", None) is None:
            raise cli.UsageError("--pca is needed, a folder of images to fit components to: this pipeline has no codes")
        options = cli_sampling.sampling_options(FLAGS, without=("eta",))
        eta = {"eta": _numbers(_ETA)[-1]} if _ETA.value else {}
        filled = COMMANDS[self.name].fills and _PROMPT.value and _EMBEDDING.value in (None, "prior")
        unused = [] if filled else ["prior"]
        unused += getattr(self.pipeline, "names", ("upsampler",)) if _LOW_RES.value else []
        cli_sampling.refuse_stages(FLAGS, unused, f"by {self.name}" + (" with --low_res" if _LOW_RES.value else ""))
        guided = _library().check_options(self.pipeline, inverts, **eta, **options, negative_prompts=_texts(_NEGATIVE))
        if _NEGATIVE.value and not guided and "prior" in unused:
            raise cli.UsageError(
                "--negative_prompt is of guidance, and nothing is guided; add --scale, such as --scale=2"
            )
        self.captions(count - (self.name == "interpolate"), prompts=self.name != "caption")
        if self.name == "reconstruct":
            self._check_components()
        if self.name == "text_diff":
            source, target = _library().decoding_of(self.pipeline).words(_texts(_SOURCE) + _texts(_TARGET)).tokens
            if (source == target).all():
                raise cli.UsageError("--source and --target are the same caption, so that there is no difference")

    def _check_components(self) -> None:
        if _PCA.value is None:
            known = _library().pca_of(self.pipeline).components.shape[1]
        else:
            found = cli_images.count_images(_PCA.value, what="--pca")
            if found < 2:
                raise cli.UsageError(f"--pca={_PCA.value} has one image, and principal components need at least two")
            known = min(found - 1, _library().decoding_of(self.pipeline).embed_dim)
        if _DIMS.value and max(_DIMS.value) > known:
            raise cli.UsageError(f"--dims={max(_DIMS.value)} must be at most {known}, the number of components")

    def filling(self, count: int) -> dict[str, Any]:
        """Return the arguments of inpainting `count` images."""
        given = {"embedding": _EMBEDDING.value, "resample": _RESAMPLE.value}
        given = {name: value for name, value in given.items() if value is not None}
        return self.sampling(count) | self.captions(count) | given

    def captions(self, count: int, *, prompts: bool = True, negative: bool = True) -> dict[str, Any]:
        """Return the captions of `count` images."""
        found = {}
        for flag, wanted in ((_PROMPT, prompts), (_NEGATIVE, negative)):
            if wanted and flag.value:
                if len(flag.value) not in (1, count):
                    wanted = one_for_each(count, "caption", "image")
                    raise cli.UsageError(f"--{flag.name} is given {len(flag.value)} times; give {wanted}")
                found[f"{flag.name}s"] = _texts(flag)
        return found

    def latents(self, images: list[np.ndarray], inverts: bool) -> Any:
        """Return the latents of images, or their embeddings alone."""
        from ddpm_jax.pipelines import manipulation

        how = self.shared(len(images), description="encode")
        if not inverts:
            return manipulation.BipartiteLatent(manipulation.embed_images(self.pipeline, images, **how))
        options = cli_sampling.sampling_options(FLAGS, without=("eta",))
        how |= self.captions(len(images), prompts=self.name in ("encode", "decode"), negative=False)
        steps = options.get("steps", options.get("decoder_steps"))
        return manipulation.encode(self.pipeline, images, steps=steps, iterations=_ITERATIONS.value, **how)


# ---- Commands: (run, latent or images) -> uint8[N, K, H, H, C], and K texts ------------------------------------------


def _decode(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    count = len(latent)
    return _library().decode(run.pipeline, latent, **run.sampling(count), **run.captions(count))[:, None], ["decoded"]


def _variations(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    count, etas = _COUNT.value or 4, _numbers(_ETA) or [None]
    how = run.sampling(len(latent) * count, rounds=len(etas)) | run.captions(len(latent)) | {"count": count}
    found = [_library().variations(run.pipeline, latent, eta=eta, **how) for eta in etas]
    texts = ["variation" if eta is None else f"eta {eta:g}" for eta in etas for _ in range(count)]
    return np.concatenate(found, axis=1), texts


def _interpolate(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    pairs, weights = len(latent) - 1, np.linspace(0, 1, _COUNT.value or 5)
    how = run.sampling(pairs * len(weights)) | run.captions(pairs) | {"weights": weights}
    ends = latent.take(slice(0, -1)), latent.take(slice(1, None))
    return _library().interpolate(run.pipeline, *ends, **how), [f"{weight:.2g}" for weight in weights]


def _text_diff(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    captions = _texts(_SOURCE) + _texts(_TARGET)
    thetas = _numbers(_THETA) or list(_library().THETAS)
    how = run.sampling(len(latent) * len(thetas)) | run.captions(len(latent)) | {"thetas": thetas}
    return _library().text_diff(run.pipeline, latent, *captions, **how), [f"theta {theta:g}" for theta in thetas]


def _reconstruct(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    pca = _library().pca_of(run.pipeline) if _PCA.value is None else _fitted(run, _PCA.value)
    known = pca.components.shape[1]
    dims = _DIMS.value or sorted({max(1, known * share // 16) for share in (1, 2, 4, 8, 16)})
    how = run.sampling(len(latent) * len(dims)) | run.captions(len(latent))
    images = _library().reconstruct(run.pipeline, latent, pca, dims, **how)
    return images, [f"{number} of {known} dimensions" for number in dims]


def _fitted(run: _Run, folder: str) -> Any:
    found = []
    for images, _ in cli_images.image_parts(folder, what="--pca"):  # not all at once: their pixels may need any memory
        how = run.shared(len(images), description="embed")
        found.append(_library().embed_images(run.pipeline, images, **how))
    return _library().fit_pca(np.concatenate(found))


def _caption(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    prompts = _texts(_PROMPT)
    how = run.sampling(len(latent) * len(prompts)) | run.captions(len(latent), prompts=False)
    return _library().recaption(run.pipeline, latent, prompts, **how), prompts


def _inpaint(run: _Run, images: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    masks, _ = cli_images.read_images(_MASK.value, what="--mask")
    keep = [mask.mean(-1) < 128 for mask in masks]
    return _library().inpaint(run.pipeline, images, keep, **run.filling(len(images)))[:, None], ["inpainted"]


def _outpaint(run: _Run, images: list[np.ndarray]) -> tuple[np.ndarray, list[str]]:
    where = {"extent": _EXTENT.value, "place": _PLACE.value}
    how = run.filling(len(images)) | {name: value for name, value in where.items() if value is not None}
    return _library().outpaint(run.pipeline, images, **how)[:, None], ["outpainted"]


def _probe(run: _Run, latent: Any) -> tuple[np.ndarray, list[str]]:
    import jax

    degrees, key = _numbers(_DEGREES, most=180.0) or [0.0], jax.random.key(_SEED.value)
    labels, found = _texts(_LABEL), []
    how = run.sampling(len(latent), rounds=len(degrees)) | run.captions(len(latent))
    for angle in degrees:
        turned = latent.replace(z_image=np.asarray(_library().perturbed(latent.z_image, angle, key)))
        if labels:
            for number, row in enumerate(_library().label_probabilities(run.pipeline, turned.z_image, labels)):
                shares = ", ".join(f"{label} {100 * share:.1f} %" for label, share in zip(labels, row))
                cli.show(f"image {number}, {angle:g} degrees: {shares}")
        found.append(_library().decode(run.pipeline, turned, **how))
    return np.stack(found, axis=1), [f"{angle:g} degrees" for angle in degrees]


class _Command(NamedTuple):
    """A command.

    Attributes:
        run: as above; None of encode.
        flags: those that it has and not all commands have.
        inverts: whether it takes x_T from inversion unless --noise says otherwise.
        of_latents: whether it takes latents and no images.
        needs: flags that must be given, and what they are.
        fills: whether it fills in what is unknown, for which the prior may be sampled.
    """

    run: Callable[[_Run, Any], tuple[np.ndarray, list[str]]] | None
    flags: tuple[str, ...] = ()
    inverts: bool = True
    of_latents: bool = True
    needs: tuple[tuple[str, ...], str] = ((), "")
    fills: bool = False


_SOURCES = ("source", "target"), "two captions"
_MASKS = ("mask",), "an image that is white where the image is replaced"
_SAMPLED = ("negative_prompt", "out_dir", "low_res", "seed", "start", "eta")
_OF_LATENTS = ("latent", "prompt", "noise", "iterations", *_SAMPLED)
_FILLED = ("prompt", "embedding", "resample", *_SAMPLED)
COMMANDS = {
    "encode": _Command(None, ("prompt", "iterations")),
    "decode": _Command(_decode, _OF_LATENTS),
    "variations": _Command(_variations, (*_OF_LATENTS, "count")),
    "interpolate": _Command(_interpolate, (*_OF_LATENTS, "count")),
    "text_diff": _Command(_text_diff, (*_OF_LATENTS, "source", "target", "theta"), needs=_SOURCES),
    "reconstruct": _Command(_reconstruct, (*_OF_LATENTS, "dims", "pca"), inverts=False),
    "caption": _Command(_caption, _OF_LATENTS, inverts=False, needs=(("prompt",), "a caption; it may be repeated")),
    "inpaint": _Command(_inpaint, (*_FILLED, "mask"), of_latents=False, needs=_MASKS, fills=True),
    "outpaint": _Command(_outpaint, (*_FILLED, "extent", "place"), of_latents=False, fills=True),
    "probe": _Command(_probe, (*_OF_LATENTS, "label", "degrees"), inverts=False),
}


# ---- The program -----------------------------------------------------------------------------------------------------


def main(name: str) -> None:
    """Run a command."""
    if name not in COMMANDS:
        given = f"{name!r} is no command" if name else "a command is needed"
        raise cli.UsageError(f"{given}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    _check_flags(name, command)
    images, names = cli_images.read_images(_IMAGE.value or (), what="--image")
    if name == "interpolate" and _LATENT.value is None and len(images) < 2:
        raise cli.UsageError("interpolate needs at least two images, such as --image a.png --image b.png")
    from ddpm_jax.pipelines.directory import load, read_tokenizer
    from ddpm_jax.pipelines.request import NotFiniteError

    tokenizer = read_tokenizer(_WORKDIR.value)
    for flag in (_PROMPT, _NEGATIVE, _LABEL, _SOURCE, _TARGET):
        cli_sampling.check_captions(_texts(flag), tokenizer, what=f"--{flag.name}")
    cli.use_cpu_devices()
    pipeline = load(_WORKDIR.value, ema=not _RAW.value)
    with contextlib.ExitStack() as bars:
        try:
            run = _Run(name, pipeline, bars)
            inverts = _inverts(command)
            stored = _stored_latent(inverts)
            run.check(inverts and command.of_latents, len(images) if stored is None else len(stored))
            latent = run.latents(images, inverts) if command.of_latents and stored is None else stored
            made = None if command.run is None else command.run(run, images if latent is None else latent)
        except NotFiniteError:
            raise
        except ValueError as error:
            raise cli.UsageError(str(error)) from error
    if made is None:
        _library().save_latents(latent, _OUT.value)
        cli.show(f"wrote {_OUT.value}: the latents of {counted(len(latent), 'image')}")
    else:
        cli_images.write_rows(_OUT.value, *made, inputs=images, names=names, out_dir=_OUT_DIR.value)


def _inverts(command: _Command) -> bool:
    return command.inverts if _NOISE.value is None else _NOISE.value == "inverted"


def _stored_latent(inverts: bool) -> Any:
    """Return the latents of --latent, with x_T or without; None if images are given."""
    if _LATENT.value is None:
        return None
    latent = _library().load_latents(_LATENT.value)
    if inverts and latent.x_T is None:
        raise cli.UsageError(f"--latent={_LATENT.value} has no x_T; --noise=random does without")
    return latent if inverts else latent.without_noise()


def _check_flags(name: str, command: _Command) -> None:
    """Refuse wrong flags before anything is loaded."""
    special = {flag for other in COMMANDS.values() for flag in other.flags}
    for flag in sorted(special - set(command.flags)):
        if FLAGS[flag].present:
            raise cli.UsageError(f"--{flag} is not used by {name}")
    needed, what = command.needs
    if any(FLAGS[flag].value in (None, []) for flag in needed):
        verb = "are" if len(needed) > 1 else "is"
        raise cli.UsageError(f"{' and '.join(f'--{flag}' for flag in needed)} {verb} needed, {what}")
    if name == "encode":
        for option in cli_sampling.sampling_options(FLAGS):
            if option not in ("steps", "decoder_steps"):
                raise cli.UsageError(f"--{option} is not used by encode, whose inversion has --steps alone")
    if FLAGS["iterations"].present and (_LATENT.value is not None or not _inverts(command)):
        raise cli.UsageError("--iterations is not used: no image is inverted")
    if name != "variations" and len(_ETA.value or ()) > 1:
        raise cli.UsageError(f"--eta is given {len(_ETA.value)} times; only variations takes several")
    for flag, most in ((_ETA, 1.0), (_THETA, 1.0), (_DEGREES, 180.0)):
        _numbers(flag, most=most)
    if _LATENT.value is None and not _IMAGE.value:
        more = ", or --latent" if "latent" in command.flags else ""
        raise cli.UsageError(f"--image is needed, a file or a folder of images{more}")
    if _LATENT.value is not None and _IMAGE.value:
        raise cli.UsageError("--image and --latent both say what is changed; give one of them")
    cli.check_exists(_WORKDIR.value, what="--workdir")
    cli.check_exists(_LATENT.value, what="--latent")
    ending = ".png" if command.run else ".safetensors"
    if not _OUT.value:
        raise cli.UsageError(f"--out is needed, a {ending} file to write")
    if not _OUT.value.lower().endswith(ending):
        raise cli.UsageError(f"--out={_OUT.value} must end in {ending}")
    cli.check_can_write(_OUT.value, what="--out")
    if _OUT_DIR.value:
        cli.check_can_write(Path(_OUT_DIR.value) / "000_000.png", what="--out_dir", given=_OUT_DIR.value)


def _texts(flag: flags.FlagHolder) -> list[str]:
    given = [flag.value] if isinstance(flag.value, str) else flag.value or ()
    return [cli.as_utf8(text, what=f"--{flag.name}") for text in given]


def _numbers(flag: flags.FlagHolder, *, most: float = 1.0) -> list[float]:
    """Return the numbers of a flag that may be repeated."""
    found = []
    for text in flag.value or ():
        try:
            number = float(text)
        except ValueError:
            raise cli.UsageError(f"--{flag.name}={text} is not a number") from None
        if not 0.0 <= number <= most:
            raise cli.UsageError(f"--{flag.name}={text} must be in [0, {most:g}]")
        found.append(number)
    return found


def _library() -> Any:
    """Return the functions of the commands; importing them imports JAX."""
    from ddpm_jax.pipelines import manipulation

    return manipulation


if __name__ == "__main__":
    command_name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else ""
    cli_sampling.define_stage_flags(FLAGS, sys.argv[1:])
    cli.run(functools.partial(main, command_name), FLAGS)
