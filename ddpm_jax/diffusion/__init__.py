"""Processes, losses, guidance, samplers and likelihoods: pure functions of arrays and callables."""
