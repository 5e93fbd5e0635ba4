"""What is kept of a set of images for its comparison with others: moments of features, and a bounded number of these.

With D dimensions, 8 D^2 bytes of each kind of features are for the moments, and 4 D bytes for each image that is kept.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ddpm_jax.errors import LoadError, ReadError, counted
from ddpm_jax.evaluation.archives import read_array, read_headers, write_arrays
from ddpm_jax.evaluation.features import LOGITS, POOL, SPATIAL, Extractor, Identity
from ddpm_jax.evaluation.images import ImageSet, share_of
from ddpm_jax.evaluation.statistics import ClassScores, Moments
from ddpm_jax.parallel import hosts

KEPT = 50_000
"""Images of a set of which features are kept, for precision and recall, KID and confidence intervals."""
MOST_DIMENSIONS = 20_000
FORMAT = "ddpm_jax statistics 1"
_STATISTICS = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}  # as guided-diffusion and pytorch-fid name them


@dataclasses.dataclass
class Summary:
    """Statistics of a set of images.

    Attributes:
        name: of the set, for messages.
        identity: of the features; None of a file that does not say it.
        preprocessing: of the images before the features, in words.
        count: images; None of a file that does not say it.
        moments: "pool" and "spatial", as far as the features have them.
        features: "pool", "spatial" and "logits" of the images that are kept, float32[n, D].
        scores: parts of the Inception Score, or None.
        size: height and width of the images; None of a file that does not say it.
    """

    name: str
    identity: Identity | None
    preprocessing: str
    count: int | None
    moments: dict[str, Moments]
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scores: ClassScores | None = None
    size: tuple[int, int] | None = None


def summarize(
    images: ImageSet,
    extractor: Extractor,
    *,
    keep: int = KEPT,
    splits: int = 10,
    seed: int = 0,
    batch_size: int | None = None,
    update: Callable[[int], Any] = lambda count: None,
    show: Callable[[int, dict[str, Any]], Any] = lambda begin, batch: None,
) -> Summary:
    """Read all images once and summarize their features; the hosts of a run share the images, and all get the result.

    Args:
        images: the set, at least two.
        extractor: of the features.
        keep: images whose features are kept: all if there are fewer, and otherwise a random part.
        splits: parts of the Inception Score; fewer if there are fewer images.
        seed: of the choice of the images that are kept.
        batch_size: images at a time; what suits the set by default.
        update: called with the number of images each time some are done.
        show: called with the index of the first image and the batch.

    Raises:
        ValueError: if there are fewer than two images, or one cannot be used; the message names it.
    """
    if len(images) < 2:
        raise ValueError(f"{images.name} has {counted(len(images), 'image')}, and statistics need at least two")
    own, size = share_of(len(images)), batch_size or images.batch_size
    parts, shape = _Parts(len(images), extractor, keep, splits, seed), None
    for begin in range(own.start, own.stop, size):
        end = min(begin + size, own.stop)
        hosts.current().busy(f"image {begin} of {images.name}")
        batch = images.read(begin, end)
        show(begin, batch)
        found, shape = extractor(batch["image"]), batch["image"].shape[1:3]
        for name, features in found.items():
            bad = np.flatnonzero(~np.isfinite(features).all(1))
            if len(bad):
                raise ValueError(f"{name} of image {begin + bad[0]} of {images.name} is not finite (NaN or infinity)")
        parts.add(begin, end, found)
        update(end - begin)
    features = {name: np.concatenate(each) for name, each in parts.kept.items()}
    summary = Summary(images.name, extractor.identity, images.preprocessing, len(images), parts.moments, features)
    summary.scores, summary.size = parts.scores, shape
    return _of_all_hosts(summary)


class _Parts:
    """What `summarize` accumulates."""

    def __init__(self, count: int, extractor: Extractor, keep: int, splits: int, seed: int):
        sizes = extractor.dimensions
        self.moments = {name: Moments(sizes[name]) for name in (POOL, SPATIAL) if name in sizes}
        self.scores = ClassScores(count, sizes[LOGITS], splits=min(splits, count)) if LOGITS in sizes else None
        self.kept = {name: [np.zeros((0, sizes[name]), np.float32)] for name in sizes}
        rng = np.random.default_rng([seed, 0x6B])
        self._chosen = np.arange(count) if keep >= count else np.sort(rng.choice(count, keep, replace=False))

    def add(self, begin: int, end: int, found: dict[str, np.ndarray]) -> None:
        """Add the features of images [begin, end)."""
        for name, moments in self.moments.items():
            moments.add(found[name])
        if self.scores is not None:
            self.scores.add(np.arange(begin, end), found[LOGITS])
        first, last = np.searchsorted(self._chosen, [begin, end])
        for name, parts in self.kept.items():
            parts.append(found[name][self._chosen[first:last] - begin])


# ---- Several hosts ---------------------------------------------------------------------------------------------------


def _of_all_hosts(own: Summary) -> Summary:
    """Return the summary of what all hosts have read."""
    if jax.process_count() == 1:
        return own
    arrays = {f"features/{name}": array for name, array in own.features.items()}
    for name, each in own.moments.items():
        arrays |= {f"{name}/count": np.array(each.count), f"{name}/mean": each.mean, f"{name}/scatter": each.scatter}
    names = () if own.scores is None else ("counts", "probabilities", "negative_entropies")
    arrays |= {f"scores/{name}": getattr(own.scores, name) for name in names}
    parts = gather_arrays(arrays | {"size": np.array(own.size or (0, 0), np.int64)})
    own.size = max(tuple(part["size"].tolist()) for part in parts)  # a host may have no image
    for name, each in own.moments.items():
        total = Moments(len(each.mean))
        for part in parts:
            total.merge(Moments.of(int(part[f"{name}/count"]), part[f"{name}/mean"], part[f"{name}/scatter"]))
        own.moments[name] = total
    for name in names:
        setattr(own.scores, name, sum(part[f"scores/{name}"] for part in parts))
    own.features = {name: np.concatenate([part[f"features/{name}"] for part in parts]) for name in own.features}
    return own


def gather_arrays(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the arrays of every host, in the order of the hosts; all of them call it.

    They are sent as bytes, since JAX would round float64, and they may differ in their shapes from host to host.
    """
    headers = hosts.current().gather("shapes", {k: [str(a.dtype), list(a.shape)] for k, a in arrays.items()})
    found: list[dict[str, np.ndarray]] = [{} for _ in headers]
    for name in arrays:
        sizes = [int(np.prod(h[name][1], dtype=np.int64)) * np.dtype(h[name][0]).itemsize for h in headers]
        data = np.zeros(max(max(sizes), 1), np.uint8)
        own = np.frombuffer(np.ascontiguousarray(arrays[name]).tobytes(), np.uint8)
        data[: len(own)] = own
        rows = np.asarray(multihost_utils.process_allgather(data[None], tiled=True))
        for part, header, row, size in zip(found, headers, rows, sizes, strict=True):
            part[name] = np.frombuffer(row[:size].tobytes(), header[name][0]).reshape(header[name][1])
    return found


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_statistics(path: str | os.PathLike, summary: Summary) -> None:
    """Write the statistics of a set as an .npz file, on the first host.

    It has "mu" and "sigma" (and "mu_s" and "sigma_s"), which guided-diffusion's evaluator and pytorch-fid read, the
    features that are kept, and "about", a JSON text that names them.

    Raises:
        ValueError: if the path does not end in .npz, by which `has_statistics` knows such files.
        OSError: if it cannot be written.
    """
    if not os.fspath(path).endswith(".npz"):
        raise ValueError(f"{path} must end in .npz, a file of statistics")
    if jax.process_index() != 0:
        return
    arrays: dict[str, Any] = {}
    for name, moments in summary.moments.items():
        mean, covariance = _STATISTICS[name]
        arrays |= {mean: moments.mean, covariance: moments.covariance}
    about = {
        "format": FORMAT,
        "name": summary.name,
        "count": summary.count,
        "size": None if summary.size is None else list(summary.size),
        "preprocessing": summary.preprocessing,
        "identity": None if summary.identity is None else list(summary.identity),
    }
    arrays |= {f"features_{name}": array for name, array in summary.features.items() if name == POOL}
    write_arrays(path, arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})


