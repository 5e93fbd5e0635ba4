"""A table of names and layouts that converts a reference implementation's tensors to our parameters and back.

A family (`interop.clip`, ...) lists an `Entry` for every parameter of ours. Reading consumes each tensor of the file
exactly once; what is missing, unknown, misshapen or not finite is an error that lists it, before anything is returned.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from ddpm_jax.storage.mapping import release
from ddpm_jax.storage.tensor_file import printable


class ConvertError(ValueError):
    """A checkpoint does not fit the network it is read as; the message lists what does not, on one printable line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class Layout(NamedTuple):
    """Conversion between a parameter and the tensors of the reference implementation.

    Attributes:
        read: maps the reference implementation's tensors to the parameter.
        write: the inverse: maps the parameter to a tuple of tensors.
    """

    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Entry(NamedTuple):
    """Names and layout of one parameter.

    Attributes:
        ours: its path in our tree, joined by slashes.
        theirs: names of the reference implementation's tensors that make it up.
        layout: the conversion between both.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout


LAYERS = 64  # of a transformer whose file says how many it has; the largest published CLIP has 48
IDENTITY = Layout(lambda x: x, lambda x: (x,))
TRANSPOSED = Layout(lambda x: x.T, lambda x: (x.T,))  # a dense layer: [out, in] -> [in, out]
KERNEL = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: (x.transpose(3, 2, 0, 1),))  # OIHW -> HWIO


def _swapped(kernel: np.ndarray) -> np.ndarray:
    """Swap the halves of the rows; the last row of an odd number stays, which is that of a zero."""
    half = len(kernel) // 2
    return np.concatenate([kernel[half : 2 * half], kernel[:half], kernel[2 * half :]])


# The dense layer after the sinusoids of the time, where the sines come first; here the cosines do.
SINES_FIRST = Layout(lambda x: _swapped(x.T), lambda x: (_swapped(x).T,))


def concatenated(layout: Layout, count: int) -> Layout:
    """Return the layout of `count` tensors that are one parameter here, concatenated along the last axis."""
    return Layout(
        lambda *parts: np.concatenate([layout.read(part) for part in parts], axis=-1),
        lambda x: tuple(layout.write(part)[0] for part in np.split(x, count, axis=-1)),
    )


def by_head(layout: Layout, heads: int, *, parts: int = 3) -> Layout:
    """Return the layout that reorders the last axis from [q|k|v][head][d] there to [head][q|k|v][d] here.

    parts: number of blocks in place of q, k and v.
    """

    def reordered(x: np.ndarray, first: int, second: int) -> np.ndarray:
        blocks = x.reshape(*x.shape[:-1], first, second, x.shape[-1] // (first * second))
        return blocks.swapaxes(-3, -2).reshape(x.shape)

    def read(*tensors: np.ndarray) -> np.ndarray:
        return reordered(layout.read(*tensors), parts, heads)

    return Layout(read, lambda x: layout.write(reordered(x, heads, parts)))


def conv(ours: str, theirs: str) -> list[Entry]:
    """Return the entries of a convolution."""
    return [
        Entry(f"{ours}/kernel", (f"{theirs}.weight",), KERNEL),
        Entry(f"{ours}/bias", (f"{theirs}.bias",), IDENTITY),
    ]


def dense(ours: str, *theirs: str, bias: bool = True) -> list[Entry]:
    """Return the entries of a dense layer, made of one or more layers of the reference implementation."""
    entries = [
        Entry(f"{ours}/kernel", tuple(f"{name}.weight" for name in theirs), concatenated(TRANSPOSED, len(theirs)))
    ]
    if bias:
        entries.append(
            Entry(f"{ours}/bias", tuple(f"{name}.bias" for name in theirs), concatenated(IDENTITY, len(theirs)))
        )
    return entries


def norm(ours: str, theirs: str) -> list[Entry]:
    """Return the entries of a layer or group norm."""
    return [
        Entry(f"{ours}/scale", (f"{theirs}.weight",), IDENTITY),
        Entry(f"{ours}/bias", (f"{theirs}.bias",), IDENTITY),
    ]


def to_ours(
    table: Sequence[Entry],
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    *,
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """Convert a reference implementation's tensors to our parameters, float32.

    Args:
        table: an entry for every parameter.
        tensors: name -> array, as `read_tensors` gives them.
        shapes: our parameters' tree, of anything with a shape (`jax.eval_shape` of an init).
        ignored: names that the file may hold besides, such as buffers that the architecture implies.

    Raises:
        ConvertError: if a tensor is missing, unknown, of another shape or not finite; all of them are listed.
    """
    wanted = flax.traverse_util.flatten_dict(dict(shapes), sep="/")
    listed = [entry.ours for entry in table]
    if sorted(listed) != sorted(wanted):
        odd = sorted(set(listed) ^ set(wanted))
        raise ConvertError(f"the network is not one that this layout holds: {', '.join(odd[:8])}")
    names = {name for entry in table for name in entry.theirs}
    unread = getattr(tensors, "unread", {})
    problems = _listed("lacks", [name for name in names if name not in tensors and name not in unread])
    opaque = [f"{name} (an object of {unread[name]})" for name in names if name not in tensors and name in unread]
    problems += _listed("has in place of a tensor", opaque)
    problems += _listed("has, unknown to this network,", set(tensors) - names - set(ignored))
    found, shapeless, infinite = {}, [], []
    for entry in table:
        if any(name not in tensors for name in entry.theirs):
            continue
        try:
            array = entry.layout.read(*(tensors[name] for name in entry.theirs))
        except (ValueError, IndexError, TypeError, AttributeError, ZeroDivisionError):
            array = None  # a layout fails on a tensor of another rank
        if array is None or array.shape != wanted[entry.ours].shape:
            has = " and ".join(f"{name} {list(tensors[name].shape)}" for name in entry.theirs)
            shapeless.append(f"{has} (for a parameter of shape {list(wanted[entry.ours].shape)})")
            continue
        # Copied even where the layout is the identity: the parameters must not depend on the mapped file.
        found[entry.ours] = np.array(array, np.float32, order="C")
        if not np.isfinite(found[entry.ours]).all():
            infinite += entry.theirs
        for name in entry.theirs:
            release(tensors[name])
    problems += _listed("has, of another shape,", shapeless) + _listed("has, not finite,", infinite)
    if problems:
        raise ConvertError(f"the file does not fit: it {'; it '.join(problems)}")
    return flax.traverse_util.unflatten_dict(found, sep="/")


def to_reference(table: Sequence[Entry], params: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return the reference implementation's tensors: the inverse of `to_ours`, bit for bit in float32."""
    flat = flax.traverse_util.flatten_dict(dict(params), sep="/")
    return {
        name: np.array(array, dtype, order="C")
        for entry in table
        for name, array in zip(entry.theirs, entry.layout.write(np.asarray(flat[entry.ours])), strict=True)
    }


def count(tensors: Iterable[str], pattern: str) -> int:
    """Return how many layers a file has: 1 + the largest number where the pattern has a #, or 0.

    Raises:
        ConvertError: if that number is not below the count of tensors, of which every layer has one at least, or there
            are more layers than any network has that is read here.
    """
    before, _, after = pattern.partition("#")
    names, layers = list(tensors), 0
    for name in names:
        number, _, rest = name.removeprefix(before).partition(".")
        if not name.startswith(before) or not rest.startswith(after.removeprefix(".")):
            continue
        if number.isascii() and number.isdecimal():
            # The length first: int() refuses numbers of thousands of digits.
            if len(number) > 9 or int(number) >= len(names):
                raise ConvertError(
                    f"the file has the tensor {name}, of more layers than its {len(names)} tensors can be"
                )
            layers = max(layers, int(number) + 1)
    if layers > LAYERS:
        raise ConvertError(f"the file has {layers} layers called {pattern}, more than {LAYERS}")
    return layers


def _listed(what: str, names: Iterable[str], most: int = 8) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what} {', '.join(names[:most])}{more}"]
