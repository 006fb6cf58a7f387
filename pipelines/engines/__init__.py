"""What decodes the pruned prompts, one file an engine, and what all engines share."""
