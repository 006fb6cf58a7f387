"""Text for people."""


def clean(text: str, limit: int = 300) -> str:
    """The first line of an exception's text, shortened."""
    return next(iter(text.strip().splitlines()), "")[:limit]
