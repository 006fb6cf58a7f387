"""Model families: the only files that know a model's internals.

Each family gives two halves that load separately, so that an actor holds only what it runs:
an encoder (vision tower and projector) and a decoder (language model and tokenizer).
"""

from otprune.models.checkpoint import Checkpoint, CheckpointError, read_checkpoint, resolve_checkpoint, weights_digest
from otprune.models.encoder import LlavaEncoder, load_encoder
from otprune.models.llava import LlavaDecoder, load_decoder
from otprune.models.prompts import Completion, Prompt, Prompter, load_prompter

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Completion",
    "LlavaDecoder",
    "LlavaEncoder",
    "Prompt",
    "Prompter",
    "load_decoder",
    "load_encoder",
    "load_prompter",
    "read_checkpoint",
    "resolve_checkpoint",
    "weights_digest",
]
