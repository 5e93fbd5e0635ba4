"""A pickle interpreter that builds dictionaries, lists, numbers, strings and descriptions of tensors, and nothing else.

A pickle is a program for a stack machine that may import and call anything. `interpret` walks its opcodes as
`pickletools` parses them: it imports nothing, and calls nothing but the few functions below, each of which stands for
one of torch's own that rebuild a tensor. Any other name in the file ends the reading, and so does a file that would
take longer than any checkpoint does: keys are strings and whole numbers, and the steps are counted.
"""

import pickletools
from collections.abc import Callable, Sized
from typing import Any, BinaryIO, NamedTuple

NAME_LENGTH = 10_000  # of the longest key, and of the longest name of a tensor
_MOST_STEPS = 4_000_000  # a checkpoint of 1000 tensors takes some 30,000


class PickleError(ValueError):
    """The pickle asks for something that tensors do not need, or is broken; the message says what."""


class Storage(NamedTuple):
    """A run of numbers in the file: the name of its type, its key, and how many there are (None: not said)."""

    dtype: str | None
    key: Any
    numel: int | None


class Tensor(NamedTuple):
    """A view of a storage, in elements; dtype if it is not the storage's own."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None


class _Type(NamedTuple):
    name: str


class _Class(NamedTuple):
    """A class of a TorchScript archive, of which an object is its attributes."""

    name: str


class _Mark:
    """Where an opcode's arguments begin on the stack."""


_MARK = _Mark()

DTYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
    "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
_TORCH_DTYPES = {f"torch.{name}": name for name in DTYPES.values()}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(offset, int):
        raise PickleError("a tensor has no storage")
    for numbers in (shape, strides):
        if not isinstance(numbers, tuple) or not all(type(n) is int for n in numbers):
            raise PickleError("a tensor has no shape")
    return Tensor(storage, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any):
    if not isinstance(dtype, _Type):
        raise PickleError("a tensor has no type")
    return _tensor(storage, offset, shape, strides)._replace(dtype=dtype.name)


def _first(value: Any, *rest: Any) -> Any:
    """Stand for a wrapper whose first argument is all that matters here."""
    return value


def _dictionary(pairs: Any = ()) -> dict:
    if isinstance(pairs, dict):
        return dict(pairs)
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise PickleError("a dictionary is made of something else than pairs")
    return _checked_dict(pairs)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch.Size": tuple,
    "torch.device": lambda *names: None,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
}
_CALLABLE = tuple(set(CALLS.values()))


def _named(name: str) -> Any:
    """Return what a global name stands for."""
    if len(name) > NAME_LENGTH:
        raise PickleError(f"it has a name of {len(name)} characters, more than {NAME_LENGTH}; nothing of it was run")
    module, _, last = name.rpartition(".")
    if name in CALLS:
        return CALLS[name]
    kind = last.removesuffix("Storage").removesuffix("Tensor")
    if module in ("torch", "torch.cuda", "torch.storage") and kind != last and kind in (*DTYPES, "Untyped"):
        return _Type(DTYPES.get(kind, "uint8"))
    if name in _TORCH_DTYPES:
        return _Type(_TORCH_DTYPES[name])
    if name.startswith("__torch__."):
        return _Class(name)
    raise PickleError(f"it names {name}, which no tensor needs; nothing of it was run")


