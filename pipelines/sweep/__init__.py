"""Grids of whole jobs, and which setting to buy."""
