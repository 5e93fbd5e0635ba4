"""Selection of a network's weights file in a directory with several formats and variants (fp16)."""

import re
from collections.abc import Iterable
from pathlib import Path

from ddpm_jax.storage.tensor_file import ReadError

# As diffusers and transformers name them, the preferred one first: what is mapped before what is interpreted.
NAMES = (
    *("diffusion_pytorch_model.safetensors", "model.safetensors"),
    *("diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json"),
    *("diffusion_pytorch_model.bin", "pytorch_model.bin"),
    *("diffusion_pytorch_model.bin.index.json", "pytorch_model.bin.index.json"),
)
_INDEX, _KINDS = r"\.(safetensors|bin)\.index(\.\w+)?\.json$", (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th")
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|ema|non_ema)(?=-\d|\.(safetensors|bin|pt|pth|ckpt|th|json)(\.|$))")


def weights_of_part(directory: Path) -> Path:
    """Return the weights file, or the index of shards, of a part of a pipeline.

    A file without the name of a variant is taken if there is one, else the only variant.

    Raises:
        ReadError: if there is none, or only several variants.
    """
    for name in NAMES:
        if (directory / name).is_file():
            return directory / name
    there = [path.name for path in sorted(directory.glob("*")) if path.is_file()] if directory.is_dir() else []
    found = {}
    for name in NAMES:
        for file in there:
            variant = _variant_of(file, name)
            if variant is not None:
                found.setdefault(variant, directory / file)
    if len(found) > 1:
        raise ReadError(
            f"{directory} has its weights only in the variants {', '.join(sorted(found))}; remove all but one"
        )
    if not found:
        raise ReadError(f"{directory} has no weights; they would be called {', '.join(NAMES)}")
    return next(iter(found.values()))


def _variant_of(file: str, name: str) -> str | None:
    """Return the variant of a file, if it is one of what this name says."""
    stem, *ends = name.split(".")
    if ends[-1] == "json":
        kind = re.escape(ends[0])
        pattern = rf"{stem}\.{kind}\.index\.(\w+)\.json|{stem}\.(\w+)\.{kind}\.index\.json"
    else:
        pattern = rf"{stem}\.(\w+)\.{re.escape(ends[0])}"
    match = re.fullmatch(pattern, file)
    return next(group for group in match.groups() if group) if match else None


def only_weights(directory: Path) -> Path:
    """Return the only weights file in a directory, by the same rule; of several formats the preferred one.

    Raises:
        ReadError: if there is none, or more than one that could be meant.
    """
    files = [path for path in sorted(directory.glob("*")) if path.is_file() and _kind(path.name) is not None]
    variants = {path: match[1] for path in files if (match := _VARIANT.search(path.name))}
    plain = [path for path in files if path not in variants]
    if not plain and len(set(variants.values())) > 1:
        names = ", ".join(sorted(set(variants.values())))
        raise ReadError(f"{directory} has its weights only in the variants {names}; give one of the files")
    pool = plain or files
    best = min((_kind(path.name) for path in pool), default=None)
    found = [path for path in pool if _kind(path.name) == best]
    if len(found) != 1:
        names = _listed(path.name for path in found)
        raise ReadError(f"{directory} must hold one weights file to be read as one network; it holds {names}")
    return found[0]


def _kind(name: str) -> int | None:
    """Return the rank of a file's format: an index of shards before the shards; None for other files."""
    match = re.search(_INDEX, name)
    if match:
        return 0 if match[1] == "safetensors" else 2
    ends = [2 * rank + 1 if rank < 2 else rank + 2 for rank, end in enumerate(_KINDS) if name.endswith(end)]
    return ends[0] if ends else None


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
