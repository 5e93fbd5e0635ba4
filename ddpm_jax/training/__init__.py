"""One training loop for every stage: state, optimizer, step, checkpoints, metrics, previews."""
