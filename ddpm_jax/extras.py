"""Error for a package of an extra that is not installed."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra to install when an import in the context fails because its package is missing.

    Args:
        extra: one of those in setup.py, as "train".

    Raises:
        ModuleNotFoundError: for a package that is not installed; also an ImportError, as usual.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ddpm_jax"):
            raise
        message = f"the package {package} is not installed; install ddpm_jax[{extra}]"
        raise ModuleNotFoundError(message, name=error.name, path=error.path) from None
