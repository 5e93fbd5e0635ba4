"""Progress on stderr: a bar on a terminal and in a notebook, and otherwise a line at intervals."""

import contextlib
import sys
import time
from typing import Any

from ddpm_jax.extras import needs_extra

with needs_extra("train"):
    import tqdm

MIN_SECONDS, MAX_SECONDS, SHARE = 2.0, 30.0, 0.1


def progress_bar(total: int, *, description: str, unit: str, initial: int = 0, shown: bool = True) -> Any:
    """Return a progress bar, a context manager with `update(n)`, `set_postfix_str(text)` and `close()`.

    Args:
        total: how much there is to do.
        description: what is done.
        unit: of `total`, in the singular.
        initial: how much has been done before.
        shown: False shows nothing.
    """
    if not shown or _redraws():
        return tqdm.tqdm(
            total=total,
            initial=initial,
            desc=description,
            unit=unit,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not shown,
        )
    return _Lines(total, description, unit, initial)


def _redraws() -> bool:
    """Return whether stderr shows a line that is written again in place of the first one."""
    stream = sys.stderr
    return stream is not None and (stream.isatty() or type(stream).__module__.startswith("ipykernel"))


class _Lines:
    """Prints a line for every tenth of the work, or every 30 s, and the last."""

    def __init__(self, total: int, description: str, unit: str, initial: int):
        self._total, self._description, self._unit, self._done = total, description, unit, initial
        self._postfix = ""
        self._begin = self._time = time.monotonic()
        self._initial = self._printed = initial

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Count what was done."""
        self._done += count
        seconds = time.monotonic() - self._time
        share = (self._done - self._printed) / max(self._total, 1)
        if seconds >= MAX_SECONDS or (seconds >= MIN_SECONDS and share >= SHARE):
            self._print()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Set what stands at the end of the lines."""
        del refresh
        self._postfix = f", {text}"

    def close(self) -> None:
        """Print the last line."""
        if self._done != self._printed:
            self._print()

    def _print(self) -> None:
        self._time, self._printed = time.monotonic(), self._done
        percent = 100 * self._done // max(self._total, 1)
        seconds = max(self._time - self._begin, 1e-3)
        rate = (self._done - self._initial) / seconds
        done = f"{self._description}: {percent}% ({self._done}/{self._total} {self._unit}s)"
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0.0 and self._done < self._total else ""
        line = f"{done}, {seconds:.0f} s, {rate:.4g} {self._unit}s/s{left}{self._postfix}"
        if sys.stderr is not None:  # print(file=None) would go to stdout
            with contextlib.suppress(OSError):  # a full disk, or a reader that has gone, does not end the work
                print(line, file=sys.stderr, flush=True)