def has_statistics(path: str | os.PathLike) -> bool:
    """Return whether a path is an .npz file with means and covariances.

    Raises:
        ReadError: if it is a damaged .npz file.
    """
    return os.fspath(path).endswith(".npz") and {"mu", "sigma"} <= set(read_headers(path))


def read_statistics(path: str | os.PathLike, extractor: Extractor) -> Summary:
    """Read statistics from a file of `write_statistics`, guided-diffusion or pytorch-fid.

    The files of the other two do not name their features, which are taken to be those of the Inception network, with
    the resize that the extractor has.

    Args:
        path: of the .npz file.
        extractor: of the features that they will be compared with.

    Raises:
        LoadError: if it is damaged, or of other features.
    """
    headers, about = read_headers(path), _read_about(path)
    identity = None if about.get("identity") is None else Identity(*about["identity"])
    if identity is not None and identity != extractor.identity:
        raise LoadError(
            f"{path} holds statistics of the features {identity}, and those of the images are {extractor.identity}; "
            "make the statistics again, or give the features that it has"
        )
    if identity is None and extractor.identity.name != "inception":
        raise LoadError(
            f"{path} does not say of which features its statistics are, as files for Inception's do, and those of the "
            f"images are {extractor.identity}; make the statistics again with --write_statistics"
        )
    moments = {}
    for name, size in extractor.dimensions.items():
        if name not in _STATISTICS or _STATISTICS[name][0] not in headers:
            continue
        mean, covariance = _STATISTICS[name]
        shapes = [headers[key].shape if key in headers else None for key in (mean, covariance)]
        if shapes != [(size,), (size, size)]:
            raise LoadError(
                f"{path}: {mean} and {covariance} have the shapes {shapes[0]} and {shapes[1]}, and "
                f"{extractor.identity} has {size} features; they are of another extractor"
            )
        moments[name] = _moments(path, mean, covariance, about.get("count"))
    features = {}
    if f"features_{POOL}" in headers:
        features[POOL] = np.asarray(read_array(path, f"features_{POOL}"), np.float32)
        if features[POOL].ndim != 2 or features[POOL].shape[1] != extractor.dimensions[POOL]:
            raise LoadError(f"{path}: features_{POOL} has the shape {features[POOL].shape}, which does not fit sigma")
    preprocessing = about.get("preprocessing", "not said by the file")
    size = None if about.get("size") is None else tuple(about["size"])
    return Summary(os.fspath(path), identity, preprocessing, about.get("count"), moments, features, size=size)


