"""Check that a network fits the parameters in a file, before any array is allocated.

The network is traced with the shapes of one example, so that what it would refuse when it is called (heads that do not
divide a width, a size that cannot be halved) is refused here, and the parameters that it needs are compared with those
of the file. Tracing takes as long as the network is deep, so the file must have at least one array for every layer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from ddpm_jax.errors import LoadError
from ddpm_jax.models import (
    adm,
    autoencoder,
    autoregressive_prior,
    clip,
    decoder,
    embedding_codes,
    embedding_norm,
    glide,
    inception,
    mlp,
    modified_resnet,
    ncsnpp,
    noised_clip,
    prior,
    text_encoder,
    unet,
    upsampler,
)
from ddpm_jax.models.shapes import parameter_shapes

Shapes = Mapping[str, tuple[int, ...]]


def check_parameters(network: nn.Module, shapes: Shapes, metadata: Mapping[str, Any], *, where: str, file: str) -> None:
    """Check that a network can be called, and has exactly the parameters of a file.

    Args:
        network: from `networks.build`, so that its fields are in their ranges.
        shapes: name -> shape, of the arrays of the file; names have slashes.
        metadata: of the model; "image_size", "channels" and "length" are used if they are there.
        where: names the network in messages.
        file: names the file in messages.

    A network of another class than those of this package is called as the tasks of this package call it.

    Raises:
        LoadError: otherwise; it names the first parameter that differs.
    """
    own = type(network) not in _INPUTS  # the caller's, of which nothing is known but the task that it was trained for
    if own and (inputs := _inputs_of_task(metadata)) is None:
        return
    if not own:
        _check_size(network, shapes, where, file)
        network = _with_levels(network, shapes)
    try:
        inputs = inputs if own else _INPUTS[type(network)](network, shapes, metadata)
        wanted = parameter_shapes(network, *inputs.args, method=inputs.method, **inputs.options)
    except LoadError:
        raise
    except Exception as error:  # any error of a network, Flax or JAX about fields that contradict each other
        reason = str(error).partition(" (http")[0].strip().partition("\n")[0] or type(error).__name__
        raise LoadError(f"{where} cannot work as it is described: {reason}") from None
    flat = flax.traverse_util.flatten_dict(dict(wanted.get("params", {})), sep="/")
    wanted = {name: tuple(leaf.shape) for name, leaf in flat.items()}
    if wanted == dict(shapes):
        return
    name = min(name for name in {*wanted, *shapes} if wanted.get(name) != shapes.get(name))
    there, here = (f"{list(x[name])}" if name in x else "absent" for x in (shapes, wanted))
    count, total = (sum(map(math.prod, x.values())) for x in (shapes, wanted))
    raise LoadError(
        f"{file} does not hold the parameters of {where}: {name} is {there} in the file and {here} in the network, "
        f"which have {count:,} and {total:,} parameters"
    )


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (dotted name, network) of a network and those in its fields."""
    yield "", network
    for field in dataclasses.fields(network):
        value = getattr(network, field.name)
        if field.name != "parent" and isinstance(value, nn.Module):
            for name, part in _parts(value):
                yield f".{field.name}{name}", part


