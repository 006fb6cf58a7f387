"""Shortens texts for logs and messages."""

from pipelines.secrets import without_secrets


def clean(text: str, limit: int = 300) -> str:
    """The first line of `text` (of an exception, say) without secrets, cut to `limit` characters; empty if there is
    none."""
    return without_secrets(next(iter(text.strip().splitlines()), ""))[:limit]
