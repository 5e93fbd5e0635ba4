"""Checkpoint families that `python -m ddpm_jax.convert` reads and writes."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.tokenizer import ClipTokenizer
from ddpm_jax.interop import (
    clip,
    ddpm,
    glide,
    guided,
    inception,
    karlo,
    karlo_original,
    latent_diffusion,
    noised_clip,
    score_sde,
    stable_diffusion,
)
from ddpm_jax.interop.config_fields import check_sizes, check_width, clip_towers, head_width, tower_sizes
from ddpm_jax.interop.diffusers_layout import weights_file
from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import ConvertError
from ddpm_jax.storage.json_file import read_json
from ddpm_jax.storage.model_directory import SOURCE, Converted, read_description, write_tensors
from ddpm_jax.storage.tensor_file import ReadError, read_tensors
from ddpm_jax.storage.tensors import Tensors
from ddpm_jax.storage.weight_files import only_weights

SMALL, WEIGHTS = (".json", ".txt", ".model"), (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th", ".msgpack")
GLIDE_MODELS = {"base": (glide.BASE, 64), "upsampler": (glide.UPSAMPLER, 256)}


class Options(NamedTuple):
    """Options that a checkpoint does not contain, where they differ from the published values.

    Attributes:
        model: name of a released network, for guided ("256x256_diffusion"), glide ("base"), clip ("ViT-H-14") and
            score-sde ("ve/cifar10_ncsnpp_continuous").
        head_width: of the text and the image tower of a CLIP; None takes the value of the model's name or of the
            config.json beside the file, else OpenAI's 64.
        activation: of a CLIP; None likewise, else OpenAI's quick_gelu.
        prior_clip: bound of the output of Karlo's prior; None takes the scheduler's, or 5 in diffusers' layout and 10
            in the original one.
        prediction: "eps" or "v", of Stable Diffusion in one file.
        image_size: in pixels, of Stable Diffusion in one file.
        part: of a training checkpoint, as `read_tensors` takes it ("ema"); None takes the raw parameters, and of
            score-sde the averages.
    """

    model: str | None = None
    head_width: tuple[int, int] | None = None
    activation: str | None = None
    prior_clip: float | None = None
    prediction: str = "eps"
    image_size: int = 512
    part: str | None = None


class Read(NamedTuple):
    """Result of reading a checkpoint.

    Attributes:
        converted: networks, parameters and metadata.
        assumed: name -> default that was used.
        files: the files that were read.
    """

    converted: Converted
    assumed: dict[str, Any]
    files: list[Path]


class Family(NamedTuple):
    """Checkpoint family.

    Attributes:
        source: its files, in words.
        read: reads them.
        write: writes a converted checkpoint into a directory, in the layout of its source.
        options: the fields of `Options` that it uses.
    """

    source: str
    read: Callable[[Path, Options], Read]
    write: Callable[[Converted, Path], None]
    options: tuple[str, ...] = ()


def sha256(path: Path) -> str:
    """Return the sum of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_files(source: Path, read: list[Path]) -> dict[str, Path]:
    """Return the small files of a directory that are not weights, by their place in it.

    A part whose weights were not read (a safety checker) is left out.
    """
    if not source.is_dir():
        return {}
    kept = {path.parent for path in read}
    left = {path.parent for path in source.glob("*/*") if path.suffix in WEIGHTS} - kept
    files = [*source.glob("*"), *source.glob("*/*")]
    return {
        str(path.relative_to(source)): path
        for path in sorted(files)
        if path.is_file() and path.suffix in SMALL and path.parent not in left and path.stat().st_size < 2**24
        and ".index." not in path.name
    }  # fmt: skip


# ---- Pipelines -------------------------------------------------------------------------------------------------------


