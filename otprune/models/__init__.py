"""Model families: only these files know the internals of a model.

The two halves of a model load separately, so that an actor holds only the half that it runs: an encoder (vision tower
and projector) and a decoder (language model and tokenizer).
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
