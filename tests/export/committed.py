"""Outputs with known captions, committed by the stage that writes, without a model."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

from pipelines.corpus.find import find_corpus
from pipelines.output.fingerprint import FILE, fingerprint
from pipelines.output.plan import make_plan
from pipelines.stages.unit_batch import Answer, Image, Rejected, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store, make_store

PROMPTS = ("describe the image .", "is it day ?")
CLAIM = {
    "prompt.template": PROMPTS[0],
    "prompt.more": [PROMPTS[1]],
    "input.image_column": "auto",
    "input.id_column": "auto",
    "prune.method": "otprune",
    "prune.retention": 0.25,
    "model.path": "a/model",
    "decode.max_bytes": 2**20,
}


def commit(
    corpus: Path | Store,
    output: Path | Store,
    *,
    rejected: Collection[tuple[str, int]] = (),
    unit_images: int = 3,
    limit: int | None = None,
    by_address: bool = False,
    format: str = "auto",
) -> None:
    """Commits what is not committed yet of the first `limit` rows. The caption of an image is `caption_of` its bytes.

    `rejected` are sources and rows that go to the quarantine, as null images do. With `by_address` every address stands
    for the bytes b"fetched".
    """
    store = output if isinstance(output, Store) else Store(str(output))
    store.write(FILE, json.dumps(CLAIM).encode())
    found = find_corpus(
        corpus if isinstance(corpus, Store) else make_store(str(corpus)),
        image_column="auto",
        id_column="auto",
        reference_column="none",
        templates=[],
        format=format,
    )
    sink = Sink(store=store, fingerprint=fingerprint(CLAIM), model="a/model", method="otprune")
    plan = make_plan(found, store, fingerprint(CLAIM), num_images=unit_images, limit=limit, num_samples=0)
    for span in plan.spans:
        records = found.format.records(found.store, span.rows, found.columns, max_bytes=2**20, with_references=False)
        for unit in span.units:
            unit_batch = UnitBatch(unit)
            for _, record in zip(range(unit.num_images), records, strict=False):
                where = {"id": record.id, "source": record.source, "row": record.row}
                data = record.data
                if not isinstance(data, bytes) and found.format.one_image_a_file:
                    data = found.store.read(record.source)
                elif isinstance(data, str):
                    data = b"fetched" if by_address else found.store.read(data)
                where["sha256"] = sha(data) if isinstance(data, bytes) else None
                if not isinstance(data, bytes):
                    unit_batch.rejected.append(Rejected(**where, reason="missing", detail=""))
                elif (record.source, record.row) in rejected:
                    unit_batch.rejected.append(Rejected(**where, reason="corrupt", detail=""))
                else:
                    answers = [Answer(caption_of(data, prompt), 5, 9, 3, "stop") for prompt in PROMPTS]
                    unit_batch.images.append(
                        Image(**where, prompts=list(PROMPTS), answers=answers, num_visual_tokens=20)
                    )
            sink.commit(unit_batch)


def caption_of(data: bytes, prompt: str = PROMPTS[0]) -> str:
    return f"ein Bild, é {sha(data)[:8]} {prompt}"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
