"""The blocks of our U-Net in order, for tables that name them otherwise."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from ddpm_jax.models.adm import Classifier
from ddpm_jax.models.unet import UNet


class Block(NamedTuple):
    """Block of a U-Net.

    Attributes:
        ours: its name in our parameters.
        kind: "res", "attention" or "resample".
        widths: channels of its input and output.
        side: "down" (encoder), "mid" or "up" (decoder).
        level: 0 is the finest.
        number: of the block in its level, and in the middle. An attention layer has the number of the block before it,
            a change of resolution the one after the last block.
    """

    ours: str
    kind: Literal["res", "attention", "resample"]
    widths: tuple[int, int]
    side: Literal["down", "mid", "up"]
    level: int
    number: int


def walk(net: UNet | Classifier, image_size: int) -> Iterator[Block]:
    """Yield the blocks between the first and the last convolution; of a classifier those down to the middle."""
    width = [int(net.channels * mult) for mult in net.channel_mult]
    attends = [attends_at(net, image_size, level) for level in range(len(width))]
    here, skips, last = width[0], [width[0]], len(width) - 1
    for level, out in enumerate(width):
        for i in range(net.num_res_blocks):
            yield Block(f"down_{level}_{i}", "res", (here, out), "down", level, i)
            if attends[level]:
                yield Block(f"down_{level}_{i}_attn", "attention", (out, out), "down", level, i)
            here = out
            skips.append(here)
        if level != last:
            yield Block(f"down_{level}_sample", "resample", (here, here), "down", level, net.num_res_blocks)
            skips.append(here)
    yield Block("mid_0", "res", (here, here), "mid", last, 0)
    if isinstance(net, Classifier) or net.mid_attention:
        yield Block("mid_attn", "attention", (here, here), "mid", last, 1)
    yield Block("mid_1", "res", (here, here), "mid", last, 2)
    if isinstance(net, Classifier):
        return
    for level in range(last, -1, -1):
        for i in range(net.num_res_blocks + 1):
            yield Block(f"up_{level}_{i}", "res", (here + skips.pop(), width[level]), "up", level, i)
            here = width[level]
            if attends[level]:
                yield Block(f"up_{level}_{i}_attn", "attention", (here, here), "up", level, i)
        if level:
            yield Block(f"up_{level}_sample", "resample", (here, here), "up", level, net.num_res_blocks + 1)


def attends_at(net: UNet | Classifier, image_size: int, level: int) -> bool:
    """Return whether a level has attention."""
    levels = getattr(net, "attention_levels", None)
    return image_size >> level in net.attention_resolutions if levels is None else level in levels
