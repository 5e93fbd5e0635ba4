"""Data sets of TensorFlow Datasets, by name or by the directory of a built one, without TensorFlow."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.decode import MAX_PIXELS, DecodeError, Decoder
from ddpm_jax.data.source import RESERVED, Fingerprint, RecordError, check_index, decode_text
from ddpm_jax.data.transforms import WHITE
from ddpm_jax.extras import needs_extra

CAPTIONS = ("caption", "text")
KEYS = ("key", "id", "filename", "file_name")
_FEATURE = re.compile(r"tensorflow_datasets\.core\.features(\.\w+)+")


class TFDSSource:
    """One split of a data set of TensorFlow Datasets, read through its `data_source`.

    A record is {"image": uint8[H, W, 3]}, and where the data set has them "caption": str, "label": int32, "key": str,
    and all numeric arrays of fixed shape, under their names. Images are decoded as in the other sources.

    Args:
        name: of the data set, as "cifar10" or "emoji/twitter:1.0.0", or the directory of a built one, the one that has
            dataset_info.json. It must be built with a file format of random access, as array_record.
        split: as TFDS has it: "train", "train[:90%]", "train+test".
        image: the feature with the image; None for "image" or the only one.
        caption: the feature with captions; None for "caption", "text" or none.
        label: the feature with labels, a ClassLabel or an integer; None for "label", or the only ClassLabel, or none.
        data_dir: where data sets are built; None for the default of TFDS.
        download: whether to download and build a data set that is not built yet.
        background: a colour for transparent parts, red, green and blue in [0, 255].
        max_pixels: a larger image is not decoded.

    Attributes:
        class_names: a tuple of str, or None without labels or for integers.

    Raises:
        ModuleNotFoundError: without the extra ddpm_jax[tfds].
        ValueError: if there is no such data set, split or feature, an array has the name of another field of
            records (image, caption, label, key), or its file format has no random access.
    """

    def __init__(
        self,
        name: str | os.PathLike,
        split: str = "train",
        *,
        image: str | None = None,
        caption: str | None = None,
        label: str | None = None,
        data_dir: str | os.PathLike | None = None,
        download: bool = False,
        background: Sequence[int] = WHITE,
        max_pixels: int = MAX_PIXELS,
    ):
        with needs_extra("tfds"):
            import tensorflow_datasets as tfds

        self._decoder = Decoder(background, max_pixels)
        self._directory = _built(tfds, name, data_dir, download)
        self._split = split
        info = tfds.builder_from_directory(self._directory).info
        if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise ValueError(
                f"{self._directory} is built as {info.file_format.value}, which is not read at random; "
                "build it again with file_format='array_record'"
            )
        self._choose_features(tfds, info.features, image, caption, label)
        decoders = {self._image: tfds.decode.SkipDecoding()}
        try:
            self._records = tfds.builder_from_directory(self._directory).as_data_source(split, decoders=decoders)
            instructions = tfds.core.splits.SplitDict(split_infos=info.splits.values())[split].file_instructions
        except ValueError:
            raise ValueError(
                f"split {split!r} is not one of {self._directory} or has no records; "
                f"there are {', '.join(info.splits)}, and parts of these, as train[:90%]"
            ) from None
        self._parts = [(str(part.filename), part.skip, part.take) for part in instructions]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Read and decode one record.

        Raises:
            DecodeError: if the image cannot be decoded; the message names the directory, the split and the index.
            CaptionError: if the caption is not UTF-8.
            RecordError: if the record is damaged or has no label.
            IndexError: if index is outside of [0, len).
        """
        index = check_index(index, len(self))
        where = f"{self._directory}: {self._split}[{index}]"
        try:
            values = self._records[index]
        except Exception as error:  # the reader's errors are not documented
            raise RecordError(f"{where}: cannot be read: {error}") from None
        try:
            image = self._decoder(values[self._image])
        except DecodeError as error:
            raise DecodeError(f"{where}: {error}") from None
        record: dict[str, Any] = {"image": image}
        if self._caption is not None:
            record["caption"] = decode_text(values[self._caption], where).strip()
        if self._label is not None:
            record["label"] = _label(int(values[self._label]), where)
        for name in self._arrays:
            record[name] = np.asarray(values[name])
            if record[name].dtype.kind == "f" and not np.isfinite(record[name]).all():
                raise RecordError(f"{where}: {name} has values that are not finite (NaN or infinity)")
        if self._key is not None:
            record["key"] = decode_text(values[self._key], where)
        return record

    def fingerprint(self) -> str:
        """Return a hash of the files and the records of the split, the features, and the background.

        Of each file the size and the first and last 64 KiB are read; its end holds the places of all records.
        """
        mark = Fingerprint("tfds 1")
        mark.add(
            self._decoder.background,
            self.class_names,
            [self._image, self._caption, self._label, self._key, self._arrays],
        )
        mark.add_file(self._directory / "features.json")
        for name, skip, take in self._parts:
            mark.add(skip, take)
            mark.add_file(name)
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"TFDSSource({str(self._directory)!r}, {self._split!r}, {len(self)} records)"

    def _choose_features(self, tfds: Any, features: Any, image: str | None, caption: str | None, label: str | None):
        """Set the names of the features that are read, and `class_names`."""
        kinds = tfds.features

        def choose(
            argument: str, given: str | None, kind: type, wanted: Sequence[str], only: bool, also: Sequence[str] = ()
        ) -> str | None:
            names = [name for name, feature in features.items() if isinstance(feature, kind)]
            fitting = [*names, *also]
            if given is not None:
                if given not in fitting:
                    raise ValueError(
                        f"{argument}={given!r} is no {kind.__name__} feature of {self._directory}: {fitting}"
                    )
                return given
            first = next((name for name in wanted if name in fitting), None)
            return names[0] if first is None and only and len(names) == 1 else first

        self._image = choose("image", image, kinds.Image, ("image",), True)
        if self._image is None:
            raise ValueError(f"{self._directory} has no feature 'image', only {', '.join(features)}; set image")
        self._caption = choose("caption", caption, kinds.Text, CAPTIONS, False)
        numeric = {
            name: feature
            for name, feature in features.items()
            if type(feature) in (kinds.Tensor, kinds.Scalar)
            and None not in feature.shape
            and np.dtype(feature.np_dtype).kind in "biuf"
        }
        integers = [name for name, x in numeric.items() if x.shape == () and np.dtype(x.np_dtype).kind in "iu"]
        self._label = choose("label", label, kinds.ClassLabel, ("label",), True, integers)
        self._key = choose("key", None, kinds.Text, KEYS, False)
        self.class_names = None
        if self._label is not None and self._label not in integers:
            self.class_names = tuple(features[self._label].names)
        self._arrays = [name for name in numeric if name != self._label]
        reserved = next((name for name in self._arrays if name in RESERVED), None)
        if reserved is not None:
            raise ValueError(
                f"the array {reserved!r} of {self._directory} cannot be that field of a record; "
                "build the data set with another name"
            )


