"""Encoded bytes -> upright RGB pixels of the size that a model takes. No torch."""
