"""A pickle interpreter that builds dictionaries, lists, numbers, strings and descriptions of tensors, and nothing else.

A pickle is a program for a stack machine that may import and call anything. `interpret` imports nothing, and calls
nothing but the functions of `pickles`. Every instruction is paid for from a `Budget`, those that make a container,
remember an object or decode a string more than the others, so that neither time nor memory grows beyond it.
"""

import codecs
import mmap
import pickletools
import struct
from collections.abc import Callable, Sized
from typing import Any

from ddpm_jax.storage.pickles import (
    CALLS,
    INTEGER_BYTES,
    NAME_LENGTH,
    Budget,
    Function,
    LongText,
    Opaque,
    PickleError,
    ScriptClass,
    Tensor,
    checked_key,
    dictionary,
    named,
    odd_key,
)

_MAKERS = ("copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__")  # of their first argument
_DIGITS = 310  # of an integer or a fraction written as text


class _Mark:
    """Marker of the beginning of an opcode's arguments on the stack."""


_MARK = _Mark()


def interpret(
    data: mmap.mmap, begin: int, end: int, storage_of: Callable[[Any], Any], budget: Budget
) -> tuple[Any, int]:
    """Read one pickle and return what it builds.

    Args:
        data: a file.
        begin, end: where in it the pickle begins, and what it may not go beyond.
        storage_of: called with every persistent id, for the `Storage` (or, in the oldest format, the `Tensor`).
        budget: what this and the file's other pickles may cost together; it also receives what was not read.

    Returns:
        dict, list, tuple, numbers, strings, `Tensor`, `Opaque`; an object of a TorchScript class is the dict of its
        attributes. An entry of a dictionary whose key is neither a string nor a whole number is left out. Second, the
        place behind the pickle.

    Raises:
        PickleError: for a name that stands for a program, for names, integers and files beyond the limits, and for
            broken files.
    """
    machine = _Machine(data, begin, end, storage_of, budget)
    try:
        machine.run()
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise PickleError(f"it is broken ({type(error).__name__}: {error})") from None
    if len(machine.stack) != 1:
        raise PickleError("it is broken (its end leaves more than one object)")
    return machine.stack[0], machine.place


class _Machine:
    """The place in the file, the stack and the memo of one reading."""

    def __init__(self, data: mmap.mmap, begin: int, end: int, storage_of: Callable[[Any], Any], budget: Budget):
        self.data, self.place, self.end = data, begin, end
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[str, Any] = {}
        self.storage_of, self.budget = storage_of, budget

    def run(self) -> None:
        """Run instructions up to STOP."""
        data, end, budget, steps = self.data, self.end, self.budget, _STEPS
        while True:
            if self.place >= end:
                raise PickleError("it is broken (it ends before its last instruction)")
            code = data[self.place]
            self.place += 1
            budget.left -= 1
            if budget.left < 0:
                budget.spend(0)
            if code == _STOP:
                return
            step = steps[code]
            if step is None:
                name = pickletools.code2op[chr(code)].name if chr(code) in pickletools.code2op else f"{code:#04x}"
                raise PickleError(f"it holds the instruction {name}, which no tensor needs; nothing of it was run")
            step(self)

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        place = self.place
        self.place = place + size
        if self.place > self.end:
            raise PickleError("it is broken (it ends before its last instruction)")
        return self.data[place : self.place]

    def line(self, most: int) -> bytes | None:
        """Return the bytes up to the end of a line; None for more than `most`, which are passed over."""
        place, end = self.place, self.data.find(b"\n", self.place, self.end)
        if end < 0:
            raise PickleError("it is broken (a line does not end)")
        self.place = end + 1
        if end - place > most:
            return None
        self.budget.left -= 1 + (end - place >> 4)
        return self.data[place:end]

    def short_line(self, most: int) -> bytes:
        """Return the bytes up to the end of a line, which may not be longer than `most`."""
        place = self.place
        line = self.line(most)
        if line is None:
            raise PickleError(
                f"it has a line of {self.place - place - 1} bytes, more than {most}; nothing of it was run"
            )
        return line

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("it is broken (an instruction lacks its argument)")
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        """Return what lies above the last mark, and remove both."""
        self.budget.left -= 1
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise PickleError("it is broken (a mark is missing)")

    def last(self, kind: type) -> Any:
        """Return what is on top of the stack, and None if it is opaque."""
        top = self.stack[-1] if self.stack else None
        if type(top) is not kind and type(top) is not Opaque:
            raise PickleError(f"it is broken (there is no {kind.__name__} to add to)")
        return None if type(top) is Opaque else top


def _set_items(machine: _Machine, items: list[Any]) -> None:
    if len(items) % 2:
        raise PickleError("it is broken (a key lacks its value)")
    target = machine.last(dict)
    if target is None:
        return
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key is None or isinstance(key, (str, int, LongText)):
            target[checked_key(key)] = value
        else:
            machine.budget.left -= 2
            machine.budget.skip(odd_key(key))


