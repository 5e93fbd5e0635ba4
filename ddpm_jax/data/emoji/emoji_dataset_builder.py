"""The TFDS builder `emoji`; docs/data.md has the commands that build it.

The names of the module and of its class are what tensorflow-datasets looks for.
"""

import io
from collections.abc import Iterator
from typing import Any

from ddpm_jax.data.decode import encode_png
from ddpm_jax.data.emoji.packages import NAMES, STYLES, check_packages, licences, notice
from ddpm_jax.data.emoji.records import GROUPS, SPLITS, Emoji, read_emoji, render, split_of
from ddpm_jax.extras import needs_extra

with needs_extra("tfds"):
    import tensorflow_datasets as tfds

DESCRIPTION = """Emoji with English names in four styles: Twitter, Google Noto, Fluent 3D and OpenMoji.

The label is the group. Variants of one base concept, in skin tone, gender and direction, are in the same split.
"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Emoji in four styles with names."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Four styles, split by base concept."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "In the manual directory run: npm pack " + " ".join(
        f"{package.name}@{package.version}" for package in (*STYLES.values(), NAMES)
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "key": tfds.features.Text(),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=list(GROUPS)),
                    "concept": tfds.features.Text(),
                    "style": tfds.features.Text(),
                    "base": tfds.features.Text(),
                    "tags": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            license=notice(tuple(STYLES)),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        directory = dl_manager.manual_dir
        check_packages(directory, tuple(STYLES))
        emoji = read_emoji(directory)
        for name, text in licences(directory).items():
            (self.data_path / name).write_text(text)
        return {split: self._generate_examples(emoji, split) for split in SPLITS}

    def _generate_examples(self, emoji: list[Emoji], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for each in emoji:
            if split_of(each.concept.base) == split:
                yield each.key, example(each)


def example(emoji: Emoji) -> dict[str, Any]:
    """Return what tensorflow-datasets encodes; an image as the bytes of a PNG file needs no TensorFlow."""
    return {
        "image": io.BytesIO(encode_png(render(emoji))),
        "key": emoji.key,
        "caption": emoji.caption,
        "label": emoji.concept.group,
        "concept": emoji.concept.code,
        "style": emoji.style,
        "base": emoji.concept.base,
        "tags": ", ".join(emoji.concept.tags),
    }
