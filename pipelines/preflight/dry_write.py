"""The last stage of a sample run: what `stages/write.py` would write is made, weighed and thrown away.

A module of its own, since the tasks that run it import it: with `sample.py` they would load torch and all models' code.
"""

import json
from typing import Any

from pipelines.output.parts import encode_table
from pipelines.stages.unit_batch import UnitBatch
from pipelines.stages.write import Sink, summarize, totals
from pipelines.text import clean


class SampleSink(Sink):
    """A sink that writes nothing; its summaries also say how many bytes it would have written."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch, sizes = UnitBatch.from_row(row), (0, 0.0)
        if unit_batch.error is None:
            try:
                with unit_batch.timed("write"):
                    sizes = self._sizes(unit_batch)
            except Exception as error:
                unit_batch.error = f"write: {type(error).__name__}: {clean(str(error))}"
        more = {"output_bytes": sizes[0], "object_bytes": sizes[1]}
        return {"summary": json.dumps(summarize(unit_batch) | more)}

    def _sizes(self, unit_batch: UnitBatch) -> tuple[int, float]:
        """Bytes of all the unit's objects, and of its captions object what does not grow with the rows in it."""
        whole = {name: len(content) for name, content in self.objects(unit_batch).items()}
        rows = self.rows(unit_batch, **self.names)
        half = len(rows) // 2
        if not half:
            return sum(whole.values()), float(list(whole.values())[-1])
        metadata = {**totals(unit_batch), "sources": unit_batch.unit.sources}
        part, full = (len(encode_table(some, self.schema, metadata)) for some in (rows[:half], rows))
        return sum(whole.values()), max(0.0, full - (full - part) / (len(rows) - half) * len(rows))
