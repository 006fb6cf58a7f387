"""What is known of the images of a corpus: the objects they show, from a file of COCO's or from drawn scenes.

coco     the objects of the instances file (quality.instances) whose image has the number in the row's id, and those
         that the row's reference captions name, as CHAIR was published; without a file, the references alone
shapes   the shapes of the demo world's scenes, from the JSON in the corpus's column `scene`
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.config.keys import InputConfig, QualitySection
from pipelines.corpus.find import Corpus, input_corpus
from pipelines.errors import UserError
from pipelines.metrics.chair import COUNTS, Vocabulary, chair_counts, chair_metrics, mentions, split
from pipelines.metrics.coco_objects import COCO, read_instances
from pipelines.metrics.shapes import SHAPES, Drawn, shape_counts, shape_metrics, shapes_of_scene, unsaid
from pipelines.store import STORE_ERRORS, make_store

SCENE = "scene"  # the column of the demo world's scenes

ImageKey = tuple[str, int]  # source, row


@dataclass(frozen=True, slots=True)
class Truth:
    """The objects of the images for which they are known."""

    vocabulary: Vocabulary
    objects: Mapping[ImageKey, frozenset[str]]
    shapes: Mapping[ImageKey, Sequence[Drawn]] = field(default_factory=dict)  # of drawn scenes alone

    def counts(self, image: ImageKey, caption: str) -> np.ndarray:
        """The counts of one caption, float64, from which `metrics` computes; those of several are their sum."""
        of_objects = chair_counts(caption, self.objects[image], self.vocabulary)
        return np.concatenate([of_objects, shape_counts(caption, self.shapes[image])]) if self.shapes else of_objects

    def metrics(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """CHAIR, recall and F1 of the objects; of drawn scenes, also how right colours, sizes and places are."""
        of_shapes = shape_metrics(sums[..., len(COUNTS) :]) if self.shapes else {}
        return chair_metrics(sums[..., : len(COUNTS)]) | of_shapes

    def unsaid(self, sums: np.ndarray) -> set[str]:
        """The metrics of which the summed counts of all captions say nothing."""
        return unsaid(sums[len(COUNTS) :]) if self.shapes else set()


def read_truth(
    quality: QualitySection,
    corpus: InputConfig,
    ids: Mapping[ImageKey, str],
    references: Mapping[ImageKey, Sequence[str]],
) -> Truth | None:
    """The truth about the images with these ids; None if `quality.objects` is none, or auto and nothing is known.

    Args:
        references: captions of images that have some.

    Raises:
        UserError: if what `quality.objects` names is not there or not readable.
    """
    if quality.objects == "none":
        return None
    if quality.objects == "coco" or quality.instances:
        return _of_coco(quality.instances, ids, references)
    try:
        scenes = _scenes(corpus, ids)
    except UserError:
        if quality.objects == "auto":
            return None
        raise
    if not scenes:
        return None
    kinds = {key: frozenset(shape.kind for shape in shapes) for key, shapes in scenes.items()}
    return Truth(SHAPES, kinds, scenes)


def read_texts(corpus: InputConfig, column: str, images: Iterable[ImageKey]) -> dict[ImageKey, list[str]]:
    """The texts in a column of the corpus, for those of the images that have any.

    Raises:
        UserError: as of `input_corpus`, or if there is no such column.
    """
    found = open_corpus(corpus, column)
    by_source: dict[str, list[int]] = defaultdict(list)
    for source, row in dict.fromkeys(images):
        by_source[source].append(row)
    texts: dict[ImageKey, list[str]] = {}
    for file in found.files:
        if rows := by_source.get(file.source):
            in_file = found.format.references(found.store, file, found.columns, rows)
            texts |= {(file.source, row): in_file[row] for row in rows if row in in_file}
    return texts


def open_corpus(corpus: InputConfig, reference_column: str) -> Corpus:
    """The corpus, with this column as that of its references.

    Raises:
        UserError: as of `input_corpus`.
    """
    return input_corpus(corpus, reference_column=reference_column)


def _of_coco(file: str | None, ids: Mapping[ImageKey, str], references: Mapping[ImageKey, Sequence[str]]) -> Truth:
    objects: dict[ImageKey, set[str]] = {}
    if file:
        store, _, name = file.rpartition("/")
        try:
            content = make_store(store or ".").read(name)
        except STORE_ERRORS as error:
            raise UserError(f"quality.instances {file} cannot be read: {type(error).__name__}: {error}") from error
        try:
            known = read_instances(content)
        except ValueError as error:
            raise UserError(f"quality.instances {file} {error}") from error
        numbers = {key: int(digits[-1]) for key, name in ids.items() if (digits := re.findall(r"\d+", name))}
        objects = {key: set(known[number]) for key, number in numbers.items() if number in known}
        if not objects:
            example = next(iter(ids.values()), "no id")
            raise UserError(
                f"quality.instances must know images of the corpus by the number in their id, got {example}"
            )
    for key in ids:
        if key in objects or (not file and key in references):
            named = (mention.name for text in references.get(key, ()) for mention in mentions(split(text), COCO))
            objects.setdefault(key, set()).update(named)
    if not objects:
        raise UserError("quality.objects=coco needs quality.instances, or a corpus with references; found neither")
    return Truth(COCO, {key: frozenset(there) for key, there in objects.items()})


def _scenes(corpus: InputConfig, images: Iterable[ImageKey]) -> dict[ImageKey, list[Drawn]]:
    """The shapes of the images whose scene the corpus has."""
    if not corpus.path:
        return {}
    texts = read_texts(corpus, SCENE, images)
    try:
        return {key: shapes_of_scene(json.loads(text)) for key, (text, *_) in texts.items()}
    except ValueError as error:
        raise UserError(f"quality.objects=shapes: column {SCENE} of {corpus.path}: {error}") from error
