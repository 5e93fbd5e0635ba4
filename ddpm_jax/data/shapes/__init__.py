"""Captioned shapes: an endless image-and-text data set that is computed, not downloaded."""
