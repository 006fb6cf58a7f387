"""Measures the quality of captions without questions."""
