"""Whole pipelines: load one, and generate."""

from ddpm_jax.errors import LoadError
from ddpm_jax.pipelines.cascade import Cascade
from ddpm_jax.pipelines.description import PipelineDescription
from ddpm_jax.pipelines.directory import load, save
from ddpm_jax.pipelines.request import NotFiniteError
from ddpm_jax.pipelines.unclip import UnCLIP

__all__ = ["Cascade", "LoadError", "NotFiniteError", "PipelineDescription", "UnCLIP", "load", "save"]