def _read_karlo(source: Path, options: Options) -> Read:
    _needs_directory(source, "karlo")
    original = any(source.glob(karlo_original.FILES["decoder"]))
    read = karlo_original.read_karlo_original(source) if original else karlo.read_karlo(source)
    if options.prior_clip is not None:
        read.metadata["prior_clip"] = options.prior_clip
    assumed = {
        "prior_clip": read.metadata["prior_clip"],
        "schedules": "cosine, 1000 steps; the decoder's variance is learned, the others' fixed small",
        "padding of captions": read.metadata["tokenizer"]["pad"],
    }
    if original:
        assumed["widths of heads"] = "64 in the prior, the decoder and CLIP"
        return Read(read, assumed, list(karlo_original.find_files(source).values()))
    return Read(read, assumed, _weights(source, list(karlo.FIELDS)))


def _write_karlo(converted: Converted, out: Path) -> None:
    models, params = converted.models, converted.params
    if converted.metadata["layout"] != "diffusers":
        _write_karlo_original(converted, out)
        return
    small, large = converted.metadata["sizes"]
    parts = {"text_encoder": clip.export_clip(params["text"], "hf")}
    if "image" in params:
        parts["image_encoder"] = clip.export_clip(params["image"], "hf")
    if "prior" in params:
        numbers = params["statistics"]
        prior = karlo.LoadedPrior(models["prior"], params["prior"], numbers["mean"], numbers["std"])
        parts["prior"] = karlo.export_prior(prior)
    parts["decoder"], parts["text_proj"] = karlo.export_decoder(params["decoder"], models["decoder"], image_size=small)
    for name in ("first", "last"):
        parts[f"super_res_{name}"] = karlo.export_upsampler(params[name], models[name], image_size=large)
    _write_parts(out, parts)


def _write_karlo_original(converted: Converted, out: Path) -> None:
    models, params = converted.models, converted.params
    small, large = converted.metadata["sizes"]
    numbers = params["statistics"]
    prior = karlo.LoadedPrior(models["prior"], params["prior"], numbers["mean"], numbers["std"])
    prior_file, statistics = karlo_original.export_prior(prior)
    decoder = karlo_original.Loaded(models["decoder"], params["decoder"])
    upsamplers = karlo_original.Loaded(models["first"], {name: params[name] for name in ("first", "last")})
    towers = {**params["text"], **params["image"]}
    for name, tensors in {
        "prior-ckpt": prior_file,
        "ViT-L-14_stats": statistics,
        "decoder-ckpt": karlo_original.export_decoder(decoder, image_size=small),
        "improved-sr-ckpt": karlo_original.export_upsamplers(upsamplers, image_size=large),
        "ViT-L-14": clip.export_clip(towers, "openai"),
    }.items():
        write_tensors(out, name, tensors, whole=True)


def _read_stable_diffusion(source: Path, options: Options) -> Read:
    if source.is_dir():
        read = stable_diffusion.read_stable_diffusion(source)
        assumed = {
            "sampler": "DDIM, whatever the scheduler's name, at its timesteps",
            "padding of captions": read.metadata["tokenizer"]["pad"],
        }
        return Read(read, assumed, _weights(source, ["text_encoder", "unet", "vae"]))
    read = latent_diffusion.read_stable_diffusion_file(
        source, prediction=options.prediction, image_size=options.image_size, part=options.part
    )
    assumed = {
        "prediction": options.prediction,
        "image_size": options.image_size,
        "schedule": latent_diffusion.SCHEDULE,
        "averages": "left out, if the file has them" if options.part is None else f"of {options.part}",
    }
    return Read(read, assumed, [source])


def _write_stable_diffusion(converted: Converted, out: Path) -> None:
    if converted.metadata["layout"] == "original":
        write_tensors(out, "model", latent_diffusion.export_stable_diffusion_file(converted), whole=True)
        return
    models, params = converted.models, converted.params
    linear = converted.metadata["linear_projection"]
    _write_parts(
        out,
        {
            "text_encoder": stable_diffusion.export_text_encoder(params["text"], models["text"]),
            "vae": stable_diffusion.export_autoencoder(params["autoencoder"], models["autoencoder"]),
            "unet": stable_diffusion.export_unet(params["unet"], models["unet"], linear_projection=linear),
        },
    )


