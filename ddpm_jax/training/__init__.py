"""Training: stages, tasks and the one loop. `train(stage, workdir)` is all that a notebook needs."""

from ddpm_jax.training.stage import Stage, Training
from ddpm_jax.training.tasks import (
    AutoregressiveTask,
    BinomialTask,
    Captions,
    ClassifierTask,
    CodesTask,
    ContrastiveTask,
    DiffusionTask,
    Embeddings,
    ImageEmbedding,
    Images,
    Labels,
    LowResolution,
    NoisedContrastiveTask,
    StatisticsTask,
    Tokens,
    Vectors,
)

__all__ = [
    "AutoregressiveTask",
    "BinomialTask",
    "Captions",
    "ClassifierTask",
    "CodesTask",
    "ContrastiveTask",
    "DiffusionTask",
    "Embeddings",
    "ImageEmbedding",
    "Images",
    "Labels",
    "LowResolution",
    "NoisedContrastiveTask",
    "Stage",
    "StatisticsTask",
    "Tokens",
    "Training",
    "Vectors",
    "train",
]


def __getattr__(name: str) -> object:
    """Import `train` when it is used: it needs the extra "train", and a stage is described without it."""
    if name == "train":
        from ddpm_jax.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
