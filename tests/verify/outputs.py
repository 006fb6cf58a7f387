"""Outputs of a caption job, written without a cluster, of which every detail can be got wrong."""

import json
from pathlib import Path
from typing import Any

from pipelines.output.fingerprint import FILE, fingerprint
from pipelines.output.unit import Unit
from pipelines.stages.unit_batch import Answer, Image, Rejected, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store

CLAIM = {
    "prompt.template": "describe the image .",
    "prompt.more": ["is it day ?"],
    "input.image_column": "auto",
    "input.id_column": "auto",
}
MINE = fingerprint(CLAIM)
SHA256 = "0" * 64
DONE = Answer("a picture", num_kept_tokens=5, num_prompt_tokens=9, num_generated_tokens=3, finish_reason="stop")


class Output:
    """An output folder of which every detail can be got wrong."""

    def __init__(self, folder: Path):
        self.store = Store(str(folder))
        self.store.write(FILE, json.dumps(CLAIM).encode())

    def commit(
        self,
        unit: Unit,
        *,
        rejected: tuple[int, ...] = (),
        prompts: int = 2,
        fingerprint: str = MINE,
        rows: list[int] | None = None,
        files: bool = False,
        both: bool = False,
    ) -> str:
        texts = [CLAIM["prompt.template"], *CLAIM["prompt.more"]][:prompts]
        unit_batch = UnitBatch(unit)
        for row in rows or range(unit.start, unit.stop):
            where: dict[str, Any] = {
                "id": str(row),
                "source": unit.sources[row if files else 0],
                "row": 0 if files else row,
            }
            if row in rejected:
                unit_batch.rejected.append(Rejected(**where, sha256=None, reason="missing", detail=""))
            if both or row not in rejected:
                unit_batch.images.append(
                    Image(**where, sha256=SHA256, num_visual_tokens=9, prompts=texts, answers=[DONE] * prompts)
                )
        Sink(store=self.store, fingerprint=fingerprint, model="m", method="otprune").commit(unit_batch)
        return f"part-{unit.name}.parquet"
