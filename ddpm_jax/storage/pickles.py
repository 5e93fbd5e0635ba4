"""Objects, names and costs that are allowed in a checkpoint's pickle; `pickle_machine` reads it.

Names stand for the few functions below, each in place of one of torch's own that rebuild a tensor, or for the types of
tensors. Any other name becomes an `Opaque`: calling it, adding to it or setting its state gives the same `Opaque`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

NAME_LENGTH = 10_000  # characters of the longest key, and of the longest name of a tensor
INTEGER_BYTES = 255  # of the longest integer; a generator's state has 16
STEPS = 1_500_000  # a checkpoint takes about 50 for each tensor, those of an optimizer's state too


class PickleError(ValueError):
    """The pickle is broken, hostile or beyond a limit; the message says what."""


class Storage(NamedTuple):
    """A run of numbers in the file: the name of its type, its key, and how many there are."""

    dtype: str
    key: Any
    numel: int


class Tensor(NamedTuple):
    """A view of a storage, in elements; dtype if it is not the storage's own."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Placeholder of an object that is not read; name: of its class, or of the function that would make it."""

    name: str


class Budget:
    """Limit on the number of instructions, and the reasons why objects were not read."""

    def __init__(self, steps: int = STEPS):
        self.left = steps
        self.unread: dict[str, None] = {}  # reasons, in order
        self.module = ""  # the class of the last whole torch.nn.Module, which is the outermost

    def spend(self, steps: int) -> None:
        """Count instructions.

        Raises:
            PickleError: if too many were run.
        """
        self.left -= steps
        if self.left < 0:
            raise PickleError(f"it takes more than {STEPS} steps to read, the most that are allowed")

    def skip(self, reason: str) -> None:
        """Record the first reasons why something is not read."""
        if len(self.unread) < 8:
            self.unread[reason] = None


class _Type(NamedTuple):
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ScriptClass:
    """A class of a TorchScript archive, of which an object is its attributes."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class LongText:
    """A string that is too long for a name, and is not decoded."""

    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Function:
    """Placeholder of one of torch's functions."""

    call: Callable[..., Any]


DTYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
_TORCH_DTYPES = {f"torch.{name}": name for name in DTYPES.values()}
# Functions that run programs, import, or change files. Nothing here could call them; no trainer stores them, so that a
# file that names one is better refused than used. Classes of the same modules (os.stat_result) are data.
_PROGRAMS = re.compile(
    r"(os|posix|nt)\.(system|popen|startfile|exec\w+|spawn\w+|posix_spawn\w*|fork\w*|kill\w*|open|remove|unlink|rmdir"
    r"|removedirs|rename|renames|replace|truncate|chmod|chown|symlink|link|putenv)"
    r"|(subprocess|commands)\.(Popen|run|call|check_call|check_output|getoutput|getstatusoutput)|_posixsubprocess\.fork_exec"
    r"|shutil\.(rmtree|move|copy\w*|chown|unpack_archive|make_archive)|_?socket\.(socket|create_\w+|fromfd)"
    r"|runpy\.\w+|importlib\.(import_module|__import__|reload)|pty\.\w+|ctypes\.(CDLL|PyDLL|OleDLL|WinDLL|[cp]\w*dll.*)"
    r"|(_|c)?[pP]ickle\.(loads?|_loads?|Unpickler|_Unpickler)|sys\.(settrace|setprofile|exit)"
    r"|_?io\.open|(builtins|__builtin__)\.(eval|exec|execfile|compile|__import__|open|input|breakpoint)"
)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor | Opaque:
    if isinstance(storage, Opaque):
        return storage
    if not isinstance(storage, Storage) or not isinstance(offset, int):
        raise PickleError("a tensor has no storage")
    for numbers in (shape, strides):
        if not isinstance(numbers, tuple) or not all(type(n) is int for n in numbers):
            raise PickleError("a tensor has no shape")
    return Tensor(storage, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any):
    if isinstance(dtype, Opaque):
        return dtype
    if not isinstance(dtype, _Type):
        raise PickleError("a tensor has no type")
    tensor = _tensor(storage, offset, shape, strides)
    return tensor._replace(dtype=dtype.name) if isinstance(tensor, Tensor) else tensor


