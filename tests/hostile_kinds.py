"""Hostile and damaged files by kind, for `hostile_files.py`: each makes the bytes of a file of about a given size.

A name that begins with "read:" is of a file that must be read; the others must be refused.
"""

import json
import pickle
import struct
import zlib

import numpy as np

NUMBERS = np.arange(6, dtype="<f4").tobytes()


def fill(unit: bytes, size: int) -> bytes:
    """Return a unit again and again, about `size` bytes of it."""
    return unit * max(1, size // len(unit))


# ---- Zip files -------------------------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"", central: dict | None = None, /, **local: object) -> tuple:
    """Return a member: its bytes, and what its two headers say in place of the truth."""
    truth = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data), "extra": b""}
    truth |= {"name": name.encode(), "offset": None}
    return data, truth | local, truth | (central or {})


def archive(members: list[tuple], *, comment: bytes = b"", zip64: bool = False, **end: int) -> bytes:
    """Return a zip file; end: what its last record says in place of the truth (count, size, begin)."""
    body, listed = [], []
    place = 0
    for data, local, central in members:
        fields = [local[key] for key in ("crc", "packed", "size")]
        head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, local["flags"], local["method"], 0, 0, *fields,
                           len(local["name"]), len(local["extra"])) + local["name"] + local["extra"]  # fmt: skip
        fields = [central[key] for key in ("crc", "packed", "size")]
        offset = place if central["offset"] is None else central["offset"]
        listed.append(
            struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, central["flags"], central["method"], 0, 0, *fields,
                        len(central["name"]), len(central["extra"]), 0, 0, 0, 0, offset)
            + central["name"] + central["extra"]
        )  # fmt: skip
        body.append(head + data)
        place += len(head) + len(data)
    directory = b"".join(listed)
    said = {"count": len(members), "size": len(directory), "begin": place} | end
    tail = b""
    if zip64:
        numbers = (said["count"], said["count"], said["size"], said["begin"])
        tail = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
        tail += struct.pack("<4sLQL", b"PK\6\7", 0, place + len(directory), 1)
    small = [min(said["count"], 0xFFFF)] * 2 + [min(said["size"], 2**32 - 1), min(said["begin"], 2**32 - 1)]
    tail += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *small, len(comment)) + comment
    return b"".join(body) + directory + tail


def text(name: bytes) -> bytes:
    """Return the opcodes of a string."""
    return b"X" + len(name).to_bytes(4, "little") + name


def whole(number: int) -> bytes:
    """Return the opcodes of an integer of any length."""
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + len(data).to_bytes(4, "little") + data


def tensor(shape=(2, 3), strides=(3, 1), offset=0, numel=6, kind=b"FloatStorage", key=b"0") -> bytes:
    """Return the opcodes of a tensor."""
    many = lambda numbers: b"(" + b"".join(map(whole, numbers)) + b"t"  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu") + whole(numel) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole(offset) + many(shape) + many(strides) + b"\x89NtR"


def saved(*parts: bytes) -> bytes:
    """Return a pickle."""
    return b"\x80\x02" + b"".join(parts) + b"."


def checkpoint(*parts: bytes, numbers: bytes = NUMBERS) -> bytes:
    """Return a zip checkpoint with this pickle."""
    return archive([member("x/data.pkl", saved(*parts)), member("x/data/0", numbers)])


