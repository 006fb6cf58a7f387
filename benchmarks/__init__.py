"""Measurements. Each script prints ratios within one run. RESULTS.md keeps the results, with machine and method."""
