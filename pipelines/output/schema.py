"""Columns and Arrow types of the captions and the quarantine, and the closed list of quarantine reasons."""

import pyarrow as pa

from pipelines.images.decode import DECODE_REASONS

CAPTIONS_FOLDER, PREDICTIONS_FOLDER = "captions", "predictions"

CAPTIONS = pa.schema(
    [
        ("id", pa.string()),  # value of the corpus's id column, or the row address `source#row`
        ("source", pa.string()),  # file, relative to the input
        ("row", pa.int64()),  # row in that file; 0 for an image file
        ("caption", pa.string()),
        ("prompt", pa.string()),  # the prompt template with its columns filled in
        ("model", pa.string()),
        ("method", pa.string()),
        ("num_visual_tokens", pa.int32()),
        ("num_kept_tokens", pa.int32()),  # visual tokens decoded; for methods inside the model, the mean over layers
        ("num_prompt_tokens", pa.int32()),  # text and visual tokens that enter the first layer
        ("num_generated_tokens", pa.int32()),  # includes the end token
        ("finish_reason", pa.string()),  # stop | length | loop
        ("sha256", pa.string()),  # of the encoded image
        ("num_attempts", pa.int32()),  # 1, and the retries of a caption that looped (or was cut)
    ]
)

_COUNTS = ("num_visual_tokens", "num_kept_tokens", "num_prompt_tokens", "num_generated_tokens")

QUARANTINE = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("sha256", pa.string()),  # of the encoded image; null if there were no bytes
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

REASONS = {
    **dict.fromkeys(DECODE_REASONS, "decode"),
    "fetch": "read",  # the address, or the file, could not be fetched and never will be
    "unavailable": "read",  # the same for a reason that may pass: 429, 5xx, a time-out, a connection cut or refused
    "unreadable": "read",  # the file of the row is damaged where the row is
    "prompt": "read",  # a column of the prompt template is null, or the prompt does not fit the model
    "encode": "encode",  # the vision tower or the selection failed on this image alone
    "generate": "generate",  # decoding failed on this image alone
    "crash": "process",  # the process that worked on this image died at every retry
}
"""The stage of each quarantine reason. The list is closed, so that counts by reason can be compared between runs."""
