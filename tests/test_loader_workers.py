"""Worker processes: the same batches, errors that name the file, and nothing left behind."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from image_files import pixels, write

from ddpm_jax.data.decode import DecodeError
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.transforms import RandomCrop, RandomFlip, Resize, Select

TRANSFORMS = (Resize(12), RandomCrop(9), RandomFlip(), Select(("image", "key", "label")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number, image in enumerate(pixels(10)):
        write(root / ("ab"[number % 2]) / f"{number}.png", image)
    return root


def load(folder, **options):
    return make_loader(ImageFolder(folder), batch_size=4, seed=0, transforms=TRANSFORMS, **options)


def test_workers_yield_the_same_batches_and_end(folder):
    with load(folder) as loader:
        expected = [next(loader) for _ in range(9)]
    loader = load(folder, num_workers=2)
    got = [next(loader) for _ in range(4)]
    state = loader.get_state()
    got += [next(loader) for _ in range(5)]
    for batch, right in zip(got, expected, strict=True):
        assert set(batch) == set(right) == {"image", "key", "label"}
        for name, value in right.items():
            assert type(batch[name]) is np.ndarray
            np.testing.assert_array_equal(batch[name], value, strict=True)
    loader.set_state(state)
    np.testing.assert_array_equal(next(loader)["image"], expected[4]["image"])
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="the loader is closed"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_is_named(tmp_path, workers):
    for number, image in enumerate(pixels(3)):
        write(tmp_path / f"{number}.png", image)
    write(tmp_path / "3.png", b"")
    transforms = (Resize(8), RandomCrop(8))
    with (
        make_loader(ImageFolder(tmp_path), batch_size=4, seed=0, transforms=transforms, num_workers=workers) as loader,
        pytest.raises(DecodeError, match=rf"{tmp_path}/3\.png: the file is empty"),
    ):
        next(loader)
    assert not multiprocessing.active_children()


PROGRAM = """
import multiprocessing, os, sys
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.loader import make_loader
from ddpm_jax.data.transforms import CenterCrop

if __name__ == "__main__":
    transforms = [CenterCrop(8)]
    loader = make_loader(ImageFolder(sys.argv[1]), batch_size=4, seed=0, transforms=transforms, num_workers=1)
    batch = next(loader)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"  # Z: ended, and nobody waited
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["normal", "killed"])
def test_workers_end_with_the_program(folder, tmp_path, end):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(folder), end]
    result = subprocess.run(command, capture_output=True, text=True)
    pids = [int(pid) for pid in result.stdout.split()]
    assert len(pids) == 1, result.stderr
    if end == "normal":  # neither leaked memory nor errors of Grain's destructors
        assert result.returncode == 0 and result.stderr == ""
    deadline = time.monotonic() + 30
    while is_running(pids[0]):
        assert time.monotonic() < deadline, f"worker {pids[0]} runs on"
        time.sleep(0.1)
