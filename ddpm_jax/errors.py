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
