"""The columns of an evaluation's predictions, which hold everything that scoring needs."""

import pyarrow as pa

from pipelines.benchmarks import RECORDS
from pipelines.output.schema import _COUNTS

PREDICTIONS = pa.schema(
    [
        *RECORDS,
        ("source", pa.string()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        *((name, pa.string()) for name in ("model", "method")),
        *((name, pa.int32()) for name in _COUNTS),  # null, like the prediction, if the image could not be read
        ("finish_reason", pa.string()),
        ("sha256", pa.string()),  # of the encoded image, or of several images concatenated
    ]
)
