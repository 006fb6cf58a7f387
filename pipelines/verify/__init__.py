"""Proofs that an output holds every input row exactly once."""