GOOD = b"}" + text(b"w") + tensor() + b"s"
W = b"}" + text(b"w")
PICKLES = {
    "dictionaries without end": lambda n: fill(b"}", n),
    "nested tuples": lambda n: b")" + fill(b"\x85", n),
    "lists without end": lambda n: fill(b"]", n),
    "strings without end": lambda n: fill(b"\x8c\x02ab", n),
    "fractions without end": lambda n: fill(b"G" + bytes(range(8)), n),
    "integers of 255 bytes": lambda n: fill(b"\x8a\xff" + b"\x7f" * 255, n),
    "a decimal integer of the whole file": lambda n: b"L" + b"7" * n + b"L\n",
    "decimal integers of 300 digits": lambda n: fill(b"I" + b"7" * 300 + b"\n", n),
    "decimal fractions of 300 digits": lambda n: fill(b"F0." + b"7" * 300 + b"\n", n),
    "a fraction of the whole file": lambda n: b"F" + b"7" * n + b"\n",
    "an integer of the whole file": lambda n: b"\x8b" + n.to_bytes(4, "little") + b"\x7f" * n,
    "an integer of negative length": lambda n: b"\x8b\xff\xff\xff\xff" + b"\x7f" * n,
    "objects remembered without end": lambda n: fill(b"K\x01\x94", n),
    "remembered at far places": lambda n: (
        b"K\x01" + b"".join(b"r" + (i * 2654435761 % 2**32).to_bytes(4, "little") for i in range(n // 5))
    ),
    "the top doubled without end": lambda n: b"}" + fill(b"2", n),
    "marks without end": lambda n: fill(b"(", n),
    "marks pushed and removed": lambda n: fill(b"((1", n),
    "a large stack under each mark": lambda n: fill(b"N", n // 2) + fill(b"(1", n // 2),
    "names without end": lambda n: fill(b"ca\nb\n", n),
    "different names without end": lambda n: b"".join(b"ca\n%d\n" % i for i in range(n // 10)),
    "a name of the whole file": lambda n: b"c" + b"a" * n + b"\nb\n",
    "a line that does not end": lambda n: b"V" + b"a" * n,
    "lines that do not end": lambda n: fill(b"V", n),
    "a class in the old way": lambda n: fill(b"(ia\nb\n", n),
    "a name from the stack": lambda n: text(b"a" * 9000) + b"q\x00" + fill(b"h\x00h\x00\x93", n),
    "calls of what is not read": lambda n: b"ca\nb\nq\x00" + fill(b"h\x00)R", n),
    "tensors outside of a dictionary": lambda n: fill(tensor(), n),
    "a generator's size": lambda n: b"ctorch\nSize\nq\x00]q\x01" + fill(b"h\x00h\x01\x85R", n),
    "states set without end": lambda n: b"}}" + text(b"a") + b"Nsq\x000h\x00" + fill(b"h\x00b", n),
    "one key set without end": lambda n: b"}" + fill(b"K\x01Ns", n),
    "different keys without end": lambda n: b"}" + b"".join(b"J%sNs" % i.to_bytes(4, "little") for i in range(n // 7)),
    "keys that are not read": lambda n: b"}" + fill(b")Ns", n),
    "nested dictionaries": lambda n: b"}" + fill(b"K\x01}", n // 2) + b"s" * (n // 6),
    "nested lists": lambda n: fill(b"](", n) + b"e" * (n // 2),
    "nested sets": lambda n: fill(b"\x8f(", n) + b"\x90" * (n // 2),
    "text lines of escapes": lambda n: fill(b"V" + b"\\u0101" * 1600 + b"\n", n),
    "quoted lines of escapes": lambda n: fill(b"S'" + b"\\x41" * 2400 + b"'\n", n),
    "strings with one wide character": lambda n: fill(text(b"\xf0\x9f\x98\x80" + b"a" * 9000), n),
    "protocols without end": lambda n: fill(b"\x80\x02", n),
    "frames beyond the end": lambda n: b"\x95" + b"\xff" * 8 + fill(b"N", n),
    "a string beyond the end": lambda n: b"X\xff\xff\xff\xff" + b"a" * n,
    "a string of 2^64 bytes": lambda n: b"\x8d" + b"\xff" * 8 + b"a" * n,
    "references to storages without end": lambda n: fill(b"(" + text(b"storage") + b"tQ", n),
    "references as text": lambda n: fill(b"Px\n", n),
    "an extension": lambda n: b"\x84\xff\xff\xff\x7f" + b"N" * n,
    "a buffer from outside": lambda n: b"\x97" + b"N" * n,
    "an opcode that is none": lambda n: b"\x00" * n,
    "a tensor that is its own shape": lambda n: W + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00N)tRs",
    "a program named in text": lambda n: W + tensor() + b"s" + text(b"x") + b"cos\nsystem\n" + text(b"id") + b"\x85Rs",
    "a program from the stack": lambda n: (
        W + tensor() + b"s" + text(b"x") + text(b"builtins") + text(b"eval") + b"\x93s"
    ),
    "a size of 64 megabits": lambda n: W + tensor(shape=(1 << 8 * n // 8, 3)) + b"s",
    "sizes whose product has 4000 bits": lambda n: W + tensor((2**62,) * 64, (0,) * 64) + b"s",
    "a stride of 200 bytes": lambda n: W + tensor(strides=(1 << 1600, 1)) + b"s",
    "an offset of 64 bits": lambda n: W + tensor(offset=1 << 64) + b"s",
    "a negative size": lambda n: W + tensor(shape=(-2, 3)) + b"s",
    "an empty tensor of a huge size": lambda n: W + tensor(shape=(0, 2**62)) + b"s",
    "a storage of more numbers": lambda n: W + tensor(numel=7) + b"s",
    "a storage of fewer numbers": lambda n: W + tensor(numel=5) + b"s",
    "a storage of another type": lambda n: W + tensor(kind=b"DoubleStorage") + b"s",
    "a storage that is not there": lambda n: W + tensor(key=b"1") + b"s",
    "a storage outside of its folder": lambda n: W + tensor(key=b"../data.pkl") + b"s",
    "tensors of one name": lambda n: (
        b"}" + text(b"a") + b"}" + text(b"b") + tensor() + b"ss" + text(b"a.b") + tensor() + b"s"
    ),
    "read: an empty tensor of a long stride": lambda n: W + tensor((0, 3), (2**62, 1)) + b"s",
    "read: one element of a long stride": lambda n: W + tensor((1, 6), (2**62, 1)) + b"s",
    "read: many objects beside the weights": lambda n: (
        W + tensor() + b"s" + text(b"l") + b"](" + b"cargparse\nNamespace\n)\x81}b" * (n // 6000) + b"es"
    ),
    "read: bytes of the whole file": lambda n: (
        W + tensor() + b"s" + text(b"b") + b"B" + n.to_bytes(4, "little") + b"a" * n + b"s"
    ),
    "read: a string of the whole file": lambda n: W + tensor() + b"s" + text(b"b") + text(b"a" * n) + b"s",
    "read: many tensors": lambda n: (
        b"}(" + b"".join(text(b"layer.%d.weight" % i) + tensor() for i in range(n // 3000)) + b"u"
    ),
}

DATA = member("x/data.pkl", saved(GOOD))
NUMS = member("x/data/0", NUMBERS)
ZIPS = {
    "members without end": lambda n: archive([DATA, NUMS, *[member(f"x/{i}") for i in range(n // 90)]]),
    "members without end, zip64": lambda n: archive(
        [DATA, NUMS, *[member(f"x/{i}") for i in range(n // 90)]], zip64=True
    ),
    "members of long names": lambda n: archive([DATA, NUMS, *[member(f"x/{i:060000}") for i in range(n // 120_000)]]),
    "members of large fields": lambda n: archive(
        [DATA, NUMS, *[member(f"x/{i}", b"", {"extra": bytes(60_000)}) for i in range(n // 60_000)]]
    ),
    "fewer members than it says": lambda n: archive([DATA, NUMS], count=3),
    "more members than it says": lambda n: archive([DATA, NUMS], count=1),
    "two ends that contradict": lambda n: archive([DATA, NUMS], zip64=True).replace(
        b"PK\5\6\0\0\0\0\2\0", b"PK\5\6\0\0\0\0\1\0"
    ),
    "a directory before the file": lambda n: archive([DATA, NUMS], begin=2**32 - 2),
    "a directory in the comment": lambda n: archive([DATA, NUMS], comment=archive([DATA])),
    "an encrypted member": lambda n: archive([DATA, member("x/data/0", NUMBERS, {"flags": 1}, flags=1)]),
    "a member encrypted in its own header": lambda n: archive([DATA, member("x/data/0", NUMBERS, flags=1)]),
    "a compressed member": lambda n: archive([DATA, member("x/data/0", NUMBERS, {"method": 8}, method=8)]),
    "a member compressed in its own header": lambda n: archive([DATA, member("x/data/0", NUMBERS, method=8)]),
    "another size in its own header": lambda n: archive([DATA, member("x/data/0", NUMBERS, size=20, packed=20)]),
    "another name in its own header": lambda n: archive([DATA, member("x/data/0", NUMBERS, name=b"x/data/1")]),
    "another checksum in its own header": lambda n: archive([DATA, member("x/data/0", NUMBERS, crc=1)]),
    "a damaged description": lambda n: archive([member("x/data.pkl", saved(GOOD), {"crc": 1}, crc=1), NUMS]),
    "overlapping members": lambda n: archive([DATA, NUMS, member("x/y", b"", {"offset": 10})]),
    "one header for two members": lambda n: archive([DATA, NUMS, member("x/y", b"", {"offset": 0})]),
    "a member beyond the file": lambda n: archive(
        [DATA, member("x/data/0", NUMBERS, {"size": 2**30, "packed": 2**30})]
    ),
    "a header beyond the file": lambda n: archive([DATA, member("x/data/0", NUMBERS, {"offset": 2**32 - 2})]),
    "a member of two sizes": lambda n: archive([DATA, member("x/data/0", NUMBERS, {"packed": 20}, packed=20)]),
    "sizes in a field that is missing": lambda n: archive([DATA, member("x/data/0", NUMBERS, {"size": 2**32 - 1})]),
    "duplicate members": lambda n: archive([DATA, NUMS, member("x/data/0", NUMBERS)]),
    "a member with a path to the outside": lambda n: archive([DATA, NUMS, member("x/../../y")]),
    "a member with an absolute path": lambda n: archive([DATA, NUMS, member("/etc/y")]),
    "two descriptions": lambda n: archive([DATA, NUMS, member("y/data.pkl", saved(GOOD))]),
    "big-endian numbers": lambda n: archive([DATA, NUMS, member("x/byteorder", b"big")]),
    "a byte order of the whole file": lambda n: archive([DATA, NUMS, member("x/byteorder", b"l" * n)]),
    "a zip file with no member": lambda n: archive([]),
    "a zip file cut off": lambda n: archive([DATA, NUMS])[:-1],
    "only the end of a zip file, again and again": lambda n: b"PK\3\4" + fill(b"PK\5\6" + bytes(18), n),
    "read: sizes after the bytes": lambda n: archive(
        [DATA, member("x/data/0", NUMBERS, {"flags": 8}, flags=8, size=0, packed=0, crc=0)]
    ),
    "read: zip64": lambda n: archive([DATA, NUMS], zip64=True),
    "read: constants of the whole file": lambda n: archive([DATA, NUMS, member("x/constants.pkl", fill(b"]", n))]),
    "read: many members": lambda n: archive([DATA, NUMS, *[member(f"x/data/{i}") for i in range(1, n // 3000)]]),
}

# ---- Safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = NUMBERS, length: int | None = None) -> bytes:
    """Return a safetensors file; header: a dictionary, or its bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(dtype="F32", shape=(6,), begin=0, end=24, **more) -> dict:
    """Return what a header says of a tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def entries(count: int, name: str = '"t%d"') -> bytes:
    """Return a header of empty tensors."""
    one = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f"{name % i}:{one}" for i in range(count)) + "}").encode()


A = json.dumps(entry()).encode()
SAFETENSORS = {
    "empty tensors without end": lambda n: safetensors(entries(n // 60), b""),
    "empty tensors with escaped names": lambda n: safetensors(entries(n // 70, '"\\u0074%d"'), b""),
    "a name of the whole file": lambda n: safetensors({"t" * n: entry()}),
    "a name of one million characters": lambda n: safetensors({"t" * 1_000_000: entry()}),
    "names that are long together": lambda n: safetensors(
        {f"{i:09000}": entry(shape=(0,), end=0) for i in range(n // 9000)}, b""
    ),
    "a wide character in a long header": lambda n: safetensors(
        json.dumps({"__metadata__": {"a": "\U0001f600" + "a" * n}}, ensure_ascii=False).encode(), b""
    ),
    "metadata without end": lambda n: safetensors(
        b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(n // 10)) + b"}}"
    ),
    "a shape of one million sizes": lambda n: safetensors({"t": entry(shape=[1] * 1_000_000)}),
    "sizes of 4000 digits": lambda n: safetensors(
        b'{"t":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * (n // 4001)) + b'],"data_offsets":[0,24]}}'
    ),
    "a size of the whole file": lambda n: safetensors(
        b'{"t":{"dtype":"F32","shape":[' + b"9" * n + b'],"data_offsets":[0,24]}}'
    ),
    "spaces without end": lambda n: safetensors(b"{" + b" " * n + b"}"),
    "lists in each other": lambda n: safetensors(b'{"t":' + b"[" * (n // 2)),
    "objects in each other": lambda n: safetensors(b'{"t":' * (n // 5)),
    "lists beside each other": lambda n: safetensors(b'{"t":[' + b"[]," * (n // 3) + b"[]]}"),
    "objects just within the limits": lambda n: safetensors(b'{"t":[' + b'{"a":0},' * min(n // 9, 465_000) + b"0]}"),
    "lists just within the limits": lambda n: safetensors(b'{"t":[' + b"[0]," * min(n // 9, 690_000) + b"0]}"),
    "metadata just within the limits": lambda n: safetensors(
        b'{"__metadata__":{' + b",".join(b'"%d":"%d"' % (i, i) for i in range(min(n // 16, 460_000))) + b'},"a":1}'
    ),
    "a header that is a list": lambda n: safetensors(b"{" + b"[]}"),
    "a header longer than the file": lambda n: safetensors({"t": entry()}, length=2**40),
    "a header of 2^64 bytes": lambda n: safetensors({"t": entry()}, length=2**64 - 1),
    "a header cut off": lambda n: safetensors({"t": entry()}, length=20),
    "a tensor twice": lambda n: safetensors(b'{"t":' + A + b',"t":' + A + b"}"),
    "a shape twice": lambda n: safetensors(b'{"t":' + A[:-1] + b',"shape":[3,2]}}'),
    "overlapping tensors": lambda n: safetensors({"a": entry(), "b": entry(shape=(2,), begin=16, end=24)}),
    "a gap between tensors": lambda n: safetensors(
        {"a": entry(shape=(2,), end=8), "b": entry(shape=(2,), begin=16, end=24)}
    ),
    "bytes after the last tensor": lambda n: safetensors({"a": entry()}, NUMBERS + b"x" * n),
    "offsets beyond the file": lambda n: safetensors({"a": entry(shape=(2**40,), end=2**42)}),
    "offsets that go back": lambda n: safetensors({"a": entry(begin=24, end=0)}),
    "negative offsets": lambda n: safetensors({"a": entry(begin=-24, end=0)}),
    "offsets that are fractions": lambda n: safetensors({"a": entry(begin=0.0, end=24.0)}),
    "a shape that does not fit its bytes": lambda n: safetensors({"a": entry(shape=(7,))}),
    "a negative size": lambda n: safetensors({"a": entry(shape=(-2, -3))}),
    "a size that is true": lambda n: safetensors({"a": entry(shape=(True, 6))}),
    "a shape of 65 axes": lambda n: safetensors({"a": entry(shape=(1,) * 64 + (6,))}),
    "an empty shape of huge sizes": lambda n: safetensors({"a": entry(shape=(0, 2**40, 2**40), end=0)}, b""),
    "an unknown type": lambda n: safetensors({"a": entry(dtype="F128")}),
    "a type that is a list": lambda n: safetensors({"a": entry(dtype=["F32"])}),
    "a type that is too wide": lambda n: safetensors({"a": entry(dtype="F64")}),
    "an entry that is a number": lambda n: safetensors({"a": 1}),
    "an entry with more fields": lambda n: safetensors({"a": entry(more=1)}),
    "metadata that is a list": lambda n: safetensors({"__metadata__": [], "a": entry()}),
    "metadata that is no string": lambda n: safetensors(b'{"__metadata__":{"a":NaN},"a":' + A + b"}"),
    "a size that is infinite": lambda n: safetensors(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}'),
    "a header that is not UTF-8": lambda n: safetensors(b'{"\xff\xfe":' + A + b"}"),
    "read: tensors in another order": lambda n: safetensors(
        {"b": entry(shape=(2,), begin=16, end=24), "a": entry(shape=(4,), end=16)}
    ),
    "read: many tensors": lambda n: safetensors(entries(n // 3000), b""),
    "read: no tensor": lambda n: safetensors(b"{}", b""),
}

# ---- The formats before the zip file ---------------------------------------------------------------------------------


def stream(*parts: bytes, keys: bytes = b"](" + text(b"0") + b"e", data: bytes | None = None) -> bytes:
    """Return a checkpoint of torch 0.4: pickles one after another, then the storages."""
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + saved(*parts) + saved(keys) + (struct.pack("<q", 6) + NUMBERS if data is None else data)


def tar(members: list[tuple[str, bytes]], *, kind: bytes = b"0", size: int | None = None, magic: bytes = b"") -> bytes:
    """Return a tar file; size: what the headers say in place of the truth."""
    found = []
    for name, data in members:
        said = (
            b"%011o\0" % (len(data) if size is None else size)
            if size is None or size < 8**11
            else b"\x80" + size.to_bytes(11)
        )
        head = bytearray(name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + said + b"%011o\0" % 0)
        head += b"        " + kind + bytes(100) + magic
        head += bytes(512 - len(head))
        head[148:156] = b"%06o\0 " % sum(head)
        found.append(bytes(head) + data + bytes(-len(data) % 512))
    return b"".join(found) + bytes(1024)


def old(
    count: bytes = b"K\x01", numel: int = 6, rank: int = 1, numbers: tuple = (6, 1, 0), data: bytes = NUMBERS
) -> list:
    """Return the members of a checkpoint of torch 0.1."""
    storage = saved(b"K\x01" + text(b"cpu") + b"ctorch\nFloatStorage\n\x87")
    view = saved(b"K\x00K\x01ctorch\nFloatTensor\n\x87")
    tensors = saved(count) + view + struct.pack("<ii", rank, 0) + struct.pack(f"<{len(numbers)}q", *numbers)
    return [
        ("storages", saved(count) + storage + struct.pack("<q", numel) + data + saved(b"]")),
        ("tensors", tensors),
        ("pickle", saved(W + text(b"0") + b"Qs")),
    ]


OLD = {
    "stream: a storage of more numbers": lambda n: stream(GOOD, data=struct.pack("<q", 7) + NUMBERS + bytes(4)),
    "stream: a storage of fewer numbers": lambda n: stream(GOOD, data=struct.pack("<q", 5) + NUMBERS),
    "stream: a storage of negative numbers": lambda n: stream(GOOD, data=struct.pack("<q", -6) + NUMBERS),
    "stream: cut off": lambda n: stream(GOOD)[:-1],
    "stream: storages without end": lambda n: stream(GOOD, keys=b"](" + fill(text(b"0"), n) + b"e"),
    "stream: a storage twice": lambda n: stream(GOOD, keys=b"](" + 2 * text(b"0") + b"e"),
    "stream: objects without end": lambda n: stream(fill(b"}", n)),
    "stream: a storage described twice": lambda n: stream(W + tensor() + b"s" + text(b"v") + tensor(numel=7) + b"s"),
    "stream: a view of a storage": lambda n: stream(
        GOOD.replace(text(b"cpu") + whole(6) + b"tQ", text(b"cpu") + whole(6) + b"K\x01tQ")
    ),
    "stream: an unknown type": lambda n: stream(W + tensor(kind=b"OtherStorage") + b"s"),
    "tar: members without end": lambda n: tar([(f"{i}", b"") for i in range(n // 512)]),
    "tar: a member of 2^80 bytes": lambda n: tar(old(), size=2**80),
    "tar: members longer than the file": lambda n: tar(old(), size=2**30),
    "tar: links": lambda n: tar(old(), kind=b"2"),
    "tar: sparse members": lambda n: tar(old(), kind=b"S"),
    "tar: an extended header of the whole file": lambda n: tar([("x", b"11 size=99\n" + b"a" * n)], kind=b"x"),
    "tar: a member twice": lambda n: tar([*old(), *old()]),
    "tar: storages without end": lambda n: tar(old(count=whole(2**40))),
    "tar: pickles without end": lambda n: tar([("storages", saved(whole(n)) + fill(saved(b"N"), n)), *old()[1:]]),
    "tar: a storage of 2^62 numbers": lambda n: tar(old(numel=2**62)),
    "tar: a storage of negative numbers": lambda n: tar(old(numel=-6)),
    "tar: a tensor of 2^31 axes": lambda n: tar(old(rank=-1)),
    "tar: a tensor beyond its storage": lambda n: tar(old(numbers=(6, 1, 1))),
    "tar: a negative stride": lambda n: tar(old(numbers=(6, -1, 5))),
    "tar: a wrong checksum": lambda n: tar(old()).replace(b"storages", b"Storages"),
    "read: stream": lambda n: stream(GOOD),
    "read: tar": lambda n: tar(old()),
    "zeros": lambda n: bytes(n),
    "text": lambda n: fill(b"weights\n", n),
    "a gzip file": lambda n: b"\x1f\x8b\x08" + bytes(n),
    "an xz file": lambda n: b"\xfd7zXZ\0" + bytes(n),
    "a bzip2 file": lambda n: b"BZh9" + bytes(n),
    "an HDF5 file": lambda n: b"\x89HDF\r\n\x1a\n" + bytes(n),
    "a pointer of Git LFS": lambda n: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": lambda n: b"<!doctype html><title>404</title>",
}
