"""Model families: the only files that know a model's internals.

Each family gives two halves that load separately, so that an actor holds only what it runs:
an encoder (vision tower and projector) and a decoder (language model and tokenizer).
"""

from otprune.models.checkpoint import CheckpointError, resolve_checkpoint, weights_digest
from otprune.models.llava import Completion, LlavaDecoder, LlavaEncoder, load_decoder, load_encoder

__all__ = [
    "CheckpointError",
    "Completion",
    "LlavaDecoder",
    "LlavaEncoder",
    "load_decoder",
    "load_encoder",
    "resolve_checkpoint",
    "weights_digest",
]
