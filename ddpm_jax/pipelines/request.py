"""Arguments of the pipelines' `generate`: each has one meaning, whatever its Python type, or is refused in a sentence.

An option may be a Python number, a NumPy scalar, or a NumPy or JAX array without axes.
"""

import dataclasses
import difflib
import functools
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.checks import is_finite, shown
from ddpm_jax.data.tokenizer import Tokenizer
from ddpm_jax.diffusion.diffusion import Diffusion
from ddpm_jax.diffusion.process import GaussianProcess, respace
from ddpm_jax.diffusion.sampling import NO_MOMENTS, NO_NORM, Sampling, as_steps
from ddpm_jax.diffusion.schedules import respaced_timesteps
from ddpm_jax.diffusion.tokens import TokenSampling
from ddpm_jax.errors import one_for_each
from ddpm_jax.parallel.mesh import batch_axes, batch_shards, data_sharding, replicated

Steps = int | str | Sequence[int]
"""A number of steps, a spec of `schedules.respaced_timesteps`, or the timesteps themselves, increasing."""

MOST_IMAGES = 2**31 - 1  # indices of images are int32
MOST_AT_A_TIME = 2**16
# What options are called in other libraries.
_ELSEWHERE = {"guidance_scale": "scale", "cfg_scale": "scale", "num_inference_steps": "steps", "num_steps": "steps"}
# What images are made from, of some pipelines or others.
_OTHER_ARGUMENTS = ("prompts", "negative_prompts", "labels", "num_images", "images")
FIELDS = tuple(field.name for field in dataclasses.fields(Sampling))