def _check_size(network: nn.Module, shapes: Shapes, where: str, file: str) -> None:
    """Refuse what would take long to trace, and the tables that a network computes where it is initialised."""
    total = sum(map(math.prod, shapes.values()))
    for name, part in _parts(network):
        layers = getattr(part, "layers", 0)
        layers = sum(layers) if isinstance(layers, tuple) else layers
        layers += len(getattr(part, "channel_mult", ())) * getattr(part, "num_res_blocks", 0)
        if layers > len(shapes):
            raise LoadError(f"{where}{name} has {layers} layers or blocks, and {file} has {len(shapes)} arrays")
        if isinstance(part, (clip.VisionTransformer, noised_clip.NoisedVisionTransformer)):
            positions = (part.image_size // part.patch) ** 2
            if positions * part.width > total:
                raise LoadError(
                    f"{where}{name} with image_size={part.image_size} and patch={part.patch} has {positions} positions "
                    f"of width={part.width}, and {file} has {total} numbers"
                )


def _with_levels(network: nn.Module, shapes: Shapes) -> nn.Module:
    """Return the network with attention at the levels at which the file has it.

    A U-Net with `attention_resolutions` finds them by the size of the image that it is initialised with, which the
    description does not say.
    """
    if isinstance(network, unet.UNet) and network.attention_levels is None:
        found = {name.partition("/")[0] for name in shapes}
        levels = range(len(network.channel_mult))
        return network.clone(attention_levels=tuple(level for level in levels if f"up_{level}_0_attn" in found))
    inner = getattr(network, "unet", None)
    if isinstance(inner, unet.UNet):
        below = {name.removeprefix("unet/"): shape for name, shape in shapes.items() if name.startswith("unet/")}
        return network.clone(unet=_with_levels(inner, below))
    return network


def _inputs_of_task(metadata: Mapping[str, Any]) -> "_Inputs | None":
    """Return what a task of this package calls any network with, as its metadata say; None if they do not."""
    size, channels = metadata.get("image_size"), metadata.get("channels", 3)
    shape: tuple[Any, ...] = (size, size, channels)
    if "embedding" in metadata:
        shape = (metadata["embedding"].get("size"),)
    if "diffusion" not in metadata or not all(isinstance(n, int) and n > 0 for n in shape):
        return None
    options = {}
    for condition in metadata.get("conditions", ()):
        if condition == "labels":
            options["y"] = _ints(1)
        elif condition == "low_resolution":
            low = metadata.get(condition, {})
            side = low.get("size")
            options["low_res"] = _floats(1, side, side, channels)
            options |= {"noise_level": _floats(1)} if low.get("noise_level_input") else {}
        else:  # its widths are not in the metadata
            return None
    return _Inputs((_floats(1, *shape), _ints(1)), options)


# ---- Inputs ----------------------------------------------------------------------------------------------------------


def _floats(*shape: int) -> jax.Array:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(*shape: int) -> jax.Array:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _bools(*shape: int) -> jax.Array:
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


class _Inputs(NamedTuple):
    """The arguments of a call with one example, as shapes, and the method; None is `__call__`."""

    args: tuple[jax.ShapeDtypeStruct, ...]
    options: dict[str, jax.ShapeDtypeStruct] = {}
    method: str | None = None


def _side(net: Any, metadata: Mapping[str, Any]) -> int:
    """Return the height of an image that a U-Net takes: that of the metadata, or the smallest."""
    size = metadata.get("image_size")
    return size if isinstance(size, int) else getattr(net, "patch", 1) * 2 ** (len(net.channel_mult) - 1)


def _channels(net: Any, shapes: Shapes, below: str = "", others: int = 0) -> int:
    """Return the channels of the images that the first convolution of a U-Net reads.

    others: channels at the grid of the first level that are not of the image.
    """
    kernel = shapes.get(f"{below}in_conv/kernel", ())
    channels = kernel[2] - others if len(kernel) == 4 else 0
    patch = getattr(net, "patch", 1)
    if channels < 1 or channels % patch**2:
        raise ValueError(f"its first convolution, {below}in_conv/kernel, has the shape {list(kernel)}")
    return channels // patch**2


def _unet(net: unet.UNet, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    size = _side(net, metadata)
    args = (_floats(1, size, size, _channels(net, shapes)), _ints(1))
    widths = [shape[0] for name, shape in shapes.items() if name.endswith("cross_kv/kernel")]
    return _Inputs(args, {"context": _floats(1, 1, widths[0])} if widths else {})


def _class_unet(net: adm.ClassUNet, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    size = _side(net.unet, metadata)
    return _Inputs((_floats(1, size, size, _channels(net.unet, shapes, "unet/")), _ints(1), _ints(1)))


def _super_unet(net: Any, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    size, channels = _side(net.unet, metadata), _channels(net.unet, shapes, "unet/") // 2
    image = _floats(1, size, size, channels)
    options = {"y": _ints(1)} if getattr(net, "num_classes", None) is not None else {}
    options |= {"noise_level": _floats(1)} if getattr(net, "noise_level_input", False) else {}
    return _Inputs((image, _ints(1), image), options)


def _ncsnpp(net: ncsnpp.NCSNpp, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    size = _side(net, metadata)
    return _Inputs((_floats(1, size, size, _channels(net, shapes)), _floats(1)))


def _classifier(net: adm.Classifier, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    return _Inputs((_floats(1, net.image_size, net.image_size, _channels(net, shapes)), _ints(1)))


def _glide(net: glide.Glide, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    size, channels = _side(net.unet, metadata), _channels(net.unet, shapes, "unet/")
    image, options = _floats(1, size, size, 3), {}
    if channels in (6, 10):
        options["low_res"] = image
    if channels in (7, 10):
        options |= {"image": image, "known": _floats(1, size, size, 1)}
    return _Inputs((image, _ints(1), _ints(1, net.context), _bools(1, net.context)), options)


def _decoder(net: decoder.Decoder, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    size = _side(net.unet, metadata)
    image = _floats(1, size, size, _channels(net.unet, shapes, "unet/", net.cond_map_channels))
    z = _floats(1, net.embed_dim)
    return _Inputs((image, _ints(1), z, z, *_text(net, shapes, getattr(net.text_encoder, "context", 4))))


def _prior(net: prior.DiffusionPrior, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    z = _floats(1, net.embed_dim)
    return _Inputs((z, _ints(1), z, *_text(net, shapes, net.context)))


def _code_prior(net: autoregressive_prior.AutoregressivePrior, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    z = _floats(1, net.embed_dim)
    return _Inputs((_ints(1, net.dims), _ints(1), z, *_text(net, shapes, net.context)))


def _codes(net: embedding_codes.EmbeddingCodes, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    return _Inputs((_floats(1, net.embed_dim),))


def _text(net: Any, shapes: Shapes, length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return a caption as a network reads it, and its mask."""
    hidden = shapes.get("text_in/kernel", (1,))[0]
    text = _floats(1, length, hidden) if net.text_encoder is None else _ints(1, length)
    return text, _bools(1, length)


def _clip(net: clip.CLIP, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    images = () if net.vision is None else _image(net.vision, shapes, metadata).args
    text = () if net.text is None else (_ints(1, net.text.context), _bools(1, net.text.context))
    if not images and not text:
        raise ValueError("it has neither an image tower nor a text tower")
    return _Inputs((*images, *text), {}, None if images and text else "encode_image" if images else "encode_text")


def _image(net: Any, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    return _Inputs((_floats(1, net.image_size, net.image_size, 3),))


def _noised_image(net: noised_clip.NoisedVisionTransformer, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    return _Inputs((*_image(net, shapes, metadata).args, _ints(1)))


def _noised_clip(net: noised_clip.NoisedCLIP, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    text = (_ints(1, net.text.context), _bools(1, net.text.context))
    return _Inputs((*_noised_image(net.vision, shapes, metadata).args, *text))


def _tokens(net: Any, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    length = getattr(net, "context", 4)
    return _Inputs((_ints(1, length), _bools(1, length)))


def _autoencoder(net: autoencoder.Autoencoder, shapes: Shapes, metadata: Mapping[str, Any]) -> _Inputs:
    return _Inputs((_floats(1, net.factor, net.factor, net.out_channels),))


_INPUTS: dict[type[nn.Module], Callable[[Any, Shapes, Mapping[str, Any]], _Inputs]] = {
    adm.Classifier: _classifier,
    adm.ClassUNet: _class_unet,
    adm.SuperUNet: _super_unet,
    autoencoder.Autoencoder: _autoencoder,
    clip.CLIP: _clip,
    clip.VisionTransformer: _image,
    decoder.Decoder: _decoder,
    glide.Glide: _glide,
    mlp.TimeMLP: lambda net, *_: _Inputs((_floats(1, net.features), _ints(1))),
    inception.Inception: lambda *_: _Inputs((_floats(1, 299, 299, 3),)),
    modified_resnet.ModifiedResNet: _image,
    ncsnpp.NCSNpp: _ncsnpp,
    noised_clip.NoisedCLIP: _noised_clip,
    noised_clip.NoisedVisionTransformer: _noised_image,
    prior.DiffusionPrior: _prior,
    autoregressive_prior.AutoregressivePrior: _code_prior,
    embedding_codes.EmbeddingCodes: _codes,
    embedding_norm.EmbeddingStatistics: lambda *_: _Inputs(()),
    text_encoder.RecurrentTextEncoder: _tokens,
    text_encoder.TextEncoder: _tokens,
    unet.UNet: _unet,
    upsampler.Upsampler: _super_unet,
}
