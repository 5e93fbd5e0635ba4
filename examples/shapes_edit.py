"""Manipulations of captioned shapes, measured: `python examples/shapes_edit.py --out DIR [--workdir DIR] [--num 64]`.

Of held-out images: the error of reconstruction through (z_image, x_T) against the number of steps; the ends of
interpolations; text differences from "a red circle" towards "a blue circle", read by the oracle; and the share of
variations that keep what a caption leaves open. Prints tables, and writes figures and edit.json into --out.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

import ddpm_jax
from ddpm_jax.compilation_cache import use_compilation_cache
from ddpm_jax.data import image_grid
from ddpm_jax.data.shapes.scenes import Scene, ShapesSource, render
from ddpm_jax.data.transforms import resize_center_crop
from ddpm_jax.evaluation.faithfulness import judge, wilson_interval
from ddpm_jax.evaluation.oracle import read
from ddpm_jax.pipelines import manipulation as edit

SEED = 7  # of the held-out images: training and the evaluation of captions have others
THETAS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
ETAS = (0.0, 0.25, 0.5, 1.0)
SHOWN = 6
DEGREES, KEY = (0.0, 15.0, 30.0, 45.0, 60.0), jax.random.key(0)


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return 10 log10(255^2 / mean squared error) of each pair of images, float64[N]."""
    errors = np.square(images.astype(np.float64) - others).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(errors, 1e-10))


def scenes_of(num: int) -> list[Scene]:
    """Return held-out scenes of one object."""
    source = ShapesSource(SEED, 64, "single", length=num)
    return [source.scene(index) for index in range(num)]


def recoloured(scene: Scene, colour: str, shape: str) -> Scene:
    """Return the scene with another object at the same place, of the same size."""
    return dataclasses.replace(scene, objects=(dataclasses.replace(scene.objects[0], colour=colour, shape=shape),))


def rendered(scenes: list[Scene], size: int) -> np.ndarray:
    """Return uint8[N, size, size, 3]."""
    return np.stack([render(scene, size) for scene in scenes])


