"""From a path or a name to the source that reads it."""

import functools
import glob
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddpm_jax.data.array_record import ArrayRecordSource
from ddpm_jax.data.cifar10 import Cifar10Source
from ddpm_jax.data.emoji.source import EmojiSource
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.record_format import MANIFEST
from ddpm_jax.data.webdataset import WebDatasetSource
from ddpm_jax.data.zeros import ZerosSource
from ddpm_jax.types import Source


def open_source(spec: str | os.PathLike, **options: Any) -> Source:
    """Open the data that a path or a name stands for.

    Args:
        spec: one of

            - a directory of images: `image_folder.ImageFolder`; labels are class subfolders or a column of metadata,
              captions are `.txt` files, `metadata.jsonl` or `metadata.csv`
            - a directory with manifest.json, as `python -m ddpm_jax.prepare` writes it:
              `array_record.ArrayRecordSource`; labels and captions are kept
            - .tar files, as "train-*.tar", "train-{000..099}.tar" or a directory of them:
              `webdataset.WebDatasetSource`; labels are `.cls`, captions `.txt`, or `caption` or `text` in `.json`
            - "tfds:NAME", or the directory of a built data set of TFDS (it has dataset_info.json):
              `tfds_source.TFDSSource`; labels are a ClassLabel, captions a Text
            - "emoji:DIRECTORY", with the packages of the emoji: `emoji.source.EmojiSource`; labels and captions
            - "cifar10:PATH", CIFAR-10's cifar-10-binary.tar.gz or the directory of its files:
              `cifar10.Cifar10Source`; labels; split="test" is an option
            - "zeros:image=256x256,labels=1000,captions", black images: `zeros.ZerosSource`; to plan or time a run
        options: of the source, as captions=None.

    Raises:
        ValueError: if nothing is there, what is there is none of these, or the source refuses it.
        TypeError: if the source has no such option; the message names those that it has.
    """
    text = os.fspath(spec)
    path = Path(text).expanduser()
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _NAMED:
        return _NAMED[prefix](os.path.expanduser(rest), options)
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _opened(ArrayRecordSource, path, options)
        if (path / "dataset_info.json").exists():
            return _tfds(str(path), options)
        if any(path.glob("*.tar")):
            return _opened(WebDatasetSource, path, options)
        return _opened(ImageFolder, path, options)
    if text.endswith(".tar") and (path.is_file() or glob.has_magic(text) or "{" in text):
        return _opened(WebDatasetSource, path, options)
    if path.exists():
        raise ValueError(f"{spec} is neither a directory nor a .tar file; give a folder of images, or prepared data")
    named = "or a name: " + ", ".join(f"{prefix}:..." for prefix in _NAMED)
    raise ValueError(f"{spec} does not exist; give a folder of images, prepared data, .tar files, {named}")


def _opened(source: Callable[..., Source], path: str | os.PathLike, options: Mapping[str, Any]) -> Source:
    known = list(inspect.signature(source).parameters)[1:]  # the first is the path
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise TypeError(f"{source.__name__} has no option {unknown}; it has {', '.join(known)}")
    return source(path, **options)


def _tfds(name: str, options: Mapping[str, Any]) -> Source:
    from ddpm_jax.data.tfds_source import TFDSSource  # imported here, since it needs an extra

    return _opened(TFDSSource, name, options)


_NAMED: dict[str, Callable[[str, Mapping[str, Any]], Source]] = {
    "tfds": _tfds,
    "emoji": functools.partial(_opened, EmojiSource),
    "cifar10": functools.partial(_opened, Cifar10Source),
    "zeros": functools.partial(_opened, ZerosSource),
}