# ---- Single networks -------------------------------------------------------------------------------------------------


def _read_clip(source: Path, options: Options) -> Read:
    file = _file(source)
    if options.model is not None:
        heads, activation = clip.PUBLISHED[_named(options, clip.PUBLISHED)]
        activations, end, towers = (activation, activation), 2, {}
    else:
        heads, activations, end, towers = _clip_config(file.parent / "config.json")
    heads = options.head_width or heads
    activation = (options.activation,) * 2 if options.activation else activations
    tensors, taken = _part(file, clip.MARKS, options)
    for name, tower in towers.items():
        check_width(tower, tensors, f"the {name} tower does not fit", (name,))
    loaded = clip.load_clip(tensors, head_width=heads, activation=activation)
    for name, tower in towers.items() if loaded.dialect == "hf" else ():
        if (model := getattr(loaded.model, name)) is not None:
            check_sizes(tower, tower_sizes(model, loaded.model.embed_dim), f"the {name} tower does not fit")
    assumed = taken | {
        "head_width": f"{heads[0]} in the text tower, {heads[1]} in the image tower",
        "activation": activation[0]
        if len(set(activation)) == 1
        else f"{activation[0]} (text), {activation[1]} (image)",
        "end of a caption": "the largest id, as interop.clip.end_mask(tokens) finds it"
        if end == 2
        else f"the first id {end}, as interop.clip.end_mask(tokens, {end}) finds it",
    }
    metadata: dict[str, Any] = {"dialect": loaded.dialect}
    if loaded.model.vision is not None:
        metadata["image_size"] = loaded.model.vision.image_size
    if (text := loaded.model.text) is not None and text.vocab_size == ClipTokenizer.vocab_size:
        # All public ones have OpenAI's tokenizer, and see nothing of the padding.
        metadata |= {"tokenizer": {"kind": "clip", "pad": 0}, "length": text.context}
    return Read(Converted("clip", {"clip": loaded.model}, {"clip": loaded.params}, metadata), assumed, files_of(file))


def _clip_config(path: Path) -> tuple[tuple[int, int], tuple[str, str], int, dict[str, dict[str, Any]]]:
    """Return of transformers' config: the widths of heads, activations, the id that ends a caption, and the towers.

    Of both towers, text first; OpenAI's values if there is no config. An end of 2 is the largest id (old configs).

    Raises:
        ReadError: if it cannot be read as such a config.
        ConvertError: if it has a field, or a value of one, that is not supported.
    """
    if not path.is_file():
        return (64, 64), ("quick_gelu", "quick_gelu"), 2, {}
    try:
        config = read_json(path)
        towers = clip_towers(config)
        heads = [head_width(tower, f"{path} ({name})") for name, tower in towers.items()]
        activations = tuple(tower["hidden_act"] for tower in towers.values())
        return tuple(heads), activations, towers["text"].get("eos_token_id", 2), towers
    except ConvertError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ReadError(f"{path} cannot be read as the config of a CLIP: {error}") from None


def _write_clip(converted: Converted, out: Path) -> None:
    tensors = clip.export_clip(converted.params["clip"], converted.metadata["dialect"])
    write_tensors(out, "model", tensors, whole=True)


def _read_guided(source: Path, options: Options) -> Read:
    published = guided.PUBLISHED[_named(options, guided.PUBLISHED)]
    file, model = _file(source), published.model()
    kwargs = {"image_size": published.image_size, "new_attention_order": published.new_attention_order}
    tensors, taken = _part(file, guided.MARKS, options)
    params = guided.load_guided(tensors, model, **kwargs)
    chosen = {name: value for name, value in published._asdict().items() if name != "model"}
    metadata = {"model": options.model} | chosen | guided.metadata_of(published, model)
    converted = Converted("guided", {"model": model}, {"model": params}, metadata)
    return Read(converted, taken | {"model": options.model} | chosen, files_of(file))


