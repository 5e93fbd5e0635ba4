"""Write tests/data/torch/*: a small checkpoint in each of PyTorch's formats, and its numbers: test_interop_reading.py.

    pip install torch numpy
    python tests/parity/make_torch_files.py

The tar of torch 0.1, which no torch writes any more, is put together here as torch.load expects it, and read by it.
"""

import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).parent.parent / "data" / "torch"


class Tower(torch.nn.Module):
    """A module with a submodule, a buffer, and a number that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor([7], dtype=torch.int64))
        self.size = 224

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something that depends on both."""
        return self.inner(x) * self.steps


def tensors() -> dict:
    """Return tensors of several types, shapes and strides, two of which share their numbers."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "plain": base,
        "turned": base.t(),
        "part": base[1:3, ::2],
        "half": base.half(),
        "brain": base.bfloat16(),
        "whole": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }


def write_tar(path: Path, saved: dict) -> None:
    """Write the format of torch 0.1: a tar of storages, tensors, and a pickle that refers to tensors by number."""
    storages, numbers = io.BytesIO(), io.BytesIO()
    pickle.dump(len(saved), storages, 2)
    pickle.dump(len(saved), numbers, 2)
    for key, tensor in enumerate(saved.values()):
        tensor = tensor.contiguous()
        pickle.dump((100 + key, "cpu", torch.FloatStorage), storages, 2)
        storages.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
        pickle.dump((key, 100 + key, torch.FloatTensor), numbers, 2)
        numbers.write(struct.pack("<ii", tensor.dim(), 0))
        numbers.write(struct.pack(f"<{2 * tensor.dim() + 1}q", *tensor.shape, *tensor.stride(), 0))
    pickle.dump([], storages, 2)
    main = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            keys = [key for key, tensor in enumerate(saved.values()) if tensor is value]
            return str(keys[0]) if keys else None

    Pickler(main, 2).dump(saved)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("storages", storages), ("tensors", numbers), ("pickle", main)):
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            archive.addfile(info, io.BytesIO(data.getvalue()))


def main() -> None:
    """Write the files."""
    OUT.mkdir(parents=True, exist_ok=True)
    saved = tensors()
    nested = {"state_dict": saved, "epoch": 3, "groups": [{"lr": 0.1, "momentum": saved["plain"]}]}
    torch.save(nested, OUT / "zip.pt")
    torch.save(nested, OUT / "stream.pt", _use_new_zipfile_serialization=False)
    torch.manual_seed(0)
    tower = Tower()
    torch.save(tower.state_dict(), OUT / "state_dict.pt")
    torch.jit.script(tower).save(str(OUT / "script.pt"))
    old = {name: tensor for name, tensor in saved.items() if tensor.dtype == torch.float32 and tensor.dim()}
    old = {name: tensor.detach() for name, tensor in old.items() if tensor.numel()}
    write_tar(OUT / "tar.pt", old)
    read = torch.load(OUT / "tar.pt", weights_only=False)
    assert all(torch.equal(read[name], tensor) for name, tensor in old.items())
    arrays = {f"state_dict.{name}": tensor.detach().float().numpy() for name, tensor in saved.items()}
    arrays |= {name: tensor.float().numpy() for name, tensor in tower.state_dict().items()}
    np.savez_compressed(OUT / "expected.npz", **arrays)
    for file in sorted(OUT.iterdir()):
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
