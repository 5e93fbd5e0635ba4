"""The errors of what is read from disk; every message is one sentence on one printable line."""

_MESSAGE = 4000


def printable(message: str) -> str:
    r"""Return a message as one line that a terminal shows as it is, of at most 4000 characters and how many follow.

    Names from files stand in it, which may hold anything: what is not printable becomes \n, \x1b or the like.
    """
    shown = message[:_MESSAGE]
    more = f"... ({len(message) - _MESSAGE} characters more)" if len(message) > _MESSAGE else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + more


class LoadError(RuntimeError):
    """A model, a pipeline or a file of weights cannot be loaded; the message is one sentence on one printable line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class ReadError(LoadError):
    """A file of weights, or a directory that holds some, cannot be read."""


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, "1 image" or "2 images"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def one_for_each(count: int, what: str, noun: str) -> str:
    """Return what an argument must hold, such as "one caption or one for each of 3 images"; `what` is the caption."""
    return f"one {what}" + ("" if count == 1 else f" or one for each of {count} {noun}s")
