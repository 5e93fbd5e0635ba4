"""Data: the built-in captioned shapes, tokenizers, record transforms and the Grain loader."""
