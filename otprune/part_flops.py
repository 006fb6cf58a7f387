"""Multiply-adds of each part of captioning an image, computed from model shapes and numbers of rows.

The functions count every matrix product, with attention scores over the full square as the pruning papers do (a causal
kernel may do half of it). Not counted: norms, activations, softmax, rotary embeddings, comparisons, sums.

For n_a rows in a layer's attention and n_f rows in its FFN, width d, FFN width m and g FFN matrices, a layer is

    (2 + 2 kv_heads / heads) n_a d^2 + 2 n_a^2 d + g n_f d m        (with heads * head_dim = d)

A linear-attention layer (a gated delta net) costs the same for every row, however many rows there are. With key heads
of together K numbers, H value heads of together V, a key head of a and a value head of b numbers, a convolution over w
tokens, and chunks of C = 64 rows, its part beside the FFN is for n rows, in whole chunks c = C ceil(n / C),

    n d (2 K + 3 V + 2 H) + n w (2 K + V) + c H (3 a b + C (2 a + b) + (C - 1) (a + b) / 2)

The first term is its projections: queries, keys, values, gate, output, decay and learning rate. The last is the delta
rule in chunks: the state is read twice and written once; keys meet keys and queries, and queries new values, inside a
chunk; a triangular system is solved for two right-hand sides. A single row, as in decoding, multiplies 3 a b in a head:
the old value is read, the state written, and the query reads it. Sources: Yang et al. 2024, "Gated Delta Networks",
equations 10 and 11 and section 3.3, and "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
section 3.2; chunks of 64 are those of transformers and of its kernels.
"""

from itertools import pairwise

from otprune.schedules import Schedule, num_kept
from otprune.shapes import LanguageShape, LinearShape, ModelShape, PatchVisionShape, VisionShape

CHUNK = 64  # rows that a linear-attention layer reads at once in a prefill


def prefill_flops(
    shape: LanguageShape,
    num_prompt_tokens: int,
    *,
    visual: Schedule | None = None,
    ffn_matrices: int = 3,
    head: bool = True,
) -> int:
    """Multiply-adds of the language model on a prompt, up to the logits of the first generated token.

    Args:
        num_prompt_tokens: tokens that every layer reads: text, and the visual tokens kept before the model.
        visual: the schedule of a method that prunes inside the model; `num_prompt_tokens` then counts text alone.
        ffn_matrices: matrices of an FFN; 3 in gated FFNs.
        head: count the product with the vocabulary matrix for the first generated token.

    Raises:
        ValueError: if `visual` has another number of layers than `shape`, or num_prompt_tokens is negative.
    """
    if visual is not None and len(visual) != shape.layers:
        raise ValueError(f"visual must have one entry for each of {shape.layers} layers, got {len(visual)}")
    if num_prompt_tokens < 0:
        raise ValueError(f"num_prompt_tokens must be at least 0, got {num_prompt_tokens}")
    total = shape.hidden * shape.vocab if head else 0
    for layer, (attention_rows, ffn_rows) in enumerate(visual or [(0, 0)] * shape.layers):
        rows = num_prompt_tokens + attention_rows
        total += _mixing(shape, layer, rows, rows)
        total += (num_prompt_tokens + ffn_rows) * _ffn(shape, ffn_matrices)
    return total


def decode_flops(
    shape: LanguageShape, num_prompt_tokens: int, num_generated: int, *, visual: Schedule | None = None
) -> int:
    """Multiply-adds of decoding tokens 2 .. num_generated with a KV cache; prefill yields token 1."""
    total = 0
    for layer, (attention_rows, _) in enumerate(visual or [(0, 0)] * shape.layers):
        for step in range(1, num_generated):
            total += _mixing(shape, layer, 1, num_prompt_tokens + attention_rows + step)
            total += _ffn(shape, 3)
    return total + max(num_generated - 1, 0) * shape.hidden * shape.vocab


def vision_flops(shape: VisionShape | PatchVisionShape, *, crops: int = 1, frame: tuple[int, int] | None = None) -> int:
    """Multiply-adds of the vision tower: patch embedding, then the layers.

    Args:
        crops: square pictures that a tower of one size reads.
        frame: (height, width) in pixels of the picture that a tower of any size reads.

    Raises:
        ValueError: if a tower of any size gets no frame.
    """
    if isinstance(shape, PatchVisionShape):
        return _patch_tower_flops(shape, *_rows_and_columns(shape, frame))
    n, d = shape.num_patches + shape.class_tokens, shape.hidden
    layer = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * shape.intermediate
    return crops * (shape.num_patches * 3 * shape.patch_size**2 * d + shape.layers * layer)


