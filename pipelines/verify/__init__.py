"""Proves that an output holds every input row, or every question, exactly once."""
