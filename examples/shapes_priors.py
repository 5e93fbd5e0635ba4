"""Both priors on captioned shapes: `python examples/shapes_priors.py --workdir DIR [--num_captions 512]`.

DIR is a run of

    python -m ddpm_jax.train --config configs/shapes.py --config.priors=both --workdir DIR

For each prior and each way to sample it, prints how many images have all attributes of their captions right: with the
prior's embedding alone, where the images show what the prior says, and with the caption beside it. Results are kept in
DIR/priors.json, so that an interrupted measurement of this first table goes on.

Then, for each way that draws one candidate, how much the embeddings of one caption vary: E |z - E z|^2 over 8 draws for
each of 256 captions (whatever --num_captions is), beside E |z_true - E z|^2, what the caption leaves open of the true
embedding and the prior does not know. A prior that draws from the right distribution has both alike.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from ddpm_jax.compilation_cache import use_compilation_cache
from ddpm_jax.data.shapes.scenes import ShapesSource
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.diffusion.tokens import TokenSampling
from ddpm_jax.evaluation.faithfulness import wilson_interval
from ddpm_jax.evaluation.measure import measure
from ddpm_jax.pipelines import UnCLIP, load
from ddpm_jax.pipelines.manipulation import embed_images
from ddpm_jax.pipelines.request import tokenize
from ddpm_jax.storage.json_file import write_json
from ddpm_jax.storage.model_directory import open_model

VARIANCES = {"ancestral": "fixed", "analytic": "analytic"}
CAPTIONS, DRAWS = 256, 8  # of the second table


def cases(workdir: Path) -> dict[str, UnCLIP]:
    """Return the pipelines that are compared, by name."""
    by_diffusion = load(workdir)
    prior, codes = open_model(workdir / "ar_prior"), open_model(workdir / "codes")
    others = {name: own for name, own in by_diffusion.sampling.items() if name != "prior"}
    by_codes = by_diffusion.replace(prior=prior, codes=codes, sampling=others | {"prior": TokenSampling()}).checked()
    found = {f"autoregressive, best of {n}": by_codes.replace(candidates=n) for n in (1, 2, 4)}
    for steps in (8, 16, 64):
        for sampler, variance in VARIANCES.items():
            sampling = others | {"prior": Sampling(sampler, str(steps))}
            for n in (1, 2, 4):
                pipeline = by_diffusion.replace(candidates=n, sampling=sampling).checked()
                found[f"diffusion, {steps} steps, {variance} variance, best of {n}"] = pipeline
    return found


@jax.jit
def draw(pipeline: UnCLIP, tokens: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
    """Draw an embedding for each caption, float32[B, D]."""
    return pipeline.sample_embedding(pipeline.encode_text(tokens, mask), tokens, jax.random.split(key, len(tokens)))


def variation(pipeline: UnCLIP, seed: int) -> dict[str, float]:
    """Return E |z - E z|^2 of the embeddings of one caption, E |z_true - E z|^2, and the mean cosine to z_true."""
    source = ShapesSource(seed, pipeline.clip.network.vision.image_size, "single", length=CAPTIONS)
    records = [source[index] for index in range(CAPTIONS)]
    true = embed_images(pipeline, [record["image"] for record in records]).astype(np.float64)
    captions = [record["caption"] for record in records]
    texts = tokenize(pipeline.tokenizer, captions, pipeline.clip.metadata["length"], allow_empty=False)
    pipeline, keys = pipeline.replace(tokenizer=None), jax.random.split(jax.random.key(seed), DRAWS)
    z = np.stack([draw(pipeline, *texts, key) for key in keys]).astype(np.float64)
    within = z.var(0, ddof=1).sum(-1).mean()
    # The mean of a few draws is off by within / DRAWS.
    error = np.square(true - z.mean(0)).sum(-1).mean() - within / DRAWS
    return {"varies": within, "open": error, "cosine": (z * true).sum(-1).mean()}


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--num_captions", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1, help="of captions and noise")
    arguments = parser.parse_args()
    use_compilation_cache()
    file, options = arguments.workdir / "priors.json", {"num_captions": arguments.num_captions, "seed": arguments.seed}
    found = json.loads(file.read_text()) if file.exists() else options | {"all right": {}}
    if {name: found.get(name) for name in options} != options:
        raise SystemExit(f"error: {file} has results of another number of captions or seed; move it away")
    print("| prior | embedding alone | 95 % interval | with the caption | 95 % interval |\n" + "| --- " * 5 + "|")
    for name, pipeline in cases(arguments.workdir).items():
        rates = found["all right"].setdefault(name, {})
        for use_text in (False, True):
            if str(use_text) not in rates:
                result = measure(pipeline, "single", embedding="prior", use_text=use_text, progress=False, **options)
                rates[str(use_text)] = result["rates"]["all"]
                write_json(file, found)
        cells = [name]
        for rate in (rates["False"], rates["True"]):
            low, high = wilson_interval(round(rate * arguments.num_captions), arguments.num_captions)
            cells += [f"{100 * rate:.1f} %", f"{100 * low:.1f}-{100 * high:.1f} %"]
        print("| " + " | ".join(cells) + " |", flush=True)
    moments = load(arguments.workdir).prior.moments
    if moments is not None:
        shown = ", ".join(f"{moments[t]:.3g} (t = {t})" for t in (0, 50, 100, 200, 400, 800) if t < len(moments))
        print(f"\nE |eps_hat|^2 / D of the diffusion prior: {shown}")
    print(f"\n{CAPTIONS} captions, {DRAWS} embeddings of each\n")
    print("| prior | varies | open | cosine to the true embedding |\n" + "| --- " * 4 + "|")
    for name, pipeline in cases(arguments.workdir).items():
        if pipeline.candidates == 1:
            row = variation(pipeline, arguments.seed)
            cells = (f"{row['varies']:.4f}", f"{row['open']:.4f}", f"{row['cosine']:.4f}")
            print("| " + " | ".join((name, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