def projector_flops(
    model: ModelShape, *, crops: int = 1, frame: tuple[int, int] | None = None, num_tokens: int | None = None
) -> int:
    """Multiply-adds of what makes visual tokens of the tower's output: an MLP of one or two layers, or mergers.

    Args:
        crops, frame: as of `vision_flops`.
        num_tokens: tokens that the MLP makes; None is `count_tokens`.
    """
    vision, width = model.vision, model.language.hidden
    num_tokens = count_tokens(vision, crops=crops, frame=frame) if num_tokens is None else num_tokens
    if isinstance(vision, PatchVisionShape):
        merged = vision.hidden * vision.merge**2
        widths = (merged, *(vision.inner or (merged,)), vision.out)
        return vision.mergers * num_tokens * sum(before * after for before, after in pairwise(widths))
    return num_tokens * (vision.width + (vision.projector_matrices - 1) * width) * width


def count_tokens(shape: VisionShape | PatchVisionShape, *, crops: int = 1, frame: tuple[int, int] | None = None) -> int:
    """Visual tokens of a picture: all those of its crops, or every token of its frame (see `vision_flops`)."""
    if isinstance(shape, PatchVisionShape):
        rows, columns = _rows_and_columns(shape, frame)
        return rows * columns
    return crops * shape.num_tokens


def _rows_and_columns(shape: PatchVisionShape, frame: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of visual tokens."""
    if frame is None:
        raise ValueError("a tower for pictures of any size needs the frame of the picture, got none")
    side = shape.patch_size * shape.merge
    return frame[0] // side, frame[1] // side


def _patch_tower_flops(shape: PatchVisionShape, rows: int, columns: int) -> int:
    """As `vision_flops`. Attention costs 2 n^2 d for the n patches of a window, or of the whole picture."""
    per_token, d = shape.merge**2, shape.hidden
    n = rows * columns * per_token
    embedding = n * 3 * shape.frames * shape.patch_size**2 * d
    linear = n * (4 * d**2 + shape.ffn_matrices * d * shape.intermediate)
    in_windows = per_token**2 * _sum_of_squares(rows, shape.window) * _sum_of_squares(columns, shape.window)
    pairs = (shape.layers - shape.window_layers) * n**2 + shape.window_layers * in_windows
    return embedding + shape.layers * linear + 2 * d * pairs


def _sum_of_squares(length: int, window: int) -> int:
    """The sum of the squares of the parts into which windows cut `length`; length squared without windows."""
    whole, rest = divmod(length, window or length)
    return whole * (window or length) ** 2 + rest**2


def selector_prefill(shape: LanguageShape, num_text: int, num_visual: int, retention: float) -> int:
    """Multiply-adds of the prefill after a selector at `retention`: the budget that every other method must match."""
    return prefill_flops(shape, num_text + num_kept(retention, num_visual))


def _ffn(shape: LanguageShape, matrices: int) -> int:
    """Multiply-adds of one row's FFN, and of the router if there are experts."""
    return shape.hidden * (matrices * shape.intermediate + shape.experts)


def _mixing(shape: LanguageShape, layer: int, num_rows: int, num_keys: int) -> int:
    """Multiply-adds of what a layer does beside its FFN: attention of either kind."""
    if shape.linear is not None and layer in shape.linear.layers:
        return _linear_attention(shape.linear, shape.hidden, num_rows)
    return _attention(shape, num_rows, num_keys)


def _attention(shape: LanguageShape, num_rows: int, num_keys: int) -> int:
    """Multiply-adds of the projections of `num_rows` rows, and of their scores and sums over `num_keys` keys."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    gate = queries if shape.linear is not None else 0
    return num_rows * shape.hidden * (2 * (queries + keys) + gate) + 2 * num_rows * num_keys * queries


def _linear_attention(linear: LinearShape, hidden: int, num_rows: int) -> int:
    """Multiply-adds of a gated delta net on `num_rows` rows: its projections, its convolution and the delta rule."""
    a, b, heads = linear.key_dim, linear.value_dim, linear.value_heads
    keys, values = linear.key_heads * a, heads * b
    projections = num_rows * hidden * (2 * keys + 3 * values + 2 * heads)
    convolution = num_rows * linear.kernel * (2 * keys + values)
    if num_rows == 1:  # a step of decoding
        return projections + convolution + heads * 3 * a * b
    chunks = -(-num_rows // CHUNK)
    solved = CHUNK * (CHUNK - 1) // 2 * (a + b)
    return projections + convolution + chunks * heads * (CHUNK * (3 * a * b + CHUNK * (2 * a + b)) + solved)
