"""VQA accuracy as OK-VQA is scored: the EvalAI answer processor, then agreement with ten human answers.

Departures: none. The code keeps the known quirks of the processor, because published numbers contain them. The
look-behind that should spare decimals is mistyped, so every dot that no digit follows is deleted, at most 32 dots. `'s`
gets a space before contractions are mapped, so `it's` becomes `it 's`. A number word above ten stays a word.
"""

import re
from collections import Counter
from collections.abc import Sequence

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_DOT = re.compile(r"\.(?!\d)")
_MAX_DOTS = 32
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've "
    "must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've "
    "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've "
    "something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't "
    "we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll "
    "who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've"
)


def _contractions() -> dict[str, str]:
    """Every contraction without one of its apostrophes -> the contraction; plus the one reversed entry of the table."""
    table = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        for i, letter in enumerate(word):
            if letter == "'":
                table[word[:i] + word[i + 1 :]] = word
    return table


_CONTRACTIONS = _contractions()


def vqa_normalize(text: str) -> str:
    """The answer as the EvalAI processor compares it: lower case, no punctuation or articles, digits for numbers."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _process_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy in [0, 1]: mean over the answers of min(1, matches among the other answers / 3).

    With ten answers of which m match: 0, 0.3, 0.6, 0.9 for m = 0..3, and 1 from 4 on.

    Raises:
        ValueError: if there is no answer.
    """
    if isinstance(answers, str) or not len(answers):
        raise ValueError(f"answers must be a list of at least one answer, got {answers!r}")
    counts = Counter(map(vqa_normalize, answers))
    matching = counts[vqa_normalize(prediction)]
    # Each answer in turn is left out: a matching answer has matching - 1 others, every other answer has all of them.
    hit, miss = min(1.0, (matching - 1) / 3), min(1.0, matching / 3)
    return (matching * hit + (len(answers) - matching) * miss) / len(answers)


def _process_punctuation(text: str) -> str:
    """Deletes every mark that touches a space somewhere in the original text, and turns all other marks into spaces.

    If the text holds a comma inside a number, all marks are deleted.
    """
    result = text
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _MARKS:
        delete = comma_in_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if delete else " ")
    return _DOT.sub("", result, count=_MAX_DOTS)
