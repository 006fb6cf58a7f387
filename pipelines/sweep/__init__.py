"""Runs a grid of caption jobs, and advises which setting to buy."""