def _label(number: int, where: str) -> np.int32:
    if number < 0:
        raise RecordError(f"{where}: has no label")
    if number >= 2**31:
        raise RecordError(f"{where}: has the label {number}, and labels are below 2**31")
    return np.int32(number)


def _built(tfds: Any, name: str | os.PathLike, data_dir: str | os.PathLike | None, download: bool) -> Path:
    """Return the directory of a built data set, see `TFDSSource`."""
    path = Path(name).absolute()
    if not path.is_dir():
        try:
            builder = tfds.builder(os.fspath(name), data_dir=data_dir)
            if download and not builder.is_prepared():
                builder = tfds.builder(os.fspath(name), data_dir=data_dir, file_format="array_record")
                builder.download_and_prepare()
        except (ValueError, AssertionError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{name} is neither a directory nor a data set of TFDS: {first}") from None
        path = Path(builder.data_dir)
        if not builder.is_prepared():
            raise ValueError(
                f"{name} is not built in {path}; build it with file_format='array_record', or set download=True"
            )
    elif not (path / "dataset_info.json").is_file():
        inside = sorted(path.glob("**/dataset_info.json"))
        hint = f"; there is one in {inside[0].parent}" if inside else ""
        raise ValueError(f"{name} has no dataset_info.json of a data set of TFDS{hint}")
    _check_features(path / "features.json")
    return path


def _check_features(path: Path) -> None:
    """Raise ValueError if features.json names other classes than those of TFDS, since TFDS imports what it names."""
    try:
        text = path.read_text(encoding="utf-8")
        named = list(_class_names(json.loads(text)))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for class_name in named:
        if not isinstance(class_name, str) or not _FEATURE.fullmatch(class_name):
            raise ValueError(f"{path} names the class {class_name!r}, which is not a feature of TFDS")


def _class_names(values: Any) -> Iterator[Any]:
    """Yield what TFDS would import; its names have two spellings in JSON."""
    if isinstance(values, dict):
        for name, value in values.items():
            if name in ("pythonClassName", "python_class_name"):
                yield value
            yield from _class_names(value)
    elif isinstance(values, list):
        for value in values:
            yield from _class_names(value)
