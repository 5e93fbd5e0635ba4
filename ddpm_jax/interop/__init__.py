"""Other libraries' checkpoints: reading them never runs what they contain."""

from ddpm_jax.storage.tensor_file import ReadError, read_tensors

__all__ = ["ReadError", "read_tensors"]
