"""Images of one request, shared by all hosts of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.parallel.mesh import make_local_mesh


def generate_on_all_hosts(
    generate: Callable[..., np.ndarray],
    count: int,
    each: Mapping[str, Any],
    *,
    start: int = 0,
    space: int = 1,
    **kwargs: Any,
) -> np.ndarray:
    """Generate images on all hosts, a part on each; all of them call it.

    Image i depends on the seed, i and its own arguments alone, so the images are those of one host up to rounding.

    Args:
        generate: of a pipeline; it is given `mesh`, the devices of this host.
        count: of the images, at least 1.
        each: arguments with an entry for each image, or None; a number is that of the images, as `num_images`.
        start: index of the first image.
        space: devices that share the rows of each image in upsampling.
        **kwargs: arguments that are the same for all images.

    Returns:
        All images, uint8[count, H, W, C], on every host.
    """
    hosts, index = jax.process_count(), jax.process_index()
    share = -(-count // hosts)
    # The last hosts may repeat the last image, which is left out below, so that all have as many.
    rows = np.minimum(np.arange(index * share, (index + 1) * share), count - 1)
    own = {name: _rows(value, rows) for name, value in each.items()}
    images = generate(**own, start=start + index * share, mesh=make_local_mesh(share, space=space), **kwargs)
    if hosts == 1:
        return images
    return np.asarray(multihost_utils.process_allgather(images, tiled=True))[:count]


def _rows(value: Any, rows: np.ndarray) -> Any:
    if isinstance(value, np.ndarray):
        return value[rows]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [value[row] for row in rows]
    return len(rows) if isinstance(value, int) else value
