"""Whole pipelines: load one, and generate."""

from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.pipelines.weights import LoadError, load, save_file

__all__ = ["LoadError", "UnCLIP", "load", "save_file"]
