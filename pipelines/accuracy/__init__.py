"""Benchmarks: questions found, asked and scored; grids of methods and retentions; their pages and tables."""
