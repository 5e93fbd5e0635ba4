"""Throughput of the loader in images per second for each source, and its memory: the table of docs/data.md.

    pip install -e '.[examples,tfds]'
    python examples/loader_throughput.py
    python examples/loader_throughput.py --minutes 30

The same JPEG images, 512 of each size, are read from a folder, from prepared ArrayRecord and WebDataset shards, from a
data set of TFDS and from memory, cropped, flipped at random and batched. Worker processes do all of the work; the first
process takes the batches. In brackets: images per second of processor time of the workers, which other programs on the
machine disturb least (Linux only: from /proc).

With --minutes, all sources are read in turn, each by one worker, and the memory of this process and of its workers is
printed. The growth is the difference of the means over the second and the last quarter of the time.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_jax.data.array_record import write_array_record
from ddpm_jax.data.arrays import ArraySource
from ddpm_jax.data.image_folder import ImageFolder
from ddpm_jax.data.loader import Loader, make_loader
from ddpm_jax.data.open_source import open_source
from ddpm_jax.data.transforms import CenterCrop, RandomFlip, Select
from ddpm_jax.types import Source

SOURCES = ("folder", "array_record", "webdataset", "tfds", "arrays")
IMAGES, BATCH = 512, 64


def write_folder(path: Path, size: int) -> None:
    """Write JPEG images with the spectrum of photographs, amplitudes that fall as 1 / frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = 1 / size
    path.mkdir(parents=True)
    for number in range(IMAGES):
        noise = np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency
        pixels = np.fft.irfft2(noise, (size, size)).transpose(1, 2, 0)
        pixels = np.clip(128 + 50 * (pixels - pixels.mean()) / pixels.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path / f"{number:04d}.jpg", quality=92)
        (path / f"{number:04d}.txt").write_text(f"noise number {number}")


def write_tar(path: Path, folder: Path) -> None:
    """Write the files of a folder as a WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


def build_tfds(path: Path, folder: Path) -> Path:
    """Build the images of a folder as a data set of TFDS and return its directory."""
    import tensorflow_datasets as tfds

    class Noise(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The images of a folder, with captions."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for file in sorted(folder.glob("*.jpg")):
                yield file.name, {"image": str(file), "caption": file.with_suffix(".txt").read_text()}

    builder = Noise(data_dir=path, file_format="array_record")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def make_sources(root: Path, size: int, names: Sequence[str]) -> dict[str, Source]:
    """Write the images of one size in every form, and return their sources."""
    folder = root / f"{size}/folder"
    write_folder(folder, size)
    sources: dict[str, Source] = {"folder": ImageFolder(folder)}
    if "array_record" in names:
        records = ({"image": file.read_bytes(), "caption": file.with_suffix(".txt").read_text()}
                   for file in sorted(folder.glob("*.jpg")))  # fmt: skip
        write_array_record(root / f"{size}/prepared", records)
        sources["array_record"] = open_source(root / f"{size}/prepared")
    if "webdataset" in names:
        write_tar(root / f"{size}/shard.tar", folder)
        sources["webdataset"] = open_source(root / f"{size}/shard.tar")
    if "tfds" in names:
        sources["tfds"] = open_source(build_tfds(root / f"{size}/tfds", folder))
    if "arrays" in names:
        records = [sources["folder"][number] for number in range(IMAGES)]
        images = np.stack([record["image"] for record in records])
        sources["arrays"] = ArraySource(images, [record["caption"] for record in records])
    return {name: sources[name] for name in names}


def open_loader(source: Source, size: int, workers: int) -> Loader:
    """Return the loader that is measured."""
    transforms = (CenterCrop(size), RandomFlip(), Select(("image", "caption")))
    return make_loader(source, batch_size=BATCH, seed=0, transforms=transforms, num_workers=workers)


def images_per_second(source: Source, size: int, workers: int, seconds: float) -> tuple[float, float]:
    """Read for some seconds, after all workers have started and filled their buffers.

    Returns:
        Images per second, and per second of processor time of the workers.
    """
    with open_loader(source, size, workers) as loader:
        for _ in range(16):  # more than the buffers hold
            next(loader)
        begin, used, count = time.perf_counter(), processor_seconds(), 0
        while time.perf_counter() - begin < seconds:
            count += len(next(loader)["image"])
        return count / (time.perf_counter() - begin), count / (processor_seconds() - used)


def processor_seconds() -> float:
    """Return the processor time of all worker processes so far."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def megabytes(pid: int | str) -> float:
    """Return the memory of a process in MB, pages shared with others in equal parts."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:", 1)[1].split()[0]) / 1000


def watch_memory(sources: dict[str, Source], size: int, minutes: float, pause: float) -> None:
    """Read all sources in turn, and print the memory of this process and of its workers."""
    rows, count, begin = [], 0, time.monotonic()
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(open_loader(source, size, 1)) for source in sources.values()]
        while (seconds := time.monotonic() - begin) < 60 * minutes:
            for loader in loaders:
                count += len(next(loader)["image"])
            time.sleep(pause)
            if not rows or seconds - rows[-1][0] >= 3 * minutes:
                workers = sum(megabytes(child.pid) for child in multiprocessing.active_children())
                rows.append((seconds, megabytes("self"), workers))
                print(f"{seconds / 60:6.1f} min {count:9d} images   process {rows[-1][1]:7.1f} MB", end="")
                print(f"   {len(loaders)} workers {workers:7.1f} MB", flush=True)
    totals = np.array([process + workers for _, process, workers in rows])
    early, late = totals[len(totals) // 4 : len(totals) // 2].mean(), totals[3 * len(totals) // 4 :].mean()
    print(f"growth from the second to the last quarter: {late - early:+.1f} MB of {late:.0f} MB, {count} images")


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--sizes", nargs="+", type=int, default=(64, 256))
    parser.add_argument("--workers", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--minutes", type=float, help="minutes of the memory measurement, at the first of the sizes")
    parser.add_argument("--pause", type=float, default=0, help="seconds between batches, with --minutes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        sources = {size: make_sources(Path(root), size, args.sources) for size in args.sizes}
        if args.minutes:
            watch_memory(sources[args.sizes[0]], args.sizes[0], args.minutes, args.pause)
            return
        print(f"images/s, batches of {BATCH}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        columns = [(size, workers) for size in args.sizes for workers in args.workers]
        print(" " * 14 + "".join(f"{f'{size} px, {workers} w':>14}" for size, workers in columns))
        for name in args.sources:
            speeds = [images_per_second(sources[size][name], size, workers, args.seconds) for size, workers in columns]
            print(f"{name:14}" + "".join(f"{f'{speed:.0f} ({cpu:.0f})':>14}" for speed, cpu in speeds), flush=True)


if __name__ == "__main__":
    main()
