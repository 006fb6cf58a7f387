"""The last stage of a sample run: makes the objects that `stages/write.py` would write, and only counts their bytes.

The tasks of this stage import this module. In `sample.py` they would also load torch and the code of all models.
"""

import json
from typing import Any

from pipelines.output.parts import encode_table
from pipelines.stages.unit_batch import UnitBatch
from pipelines.stages.write import Sink, summarize, totals
from pipelines.text import clean


class SampleSink(Sink):
    """A sink that writes nothing. Its summaries also count the bytes that a real sink would write."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch, sizes = UnitBatch.from_row(row), (0, 0.0)
        if unit_batch.error is None:
            try:
                with unit_batch.timed("write"):
                    sizes = self._sizes(unit_batch)
            except Exception as error:
                unit_batch.error = f"write: {type(error).__name__}: {clean(str(error))}"
        extra = {"output_bytes": sizes[0], "object_bytes": sizes[1]}
        return {"summary": json.dumps(summarize(unit_batch) | extra)}

    def _sizes(self, unit_batch: UnitBatch) -> tuple[int, float]:
        """(bytes of all objects of the unit, bytes of its captions object that do not grow with the rows).

        The second number is where the line through the bytes of half the rows and of all rows meets no rows.
        """
        sizes = {name: len(content) for name, content in self.objects(unit_batch).items()}
        rows = self.rows(unit_batch, **self.names)
        half = len(rows) // 2
        if not half:
            return sum(sizes.values()), float(list(sizes.values())[-1])  # the captions object comes last
        metadata = {**totals(unit_batch), "sources": unit_batch.unit.sources}
        half_bytes, all_bytes = (len(encode_table(subset, self.schema, metadata)) for subset in (rows[:half], rows))
        bytes_per_row = (all_bytes - half_bytes) / (len(rows) - half)
        return sum(sizes.values()), max(0.0, all_bytes - bytes_per_row * len(rows))
