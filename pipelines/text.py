"""Shortens texts for logs and messages."""


def clean(text: str, limit: int = 300) -> str:
    """The first line of `text` (of an exception, say), cut to `limit` characters; empty if the text is empty."""
    return next(iter(text.strip().splitlines()), "")[:limit]
