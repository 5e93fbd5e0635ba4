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


def compile_manipulations_quickly(patch):
    """Replace the programs of `pipelines.inversion` by ones that compile quickly; patch: a `MonkeyPatch`."""
    from random_networks import fast_jit

    from ddpm_jax.pipelines import inversion

    static = {"_embed": (), "_embed_text": (), "_encode": ("iterations",), "_decode": ("low_res", "resample")}
    for program, names in static.items():
        patch.setattr(inversion, program, fast_jit(getattr(inversion, program).__wrapped__, static_argnames=names))