def share(flags: list[bool]) -> str:
    """Return a share with its 95 % Wilson interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    return f"{100 * np.mean(flags):.1f} % ({100 * low:.1f}-{100 * high:.1f})"


class Report:
    """Prints tables as Markdown, and keeps their numbers; writes grids of images."""

    def __init__(self, out: Path):
        self.out, self.numbers = out, {}
        out.mkdir(parents=True, exist_ok=True)

    def table(self, name: str, rows: list[dict[str, object]]) -> None:
        """Print and keep one table."""
        self.numbers[name] = rows
        print(f"\n{name}\n\n| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
        for row in rows:
            print(
                "| "
                + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
                + " |"
            )
        (self.out / "edit.json").write_text(json.dumps(self.numbers, indent=1) + "\n")

    def figure(self, name: str, images: np.ndarray, texts: list[str], first: np.ndarray | None = None) -> None:
        """Write a grid with a row for each of the first inputs; images: uint8[N, K, H, H, 3]."""
        images = images[:SHOWN]
        if first is not None:
            images = np.concatenate([first[:SHOWN, None], images], axis=1)
            texts = ["input", *texts]
        flat = images.reshape(-1, *images.shape[2:])
        image_grid.save_png(self.out / f"{name}.png", image_grid.grid(flat, texts * len(images), columns=len(texts)))


def reconstruction(pipeline, report: Report, num: int, all_steps: list[int]) -> edit.BipartiteLatent:
    """Measure the way through (z_image, x_T) and back; return the latents by the most steps."""
    images = rendered(scenes_of(num), pipeline.image_size)
    small = resize_center_crop(images, pipeline.decoder.metadata["image_size"])
    rows, shown = [], []
    for steps in all_steps:
        latent = edit.encode(pipeline, images, steps=edit.inversion_steps(pipeline, steps))
        low, high = (edit.decode(pipeline, latent, low_res=low_res) for low_res in (True, False))
        errors = psnr(low, small), psnr(high, images)
        rows.append(
            {
                "steps": steps,
                "PSNR of the decoder (dB)": float(errors[0].mean()),
                "worst": float(errors[0].min()),
                "PSNR of the upsampled image (dB)": float(errors[1].mean()),
                "worst upsampled": float(errors[1].min()),
            }
        )
        shown.append(high)
    report.table(f"Reconstruction of {num} images", rows)
    report.figure("reconstruction", np.stack(shown, axis=1), [f"{steps} steps" for steps in all_steps], images)
    return latent


def interpolation(pipeline, report: Report, num: int, latent: edit.BipartiteLatent) -> None:
    """Measure the ends of interpolations between consecutive images."""
    images, weights = rendered(scenes_of(num), pipeline.image_size), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    ends = latent.take(slice(0, -1)), latent.take(slice(1, None))
    found = edit.interpolate(pipeline, *ends, weights=weights)
    fixed = edit.interpolate(pipeline, *ends, weights=weights, noise="fixed")
    errors = psnr(found[:, 0], images[:-1]), psnr(found[:, -1], images[1:])
    row = {"pairs": num - 1, "PSNR of the first end (dB)": errors[0].mean(), "of the second": errors[1].mean()}
    report.table("Interpolation, x_T interpolated", [row])
    texts = [f"{weight:.1f}" for weight in weights]
    report.figure("interpolation", found, texts)
    report.figure("interpolation_fixed_noise", fixed, texts)


def text_difference(pipeline, report: Report, num: int, steps: int) -> None:
    """Measure text differences by the oracle."""
    scenes = [recoloured(scene, "red", "circle") for scene in scenes_of(num)]
    wanted = [recoloured(scene, "blue", "circle") for scene in scenes]
    images = rendered(scenes, pipeline.image_size)
    latent = edit.encode(pipeline, images, steps=edit.inversion_steps(pipeline, steps))
    found, rows = edit.text_diff(pipeline, latent, "a red circle", "a blue circle", thetas=THETAS), []
    for column, theta in enumerate(THETAS):
        verdicts = [judge(scene, read(image)) for scene, image in zip(wanted, found[:, column])]
        kept = [verdict["shape"] and verdict["size"] and verdict["position"] for verdict in verdicts]
        rows.append(
            {"theta": theta, "blue": share([verdict["colour"] for verdict in verdicts])}
            | {name: share([verdict[name] for verdict in verdicts]) for name in ("shape", "size", "position")}
            | {"shape, size and position": share(kept)}
            | {"background": share([verdict["background"] for verdict in verdicts])}
        )
    report.table(f'Text difference from "a red circle" to "a blue circle", {num} images', rows)
    report.figure("text_diff", found, [f"theta {theta:g}" for theta in THETAS], images)


def variation(pipeline, report: Report, num: int, latent: edit.BipartiteLatent, count: int) -> None:
    """Measure which share of variations keep what the caption leaves open."""
    scenes = scenes_of(num)
    images, rows, shown = rendered(scenes, pipeline.image_size), [], []
    captions = [f"a {scene.objects[0].colour} {scene.objects[0].shape}" for scene in scenes]
    for with_caption in (False, True):
        prompts = {"prompts": captions} if with_caption else {}
        for eta in (*ETAS, None):
            given = latent if eta is not None else latent.without_noise()
            found = edit.variations(pipeline, given, count=count, eta=eta, **prompts)
            verdicts = [judge(scene, read(image)) for scene, row in zip(scenes, found) for image in row]
            rows.append(
                {"caption": captions[0] if with_caption else "none", "noise": "new" if eta is None else f"eta {eta:g}"}
                | {name: share([v[name] for v in verdicts]) for name in ("colour", "shape")}
                | {name: share([v[name] for v in verdicts]) for name in ("size", "background", "position")}
            )
            if not with_caption:
                shown.append(found[:, 0])
    report.table(f"{count} variations of each of {num} images", rows)
    report.figure("variations", np.stack(shown, axis=1), [*(f"eta {eta:g}" for eta in ETAS), "new noise"], images)


def others(pipeline, report: Report, latent: edit.BipartiteLatent, num_pca: int) -> None:
    """Write the figures of what is looked at, and not measured."""
    latent = latent.take(slice(0, SHOWN))
    scenes, size = scenes_of(SHOWN), pipeline.image_size
    images = rendered(scenes, size)
    source = ShapesSource(SEED + 1, size, "train", length=num_pca)
    pca = edit.fit_pca(edit.embed_images(pipeline, [source[index]["image"] for index in range(num_pca)]))
    dims = [dims for dims in (2, 4, 8, 16, 32, 64) if dims <= pca.components.shape[1]]
    found = edit.reconstruct(pipeline, latent.without_noise(), pca, dims)
    report.figure("reconstruct", found, [f"{number} dimensions" for number in dims], images)
    keep = np.ones((size, size), bool)
    keep[:, size // 2 :] = False
    filled = edit.inpaint(pipeline, images, keep, embedding="image", resample=4)
    wider = edit.outpaint(pipeline, images, extent=0.5, resample=4)
    report.figure("inpaint", np.stack([filled, wider], axis=1), ["right half inpainted", "outpainted"], images)
    prompts = ["a large blue star", "a circle on a black background", "a small yellow heart"]
    report.figure("caption", edit.recaption(pipeline, latent.without_noise(), prompts), prompts, images)
    turned = [latent.without_noise().replace(z_image=edit.perturbed(latent.z_image, angle, KEY)) for angle in DEGREES]
    probed = [edit.decode(pipeline, each) for each in turned]
    report.figure("probe", np.stack(probed, axis=1), [f"{angle:g} degrees" for angle in DEGREES], images)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workdir", help="of a trained pipeline; the bundled one if none")
    parser.add_argument("--num", type=int, default=64, help="images of each measurement, at least 2")
    parser.add_argument("--steps", default="10,25,50,100,250", help="numbers of steps, of which the last is used")
    parser.add_argument("--variations", type=int, default=4, help="of each image")
    parser.add_argument("--num_pca", type=int, default=1000, help="images that principal components are fitted to")
    given = parser.parse_args()
    use_compilation_cache()
    steps = [int(number) for number in given.steps.split(",")]
    pipeline, report = ddpm_jax.load(given.workdir), Report(given.out)
    latent = reconstruction(pipeline, report, given.num, steps)
    interpolation(pipeline, report, given.num, latent)
    text_difference(pipeline, report, given.num, steps[-1])
    variation(pipeline, report, given.num, latent, given.variations)
    others(pipeline, report, latent, given.num_pca)
    print(f"\nwrote figures and edit.json into {given.out}")


if __name__ == "__main__":
    main()
