"""Measurements of what a model makes."""
