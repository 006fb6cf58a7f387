"""CHAIR: the objects that a caption mentions, those it invents, and those of the image it finds (Rohrbach et al. 2018).

    CHAIR_i  =  mentions of objects that are not there / mentions
    CHAIR_s  =  captions with such a mention / captions
    recall   =  objects of the images that their captions mention / objects of the images
    F1       =  harmonic mean of 1 - CHAIR_i and recall: one number that neither silence nor invention raises

A mention is a phrase of the vocabulary; the longest one counts, in the singular or plural. Every mention counts, also a
second one of the same object; an object of an image counts once, whatever its number.

Departures:
- The published code takes nouns to the singular with pattern.en and splits captions with NLTK; this module tries the
  regular plurals of English on the last word of a phrase.
- Captions say what they mean by more words than the published list of synonyms holds, so vocabularies are data
  (coco_objects.py), and corpora with other objects bring their own.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipelines.metrics.sums import ratio

COUNTS = ("captions", "with_invented", "mentions", "invented", "objects", "found")

_TOKENS = re.compile(r"[^\W_]+|[^\w\s]")
_IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"}
_FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "the", "and", "or", "but", "as", "while", "which", "that", "this", "these", "those", "it", "its"),
        *("with", "in", "on", "at", "of", "to", "by", "for", "from", "into", "onto", "over", "under", "between"),
        *("next", "near", "beside", "behind", "above", "below", "there", "their", "who"),
        *("is", "are", "was", "were", "be", "has", "have"),
    )
)
_NO_OBJECT = ""


class Mention(NamedTuple):
    """An object in a caption: its name, and the range of its tokens."""

    name: str
    start: int
    stop: int


class Chair(NamedTuple):
    """What a caption says of the objects of its image."""

    mentioned: list[str]  # name of the object of each mention, in order
    invented: list[str]  # those of them that are not there
    recall: float  # share of the objects there that are mentioned; 1 if none is there


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The phrases that name objects."""

    phrases: Mapping[tuple[str, ...], str]  # words -> name of the object, or "" for a phrase that names none
    adjectives: frozenset[str] = frozenset()  # names that are adjectives in front of a noun, as orange
    longest: int = field(default=1)  # words of the longest phrase

    @classmethod
    def of(
        cls, words: Mapping[str, Iterable[str]], *, no_objects: Iterable[str] = (), adjectives: Iterable[str] = ()
    ) -> "Vocabulary":
        """From object -> its synonyms. The name itself is a phrase, too.

        Args:
            no_objects: phrases that hold the name of an object and mean another thing, such as "train tracks".
            adjectives: objects whose name does not count where another word follows.
        """
        phrases = {tuple(split(text)): name for name, texts in words.items() for text in (name, *texts)}
        phrases |= {tuple(split(text)): _NO_OBJECT for text in no_objects}
        return cls(phrases, frozenset(adjectives), max(map(len, phrases), default=1))


def chair(
    caption: str, objects_present: Collection[str], vocabulary: Vocabulary | Mapping[str, Iterable[str]] | Sequence[str]
) -> Chair:
    """The objects that a caption mentions and invents, and the recall of those that are there.

    Args:
        objects_present: names of the objects in the image, as in the vocabulary.
        vocabulary: a `Vocabulary`, or object -> synonyms, or names alone.
    """
    there = set(objects_present)
    mentioned = [mention.name for mention in mentions(split(caption), as_vocabulary(vocabulary))]
    recall = len(there & set(mentioned)) / len(there) if there else 1.0
    return Chair(mentioned, [name for name in mentioned if name not in there], recall)


def chair_counts(caption: str, objects_present: Collection[str], vocabulary: Vocabulary) -> np.ndarray:
    """The counts of one caption, float64 [6] in the order of COUNTS; those of a corpus are their sum."""
    said, there = chair(caption, objects_present, vocabulary), set(objects_present)
    found = len(there & set(said.mentioned))
    return np.array([1, bool(said.invented), len(said.mentioned), len(said.invented), len(there), found], np.float64)


def chair_metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics [...] in [0, 1], from summed counts [..., 6]."""
    captions, with_invented, said, invented, objects, found = np.moveaxis(sums[..., : len(COUNTS)], -1, 0)
    precision, recall = 1 - ratio(invented, said), ratio(found, objects)
    return {
        "chair_s": ratio(with_invented, captions),
        "chair_i": ratio(invented, said),
        "object_recall": recall,
        "object_f1": ratio(2 * precision * recall, precision + recall),
    }


def as_vocabulary(words: Vocabulary | Mapping[str, Iterable[str]] | Sequence[str]) -> Vocabulary:
    """A vocabulary from any of the forms that `chair` takes."""
    if isinstance(words, Vocabulary):
        return words
    return Vocabulary.of(words if isinstance(words, Mapping) else {name: () for name in words})


def split(text: str) -> list[str]:
    """Words in lower case and punctuation marks; a hyphen parts words, and the ending 's is dropped."""
    text = text.lower().replace("\u2019", "'")
    return _TOKENS.findall(re.sub(r"'s\b", "", text).replace("-", " "))


def mentions(tokens: Sequence[str], vocabulary: Vocabulary) -> list[Mention]:
    """The objects that the tokens of a caption name, from left to right, the longest phrase first."""
    found, at = [], 0
    while at < len(tokens):
        for length in range(min(vocabulary.longest, len(tokens) - at), 0, -1):
            name = _name_of(tokens[at : at + length], vocabulary.phrases)
            if name is not None and not (name in vocabulary.adjectives and _describes(tokens, at + length)):
                found += [Mention(name, at, at + length)] if name else []
                at += length
                break
        else:
            at += 1
    return found


def _name_of(words: Sequence[str], phrases: Mapping[tuple[str, ...], str]) -> str | None:
    """The object that a phrase names, its last word in the singular or plural; None if it names none."""
    *rest, last = words
    forms = [last, _IRREGULAR.get(last, last)]
    if last.endswith("s"):
        forms += [last[:-1], last.removesuffix("es")]
        forms += [last[:-3] + "y"] if last.endswith("ies") else []
        forms += [last[:-3] + "fe", last[:-3] + "f"] if last.endswith("ves") else []
    return next((phrases[key] for form in forms if (key := (*rest, form)) in phrases), None)


def _describes(tokens: Sequence[str], after: int) -> bool:
    """Whether a content word follows, so that the word in front of it is an adjective."""
    return after < len(tokens) and tokens[after][0].isalnum() and tokens[after] not in _FUNCTION_WORDS
