"""Kinds of values that a field of a config.json may have, each with the words for a message."""

from collections.abc import Callable
from typing import Any, NamedTuple

MOST = 2**20  # of a whole number: more than any size of a network here


class Kind(NamedTuple):
    """Requirement on the value of a config field.

    Attributes:
        meaning: in words that follow "it must be".
        holds: returns whether a value meets it.
    """

    meaning: str
    holds: Callable[[Any], bool]


def optional(kind: Kind) -> Kind:
    """Return the kind that may be null too."""
    return Kind(f"{kind.meaning}, or null", lambda value: value is None or kind.holds(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(holds, value))


def _is_side(value: Any) -> bool:
    return _is_whole(value) or (_is_list(value, _is_whole) and len(value) == 2 and value[0] == value[1])


ANY = Kind("anything", lambda value: True)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NUMBER = Kind("a finite number", lambda value: _is_number(value) and abs(value) < float("inf"))
POSITIVE = Kind("a finite number above 0", lambda value: _is_number(value) and 0 < value < float("inf"))
WHOLE = Kind(f"a whole number between 1 and {MOST}", _is_whole)
WHOLES = Kind(f"{WHOLE.meaning}, or a list of such", lambda value: _is_whole(value) or _is_list(value, _is_whole))
WORDS = Kind("a list of strings", lambda value: _is_list(value, WORD.holds))
WIDTHS = Kind(  # every norm has 32 groups
    "a list of multiples of 32", lambda value: _is_list(value, lambda width: _is_whole(width) and width % 32 == 0)
)
SIDE = Kind(f"{WHOLE.meaning}, or a pair of two equal ones: images are square", _is_side)
