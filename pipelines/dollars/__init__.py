"""Prices, what nodes are held for, where the dollars went, and the cap."""
