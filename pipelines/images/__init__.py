"""Turns encoded bytes into upright RGB pixels of the size that a model takes. Imports no torch."""