def _moments(path: str | os.PathLike, mean: str, covariance: str, count: int | None) -> Moments:
    arrays = [np.asarray(read_array(path, name), np.float64) for name in (mean, covariance)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise LoadError(f"{path}: {mean} or {covariance} has values that are not finite (NaN or infinity)")
    count = count or 2  # only the covariance of a file counts
    return Moments.of(count, arrays[0], arrays[1] * (count - 1))


def _read_about(path: str | os.PathLike) -> dict[str, Any]:
    if "about" not in read_headers(path):
        return {}
    try:
        about = json.loads(read_array(path, "about").astype(np.uint8).tobytes())
        is_right = isinstance(about, dict) and about.get("format") == FORMAT
        identity = about.get("identity") if is_right else None
        is_right &= identity is None or (len(identity) == 3 and all(isinstance(part, str) for part in identity))
        count = about.get("count") if is_right else None
        is_right &= count is None or (type(count) is int and count >= 2)
        size = about.get("size") if is_right else None
        is_right &= size is None or (len(size) == 2 and all(type(side) is int and side >= 1 for side in size))
    except (ValueError, TypeError, AttributeError) as error:
        raise ReadError(f"{path}: about is not the description of statistics: {error}") from None
    if not is_right:
        raise ReadError(f"{path}: about is not the description of statistics in the format {FORMAT!r}")
    return about