def as_int(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Return an integer option as a Python int.

    Raises:
        ValueError: if value is not an integer in [least, most]; True and 4.0 are none.
    """
    value, given = _plain(name, value), value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={shown(given)} must be an integer")
    if value < least:
        raise ValueError(f"{name}={shown(value)} must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={shown(value)} must be at most {most}")
    return int(value)


def as_seed(value: Any) -> int:
    """Return a seed in [0, 2**32); JAX would take a larger one modulo 2**32.

    Raises:
        ValueError: if value is not an integer in this range.
    """
    return as_int("seed", value, least=0, most=2**32 - 1)


def image_indices(start: Any, count: int) -> np.ndarray:
    """Return the indices of images start .. start + count - 1, int32[count].

    Raises:
        ValueError: if start is not an integer in its range.
    """
    return as_int("start", start, least=0, most=max(MOST_IMAGES - count, 0)) + np.arange(count, dtype=np.int32)


def image_keys(seed: jax.Array, index: jax.Array) -> jax.Array:
    """Return the keys of images, as `samplers.example_keys` makes them; seed: uint32[]; index: int32[B]."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def as_float(name: str, value: Any, *, least: float = -math.inf, most: float = math.inf) -> float:
    """Return a real option as a Python float.

    Raises:
        ValueError: if value is not a finite number in [least, most].
    """
    value, given = _plain(name, value), value
    if not is_finite(value):
        raise ValueError(f"{name}={shown(given)} must be a finite number")
    if not least <= value <= most:
        raise ValueError(f"{name}={shown(value)} must be in [{least:g}, {most:g}]")
    return float(value)


def respaced(process: GaussianProcess, name: str, steps: Steps) -> GaussianProcess:
    """Return `respace(process, steps)`; errors name the option.

    Raises:
        ValueError: if the process has no such steps.
    """
    try:
        return respace(process, as_steps(name, steps))
    except ValueError as error:
        raise ValueError(str(error).replace("spec=", f"{name}=", 1)) from None


def check_steps(name: str, sampling: Sampling, diffusion: Diffusion) -> None:
    """Raise ValueError, naming the option, if a process has no such steps."""
    try:
        respaced_timesteps(diffusion.num_steps, sampling.steps)
    except ValueError as error:
        raise ValueError(str(error).replace("spec=", f"{name}=", 1)) from None


def on_mesh(mesh: Mesh | None, models: Any) -> tuple[Any, Callable[[Any], Any], int]:
    """Place models for the devices that share each batch.

    Args:
        mesh: with an axis "data"; None is one device.
        models: a tree of arrays.

    Returns:
        The tree, with a copy on every device; what places arrays [B, ...] or None; and the number of devices.
    """
    if mesh is None:
        here = lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x  # noqa: E731 (once, not for every batch)
        return jax.tree.map(here, models), lambda array: array, 1
    if not isinstance(mesh, Mesh) or not batch_axes(mesh):
        raise ValueError(f'mesh={shown(mesh)} must be a Mesh with an axis "data", as make_local_mesh returns')
    place = functools.partial(jax.device_put, device=data_sharding(mesh))
    return jax.device_put(models, replicated(mesh)), place, batch_shards(mesh)


def stage_samplings(
    defaults: Mapping[str, Sampling | TokenSampling],
    options: Mapping[str, Any],
    *,
    main: str = "decoder",
    arguments: Collection[str] = ("prompts", "negative_prompts"),
    guided: Collection[str] = (),
    classified: Collection[str] = (),
    clip_guided: Collection[str] = (),
    measured: Collection[str] = (),
    normed: Collection[str] = (),
) -> dict[str, Any]:
    """Return how each stage is sampled.

    Args:
        defaults: of each stage.
        options: the fields of the stages' `Sampling` or `TokenSampling` by the names <stage>_<field>, and <field> alone
            for the main stage; None takes the default.
        main: the main stage.
        arguments: the other arguments of the pipeline's `generate`, for messages; those of all pipelines are known.
        guided: the stages that have a null condition, for the options scale and rescale.
        classified: the stages that have a classifier, for the option classifier_scale.
        clip_guided: the stages that have a noised CLIP, for the option clip_scale.
        measured: the stages whose second moments are known, for the sampler "analytic".
        normed: the stages whose data are embeddings of one norm, for the option l2_clamp.

    Raises:
        ValueError: if an option is unknown, given twice or out of its range, or its stage cannot use it.
    """
    found: dict[str, dict[str, Any]] = {stage: {} for stage in defaults}
    plain: set[str] = set()
    for name, value in options.items():
        stage, field = (main, name) if name in FIELDS else _stage_and_field(name, defaults, arguments)
        if value is None:
            continue
        if isinstance(value, jax.core.Tracer):
            raise ValueError(
                f"{name} is traced: generate runs compiled programs and returns numpy arrays; inside of jit and "
                "vmap call the stages of the pipeline (docs/pipelines.md)"
            )
        if field in found[stage]:
            raise ValueError(f"{field} and {main}_{field} are the same option; give one of them")
        found[stage][field] = value
        plain |= {field} if name == field else set()
    samplings = {}
    for stage, given in found.items():
        prefix = "" if stage == main and plain else f"{stage}_"
        samplings[stage] = defaults[stage].with_options(prefix, **given)
        lacking = {"classifier_scale": "a classifier"} if stage not in classified else {}
        lacking |= {"clip_scale": "a noised CLIP"} if stage not in clip_guided else {}
        _check_usable(samplings[stage], prefix, stage in guided, lacking, stage in measured)
        if getattr(samplings[stage], "l2_clamp", False) and stage not in normed:
            raise ValueError(f"{prefix}{NO_NORM}")
    return samplings


def _stage_and_field(name: str, stages: Mapping[str, Any], arguments: Collection[str]) -> tuple[str, str]:
    fields = {stage: tuple(field.name for field in dataclasses.fields(own)) for stage, own in stages.items()}
    known = {f"{stage}_{field}": (stage, field) for stage in stages for field in fields[stage]}
    if name in known:
        return known[name]
    if name in _OTHER_ARGUMENTS:
        raise ValueError(
            f"{name} is no argument of this pipeline, which generates images from {' and '.join(arguments)}"
        )
    names = [*known, *FIELDS, *arguments, "seed", "start", "batch_size", "report"]
    of_stage = name.endswith(tuple(f"_{field}" for field in FIELDS))
    # The end of a stage's option makes it like all options with that end.
    close = difflib.get_close_matches(name, names, 1, cutoff=0.8 if of_stage else 0.6)
    meant = [_ELSEWHERE[name]] if name in _ELSEWHERE else close
    near = f" (did you mean {meant[0]!r}?)" if meant else ""
    owner = next((stage for stage in stages if name.startswith(f"{stage}_")), None)
    if of_stage and owner is not None:
        raise ValueError(f"there is no option {name!r}: the stage {owner} takes {', '.join(fields[owner])}")
    if of_stage:
        raise ValueError(f"there is no option {name!r}{near}: this pipeline has the stages {', '.join(stages)}")
    raise ValueError(
        f"there is no option {name!r}{near}; options are <stage>_<name> with the stages {', '.join(stages)} and the "
        f"names {', '.join(FIELDS)}"
    )


def _check_usable(sampling: Sampling, prefix: str, guided: bool, lacking: Mapping[str, str], measured: bool) -> None:
    """Raise ValueError if a stage is to be sampled by what a pipeline does not have; lacking: option -> what."""
    needs = dict(lacking)
    if not guided:
        needs |= dict.fromkeys(("scale", "rescale"), "a network with a null condition (drop above 0 in training)")
    for field, what in needs.items():
        if (value := getattr(sampling, field, None)) is not None:
            raise ValueError(f"{prefix}{field}={value} needs {what}, which this stage does not have")
    if isinstance(sampling, Sampling) and sampling.sampler == "analytic" and not measured:
        raise ValueError(f"{prefix}sampler='analytic' {NO_MOMENTS}")


def batches(count: int, batch_size: int, unit: int = 1) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the rows of every batch and how many of them are new; batches have two sizes, batch_size and unit.

    Programs are compiled for a batch size, so that any count needs two at most. What is left after whole batches is
    taken by the unit if it is at most half a batch, and otherwise filled up with copies of its last row: no more rows
    are computed than twice those that are wanted.

    Args:
        count: of the examples.
        batch_size: a multiple of unit.
        unit: the smallest batch, 1 or the number of devices that share each batch.
    """
    whole = count - count % batch_size
    rest = count - whole
    small = [unit] * -(-rest // unit)
    sizes = [batch_size] * (whole // batch_size) + ([batch_size] if 2 * rest > batch_size else small)
    start = 0
    for size in sizes:
        yield np.minimum(np.arange(start, start + size), count - 1), min(size, count - start)
        start += size


def call_fitting(program: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return `program(*arguments, **options)`.

    Raises:
        ValueError: if Flax finds that parameters do not fit their network.
    """
    try:
        return program(*arguments, **options)
    except flax.errors.FlaxError as error:
        reason = str(error).partition(" (http")[0]
        raise ValueError(f"the parameters do not fit the networks: {reason}") from error


def in_batches(
    run: Callable[..., tuple[Any, Sequence[jax.Array]]],
    arrays: Sequence[Any],
    *,
    batch_size: Any,
    stages: Sequence[str],
    report: Callable[[int], None] | None = None,
    name: str = "prompts",
    place: Callable[[Any], Any] = lambda array: array,
    unit: int = 1,
) -> Any:
    """Run a compiled program over all examples, in `batches`.

    Args:
        run: takes the same rows of every array, and returns images [B, ...], or a tree of such arrays, and bool[B] for
            each stage, whether all that it returned is finite.
        arrays: each [N, ...], or None.
        batch_size: examples at a time.
        stages: their names, in the order in which they run.
        report: called with the number of images each time some are done.
        name: of the argument that the examples are from.
        place: puts an array of a batch, or None, on the devices; from `on_mesh`, as is unit.
        unit: the smallest batch; batch_size is rounded up to a multiple of it.

    Returns:
        The images of all examples, [N, ...], or a tree of them.

    Raises:
        ValueError: if batch_size is not an integer in its range.
        NotFiniteError: if a stage returned NaN or infinity.
    """
    batch_size, done = as_int("batch_size", batch_size, least=1, most=MOST_AT_A_TIME), []
    if report is not None and not callable(report):
        raise ValueError(f"report={shown(report)} must be a function of the number of images that are done")
    count = next(len(array) for array in arrays if array is not None)
    for rows, new in batches(count, -(-batch_size // unit) * unit, unit):
        images, finite_of = run(*(place(None if array is None else array[rows]) for array in arrays))
        check_finite(stages, finite_of, rows, name)
        done.append([np.asarray(array)[:new] for array in jax.tree.leaves(images)])
        if report is not None:
            report(new)
    return jax.tree.unflatten(jax.tree.structure(images), map(np.concatenate, zip(*done)))


def as_prompts(prompts: Iterable[str]) -> list[str]:
    """Return captions as a list of strings.

    Args:
        prompts: a list, a tuple, an array of strings or an iterator.

    Raises:
        ValueError: if there is none, they are one string, or one of them is no string; the message names which.
    """
    if isinstance(prompts, (str, bytes)):
        raise ValueError("prompts must be a sequence of at least one caption, got one string; put it into a list")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise ValueError(f"prompts must be a sequence of captions, got {type(prompts).__name__}")
    found = list(prompts)
    if not found:
        raise ValueError("prompts must hold at least one caption")
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"prompts[{number}] must be a string, got {text!r}")
    return [str(text) for text in found]


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, *, name: str = "prompts", allow_empty: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32[B, L] and mask bool[B, L] of captions.

    Args:
        tokenizer: encodes them.
        texts: B captions.
        length: L.
        name: of the argument that the captions are from.
        allow_empty: True encodes a caption without words as `Tokenizer.null`, the unconditional one.

    Raises:
        ValueError: as the tokenizer; the message names the caption.
    """
    rows = []
    for number, text in enumerate(texts):
        try:
            empty = allow_empty and not tokenizer.ids(text)
            rows.append(tokenizer.null(length) if empty else tokenizer([text], length))
        except ValueError as error:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise ValueError(f"{name}[{number}] = {shown!r}: {error}") from None
    tokens, masks = zip(*rows, strict=True)
    return np.concatenate(tokens), np.concatenate(masks)


def negative_tokens(
    tokenizer: Tokenizer, negative_prompts: str | Iterable[str] | None, count: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32[count, L] and mask bool[count, L] of the captions that guidance leads away from.

    Args:
        tokenizer: encodes them.
        negative_prompts: one caption for all prompts, or one for each; None is the unconditional caption "".
        count: the number of prompts.
        length: L.

    Raises:
        ValueError: if they are none of these; and as the tokenizer, where the message names the caption.
    """
    one = negative_prompts is None or isinstance(negative_prompts, str)
    if not one and (not isinstance(negative_prompts, Iterable) or isinstance(negative_prompts, (bytes, Mapping))):
        raise ValueError(f"negative_prompts must be a caption or a sequence of captions, got {negative_prompts!r}")
    texts = [negative_prompts or ""] if one else list(negative_prompts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"negative_prompts[{number}] must be a string, got {text!r}")
    if len(texts) not in (1, count):
        raise ValueError(f"negative_prompts must be {one_for_each(count, 'caption', 'prompt')}, got {len(texts)}")
    encoded = tokenize(tokenizer, texts, length, name="negative_prompts", allow_empty=True)
    tokens, mask = (np.broadcast_to(array, (count, length)) for array in encoded)
    return tokens, mask


def as_labels(labels: Any, num_classes: int, names: Sequence[str] | None, count: int | None) -> np.ndarray:
    """Return labels as int32[N], -1 for the null class.

    Args:
        labels: one label for all images, or one for each: an index in [0, num_classes), a name, or None.
        num_classes: K.
        names: of the classes, or None.
        count: N; by default the number of labels, or 1.

    Raises:
        ValueError: if a label is none of these, or there is not one for each image.
    """
    one = labels is None or isinstance(labels, (str, numbers.Integral)) or getattr(labels, "ndim", None) == 0
    if not one and (not isinstance(labels, Iterable) or isinstance(labels, (bytes, Mapping))):
        raise ValueError(f"labels={labels!r:.60} must be a label, or a sequence with one for each image")
    given = [labels] if one else list(labels)
    if not given:
        raise ValueError("labels must hold at least one label")
    found = [_label(f"labels[{i}]" if not one else "labels", x, num_classes, names) for i, x in enumerate(given)]
    found *= count if one and count is not None else 1
    if count is not None and len(found) != count:
        raise ValueError(f"labels must be {one_for_each(count, 'label', 'image')}, got {len(found)}")
    return np.array(found, np.int32)


def _label(where: str, label: Any, num_classes: int, names: Sequence[str] | None) -> int:
    label, given = _plain(where, label), label
    if label is None:
        return -1
    if isinstance(label, str):
        if label in (names or ()):
            return list(names).index(label)
        if not names:
            raise ValueError(f"{where}={label!r:.60}: the classes have no names; give an index below {num_classes}")
        near = difflib.get_close_matches(label, names, 1, cutoff=0.0)[0]
        raise ValueError(f"{where}={label!r:.60} is none of the {num_classes} classes; did you mean {near!r}?")
    if isinstance(label, bool) or not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
        raise ValueError(f"{where}={given!r:.60} must be the index of a class, in [0, {num_classes}), or its name")
    return int(label)


class NotFiniteError(ValueError):
    """A network returned NaN or infinity, of which no image can be made."""


def check_finite(stages: Sequence[str], finite: Sequence[jax.Array], rows: np.ndarray, name: str = "prompts") -> None:
    """Refuse a batch in which a stage returned a value that is not finite.

    Args:
        stages: their names, in the order in which they run.
        finite: bool[B] for each stage, whether all its values are finite.
        rows: int[B], the positions of the batch's examples in the argument `name`.

    Raises:
        NotFiniteError: the message names the first such stage and the examples.
    """
    for stage, flags in zip(stages, finite, strict=True):
        bad = np.unique(rows[~np.asarray(flags)[: len(rows)]])
        if bad.size:
            which = ", ".join(f"{name}[{row}]" for row in bad[:8]) + (", ..." if bad.size > 8 else "")
            raise NotFiniteError(
                f"the {stage} returned values that are not finite (NaN or infinity) for {which}: its weights are "
                "damaged, or its numbers overflow in the dtype that it computes in"
            )


def _plain(name: str, value: Any) -> Any:
    """Return the Python number or string of a scalar, and anything else as it is."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a concrete value, not one that JAX traces")
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return value  # a key, which is no number
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