def _call(machine: _Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    if isinstance(function, Opaque):
        made = arguments[0] if function.name in _MAKERS and isinstance(arguments, tuple) and arguments else function
        machine.stack.append(made if isinstance(made, Opaque) else function)
        return
    if not isinstance(function, Function) or not isinstance(arguments, tuple):
        raise PickleError("it calls something that is not one of torch's functions; nothing of it was run")
    _result(machine, function, arguments)


def _result(machine: _Machine, function: Function, arguments: tuple) -> None:
    # Functions copy their arguments, which a small file may pass again and again.
    machine.budget.spend(1 + sum(len(argument) for argument in arguments if isinstance(argument, Sized)))
    found = function.call(*arguments)
    if function.call is dictionary and isinstance(found, list):
        machine.stack.append({})
        _set_items(machine, found)
    else:
        machine.stack.append(found)


def _new(machine: _Machine) -> None:
    arguments, kind = machine.pop(), machine.pop()
    if isinstance(kind, Opaque):
        machine.stack.append(kind)
    elif kind is CALLS["collections.OrderedDict"] and isinstance(arguments, tuple):
        _result(machine, kind, arguments)
    elif isinstance(kind, ScriptClass) and arguments == ():
        machine.budget.spend(1)
        machine.stack.append({})
    else:
        raise PickleError("it makes an object that is not a tensor; nothing of it was run")


def _new_with_names(machine: _Machine) -> None:
    machine.pop()
    _new(machine)


def _object(machine: _Machine) -> None:
    parts = machine.to_mark()
    if not parts or not isinstance(parts[0], Opaque):
        raise PickleError("it makes an object that is not a tensor; nothing of it was run")
    machine.stack.append(parts[0])


def _instance(machine: _Machine) -> None:
    kind = _global_name(machine)
    machine.to_mark()
    if not isinstance(kind, Opaque):
        raise PickleError("it makes an object that is not a tensor; nothing of it was run")
    machine.stack.append(kind)


def _build(machine: _Machine) -> None:
    state, thing = machine.pop(), machine.stack[-1] if machine.stack else None
    if isinstance(thing, Opaque) and isinstance(state, dict) and "_parameters" in state and "_modules" in state:
        machine.budget.module = thing.name
    if isinstance(thing, (Tensor, Opaque)):
        return  # attributes of a tensor, and the state of what is not read
    thing = machine.last(dict)
    if thing and isinstance(state, dict):
        return  # attributes of an ordered dictionary, such as a state_dict's _metadata
    if isinstance(state, tuple) and len(state) == 2:  # a TorchScript object with its own __getstate__
        state = state[0]
    if isinstance(state, dict):
        machine.budget.spend(len(state))
        thing.update(state)


def _global_name(machine: _Machine) -> Any:
    module, name = machine.short_line(2 * NAME_LENGTH), machine.short_line(2 * NAME_LENGTH)
    return _named(machine, f"{module.decode()}.{name.decode()}")


def _named(machine: _Machine, name: str) -> Any:
    if name not in machine.names:
        machine.budget.spend(8)
        machine.names[name] = named(name, machine.budget)
    return machine.names[name]


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("it is broken (a name is not a string)")
    machine.budget.spend(len(name) + len(module) >> 4)
    machine.stack.append(_named(machine, f"{module}.{name}"))


def _push(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _container(kind: type) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.budget.left -= 1
        machine.stack.append(kind())

    return step


def _whole(size: int, signed: bool = False) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(int.from_bytes(machine.take(size), "little", signed=signed))


def _long(size: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        length = int.from_bytes(machine.take(size), "little")
        if length > INTEGER_BYTES:
            raise PickleError(f"it has an integer of {length} bytes, more than {INTEGER_BYTES}")
        machine.stack.append(int.from_bytes(machine.take(length), "little", signed=True))

    return step


def _fraction(machine: _Machine) -> None:
    machine.stack.append(struct.unpack(">d", machine.take(8))[0])


def _integer_line(machine: _Machine) -> None:
    line = machine.short_line(_DIGITS)
    machine.stack.append(line == b"01" if line in (b"00", b"01") else int(line.removesuffix(b"L")))


def _fraction_line(machine: _Machine) -> None:
    machine.stack.append(float(machine.short_line(_DIGITS)))


def _text(size: int, encoding: str) -> Callable[[_Machine], None]:
    errors = "surrogatepass" if encoding == "utf-8" else "strict"  # as Python's own pickle

    def step(machine: _Machine) -> None:
        length = int.from_bytes(machine.take(size), "little")
        if length > 4 * NAME_LENGTH:
            _skip(machine, length)
            machine.stack.append(LongText(length))
            return
        machine.budget.left -= 1 + (length >> 4)
        machine.stack.append(machine.take(length).decode(encoding, errors))

    return step


def _text_line(machine: _Machine) -> None:
    place, line = machine.place, machine.line(4 * NAME_LENGTH)
    machine.stack.append(LongText(machine.place - place) if line is None else line.decode("raw-unicode-escape"))


def _quoted_line(machine: _Machine) -> None:
    place, line = machine.place, machine.line(4 * NAME_LENGTH)
    if line is None:
        machine.stack.append(LongText(machine.place - place))
        return
    line = line.strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"'\"":
        raise PickleError("it is broken (a string has no quotes)")
    machine.stack.append(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))


def _bytes(size: int) -> Callable[[_Machine], None]:
    found = Opaque("bytes")

    def step(machine: _Machine) -> None:
        _skip(machine, int.from_bytes(machine.take(size), "little"))
        machine.stack.append(found)

    return step


def _skip(machine: _Machine, size: int) -> None:
    machine.place += size
    if machine.place > machine.end:
        raise PickleError("it is broken (it ends before its last instruction)")


def _put(read: Callable[[_Machine], int] | None) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        if not machine.stack:
            raise PickleError("it is broken (there is nothing to remember)")
        machine.budget.left -= 1
        machine.memo[len(machine.memo) if read is None else read(machine)] = machine.stack[-1]

    return step


def _get(read: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.memo[read(machine)])


def _place(size: int) -> Callable[[_Machine], int]:
    return lambda machine: int.from_bytes(machine.take(size), "little")


def _place_line(machine: _Machine) -> int:
    return int(machine.short_line(20))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        stack = machine.stack
        if len(stack) < count or any(item is _MARK for item in stack[-count:]):
            raise PickleError("it is broken (an instruction lacks its argument)")
        machine.budget.left -= 1
        stack[-count:] = [tuple(stack[-count:])]

    return step


def _add(take: Callable[[_Machine], list], kind: type) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        items = take(machine)
        target = machine.last(kind)
        if target is not None:
            target.extend(items)

    return step


def _frozenset(machine: _Machine) -> None:
    machine.to_mark()
    machine.stack.append(Opaque("frozenset"))


def _dict_of_mark(machine: _Machine) -> None:
    items = machine.to_mark()
    machine.stack.append({})
    _set_items(machine, items)


def _one(machine: _Machine) -> list[Any]:
    return [machine.pop()]


def _persistent(machine: _Machine) -> None:
    machine.budget.left -= 2
    machine.stack.append(machine.storage_of(machine.pop()))


def _persistent_line(machine: _Machine) -> None:
    machine.budget.left -= 2
    machine.stack.append(machine.storage_of(machine.short_line(_DIGITS).decode()))


_BY_NAME: dict[str, Callable[[_Machine], None]] = {
    "PROTO": lambda machine: _skip(machine, 1),
    "FRAME": lambda machine: _skip(machine, 8),
    "BININT": _whole(4, signed=True), "BININT1": _whole(1), "BININT2": _whole(2), "LONG1": _long(1), "LONG4": _long(4),
    "INT": _integer_line, "LONG": _integer_line, "FLOAT": _fraction_line, "BINFLOAT": _fraction,
    "STRING": _quoted_line, "BINSTRING": _text(4, "latin-1"), "SHORT_BINSTRING": _text(1, "latin-1"),
    "UNICODE": _text_line, "BINUNICODE": _text(4, "utf-8"), "SHORT_BINUNICODE": _text(1, "utf-8"),
    "BINUNICODE8": _text(8, "utf-8"),
    "BINBYTES": _bytes(4), "SHORT_BINBYTES": _bytes(1), "BINBYTES8": _bytes(8), "BYTEARRAY8": _bytes(8),
    "PUT": _put(_place_line), "BINPUT": _put(_place(1)), "LONG_BINPUT": _put(_place(4)), "MEMOIZE": _put(None),
    "GET": _get(_place_line), "BINGET": _get(_place(1)), "LONG_BINGET": _get(_place(4)),
    "MARK": _push(_MARK), "NONE": _push(None), "NEWTRUE": _push(True), "NEWFALSE": _push(False),
    "EMPTY_DICT": _container(dict), "EMPTY_LIST": _container(list), "EMPTY_TUPLE": _push(()),
    "EMPTY_SET": _push(Opaque("set")), "ADDITEMS": _add(_Machine.to_mark, Opaque), "FROZENSET": _frozenset,
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.to_mark())),
    "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3),
    "LIST": lambda machine: machine.stack.append(machine.to_mark()), "DICT": _dict_of_mark,
    "SETITEM": lambda machine: _set_items(machine, [machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine: _set_items(machine, machine.to_mark()),
    "APPEND": _add(_one, list), "APPENDS": _add(_Machine.to_mark, list),
    "POP": lambda machine: machine.stack.pop(), "POP_MARK": lambda machine: machine.to_mark(),
    "DUP": lambda machine: machine.stack.append(machine.stack[-1]),
    "GLOBAL": lambda machine: machine.stack.append(_global_name(machine)), "STACK_GLOBAL": _stack_global,
    "REDUCE": _call, "NEWOBJ": _new, "NEWOBJ_EX": _new_with_names, "OBJ": _object, "INST": _instance, "BUILD": _build,
    "BINPERSID": _persistent, "PERSID": _persistent_line,
}  # fmt: skip
_STEPS = [
    _BY_NAME.get(pickletools.code2op[chr(code)].name) if chr(code) in pickletools.code2op else None
    for code in range(256)
]
_STOP = ord(".")
