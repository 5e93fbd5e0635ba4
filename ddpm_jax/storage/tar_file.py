"""Members of a tar file by name, for the tar of torch 0.1: three files, uncompressed.

Python's tarfile would try three decompressors on a file that is no tar, and read every member's header of one that is.
Layout: POSIX.1-1988 (ustar), and the extensions that Python writes.
"""

import mmap

from ddpm_jax.storage.pickles import PickleError

MEMBERS = 64  # torch 0.1 wrote four
_BLOCK = 512
_FILE, _EXTENDED = (b"\0", b"0", b"7"), (b"x", b"g")


def is_tar(begin: bytes) -> bool:
    """Return whether a block of 512 bytes is the header of a member: its checksum says so."""
    if len(begin) < _BLOCK:
        return False
    field = begin[148:156].split(b"\0")[0].strip()
    return field.isdigit() and all(c in b"01234567" for c in field) and int(field, 8) == _checksum(begin[:_BLOCK])


def read_tar(data: mmap.mmap, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return where the members of these names begin and end.

    Raises:
        PickleError: if the file is broken, one is missing, there twice, or not a plain file, or there are too many.
    """
    found: dict[str, tuple[int, int]] = {}
    place = 0
    for _ in range(MEMBERS):
        header = data[place : place + _BLOCK]
        if len(header) < _BLOCK or not header.strip(b"\0"):
            break
        if not is_tar(header):
            raise PickleError("it is a broken tar file (a header's checksum is wrong)")
        begin, name = place + _BLOCK, header[:100].split(b"\0")[0].decode("latin-1")
        kind, end = header[156:157], begin + _size(header[124:136])
        if kind in _EXTENDED and any(word in data[begin : min(end, begin + 4096)] for word in (b"size=", b"path=")):
            raise PickleError("it is a tar file with a name or size in an extended header, which PyTorch's have not")
        if name in names:
            if kind not in _FILE:
                raise PickleError(f"its member {name} is not a file")
            if name in found or end > len(data):
                raise PickleError(f"its member {name} is {'there twice' if name in found else 'cut off'}")
            found[name] = begin, end
        place = begin + (end - begin + _BLOCK - 1) // _BLOCK * _BLOCK
    else:
        raise PickleError(f"it is a tar file of more than {MEMBERS} members, or not one of PyTorch")
    missing = [name for name in names if name not in found]
    if missing:
        raise PickleError(f"it is a broken tar file, or not one of PyTorch (it has no {missing[0]})")
    return found


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _size(field: bytes) -> int:
    if field[0] == 0x80:  # in base 256, of files above 8 GB
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise PickleError("it is a broken tar file (a size is not a number)")
    return int(digits, 8)
