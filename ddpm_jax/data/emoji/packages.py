"""The npm packages of the emoji, and their tar files read without unpacking them.

A tar file is read from begin to end in memory: nothing is written, no path of it is used, no script of it is run.
"""

import dataclasses
import gzip
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

MAX_MEMBERS = 100_000
MAX_BYTES = 2**30  # of a whole tar file, uncompressed; the largest package has 76 MB
MAX_MEMBER_BYTES = 2**24  # of a member that is read


@dataclasses.dataclass(frozen=True)
class Package:
    """One npm package.

    Attributes:
        name: in the registry.
        version: the version that is read.
        images: pattern of the names of its images, the group "code" holds the code points.
        licence: of the images, one line.
        texts: members with the texts of licences.
    """

    name: str
    version: str
    images: str
    licence: str
    texts: tuple[str, ...]

    @property
    def file(self) -> str:
        """File name of the tar file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"

    @property
    def is_svg(self) -> bool:
        """True if the images are SVG files, which have to be rendered."""
        return self.images.endswith("svg")


STYLES = {
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        r"package/img/twitter/64/(?P<code>[0-9a-f-]+)\.png",
        "Twemoji, (c) Twitter, Inc. and other contributors, CC BY 4.0, https://creativecommons.org/licenses/by/4.0/; "
        "packaged by Cal Henderson under the MIT licence",
        ("package/LICENSE",),
    ),
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        r"package/img/google/64/(?P<code>[0-9a-f-]+)\.png",
        "Noto Emoji, (c) Google LLC, Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0; "
        "packaged by Cal Henderson under the MIT licence",
        ("package/LICENSE",),
    ),
    "fluent3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        r"package/assets/(?P<code>[0-9a-f_-]+)\.webp",
        "Fluent Emoji, (c) Microsoft Corporation, MIT licence; packaged by LobeHub under the MIT licence",
        ("package/README.md",),
    ),
    "openmoji": Package(
        "openmoji",
        "17.0.0",
        r"package/color/svg/(?P<code>[0-9A-F-]+)\.svg",
        "OpenMoji, the open-source emoji and icon project, https://openmoji.org, CC BY-SA 4.0, "
        "https://creativecommons.org/licenses/by-sa/4.0/ (what is made from these images is under the same licence)",
        ("package/LICENSE.txt",),
    ),
}
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    r"(?!)",
    "names and tags from emojibase, (c) Miles Johnson, MIT licence",
    ("package/LICENSE",),
)


class EmojiError(ValueError):
    """A package that is missing or broken; the message is one sentence."""


def broken(directory: str | os.PathLike, package: Package, reason: str) -> EmojiError:
    """Return the error for a package that cannot be read."""
    return EmojiError(
        f"{Path(directory) / package.file} is broken ({reason}); fetch it again by: {_command([package])}"
    )


def check_packages(directory: str | os.PathLike, styles: tuple[str, ...]) -> None:
    """Raise EmojiError, with the commands that fetch them, if the packages of the styles are not in a directory."""
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise ValueError(f"styles must be among {', '.join(STYLES)}, got {', '.join(unknown) or 'none'}")
    if not Path(directory).is_dir():
        raise EmojiError(f"{directory} is not a directory; make it, and in it run: {_command(_packages(styles))}")
    missing = [package for package in _packages(styles) if not (Path(directory) / package.file).is_file()]
    if missing:
        raise EmojiError(f"{directory} has no {missing[0].file}; in it run: {_command(missing)}")


def notice(styles: tuple[str, ...]) -> str:
    """Return the licence of each style, a line each."""
    packages = zip([*styles, "names and tags"], _packages(styles), strict=True)
    lines = (f"{name} ({package.name} {package.version}): {package.licence}." for name, package in packages)
    return "Emoji images and their names.\n\n" + "\n".join(lines) + "\n"


def licences(directory: str | os.PathLike, styles: tuple[str, ...] = tuple(STYLES)) -> dict[str, str]:
    """Return the texts of licences that belong beside what is made from the packages.

    Returns:
        {file name: text}: NOTICE.txt, which names the licence of every style, and what the packages hold themselves.
    """
    packages, texts = _packages(styles), {"NOTICE.txt": notice(styles)}
    for package in packages:
        for name, data in read_members(directory, package, "|".join(map(re.escape, package.texts))):
            texts[f"{package.file.removesuffix('.tgz')}-{Path(name).name}"] = data.decode("utf-8", "replace")
    return texts


def read_members(directory: str | os.PathLike, package: Package, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files of a package whose whole name has a pattern, in the order of the tar file.

    Raises:
        EmojiError: if the file is broken or larger than such a package can be.
    """
    path, wanted = Path(directory) / package.file, re.compile(pattern)
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=_Limited(unzipped), mode="r|") as members:
            for number, member in enumerate(members):
                if number >= MAX_MEMBERS or member.size > MAX_BYTES:
                    raise EmojiError(f"{path} is larger than {package.name} can be")
                if member.isreg() and wanted.fullmatch(member.name):
                    yield member.name, _content(members, member, path)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, OverflowError) as error:
        raise broken(directory, package, str(error)) from None


def _command(packages: list[Package]) -> str:
    """Return the command that fetches the tar files of packages into the working directory."""
    return "npm pack " + " ".join(f"{package.name}@{package.version}" for package in packages)


def _packages(styles: tuple[str, ...]) -> list[Package]:
    return [*(STYLES[style] for style in styles), NAMES]


def _content(members: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise EmojiError(f"{path} has {member.name} of {member.size} bytes, which is more than an emoji needs")
    file = members.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


class _Limited:
    """A stream that ends with an error after MAX_BYTES: a small file may hold many gigabytes."""

    def __init__(self, stream: gzip.GzipFile):
        self._stream, self._left = stream, MAX_BYTES

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"it holds more than {MAX_BYTES} bytes")
        return data
