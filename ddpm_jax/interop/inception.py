"""FID's Inception network from the files that carry its weights in PyTorch.

The one that torch-fidelity and pytorch-fid download is pt_inception-2015-12-05-6726825d.pth.
"""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import IDENTITY, KERNEL, TRANSPOSED, ConvertError, Entry, to_ours, to_reference
from ddpm_jax.models.inception import SIZE, Inception
from ddpm_jax.models.shapes import parameter_shapes

MARKS = ("Mixed_7c.branch_pool.conv.weight",)
_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_inception(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameters of `Inception`, float32.

    Args:
        tensors: as `read_tensors` gives them.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    tensors = select(tensors, MARKS)
    if MARKS[0] not in tensors:
        raise ConvertError(f"the file is not of FID's Inception network: it lacks {MARKS[0]}")
    counters = [name for name in tensors if name.endswith(".num_batches_tracked")]
    return to_ours(inception_table(), tensors, _shapes(), ignored=counters)


def export_inception(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the file's tensors, float32, without PyTorch's counters of batches."""
    return to_reference(inception_table(), params)


def inception_table() -> list[Entry]:
    """Return the table; our names are the file's."""
    table = [Entry("fc_kernel", ("fc.weight",), TRANSPOSED), Entry("fc_bias", ("fc.bias",), IDENTITY)]
    for path in flax.traverse_util.flatten_dict(_shapes(), sep="/"):
        if "/" in path:
            *place, kind, name = path.split("/")
            theirs, layout = ("weight", KERNEL) if kind == "conv" else (_NORM[name], IDENTITY)
            table.append(Entry(path, (".".join([*place, kind, theirs]),), layout))
    return table


def _shapes() -> Any:
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return parameter_shapes(Inception(), image)["params"]
