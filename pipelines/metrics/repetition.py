"""Detects captions that repeat themselves, the failure of a decoder that never ends its caption."""

import re
from collections.abc import Sequence

MAX_PERIOD = 12  # tokens in the longest phrase whose repetition counts as a loop
MIN_TURNS = 3  # turns of a loop: "very very" is still normal speech
_PIECES = re.compile(r"\w+|[^\w\s]")


def pieces(caption: str) -> list[str]:
    """Words and single punctuation marks in lower case. Punctuation stays, because dots can loop as well."""
    return _PIECES.findall(caption.lower())


def repeated_share(tokens: Sequence[str], n: int = 4) -> float:
    """Share of the n-grams that occurred before in the same caption, in [0, 1); 0 without n-grams.

    Raises:
        ValueError: if n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop_turns(tokens: Sequence[str]) -> int:
    """How often the end of the caption repeats one phrase of up to 12 tokens without a break; 1 is no repetition.

    The last turn may be cut, as by a limit of tokens; only complete turns count. Read backwards, a loop of period p is
    a run of tokens that equal the token p places later, so no alignment of turns is needed.
    """
    backwards, best = list(reversed(tokens)), 1
    for period in range(1, min(MAX_PERIOD, len(tokens) // 2) + 1):
        same = 0
        while same + period < len(backwards) and backwards[same] == backwards[same + period]:
            same += 1
        best = max(best, same // period + 1)
    return best


def is_loop(caption: str) -> bool:
    """Whether the caption ends in a loop of at least three turns."""
    return loop_turns(pieces(caption)) >= MIN_TURNS