def interpret(file: BinaryIO, storage_of: Callable[[Any], Any]) -> Any:
    """Read one pickle and return what it builds.

    Args:
        file: at the beginning of a pickle; it is left after its end.
        storage_of: called with every persistent id, for the `Storage` (or, in the oldest format, the `Tensor`).

    Returns:
        dict, list, tuple, numbers, strings, `Tensor`; an object of a TorchScript class is the dict of its attributes.

    Raises:
        PickleError: for any name but those of tensors, any call but those that rebuild one, keys of dictionaries that
            are not strings (of at most `NAME_LENGTH` characters) or whole numbers, files of too many steps, and broken
            ones.
    """
    machine = _Machine(storage_of)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise PickleError(
                    f"it holds the instruction {opcode.name}, which no tensor needs; nothing of it was run"
                )
            machine.spend(1)
            step(machine, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise PickleError(f"it is broken ({type(error).__name__}: {error})") from None
    if len(machine.stack) != 1:
        raise PickleError("it is broken (its end leaves more than one object)")
    return machine.stack[0]


class _Machine:
    """The stack and the memo of one reading."""

    def __init__(self, storage_of: Callable[[Any], Any]):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storage_of = storage_of
        self.left = _MOST_STEPS

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise PickleError(f"it takes more than {_MOST_STEPS} steps to read, which no checkpoint does")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("it is broken (an instruction lacks its argument)")
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise PickleError("it is broken (a mark is missing)")

    def last(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise PickleError(f"it is broken (there is no {kind.__name__} to add to)")
        return self.stack[-1]


def _checked_dict(pairs: Any) -> dict:
    return {checked_key(key): value for key, value in pairs}


def checked_key(key: Any) -> str | int | None:
    """Return a key if it is a string, a whole number or None, and short.

    Others would have to be hashed, which takes time and stack without bound for tuples of tuples.
    """
    if key is not None and not isinstance(key, (str, int)):
        raise PickleError(f"it has a key of type {type(key).__name__}, which is neither a string nor a whole number")
    if isinstance(key, str) and len(key) > NAME_LENGTH:
        raise PickleError(f"it has a name of {len(key)} characters, more than {NAME_LENGTH}")
    if isinstance(key, int) and key.bit_length() > 64:
        raise PickleError(f"it has a key that is a number of {key.bit_length()} bits, more than 64")
    return key


def _set_items(machine: _Machine, items: list[Any]) -> None:
    if len(items) % 2:
        raise PickleError("it is broken (a key lacks its value)")
    machine.last(dict).update(_checked_dict(zip(items[::2], items[1::2], strict=True)))


def _call(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not any(function is known for known in _CALLABLE) or not isinstance(arguments, tuple):
        raise PickleError("it calls something that is not one of torch's functions; nothing of it was run")
    machine.stack.append(_result(machine, function, arguments))


def _result(machine: _Machine, function: Callable[..., Any], arguments: tuple) -> Any:
    # Functions copy their arguments, which a small file may ask for again and again.
    machine.spend(sum(len(argument) for argument in arguments if isinstance(argument, Sized)))
    return function(*arguments)


def _new(machine: _Machine, _: Any) -> None:
    arguments, kind = machine.pop(), machine.pop()
    if kind is CALLS["collections.OrderedDict"] and isinstance(arguments, tuple):
        machine.stack.append(_result(machine, _dictionary, arguments))
    elif isinstance(kind, _Class) and arguments == ():
        machine.stack.append({})
    else:
        raise PickleError("it makes an object that is not a tensor; nothing of it was run")


def _build(machine: _Machine, _: Any) -> None:
    state, thing = machine.pop(), machine.last(dict)
    if thing and isinstance(state, dict):
        return  # attributes of an ordered dictionary, such as a state_dict's _metadata
    if isinstance(state, tuple) and len(state) == 2:  # a TorchScript object with a __getstate__ of its own
        state = state[0]
    if isinstance(state, dict):
        machine.spend(len(state))
        thing.update(state)


def _global(machine: _Machine, argument: str) -> None:
    machine.stack.append(_named(".".join(argument.split(" ", 1))))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("it is broken (a name is not a string)")
    machine.stack.append(_named(f"{module}.{name}"))


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value() if isinstance(value, type) else value)


def _put(machine: _Machine, argument: int | None) -> None:
    if not machine.stack:
        raise PickleError("it is broken (there is nothing to remember)")
    machine.memo[len(machine.memo) if argument is None else int(argument)] = machine.stack[-1]


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        machine.stack.append(tuple(reversed([machine.pop() for _ in range(count)])))

    return step


def _append_from(take: Callable[[_Machine], list]) -> Callable[[_Machine, Any], None]:
    def step(machine: _Machine, _: Any) -> None:
        items = take(machine)
        machine.last(list).extend(items)

    return step


def _get(machine: _Machine, argument: int | str) -> None:
    machine.stack.append(machine.memo[int(argument)])


def _dict_of_mark(machine: _Machine, _: Any) -> None:
    items = machine.to_mark()
    machine.stack.append({})
    _set_items(machine, items)


_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS, _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "MARK": _constant(_MARK),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.to_mark())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": lambda machine, _: machine.stack.append(machine.to_mark()),
    "DICT": _dict_of_mark,
    "SETITEM": lambda machine, _: _set_items(machine, [machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.to_mark()),
    "APPEND": _append_from(lambda machine: [machine.pop()]),
    "APPENDS": _append_from(_Machine.to_mark),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _new,
    "BUILD": _build,
    "BINPERSID": lambda machine, _: machine.stack.append(machine.storage_of(machine.pop())),
    "PERSID": lambda machine, argument: machine.stack.append(machine.storage_of(argument)),
}


def storage_type(kind: Any) -> str:
    """Return the dtype that a storage's class in a persistent id stands for."""
    if not isinstance(kind, _Type):
        raise PickleError("a storage has no type that is known")
    return kind.name
