"""Tasks: a network, its loss and its previews. Each kind of loss has one module."""

from ddpm_jax.training.tasks.autoregressive import AutoregressiveTask
from ddpm_jax.training.tasks.binomial import BinomialTask
from ddpm_jax.training.tasks.classifier import ClassifierTask
from ddpm_jax.training.tasks.codes import CodesTask
from ddpm_jax.training.tasks.conditions import Captions, Condition, ImageEmbedding, Labels, LowResolution, Tokens
from ddpm_jax.training.tasks.contrastive import ContrastiveTask, NoisedContrastiveTask
from ddpm_jax.training.tasks.data import Embeddings, Images, Vectors
from ddpm_jax.training.tasks.diffusion import DiffusionTask
from ddpm_jax.training.tasks.statistics import StatisticsTask

__all__ = [
    "AutoregressiveTask",
    "BinomialTask",
    "Captions",
    "ClassifierTask",
    "CodesTask",
    "Condition",
    "ContrastiveTask",
    "DiffusionTask",
    "Embeddings",
    "ImageEmbedding",
    "Images",
    "Labels",
    "LowResolution",
    "NoisedContrastiveTask",
    "StatisticsTask",
    "Tokens",
    "Vectors",
]