def _write_guided(converted: Converted, out: Path) -> None:
    kwargs = {name: converted.metadata[name] for name in ("image_size", "new_attention_order")}
    write_tensors(
        out, "model", guided.export_guided(converted.params["model"], converted.models["model"], **kwargs), whole=True
    )


def _read_ddpm(source: Path, options: Options) -> Read:
    _needs_directory(source, "ddpm")
    converted, assumed = ddpm.read_ddpm(source)
    return Read(converted, assumed, _weights(source, ["unet"]) or files_of(weights_file(source, "")))


def _write_ddpm(converted: Converted, out: Path) -> None:
    model, metadata = converted.models["model"], converted.metadata
    tensors = ddpm.export_ddpm(converted.params["model"], model, flip_sin_to_cos=metadata["flip_sin_to_cos"])
    _write_parts(out, {"unet" if metadata["in_parts"] else "": tensors})


def _read_score_sde(source: Path, options: Options) -> Read:
    file = _file(source)
    converted, assumed = score_sde.read_score_sde(file, _named(options, score_sde.PUBLISHED), part=options.part)
    return Read(converted, assumed, files_of(file))


def _write_score_sde(converted: Converted, out: Path) -> None:
    params, model, sigmas = converted.params["model"], converted.models["model"], converted.metadata["sigmas"]
    write_tensors(out, "model", score_sde.export_score_sde(params, model, sigmas), whole=True)


def _read_glide(source: Path, options: Options) -> Read:
    make, size = GLIDE_MODELS[_named(options, GLIDE_MODELS)]
    file, model = _file(source), make()
    tensors, taken = _part(file, guided.MARKS, options)
    params = glide.load_glide(tensors, model, image_size=size)
    metadata = {"model": options.model, "image_size": size}
    schedule = {"schedule": "cosine" if options.model == "base" else "linear", "num_steps": 1000}
    converted = Converted("glide", {"model": model}, {"model": params}, metadata | schedule)
    return Read(converted, taken | metadata | schedule, files_of(file))


def _write_glide(converted: Converted, out: Path) -> None:
    model, size = converted.models["model"], converted.metadata["image_size"]
    write_tensors(out, "model", glide.export_glide(converted.params["model"], model, image_size=size), whole=True)


def _read_noised_clip(source: Path, options: Options) -> Read:
    _needs_directory(source, "noised-clip")
    files = []
    for tower in ("image", "text"):
        found = sorted(source.glob(f"*{tower}*"))
        if len(found) != 1:
            raise ReadError(f"{source} must hold one file with {tower} in its name, and holds {len(found)}")
        files += found
    model = noised_clip.NOISED_CLIP()
    towers = [read_tensors(file, part=options.part) for file in files]
    params = noised_clip.load_noised_clip(*towers, model)
    assumed = {"scale": model.scale, "process": "cosine, 1000 steps"}
    return Read(Converted("noised-clip", {"model": model}, {"model": params}, {}), assumed, files)


def _write_noised_clip(converted: Converted, out: Path) -> None:
    image, text = noised_clip.export_noised_clip(converted.params["model"], converted.models["model"])
    write_tensors(out, "image-enc", image, whole=True)
    write_tensors(out, "text-enc", text, whole=True)


def _read_inception(source: Path, options: Options) -> Read:
    file = _file(source)
    tensors, taken = _part(file, inception.MARKS, options)
    params = inception.load_inception(tensors)
    converted = Converted("inception", {"model": inception.Inception()}, {"model": params}, {})
    return Read(converted, taken | {"classes": 1008}, files_of(file))


def _write_inception(converted: Converted, out: Path) -> None:
    write_tensors(out, "model", inception.export_inception(converted.params["model"]))


