"""Checkpoints of score_sde_pytorch (Song et al. 2021): NCSN++ and DDPM++.

A file has {"model": the state, "ema": {"shadow_params": the averages, a list}, "optimizer", "step"}; the names of the
state begin with "module." where it was trained on several devices, and number the layers in the order in which they
are made. It does not say which network it is of, so that is given by the name of its config there.

Networks of the VE-SDE were trained on images in [0, 1]. Here images are in [-1, 1], and so sigma is twice theirs, which
is the network's `sigma_unit`; the score is half of theirs, which dividing the output by that sigma gives.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.interop.parts import select
from ddpm_jax.interop.table import (
    IDENTITY,
    SINES_FIRST,
    ConvertError,
    Entry,
    Layout,
    concatenated,
    conv,
    dense,
    norm,
    to_ours,
    to_reference,
)
from ddpm_jax.models.ncsnpp import NCSNpp
from ddpm_jax.models.shapes import parameter_shapes
from ddpm_jax.storage.model_directory import Converted
from ddpm_jax.storage.tensor_file import read_tensors
from ddpm_jax.storage.tensors import Tensors

MARKS = ("all_modules.2.weight",)  # a dense layer of the embedding, or the first convolution
_SHADOW = "ema.shadow_params."
_PIXEL = Layout(lambda x: x[None, None], lambda x: (x[0, 0],))  # a matrix -> a 1 x 1 convolution
# Inside of a layer there, in the order in which its parameters are made, which is that of the averages.
_ORDER = ("GroupNorm_0", "Conv_0", "Conv2d_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2", "NIN_0", "NIN_1", "NIN_2",
          "NIN_3")  # fmt: skip


class Published(NamedTuple):
    """A config of the published code, and how its network is called there.

    Attributes:
        sde: "vp", "sub_vp" or "ve".
        fields: of the network, besides those of the sde.
        image_size: of the training images, in pixels.
        continuous: trained in continuous time; else at `num_steps` noise levels.
        num_steps: noise levels there, and steps of its samplers.
        sigmas: (smallest, largest), for images in [0, 1]; of the VE-SDE.
        snr: of the corrector.
    """

    sde: str
    fields: Mapping[str, Any] = {}
    image_size: int = 32
    continuous: bool = True
    num_steps: int = 1000
    sigmas: tuple[float, float] = (0.01, 50.0)
    snr: float = 0.16

    def model(self) -> NCSNpp:
        """Return the network."""
        if self.sde != "ve":
            return NCSNpp(128, time_scale=999.0 if self.continuous else 1.0, **self.fields)
        own = {"embedding": "fourier"}
        if not self.continuous:
            own = {"sigma_range": self.sigmas, "time_scale": self.num_steps - 1.0}
        return NCSNpp(**({"channels": 128, "scale_by_sigma": True, "sigma_unit": 2.0} | own | dict(self.fields)))

    def metadata(self) -> dict[str, Any]:
        """Return what a pipeline has to know, plain data."""
        diffusion: dict[str, Any] = {"schedule": self.sde, "num_steps": self.num_steps, "prediction": "eps"}
        sampling: dict[str, Any] = {"sampler": "euler_maruyama", "steps": self.num_steps}
        if self.sde == "ve":
            diffusion |= {"prediction": "score", "span": [2.0 * sigma for sigma in self.sigmas], "time": "sigma"}
            sampling |= {"sampler": "predictor_corrector", "snr": self.snr}
        elif not self.continuous:
            diffusion["schedule"], sampling["sampler"] = "linear", "ancestral"
        return {
            "diffusion": diffusion,
            "image_size": self.image_size,
            "channels": 3,
            "conditions": [],
            "sampling": sampling,
            "sigmas": [*self.sigmas, self.num_steps],
        }


def _published() -> dict[str, Published]:
    """Return the configs by their names there."""
    residual, plain = {"input_pyramid": "residual"}, {"fir_taps": ()}
    deep = {"num_res_blocks": 8}
    found = {}
    for place, sde in (("vp", "vp"), ("subvp", "sub_vp")):
        for network, fields in (("ddpmpp", plain), ("ncsnpp", residual)):
            found[f"{place}/cifar10_{network}_continuous"] = Published(sde, fields)
            found[f"{place}/cifar10_{network}_deep_continuous"] = Published(sde, fields | deep)
    found["vp/cifar10_ddpmpp"] = Published("vp", plain, continuous=False)
    found["vp/cifar10_ncsnpp"] = Published("vp", residual, continuous=False)
    found["ve/cifar10_ncsnpp"] = Published("ve", residual, continuous=False)
    found["ve/cifar10_ncsnpp_continuous"] = Published("ve", residual)
    found["ve/cifar10_ncsnpp_deep_continuous"] = Published("ve", residual | deep)
    skips = {"input_pyramid": "skip", "output_pyramid": "skip", "dropout": 0.0}
    middle = skips | {"channel_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2, "attention_levels": (4,)}
    for name, largest in (("bedroom", 378.0), ("church", 380.0), ("celebahq_256", 348.0), ("ffhq_256", 348.0)):
        own = Published("ve", middle, 256, True, 2000, (0.01, largest), 0.075)
        found[f"ve/{name}_ncsnpp_continuous"] = own
    large = skips | {"channels": 16, "channel_mult": (1, 2, 4, 8, 16, 32, 32, 32), "num_res_blocks": 1}
    for name in ("ffhq", "celebahq"):
        own = Published("ve", large | {"attention_levels": (6,)}, 1024, True, 2000, (0.01, 1348.0), 0.15)
        found[f"ve/{name}_ncsnpp_continuous"] = own
    return found


PUBLISHED = _published()


def read_score_sde(file: str | Path, name: str, *, part: str | None = None) -> tuple[Converted, dict[str, Any]]:
    """Read a checkpoint.

    Args:
        file: as torch.save wrote it, or a state dict as `export_score_sde` gives it.
        name: of its config, a key of `PUBLISHED`.
        part: "model" takes the raw parameters; None the averages, as the published samplers do, where the file has
            them.

    Returns:
        the network "model" with its parameters and metadata, and what was taken where the file is silent.

    Raises:
        ReadError: if the file cannot be read.
        ConvertError: if the name is unknown or the tensors are not those of the network.
    """
    if name not in PUBLISHED:
        raise ConvertError(f"model={name!r} is not a config of this family: {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    model, tensors = published.model(), read_tensors(file, part=part)
    averaged = part is None and any(key.startswith(_SHADOW) for key in tensors)
    params = load_score_sde(tensors, model)
    metadata = published.metadata()
    assumed = {"model": name, "tensors": "the averages (ema)" if averaged else "the raw ones"}
    assumed |= {key: metadata["diffusion"][key] for key in ("schedule", "num_steps")}
    return Converted("score-sde", {"model": model}, {"model": params}, metadata | {"model": name}), assumed


def load_score_sde(tensors: Mapping[str, np.ndarray], model: NCSNpp, *, channels: int = 3) -> dict[str, Any]:
    """Return the parameters of a network, averages where there are any.

    Args:
        tensors: of a checkpoint, or of the state of the network alone.
        model: the network.
        channels: of the images.

    Raises:
        ConvertError: if the tensors are not those of the network; it lists which.
    """
    table = score_sde_table(model)
    shadow = {key.removeprefix(_SHADOW): array for key, array in tensors.items() if key.startswith(_SHADOW)}
    state = {key: array for key, array in tensors.items() if not key.startswith(("ema.", "optimizer."))}
    found = select(Tensors(state, getattr(tensors, "unread", None)), MARKS)
    if shadow:
        found = Tensors({**found, **_averages(shadow, found, table)}, found.unread)
    return to_ours(table, found, score_sde_shapes(model, channels), ignored=("sigmas",))


def export_score_sde(params: Mapping[str, Any], model: NCSNpp, sigmas: tuple[float, float, int]) -> dict[str, Any]:
    """Return the state of the published network, float32: the inverse of `load_score_sde`, bit for bit.

    sigmas: (smallest, largest, count) of the buffer "sigmas" of noise levels, for images in [0, 1].
    """
    smallest, largest, count = sigmas
    levels = np.exp(np.linspace(np.log(largest), np.log(smallest), int(count)))
    return {"sigmas": np.asarray(levels, np.float32)} | to_reference(score_sde_table(model), params)


def _averages(
    shadow: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray], table: list[Entry]
) -> dict[str, np.ndarray]:
    """Return averages by the names of what they are averages of: all parameters that are trained, in their order."""
    names = [name for entry in table for name in entry.theirs if entry.ours != "time/frequencies"]
    names = sorted(names, key=_place)
    if sorted(shadow, key=lambda key: (len(key), key)) != [str(i) for i in range(len(names))]:
        raise ConvertError(f"the file does not fit: it has {len(shadow)} averages, of {len(names)} parameters")
    for number, name in enumerate(names):
        average = shadow[str(number)]
        if name in state and state[name].shape != average.shape:
            raise ConvertError(
                f"the file does not fit: its average {number} has the shape {list(average.shape)}, and is of {name} "
                f"{list(state[name].shape)}"
            )
    return {name: shadow[str(number)] for number, name in enumerate(names)}


def _place(name: str) -> tuple[int, int, int]:
    """Return where a parameter stands: the number of its layer, its part, and whether it is a bias."""
    module, *part, kind = name.removeprefix("all_modules.").split(".")
    return int(module), _ORDER.index(part[0]) if part else 0, ("weight", "W", "bias", "b").index(kind) // 2


def score_sde_shapes(model: NCSNpp, channels: int = 3) -> Any:
    """Return the shapes of the parameters, made without any numbers."""
    size = 2 ** (len(model.channel_mult) - 1)
    image, t = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, size, size, channels), (1,)))
    return parameter_shapes(model, image, t)["params"]


# ---- The table -------------------------------------------------------------------------------------------------------


class _Table:
    """The table of a network, and the layers there that are in it already."""

    def __init__(self, model: NCSNpp):
        self.model, self.entries, self.layers = model, [], 0

    def next(self) -> str:
        """Return the name of the next layer there."""
        self.layers += 1
        return f"all_modules.{self.layers - 1}"

    def embedding(self) -> None:
        if self.model.embedding == "fourier":
            self.entries.append(Entry("time/frequencies", (f"{self.next()}.W",), IDENTITY))
        first = dense("time/dense_0", self.next())
        if self.model.embedding != "fourier":
            first[0] = first[0]._replace(layout=SINES_FIRST)
        self.entries += first + dense("time/dense_1", self.next())

    def res(self, ours: str, here: int, out: int, resampled: bool = False) -> None:
        there = self.next()
        self.entries += norm(f"{ours}/norm_1", f"{there}.GroupNorm_0") + conv(f"{ours}/conv_1", f"{there}.Conv_0")
        self.entries += dense(f"{ours}/emb", f"{there}.Dense_0")
        self.entries += norm(f"{ours}/norm_2", f"{there}.GroupNorm_1") + conv(f"{ours}/conv_2", f"{there}.Conv_1")
        if self.model.biggan and (here != out or resampled):
            self.entries += conv(f"{ours}/skip", f"{there}.Conv_2")
        elif here != out:
            self.entries += _matrices(f"{ours}/skip", f"{there}.NIN_0", layout=_PIXEL)

    def attention(self, ours: str) -> None:
        there = self.next()
        self.entries += norm(f"{ours}/norm", f"{there}.GroupNorm_0")
        self.entries += _matrices(f"{ours}/qkv", *(f"{there}.NIN_{i}" for i in range(3)))
        self.entries += _matrices(f"{ours}/out", f"{there}.NIN_3")

    def resample(self, ours: str, width: int) -> None:
        if self.model.biggan:
            self.res(ours, width, width, True)
        else:
            self.learned(ours, parameters=self.model.conv_resample)

    def learned(self, ours: str, parameters: bool = True) -> None:
        """Add a change of resolution, which is a layer there even where it has no parameters."""
        there = self.next()
        if parameters and self.model.fir_taps:
            self.entries += conv(ours, f"{there}.Conv2d_0")
        elif parameters:
            self.entries += conv(f"{ours}/conv", f"{there}.Conv_0")

    def output(self, ours: str) -> None:
        self.entries += norm(f"{ours}_norm", self.next())
        self.entries += conv(f"{ours}_conv", self.next())


def score_sde_table(model: NCSNpp) -> list[Entry]:
    """Return the table of a network."""
    table = _Table(model)
    table.embedding()
    table.entries += conv("in_conv", table.next())
    widths = [model.channels * mult for mult in model.channel_mult]
    here, skips, last = model.channels, [model.channels], len(widths) - 1
    for level, width in enumerate(widths):
        for i in range(model.num_res_blocks):
            table.res(f"down_{level}_{i}", here, width)
            here = width
            if level in model.attention_levels:
                table.attention(f"down_{level}_{i}_attn")
            skips.append(here)
        if level == last:
            continue
        table.resample(f"down_{level}_sample", here)
        pyramid = f"down_{level}_pyramid"
        if model.input_pyramid == "skip":
            table.entries += conv(pyramid, f"{table.next()}.Conv_0")
            here = 2 * here if model.combine == "cat" else here
        elif model.input_pyramid == "residual":
            table.learned(pyramid)
        skips.append(here)
    table.res("mid_0", here, here)
    table.attention("mid_attn")
    table.res("mid_1", here, here)
    for level in range(last, -1, -1):
        for i in range(model.num_res_blocks + 1):
            table.res(f"up_{level}_{i}", here + skips.pop(), widths[level])
            here = widths[level]
        if level in model.attention_levels:
            table.attention(f"up_{level}_attn")
        pyramid = f"up_{level}_pyramid"
        if model.output_pyramid == "skip" or (model.output_pyramid == "residual" and level == last):
            table.output(pyramid)
        elif model.output_pyramid == "residual":
            table.learned(pyramid)
        if level:
            table.resample(f"up_{level}_sample", here)
    if model.output_pyramid != "skip":
        table.output("out")
    return table.entries


def _matrices(ours: str, *theirs: str, layout: Layout = IDENTITY) -> list[Entry]:
    """Return the entries of one or more layers whose matrices are not transposed there."""
    kernel = Entry(f"{ours}/kernel", tuple(f"{name}.W" for name in theirs), concatenated(layout, len(theirs)))
    bias = Entry(f"{ours}/bias", tuple(f"{name}.b" for name in theirs), concatenated(IDENTITY, len(theirs)))
    return [kernel, bias]
