"""Measures the quality of a sweep's points: health, scores against references, agreement with unpruned captions.

The advice uses `relative`: the quality of a point as a share of the unpruned model's quality on the same images. If the
corpus has references, `relative` is the ratio of the two CIDEr scores. Its interval comes from resampling images, with
both captions of an image together. Without references, `relative` is the mean ROUGE-L of the point's captions against
the unpruned captions, which is agreement, not accuracy. Of long captions, of which n-grams say little, it is the ratio
of the F1s of the objects that they name, where these are known (preflight/gate_metrics.py argues it).
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.corpus.truth import ImageKey, Truth, read_truth
from pipelines.metrics.agreement import health
from pipelines.metrics.bootstrap import bootstrap, percentile_interval, resampled_sums
from pipelines.metrics.cider import cider_d_scores
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.rouge import rouge_l
from pipelines.metrics.sums import ratio
from pipelines.preflight.gate_metrics import LONG, mean_words
from pipelines.quality.captions import (
    Address,
    address_of,
    measure_agreement,
    measure_references,
    measure_truth,
    read_captions,
    read_references,
    sample_order,
    sum_by_image,
)  # fmt: skip
from pipelines.quality.config import QualityConfig
from pipelines.store import Store
from pipelines.sweep.config import SweepConfig

Interval = tuple[float, float, float]  # value and the ends of its 95 % interval

RELATIVE_BY = {
    "cider": "CIDEr against the references",
    "rouge_l": "ROUGE-L against unpruned captions",
    "objects": "F1 of the objects named",
}


@dataclass(slots=True)
class Judge:
    """Measures points. Reads the references of each image once and keeps them for all points."""

    config: SweepConfig
    _references: dict[Address, list[str]] = field(default_factory=dict)
    _looked_up: set[Address] = field(default_factory=set)
    _truth: Truth | None = None
    _ids: dict[ImageKey, str] = field(default_factory=dict)  # of the images that the truth was asked about

    def measure(self, output: Store, unpruned: Store | None) -> dict[str, Any]:
        """The quality of a point's captions, as it stands in the record of the point.

        `references` is None without references; `agreement` and `relative` are None without a common unpruned image.

        Raises:
            UserError: if the output holds no captions.
        """
        rows = self._rows(output)
        captions = {address_of(row): row["caption"] for row in rows}
        references = self.references(captions)
        truth = self.truth(rows, references)
        resamples = self.config.sweep.resamples
        others = {} if unpruned is None else {address_of(row): row["caption"] for row in self._rows(unpruned)}
        by = self.metric(captions, others, references, truth)
        common = [address for address in captions if address in others]
        agreed = {key: captions[key] for key in common}
        return {
            "judged": self.settings,
            "captions": len(rows),
            "health": health([row["caption"] for row in rows], [row["finish_reason"] for row in rows]),
            "references": measure_references(captions, references, resamples) if references else None,
            "referenced": len(references),
            "objects": measure_truth(captions, truth, resamples) if truth else None,
            "agreement": measure_agreement(agreed, others, resamples) if common else None,
            "relative": self.relative(captions, others, by),
            "relative_by": RELATIVE_BY[by],
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a measured quality depends on, beside the captions."""
        sweep = self.config.sweep
        quality = self.config.quality
        return {
            "sample": sweep.sample,
            "resamples": sweep.resamples,
            "references": self.config.input.reference_column,
            "metric": sweep.metric,
            "objects": [quality.objects, quality.instances],
        }

    def metric(
        self,
        captions: Mapping[Address, str],
        unpruned: Mapping[Address, str],
        references: Mapping[Address, Sequence[str]],
        truth: Truth | None,
    ) -> str:
        """The metric of `relative`, by `sweep.metric`: a key of RELATIVE_BY."""
        if self.config.sweep.metric != "auto":
            return self.config.sweep.metric
        known = [address for address in captions if truth is not None and address[:2] in truth.objects]
        if unpruned and 2 * len(known) >= len(captions) and mean_words(list(unpruned.values())) > LONG:
            return "objects"
        return "cider" if references else "rouge_l"

    def relative(
        self, captions: Mapping[Address, str], unpruned: Mapping[Address, str], by: str = "cider"
    ) -> Interval | None:
        """Quality as a share of the unpruned model's quality; None if the two have no image in common to judge."""
        references, truth = self.references(captions), self._truth
        common = [address for address in captions if address in unpruned]
        if by == "cider":
            common = [address for address in references if address in unpruned]
        elif by == "objects":
            common = [address for address in common if truth is not None and address[:2] in truth.objects]
        if not common:
            return None
        if by == "objects" and truth is not None:
            rows = [
                np.concatenate([truth.counts(key[:2], texts[key]) for texts in (captions, unpruned)]) for key in common
            ]
        elif by == "cider":
            rows = list(zip(*(scores(texts, references, common) for texts in (captions, unpruned)), strict=True))
        else:
            rows = [[rouge_l(tokenize(captions[key]), [tokenize(unpruned[key])]), 1] for key in common]
        table = sum_by_image(common, rows)

        def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
            if by == "objects" and truth is not None:
                half = sums.shape[-1] // 2
                f1, other = (truth.metrics(part)["object_f1"] for part in (sums[..., :half], sums[..., half:]))
                return {"relative": ratio(f1, other)}
            return {"relative": ratio(sums[..., 0], sums[..., 1])}

        value = float(combine(table.sum(axis=0))["relative"])
        return (value, *bootstrap(table, combine, resamples=self.config.sweep.resamples)["relative"])

    def difference(self, output: Store, other: Store) -> Interval | None:
        """CIDEr (raw scale) of one output minus CIDEr of another, on the same images; None without references."""
        a, b = ({address_of(row): row["caption"] for row in self._rows(store)} for store in (output, other))
        references = self.references(a)
        common = [address for address in references if address in b]
        if not common:
            return None
        pairs = zip(*(scores(texts, references, common) for texts in (a, b)), strict=True)
        table = sum_by_image(common, [[score - other_score, 1] for score, other_score in pairs])
        sums = resampled_sums(table, self.config.sweep.resamples)
        total, count = table.sum(axis=0)
        return (float(total / count), *percentile_interval(sums[:, 0] / sums[:, 1]))

    def truth(self, rows: Sequence[dict[str, Any]], references: Mapping[Address, Sequence[str]]) -> Truth | None:
        """What is known of the objects of the captioned images. Read again only where a point has new images."""
        ids = {address_of(row)[:2]: row["id"] for row in rows}
        if not ids.keys() <= self._ids.keys():
            self._ids |= ids
            texts = {address[:2]: texts for address, texts in references.items()}
            self._truth = read_truth(self.config.quality, self.config.input, self._ids, texts)
        return self._truth

    def references(self, captions: Mapping[Address, str]) -> dict[Address, list[str]]:
        """The references of the captioned images that have some. Each row is looked up only once."""
        if missing := [address for address in captions if address not in self._looked_up]:
            config = QualityConfig(input=self.config.input, output=self.config.output)
            self._references |= read_references(config, missing)
            self._looked_up.update(missing)
        return {address: texts for address, texts in self._references.items() if address in captions}

    def _rows(self, output: Store) -> list[dict[str, Any]]:
        return heapq.nsmallest(self.config.sweep.sample, read_captions(output, "output.path"), key=sample_order)


def scores(
    captions: Mapping[Address, str], references: Mapping[Address, Sequence[str]], addresses: Sequence[Address]
) -> list[float]:
    """CIDEr (raw scale) of the captions at `addresses`."""
    known = {key: [tokenize(text) for text in references[key]] for key in addresses}
    done = cider_d_scores({key: tokenize(captions[key]) for key in addresses}, known)
    return [done[key] for key in addresses]