def _first(value: Any, *rest: Any) -> Any:
    """Return the first argument of a wrapper, which is the object itself."""
    return value


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Rebuild a tensor that has attributes, or is of a subclass."""
    if not isinstance(function, Function) or not isinstance(arguments, tuple):
        return Opaque("torch._tensor._rebuild_from_type_v2")
    return function.call(*arguments)


def dictionary(pairs: Any = ()) -> dict | list:
    """Return a copy of a dictionary, or the keys and values in turn of a list of pairs."""
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise PickleError("a dictionary is made of something else than pairs")
    return [item for pair in pairs for item in pair]  # whose keys are checked as those of other dictionaries


CALLS: dict[str, Function] = {
    name: Function(function)
    for name, function in {
        "collections.OrderedDict": dictionary,
        "collections.Counter": dictionary,
        "collections.defaultdict": lambda *rest: {},
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _first,
        "torch._utils._rebuild_parameter_with_state": _first,
        "torch._tensor._rebuild_from_type_v2": _subclass,
        "torch.nn.parameter.Parameter": _first,
        "torch.Size": tuple,
        "torch.device": lambda *names: None,
        "torch.jit._pickle.build_boollist": _first,
        "torch.jit._pickle.build_doublelist": _first,
        "torch.jit._pickle.build_intlist": _first,
        "torch.jit._pickle.build_tensorlist": _first,
        "torch.jit._pickle.restore_type_tag": _first,
    }.items()
}


def named(name: str, budget: Budget) -> Any:
    """Return what a global name stands for.

    Raises:
        PickleError: if it is too long, or stands for a program.
    """
    if len(name) > NAME_LENGTH:
        raise PickleError(f"it has a name of {len(name)} characters, more than {NAME_LENGTH}; nothing of it was run")
    if name in CALLS:
        return CALLS[name]
    module, _, last = name.rpartition(".")
    kind = last.removesuffix("Storage").removesuffix("Tensor")
    if module in ("torch", "torch.cuda", "torch.storage") and kind != last and kind in (*DTYPES, "Untyped"):
        return _Type(DTYPES.get(kind, "uint8"))
    if name in _TORCH_DTYPES:
        return _Type(_TORCH_DTYPES[name])
    if name.startswith("__torch__."):
        return ScriptClass(name)
    reason = f"it names {name}, which no tensor needs; nothing of it was run"
    if _PROGRAMS.fullmatch(name):
        raise PickleError(reason)
    budget.skip(reason)
    return Opaque(name)


def checked_key(key: Any) -> str | int | None:
    """Return a key if it is a string, a whole number or None, and short.

    Others would have to be hashed, which takes time and stack without bound for tuples of tuples.

    Raises:
        PickleError: for another one.
    """
    if type(key) is LongText:
        raise PickleError(f"it has a name of {key.length} bytes, more than {NAME_LENGTH}")
    if key is not None and not isinstance(key, (str, int)):
        raise PickleError(odd_key(key))
    if isinstance(key, str) and len(key) > NAME_LENGTH:
        raise PickleError(f"it has a name of {len(key)} characters, more than {NAME_LENGTH}")
    if isinstance(key, int) and key.bit_length() > 64:
        raise PickleError(f"it has a key that is a number of {key.bit_length()} bits, more than 64")
    return key


def odd_key(key: Any) -> str:
    """Return why a key is none."""
    kind = key.name if isinstance(key, Opaque) else type(key).__name__
    return f"it has a key of type {kind}, which is neither a string nor a whole number"


def storage_type(kind: Any) -> str | Opaque:
    """Return the dtype that a storage's class in a persistent id stands for.

    Raises:
        PickleError: if it is no class.
    """
    if isinstance(kind, Opaque):
        return kind
    if not isinstance(kind, _Type):
        raise PickleError("a storage has no type that is known")
    return kind.name
