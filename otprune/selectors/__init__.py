"""Selectors: functions from tokens [B, N, D] to kept indices int64 [B, k], one file per method."""
