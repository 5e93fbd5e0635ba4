"""Records of zeros, in the form of a data set that is not there: to plan a run, or to time one without its data."""

import re
from typing import Any, SupportsIndex

import numpy as np

from ddpm_jax.data.source import Fingerprint, check_index

_ARRAY = re.compile(r"(\w+)=([a-z]+\d*)\[([\d,]*)\]")
_FORM = "zeros:image=256x256,labels=1000,captions,z_image=float32[1024]"


class ZerosSource:
    """Black images, with labels, captions and arrays of zeros where they are wanted.

    Args:
        spec: the entries of a record, separated by commas: "image=HEIGHTxWIDTH"; "labels=COUNT" for label 0 of a number
            of classes; "captions"; and NAME=DTYPE[SHAPE] for an array, as in "z_image=float32[1024]".
        length: number of records.

    Attributes:
        class_names: "0", "1" and so on with labels, or None.

    Raises:
        ValueError: if the text is not of this form.
    """

    def __init__(self, spec: str, *, length: int = 4096):
        self._spec, self._length, self.class_names = spec, length, None
        self._record: dict[str, Any] = {}
        for entry in re.split(r",(?![\d,]*\])", spec):
            name, _, value = entry.partition("=")
            array = _ARRAY.fullmatch(entry)
            if re.fullmatch(r"image=\d+x\d+", entry):
                self._record["image"] = np.zeros((*map(int, value.split("x")), 3), np.uint8)
            elif re.fullmatch(r"labels=[1-9]\d*", entry):
                self._record["label"] = np.int32(0)
                self.class_names = tuple(map(str, range(int(value))))
            elif entry == "captions":
                self._record["caption"] = "an image"
            elif array:
                shape = tuple(int(side) for side in array[3].split(",") if side)
                try:
                    self._record[name] = np.zeros(shape, np.dtype(array[2]))
                except TypeError:
                    raise ValueError(f"{entry!r} of zeros:{spec} names no dtype; an example is {_FORM}") from None
            else:
                raise ValueError(f"{entry!r} of zeros:{spec} is no entry of a record; an example is {_FORM}")
        if "image" not in self._record:
            raise ValueError(f"zeros:{spec} has no image=HEIGHTxWIDTH; an example is {_FORM}")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Return one record; raise IndexError if index is outside of [0, len)."""
        check_index(index, self._length)
        return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in self._record.items()}

    def fingerprint(self) -> str:
        """Return a hash of the form of the records and of their number."""
        mark = Fingerprint("zeros 1")
        mark.add(self._spec, self._length)
        return mark.hexdigest()

    def __repr__(self) -> str:
        return f"ZerosSource({self._spec!r})"
