"""Tensors of a weights file by name, and selection of one part, such as the averages (EMA) of a training run."""

from collections.abc import Callable, Mapping

import numpy as np

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing
_FLATTENED = ("decay", "num_updates")  # beside the averages of latent diffusion's LitEma, whose names have no dots


class Tensors(dict[str, np.ndarray]):
    """Arrays by name, and what the file has beside them.

    Attributes:
        unread: name -> class of objects that are not read (at most a thousand).
        metadata: of a safetensors file, name -> string.
        chosen: in words, which tensors of the file these are; empty for all.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        unread: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        chosen: str = "",
    ):
        super().__init__(arrays)
        self.unread, self.metadata, self.chosen = dict(unread or {}), dict(metadata or {}), chosen


def below(tensors: Tensors, prefix: str, *, without: tuple[str, ...] = (), chosen: str = "") -> Tensors:
    """Return the tensors whose names begin with a prefix and not with one of `without`, by the rest of their names."""

    def cut(values: Mapping) -> dict:
        names = [name for name in values if name.startswith(prefix) and not name.startswith(without)]
        return {name[len(prefix) :]: values[name] for name in names}

    return Tensors(cut(tensors), cut(tensors.unread), tensors.metadata, chosen or tensors.chosen)


def renamed(tensors: Mapping[str, np.ndarray], name_of: Callable[[str], str | None]) -> Tensors:
    """Return tensors by other names, and what is not read too; those for which there is None are left out."""

    def moved(values: Mapping) -> dict:
        names = {name: name_of(name) for name in values}
        return {new: values[name] for name, new in names.items() if new is not None}

    return Tensors(moved(tensors), moved(getattr(tensors, "unread", {})))


def take_part(tensors: Tensors, part: str) -> Tensors:
    """Return one part of a file.

    Args:
        tensors: all of the file.
        part: the dotted name of what holds the part ("state_dict_ema"); what stands before it may be left out. If it
            holds averages as latent diffusion stores them (LitEma: names without dots), they replace the tensors that
            they are averages of, and the rest of the file is returned too.

    Raises:
        ValueError: if there is no such part, or more than one.
    """
    part = part.strip(".")
    if not part:
        raise ValueError("part is empty; it must be the name of what holds the part, such as state_dict_ema")
    found = set()
    for name in tensors:
        place = f".{name}".find(f".{part}.")
        if place >= 0:
            found.add(name[: place + len(part) + 1])
    if len(found) != 1:
        above = sorted({name.partition(".")[0] for name in tensors if "." in name})
        listed = ", ".join(prefix.removesuffix(".") for prefix in sorted(found)[:8])
        raise ValueError(
            f"part={part!r} could be any of {listed}" if found else f"part={part!r} is not in it; it has "
            f"{', '.join(above[:8]) or 'no parts'}{', ...' if len(above) > 8 else ''}"
        )  # fmt: skip
    prefix = found.pop()
    inner = below(tensors, prefix, chosen=f"those under {prefix}")
    if all(name in inner for name in _FLATTENED) and not any("." in name for name in inner):
        return _with_averages(tensors, prefix, inner)
    return inner


def _with_averages(tensors: Tensors, prefix: str, averages: Tensors) -> Tensors:
    """Return the file with averages in place of the tensors that they are averages of."""
    root = prefix[: prefix.rstrip(".").rfind(".") + 1]
    places: dict[str, str] = {}
    for name in tensors:
        if not name.startswith(root) or name.startswith(prefix):
            continue
        flat = name[len(root) :].partition(".")[2].replace(".", "")
        if flat in averages and places.setdefault(flat, name) != name:
            raise ValueError(f"its average {prefix}{flat} could be of {places[flat]} or of {name}")
    lost = [name for name in averages if name not in places and name not in _FLATTENED]
    if lost:
        raise ValueError(f"its average {prefix}{lost[0]} belongs to no tensor of the file")
    rest = {name: array for name, array in tensors.items() if not name.startswith(prefix)}
    replaced = {name: averages[flat] for flat, name in places.items()}
    return Tensors(rest | replaced, tensors.unread, tensors.metadata, f"{len(replaced)} averages of {prefix}")


def unwrapped(tensors: Tensors) -> Tensors:
    """Return tensors without the names that torch.compile, FSDP and activation checkpointing put in between.

    Raises:
        ValueError: if two tensors would have one name.
    """
    if not any(f"{wrapper}." in name for name in tensors for wrapper in WRAPPERS):
        return tensors
    found: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short in found:
            raise ValueError(f"it has the tensor {short} both wrapped and as it is")
        found[short] = array
    return Tensors(found, tensors.unread, tensors.metadata, tensors.chosen)
