"""Detects captions that repeat themselves, the failure of a decoder that never ends its caption.

A caption loops if its end repeats one phrase word for word, without a break:

    period p      a phrase of p pieces: words, punctuation marks, characters of scripts without spaces
    repeated      pieces at the end that equal the piece p places earlier; the first turn is not among them
    a loop        repeated >= 2 p (the phrase stands there three times) and repeated >= 12

So "no no no" on a sign, "a very, very, very big dog" and a list of three equal items are no loops, and neither are
sentences of one pattern that differ in a word. The last turn may be cut, within a word too, and up to two pieces may
follow it, such as a dot and a quote.
"""

import re
from collections.abc import Sequence

MIN_TURNS = 3  # turns of a loop
MIN_REPEATED = 12  # pieces of a loop behind its first turn: what a person repeats is shorter
MAX_TAIL = 2  # pieces behind a loop: the end of a sentence, or a word that the limit of tokens cut
MAX_WORD = 32  # letters of the longest word; what is longer counts letter by letter, as 000000...

_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Thai ... Han
_PIECES = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|[^\w\s]")


def pieces(caption: str) -> list[str]:
    """Words and single punctuation marks in lower case. Punctuation stays, because dots can loop as well.

    Scripts that write no spaces give one piece a character; so do words of more than 32 letters.
    """
    words = _PIECES.findall(caption.lower())
    return [piece for word in words for piece in (word if len(word) > MAX_WORD else (word,))]


def repeated_share(tokens: Sequence[str], n: int = 4) -> float:
    """Share of the n-grams that occurred before in the same caption, in [0, 1); 0 without n-grams.

    Raises:
        ValueError: if n is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop_period(tokens: Sequence[str]) -> int:
    """Number of pieces in the phrase that the very end of the text loops over, the shortest if several do; 0 if none.

    Read backwards, a loop of period p is a run of tokens that equal the token p places later, so no alignment of turns
    is needed. At most len^2 / 3 comparisons, of which all but a few per period end at once in text that does not loop.
    """
    backwards = tokens[::-1]
    for period in range(1, len(tokens) // MIN_TURNS + 1):
        needed = max((MIN_TURNS - 1) * period, MIN_REPEATED)
        if needed + period <= len(tokens) and all(backwards[i] == backwards[i + period] for i in range(needed)):
            return period
    return 0


def is_loop(caption: str) -> bool:
    """Whether the caption ends in a loop."""
    tokens = pieces(caption)
    return any(loop_period(tokens[: len(tokens) - tail]) for tail in range(MAX_TAIL + 1))