FAMILIES = {
    "clip": Family(
        "a file: OpenAI's, open_clip's or transformers'",
        _read_clip,
        _write_clip,
        ("model", "head_width", "activation", "part"),
    ),
    "karlo": Family("a directory, diffusers' layout or the original one", _read_karlo, _write_karlo, ("prior_clip",)),
    "stable-diffusion": Family(  # the options are of a file
        "a directory, diffusers' layout, or a file of the original code",
        _read_stable_diffusion,
        _write_stable_diffusion,
        ("prediction", "image_size", "part"),
    ),
    "guided": Family("a file of guided or improved diffusion", _read_guided, _write_guided, ("model", "part")),
    "ddpm": Family("a directory, diffusers' layout: a pipeline or its network alone", _read_ddpm, _write_ddpm),
    "score-sde": Family("a file of score_sde_pytorch", _read_score_sde, _write_score_sde, ("model", "part")),
    "glide": Family("a file: base or upsampler, inpainting or not", _read_glide, _write_glide, ("model", "part")),
    "noised-clip": Family(
        "a directory with GLIDE's image-enc.pt and text-enc.pt", _read_noised_clip, _write_noised_clip, ("part",)
    ),
    "inception": Family("FID's pt_inception file", _read_inception, _write_inception, ("part",)),
}


def _needs_directory(source: Path, family: str) -> None:
    if not source.is_dir():
        raise ReadError(f"{source} is not a directory; {family} is read from {FAMILIES[family].source}")


def _file(source: Path) -> Path:
    """Return the file that a source is, or the only weights file in the directory that it is."""
    if not source.is_dir():
        return source
    return only_weights(source)


def _part(file: Path, marks: Sequence[str], options: Options) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors of a network, and what the model card says of which they are."""
    tensors = select(read_tensors(file, part=options.part), marks)
    return tensors, {"tensors": tensors.chosen} if tensors.chosen else {}


def _named(options: Options, known: Mapping[str, Any]) -> str:
    if options.model not in known:
        raise ConvertError(f"model={options.model!r} is not a released network of this family: {', '.join(known)}")
    return options.model


def _weights(source: Path, parts: list[str]) -> list[Path]:
    """Return the weights files of the parts that a directory has, shards too."""
    there = [part for part in parts if (source / part).is_dir()]
    return [path for part in there for path in files_of(weights_file(source, part))]


def files_of(path: Path) -> list[Path]:
    """Return a file, and the shards that it names if it is an index."""
    if path.suffix != ".json":
        return [path]
    names = read_json(path)["weight_map"].values()
    return [path, *(path.parent / name for name in sorted(set(names)))]


def _write_parts(out: Path, parts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for part, tensors in parts.items():
        (out / part).mkdir(parents=True, exist_ok=True)
        name = "model" if part.endswith("encoder") else "diffusion_pytorch_model"
        write_tensors(out / part, name, tensors)


def restore_source_files(workdir: Path, out: Path) -> None:
    """Copy the small files of the source that are stored beside a converted checkpoint."""
    read_description(workdir)
    small = workdir / SOURCE if (workdir / SOURCE).is_dir() else workdir / "peer"  # its name in earlier versions
    for path in sorted(small.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(small)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.write_bytes(path.read_bytes())
    index = out / "model_index.json"
    if index.is_file():
        parts, text = json.loads(index.read_text()), index.read_text()
        if _without_missing(parts, out) != json.loads(text):
            index.write_text(json.dumps(parts, indent=2))


def _without_missing(index: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return diffusers' list of parts without those that are not there: their weights were never read.

    A directory without any parts holds all files itself, as the first pipelines of diffusers did.
    """
    if not any(path.is_dir() for path in out.iterdir()):
        return index
    for name, part in index.items():
        if isinstance(part, list) and len(part) == 2 and not (out / name).is_dir():
            index[name] = [None, None]
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    return index
