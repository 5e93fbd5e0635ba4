"""What a training step or a sampler needs on a TPU, from the TPU's own compiler, without a TPU."""
