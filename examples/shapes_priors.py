"""Both priors on captioned shapes: `python examples/shapes_priors.py --workdir DIR [--num_captions 512]`.

DIR is a run of

    python -m ddpm_jax.train --config configs/shapes.py --config.priors=both --workdir DIR

For each prior and each way to sample it, prints how many images have all attributes of their captions right: with the
prior's embedding alone, where the images show what the prior says, and with the caption beside it. Results are kept in
DIR/priors.json, so that an interrupted measurement goes on.
"""

import argparse
import json
from pathlib import Path

from ddpm_jax.compilation_cache import use_compilation_cache
from ddpm_jax.diffusion.sampling import Sampling
from ddpm_jax.diffusion.tokens import TokenSampling
from ddpm_jax.evaluation.faithfulness import wilson_interval
from ddpm_jax.evaluation.measure import measure
from ddpm_jax.pipelines import UnCLIP, load
from ddpm_jax.storage.json_file import write_json
from ddpm_jax.storage.model_directory import open_model

VARIANCES = {"ancestral": "fixed", "analytic": "analytic"}


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


if __name__ == "__main__":
    main()
