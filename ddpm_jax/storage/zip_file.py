"""The list of members of a zip file, bounded before it is read and checked before it is used.

Python's zipfile parses the whole central directory when it opens a file: 22 s and 570 MB for a million members.
Layouts: APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end).
"""

import mmap
import struct
from typing import NamedTuple

from ddpm_jax.storage.pickles import PickleError

MEMBERS = 100_000  # a checkpoint has one for each storage; the largest published ones have some thousands
DIRECTORY = 1 << 24  # bytes of the central directory
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s4B4H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 1, 8, 0x800
_FULL = 0xFFFFFFFF  # stands where a zip64 field holds the number


class Member(NamedTuple):
    """An entry of the central directory; `limit` is where the next member or the directory begins."""

    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int
    limit: int


def read_members(data: mmap.mmap) -> dict[str, Member]:
    """Return the members of a zip file by name.

    Raises:
        PickleError: if it is broken, has too many members, two of one name, two that overlap, or one whose path leads
            out of the archive.
    """
    count, size, begin = _end(data)
    if count > MEMBERS:
        raise PickleError(f"it has {count} members, more than {MEMBERS}")
    if size > DIRECTORY:
        raise PickleError(f"its list of members has {size} bytes, more than {DIRECTORY}")
    listed, found = _entries(data[begin : begin + size], count), {}
    listed.sort(key=lambda member: member.header)
    for number, member in enumerate(listed):
        limit = listed[number + 1].header if number + 1 < len(listed) else begin
        if member.header + _LOCAL.size + member.packed > limit:
            raise PickleError(f"its member {member.name!r} overlaps what follows it")
        if member.name in found:
            raise PickleError(f"two of its members have the name {member.name!r}")
        if member.name.startswith("/") or "\\" in member.name or ".." in member.name.split("/"):
            raise PickleError(f"its member {member.name!r} has a path that leads out of the archive")
        found[member.name] = member._replace(limit=limit)
    return found


def extent(data: mmap.mmap, member: Member) -> tuple[int, int]:
    """Return where a member's bytes begin and end, after comparing its own header with the central directory.

    Raises:
        PickleError: if it is compressed or encrypted, or the two contradict each other.
    """
    name = member.name
    header = data[member.header : member.header + _LOCAL.size]
    if len(header) != _LOCAL.size or header[:4] != b"PK\x03\x04":
        raise PickleError(f"it is a broken zip file (no header for {name})")
    _, _, flags, method, _, _, crc, packed, size, length, extra = _LOCAL.unpack(header)
    if (flags | member.flags) & _ENCRYPTED:
        raise PickleError(f"its member {name} is encrypted")
    if method or member.method:
        raise PickleError(f"its member {name} is compressed, which PyTorch's never are")
    begin = member.header + _LOCAL.size
    if _name(data[begin : begin + length], flags) != name:
        raise PickleError(f"its member {name} has another name in its own header")
    begin += length + extra
    if not flags & _DESCRIPTOR or packed or size:  # else the sizes follow the bytes, as PyTorch writes them
        if _FULL in (packed, size):
            size, packed, _ = _zip64(data[begin - extra : begin], size, packed, 0, name)
        if (crc, packed, size) != (member.crc, member.packed, member.size):
            raise PickleError(f"its member {name} has {size} bytes by its own header and {member.size} by the list")
    if member.packed != member.size or begin + member.size > member.limit:
        raise PickleError(f"its member {name} has {member.size} bytes by the list, which the file does not hold")
    return begin, begin + member.size


def _end(data: mmap.mmap) -> tuple[int, int, int]:
    """Return the count of members, and the size and place of the central directory."""
    place = data.rfind(b"PK\x05\x06", max(0, len(data) - _END.size - 0xFFFF))
    if place < 0 or place + _END.size > len(data):
        raise PickleError("it is a broken zip file (it has no list of members)")
    _, disk, first, here, count, size, begin, comment = _END.unpack_from(data, place)
    if place + _END.size + comment != len(data) or disk or first:
        raise PickleError("it is a broken zip file (its end is not where it says, or in another file)")
    small, ends = (here, count, size, begin), place
    if place >= _LOCATOR.size and data[place - _LOCATOR.size : place - _LOCATOR.size + 4] == b"PK\x06\x07":
        _, _, ends, _ = _LOCATOR.unpack_from(data, place - _LOCATOR.size)
        if ends + _END64.size > place or data[ends : ends + 4] != b"PK\x06\x06":
            raise PickleError("it is a broken zip file (its zip64 record is not where it says)")
        _, _, _, _, disk, first, here, count, size, begin = _END64.unpack_from(data, ends)
        full = (0xFFFF, 0xFFFF, _FULL, _FULL)
        large = (here, count, size, begin)
        if disk or first or any(a not in (b, most) for a, b, most in zip(small, large, full, strict=True)):
            raise PickleError("it is a broken zip file (its two ends contradict each other)")
    if here != count or begin + size != ends:
        raise PickleError("it is a broken zip file (its list of members is not where it says)")
    return count, size, begin


def _entries(directory: bytes, count: int) -> list[Member]:
    found, place = [], 0
    for _ in range(count):
        if place + _CENTRAL.size > len(directory) or directory[place : place + 4] != b"PK\x01\x02":
            raise PickleError("it is a broken zip file (its list of members ends early)")
        entry = _CENTRAL.unpack_from(directory, place)
        flags, method, crc, packed, size = entry[5], entry[6], entry[9], entry[10], entry[11]
        length, extra, comment, disk, header = *entry[12:16], entry[18]
        begin = place + _CENTRAL.size
        place = begin + length + extra + comment
        name = _name(directory[begin : begin + length], flags)
        if disk or place > len(directory):
            raise PickleError("it is a broken zip file (its list of members ends early, or names another file)")
        if _FULL in (packed, size, header):
            extras = directory[begin + length : begin + length + extra]
            size, packed, header = _zip64(extras, size, packed, header, name)
        found.append(Member(name, flags, method, crc, packed, size, header, 0))
    if place != len(directory):
        raise PickleError("it is a broken zip file (its list of members is longer than their count)")
    return found


def _name(name: bytes, flags: int) -> str:
    return name.decode("utf-8" if flags & _UTF8 else "cp437", "backslashreplace")


def _zip64(extras: bytes, size: int, packed: int, header: int, name: str) -> tuple[int, int, int]:
    """Return the sizes and the place of a member, those that are too large for 32 bits from its zip64 field."""
    place = 0
    while place + 4 <= len(extras):
        kind, length = struct.unpack_from("<HH", extras, place)
        if kind == 1:
            numbers = [extras[i : i + 8] for i in range(place + 4, min(place + 4 + length, len(extras)), 8)]
            rest = iter([int.from_bytes(number, "little") for number in numbers if len(number) == 8])
            values = [next(rest, None) if value == _FULL else value for value in (size, packed, header)]
            if None not in values:
                return values[0], values[1], values[2]
        place += 4 + length
    raise PickleError(f"it is a broken zip file (the size of {name} is missing)")
