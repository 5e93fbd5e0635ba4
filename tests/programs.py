"""Counts of compiled programs and of the memory that arrays take."""

import contextlib

import jax
from jax import monitoring


@contextlib.contextmanager
def no_compilation():
    """Assert that nothing is compiled in the context, no program of one operation either."""
    found = []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    monitoring.register_event_duration_secs_listener(count)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(count)
    assert not found, f"{len(found)} programs were compiled, in {sum(found):.2f} s"


def live_bytes():
    """Return the bytes of all arrays that are alive."""
    return sum(array.nbytes for array in jax.live_arrays())
