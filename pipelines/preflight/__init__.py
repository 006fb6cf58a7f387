"""Captions a sample before a corpus is paid for: the estimate, the gate and the canary."""
