"""Prepare a data set: any source becomes ArrayRecord shards of images of one size, with a manifest."""

from ddpm_jax.data.preparing.directory import OutputError
from ddpm_jax.data.preparing.part import Options, PrepareError
from ddpm_jax.data.preparing.run import Summary, prepare

__all__ = ["Options", "OutputError", "PrepareError", "Summary", "prepare"]
