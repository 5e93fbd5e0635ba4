"""The pipeline that a converted checkpoint is."""

from typing import Any

from ddpm_jax.storage.model_directory import Converted

PIPELINES = ("karlo", "stable-diffusion")


def pipeline_of(converted: Converted) -> Any:
    """Return the pipeline that a converted checkpoint is; one network alone is returned as it is."""
    from ddpm_jax.interop import families

    return families.pipeline_of(converted)
