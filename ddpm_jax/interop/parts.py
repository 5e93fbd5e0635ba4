"""Selection of a network's tensors in a training checkpoint: those below the prefix of its known names.

Trainers store a network's tensors under various prefixes: {"state_dict": ...}, "module." (DistributedDataParallel),
"model." (Lightning), {"model": ..., "ema": ...}. A network is found by a mark, a tensor that it must have.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from ddpm_jax.interop.table import ConvertError
from ddpm_jax.storage.tensors import Tensors, below, unwrapped

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of model_ema, model-ema, modelEMA
_AVERAGE = re.compile(
    r"(g|net|unet|model|params|weights)?ema(net|model)?|swa|avg|averaged?|averages|shadow|polyak|teacher"
)


def select(tensors: Mapping[str, np.ndarray], marks: Sequence[str]) -> Tensors:
    """Return the tensors of one network, by its own names.

    Averages ("ema", "model_ema", "modelEMA", ...) are taken only where there are no raw ones, or where the part that
    was read is one of averages: `read_tensors(path, part="ema")`.

    Args:
        tensors: as `read_tensors` gives them.
        marks: names of tensors that the network must have; the first that is found counts.

    Returns:
        What lies below the prefix, with `chosen` saying so; all if no mark is found, which the table then says.

    Raises:
        ConvertError: if the file holds several networks that it could be; it lists where they are.
    """
    tensors = tensors if isinstance(tensors, Tensors) else Tensors(tensors)
    try:
        tensors = unwrapped(tensors)
    except ValueError as error:
        raise ConvertError(f"the file does not fit: {error}") from None
    found = next((prefixes for mark in marks if (prefixes := _prefixes(tensors, mark))), [])
    averages = [prefix for prefix in found if is_average(prefix)]
    raw = [prefix for prefix in found if prefix not in averages]
    named = is_average(tensors.chosen.removeprefix("those under "))  # ema_pytorch has ema.online_model, ema.ema_model
    candidates = [""] if "" in raw else (averages or raw if named else raw or averages)
    left = [other.removesuffix(".") for other in averages if other not in candidates]
    if not candidates:
        return tensors
    if len(candidates) > 1:
        listed = ", ".join(prefix.removesuffix(".") for prefix in candidates[:8])
        raise ConvertError(
            f"the file holds {len(candidates)} networks that could be meant, under {listed}; choose one with "
            "read_tensors(path, part=...) or --part"
        )
    prefix = candidates[0]
    others = tuple(other for other in found if other != prefix and other.startswith(prefix))
    chosen = tensors.chosen + prefix if tensors.chosen else f"those under {prefix}" if prefix else ""
    if left:
        chosen = f"{chosen or 'the raw ones'}; averages under {', '.join(left)} are left out, --part takes them"
    return below(tensors, prefix, without=others, chosen=chosen)


def is_average(prefix: str) -> bool:
    """Return whether a dotted name says that averages are below it: ema, model_ema, model-ema, modelEMA, polyak, ..."""
    return any(_AVERAGE.fullmatch(word.lower()) for word in _WORDS.findall(prefix))


def _prefixes(tensors: Mapping[str, np.ndarray], mark: str) -> list[str]:
    """Return what stands before a mark, wherever it is, "" or with a dot at its end."""
    ends = f".{mark}"
    return sorted(name[: -len(mark)] for name in tensors if name == mark or name.endswith(ends))
