"""Evaluations: find, answer and score the questions of benchmarks; compare methods and retentions in a grid."""
