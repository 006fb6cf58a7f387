"""The engines, which decode the pruned prompts, and the code that all engines share."""
