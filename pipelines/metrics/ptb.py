"""Cuts a caption into Penn-Treebank-like tokens, as the published caption scores count them, without Java.

The published scores tokenise with Stanford's PTBTokenizer 3.4.1 (lower-casing) and then drop quotes, sentence
punctuation and dashes. This module reproduces the result for captions. Clitics and `n't` are split off. Hyphenated,
slashed and dotted words stay whole. Acronyms and common abbreviations keep their dot. Brackets stay as `-lrb-`: the
published drop list names brackets in upper case, so it misses them after lower-casing.

Departures:
- A letter with the dot that ends the caption loses the dot: `the letter C.` ends in `c`. The original also looks behind
  the line break: it keeps the dot of `c.` unless the next caption of the file begins with A, The, It or the like, as
  captions do. Here no caption depends on its neighbour.
- The general rules cut shapes that captions hardly have: smileys, HTML entities, `1.2-1.3`, rare abbreviations.
  tests/metrics/test_ptb.py runs the original if Java is installed, and states the agreement.
"""

import re

_DROPPED = frozenset(("''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"))

# Characters that the original rewrites before or while it cuts tokens. The soft hyphen disappears.
_REWRITES = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u2039": "'", "\u203a": "'",
        "\u201c": '"', "\u201d": '"', "\u00ab": '"', "\u00bb": '"',
        "\u2013": " -- ", "\u2014": " -- ", "\u2015": " -- ", "\u2026": " ... ",
        "\u00bd": " 1/2 ", "\u00bc": " 1/4 ", "\u00be": " 3/4 ",
        "\u00a3": " # ", "\u20ac": " $ ", "\u00a2": " cents ",
        "\u00ad": None, "\u200b": " ",
    }
)  # fmt: skip

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_ABBREVIATIONS = (
    "mr mrs ms dr prof rev gen capt lt sgt col maj cpl pvt gov sen rep hon pres st ave blvd rd ft mt ct ste bldg sq "
    "dept univ assn est ext tel jr sr co inc ltd corp bros mfg intl natl etc vs al cf jan feb mar apr jun jul aug sep "
    "sept oct nov dec mon tue tues wed thu thurs fri calif fla mich minn va ky tenn ariz ind kan mo neb nev okla wis"
).replace(" ", "|")

# Words that open a sentence. If one of them follows a letter with a dot, the dot ends a sentence: no initial. So does
# the dot that ends a caption.
_OPENERS = "The A An In It He She There This That They We You Some At But Her As If Then When What Now".replace(
    " ", "|"
)

_LETTER = r"[^\W\d_]"
_WORD = r"[^\W_]+"  # letters and digits
_END = r"(?![\w'-])"  # not inside a longer word

# The order matters: at each position, the first shape that matches makes the next token.
_SHAPES = (
    r"</?[A-Za-z][^<>]*>",  # mark-up
    r"https?://\S+|www\.\S+|[\w.+-]+@[\w-]+(?:\.[\w-]+)*|(?<!\w)[@#][A-Za-z]\w*",
    rf"(?i:n't|'(?:s|m|d|ll|re|ve))(?!{_LETTER})",  # clitics
    rf"{_LETTER}+?(?=(?i:n't)(?!{_LETTER}))",  # do|n't
    rf"(?i:can(?=not{_END})|(?:gon|wan)(?=na{_END})|got(?=ta{_END})|(?:lem|gim)(?=me{_END}))",
    rf"(?i:'t(?=(?:is|was){_END})|y'(?=all))",
    r"'(?:\d\d(?i:s)?(?![\w'])|(?i:em|til|cause|n)(?![\w'])|(?i:n'))",  # '90s, 'em, 'n'
    r"(?i:ma'am|hawai'i|(?:\w+-)*[a-z]'(?!(?:ll|re|ve)\b)[a-z]{2,})(?:-\w+)*",  # o'clock, o'brien
    rf"{_LETTER}(?:\.{_LETTER})+(?!\w|\.{_LETTER})(?:\.(?:-\w+)*)?",  # u.s., d.v.d, u.s.-based
    rf"(?i:{_ABBREVIATIONS}|ph\.d)\.(?!\w)|(?i:no)\.(?=\s*\d)",
    rf"{_LETTER}\.(?!\w|\s*\Z|\s+(?:{_OPENERS})\b)",  # initials
    r"[A-Z]+(?:&[A-Z]+)+|[A-Z]+\$",  # B&W, US$
    rf"[-+]?\d*(?:[.,]\d+)+(?:-{_LETTER}+)*",  # 5.99, 10,000, .5, 1.5-inch
    r"[-+]?\d*(?::\d+)+|[-+]\d+",  # 5:54, -5
    rf"{_LETTER}[^\W_]*(?:[.!?]{_LETTER}[^\W_]*)+(?:-{_WORD})*",  # a missing space: ground.a
    rf"{_WORD}(?:[-_/]{_WORD})*",  # a-b, a/b, 12-inch
    r"[!?]+|\.{3,}|-{2,}|[*_#]{2,}|''",
    r"\S",
)
_TOKEN = re.compile("|".join(_SHAPES))


def tokenize(caption: str) -> list[str]:
    """The lower-case tokens of one caption, without the punctuation that caption scores drop.

    A line break counts as a space. An empty caption has no tokens.
    """
    tokens = (_BRACKETS.get(token) or token.lower() for token in _TOKEN.findall(caption.translate(_REWRITES)))
    return [part for token in tokens if not _is_dropped(token) for part in token.split()]


def _is_dropped(token: str) -> bool:
    return token in _DROPPED or not token.strip(".") or (token.startswith("--") and not token.strip("-"))
