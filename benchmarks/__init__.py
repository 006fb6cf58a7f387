"""Measurements. Each script prints ratios of one run; RESULTS.md keeps what was measured, where and how."""
