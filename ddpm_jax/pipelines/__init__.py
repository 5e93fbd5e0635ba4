"""Whole pipelines: load one, and generate."""

from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.pipelines.unclip import UnCLIP
from ddpm_jax.pipelines.weights import LoadError, load, save_file

__all__ = ["LoadError", "NotFiniteError", "UnCLIP", "load", "save_file"]
