"""Both priors on captioned shapes: `python examples/shapes_priors.py --workdir DIR [--num_captions 512]`.

Fits the codes and trains the autoregressive prior of configs/shapes.py on the CLIP that the package carries, estimates
the second moments of its diffusion prior, and prints how many images have all attributes of their captions right, for
each prior and each way to sample it. The decoder is given the prior's embedding alone, without the caption, so that the
images show what the prior says. It goes on where it was interrupted.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import shapes  # noqa: E402
from ddpm_jax.compilation_cache import use_compilation_cache  # noqa: E402
from ddpm_jax.diffusion.sampling import Sampling  # noqa: E402
from ddpm_jax.diffusion.tokens import TokenSampling  # noqa: E402
from ddpm_jax.evaluation.faithfulness import wilson_interval  # noqa: E402
from ddpm_jax.evaluation.measure import measure  # noqa: E402
from ddpm_jax.pipelines import load  # noqa: E402
from ddpm_jax.pipelines.directory import BUNDLED  # noqa: E402
from ddpm_jax.storage.model_directory import open_model  # noqa: E402
from ddpm_jax.storage.moments import read_moments  # noqa: E402
from ddpm_jax.training import train  # noqa: E402
from ddpm_jax.training.moments import estimate_moments  # noqa: E402


def trained(workdir: Path, num_steps: int, examples: int):
    """Return the bundled pipeline with moments, and the same with the autoregressive prior."""
    config = shapes.get_config()
    config.priors = "both"
    config.ar_prior.training.update(num_steps=num_steps, checkpoint_every=200)
    by_name = {stage.name: stage for stage in shapes.stages(config)}
    clip = {"clip": str(BUNDLED / "clip")}
    codes = dataclasses.replace(by_name["codes"], needs=clip)
    by_codes = dataclasses.replace(by_name["ar_prior"], needs=clip | {"codes": "codes"})
    train([codes, by_codes], workdir)
    pipeline = load()
    stage, models = by_name["prior"], {"clip": pipeline.clip}
    source = stage.source.compute(models, workdir / "embeddings")
    records = [{"z_image": source[i]["z_image"]} | text(stage, source[i]) for i in range(examples)]
    estimate_moments(stage.task, pipeline.prior.params, models, records, workdir)
    moments = read_moments(workdir, pipeline.prior.diffusion.num_steps)
    by_diffusion = pipeline.replace(prior=pipeline.prior.replace(moments=moments))
    prior = open_model(workdir / "ar_prior")
    sampling = {name: own for name, own in pipeline.sampling.items() if name != "prior"}
    return by_diffusion, pipeline.replace(prior=prior, codes=open_model(workdir / "codes"), sampling=sampling)


def text(stage, record):
    """Return the tokens of a record, as the prior reads them."""
    for transform in stage.transforms:
        record = transform(record)
    return {name: record[name] for name in ("tokens", "mask", "z_text")}


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--num_captions", type=int, default=512)
    parser.add_argument("--num_steps", type=int, default=800, help="of the autoregressive prior")
    parser.add_argument("--moment_examples", type=int, default=512)
    arguments = parser.parse_args()
    use_compilation_cache()
    by_diffusion, by_codes = trained(arguments.workdir, arguments.num_steps, arguments.moment_examples)
    cases = []
    for candidates in (1, 2, 4):
        name = f"autoregressive, {candidates} candidate" + "s" * (candidates > 1)
        cases.append((name, by_codes.replace(candidates=candidates), TokenSampling()))
    for steps in (8, 16, 64):
        for sampler in ("ancestral", "analytic"):
            for candidates in (1, 2, 4):
                kind = {"ancestral": "fixed", "analytic": "analytic"}[sampler]
                name = f"diffusion, {steps} steps, {kind} variance, {candidates} candidate" + "s" * (candidates > 1)
                cases.append((name, by_diffusion.replace(candidates=candidates), Sampling(sampler, steps)))
    found = {}
    print("| prior | all right | 95 % interval |\n| --- | --- | --- |")
    for name, pipeline, sampling in cases:
        pipeline = pipeline.replace(sampling=dict(pipeline.sampling) | {"prior": sampling})
        options = {"num_captions": arguments.num_captions, "seed": 1, "progress": False}
        result = measure(pipeline, "single", embedding="prior", use_text=False, **options)
        rate, n = result["rates"]["all"], result["n"]
        low, high = wilson_interval(round(rate * n), n)
        found[name] = {"rate": rate, "n": n}
        print(f"| {name} | {100 * rate:.1f} % | {100 * low:.1f}-{100 * high:.1f} % |", flush=True)
    (arguments.workdir / "priors.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
