"""Where pruning pays: one 1024 x 768 photograph in every released checkpoint that conf/ names.

    OMP_NUM_THREADS=1 python -m benchmarks.families [--no-times]

Prints a table with a checkpoint a row, from the sizes of its configuration alone (`released_configs.py`), at the
retention and with the limits of pictures of the file under conf/, and at the end the same as JSON. Two minutes on one
core, which the selections take; two seconds without them.

What is counted: multiply-adds (TFLOP = 1e12) of the vision tower with its projector, of the prefill of a prompt of 40
tokens of text, the picture's tokens and what stands between them, and of 100 decode steps. What is measured: the
processor time of the selection of one picture on this CPU, of random clustered features of the checkpoint's width in
float32, the least of three; on a GPU it is another number. The bytes are those of the kept tokens, bfloat16, and of
their indices.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING

from benchmarks.released_configs import RELEASED, Released
from otprune import num_kept, select_tokens
from otprune.families import FAMILIES, Facts, ImageProcessor, Options
from otprune.flops import TrueFlops, true_flops
from otprune.shapes import LanguageShape, ModelShape
from pipelines.config.load import load_config

CONF = Path(__file__).resolve().parent.parent / "conf"
SIZE = (768, 1024)  # height, width
TEXT_TOKENS = 40
DECODE_STEPS = 100
METHODS = ("otprune", "logdet_linear")
MEASURED = 3


@dataclass(frozen=True)
class Row:
    """The figures of one checkpoint. `pruned` and `whole` are TFLOPs."""

    name: str
    visual: int
    kept: int
    retention: float
    bytes_between_actors: int
    tower: float
    prefill: tuple[float, float]  # whole, pruned
    decode: tuple[float, float]
    select_ms: dict[str, float]

    @property
    def total(self) -> tuple[float, float]:
        """Of the whole picture and of the pruned one."""
        whole, pruned = (self.tower + self.prefill[i] + self.decode[i] for i in (0, 1))
        return whole, pruned


class StandInTokenizer:
    """A token for each text that stands among a picture's tokens, in place of a released tokenizer's."""

    PIECES = re.compile(r"<[^>]+>|\n\n|\n")

    def __init__(self, image_token: int, tokens: dict[str, int]):
        self.image_token, self.texts = image_token, {"<image>": image_token, **tokens}

    def __call__(self, text: str, **_: Any) -> Any:
        ids = [self.convert_tokens_to_ids([piece])[0] for piece in self.PIECES.findall(text)]
        return argparse.Namespace(input_ids=ids)

    def convert_tokens_to_ids(self, texts: Sequence[str]) -> list[int]:
        return [self.texts.setdefault(text, self.image_token + len(self.texts)) for text in texts]

    def convert_ids_to_tokens(self, token: int) -> str:
        return next(text for text, known in self.texts.items() if known == token)


def read_released(released: Released) -> tuple[float, Facts, ModelShape]:
    """(retention, facts, sizes): what the family reads of a checkpoint's configuration, with what conf/ sets."""
    family = FAMILIES[released.config["model_type"]]
    config: Any = CONFIG_MAPPING[family.name].from_dict(released.config)
    chosen = load_config(["--config", str(CONF / f"{released.conf}.yaml"), "input.path=-", "output.path=-"])
    image_token = getattr(config, "image_token_id", None) or config.image_token_index
    tokenizer = StandInTokenizer(image_token, released.tokens)
    processor = ImageProcessor(
        mean=(0.5,) * 3, std=(0.5,) * 3, settings={"image_mean": 0.5, **released.processor}, tokenizer=lambda: tokenizer
    )
    options = Options(max_pixels=chosen.model.max_pixels, max_tiles=chosen.model.max_tiles)
    facts = family.read(config, processor, options)
    shape = ModelShape(vision=facts.vision, language=LanguageShape.from_config(config.text_config))
    return chosen.prune.share, facts, shape


def row_of(released: Released, *, times: bool = True) -> Row:
    """The figures of a photograph of SIZE."""
    retention, facts, shape = read_released(released)
    visual = facts.geometry.num_visual(SIZE)
    kept = num_kept(retention, visual)
    whole = flops_of(facts, shape, visual, "none")
    pruned = flops_of(facts, shape, kept, "otprune", retention=retention)
    width = shape.language.hidden
    return Row(
        name=released.name,
        visual=visual,
        kept=kept,
        retention=retention,
        bytes_between_actors=kept * (2 * width * (1 + facts.levels) + 4),
        tower=(whole.vision + whole.projector) / 1e12,
        prefill=(whole.prefill / 1e12, pruned.prefill / 1e12),
        decode=(whole.decode / 1e12, pruned.decode / 1e12),
        select_ms={method: select_ms(method, num_tokens=visual, width=width, keep=kept) for method in METHODS}
        if times
        else {},
    )


def flops_of(facts: Facts, shape: ModelShape, num_kept: int, method: str, **settings: Any) -> TrueFlops:
    """Multiply-adds of the photograph when `num_kept` of its tokens, spread over it, are in the prompt."""
    geometry = facts.geometry
    frame, visual = geometry.frame(SIZE), geometry.num_visual(SIZE)
    kept = np.linspace(0, visual - 1, num_kept).round().astype(np.int64)
    between = len(geometry.span(SIZE, kept, facts.image_token)) - num_kept  # labels of tiles, ends of rows
    free = not geometry.tiled and geometry.fixed is None
    return true_flops(
        shape,
        method,
        num_text=TEXT_TOKENS + between,
        num_visual=visual,
        num_generated=1 + DECODE_STEPS,  # the first comes of the prefill
        crops=frame.num_crops,
        frame=(frame.height, frame.width) if free else None,
        **settings,
    )


def select_ms(method: str, *, num_tokens: int, width: int, keep: int) -> float:
    """The least processor time in milliseconds of a selection on this machine: wall time on one idle core.

    Features are points around 32 centres, as visual tokens resemble each other; a method's time depends on their
    numbers and hardly on their values.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(32, width, generator=generator)
    owner = torch.randint(32, (num_tokens,), generator=generator)
    features = (centres[owner] + 0.5 * torch.randn(num_tokens, width, generator=generator))[None]
    taken = []
    for _ in range(MEASURED):
        begin = time.process_time()
        select_tokens(features, keep, method=method)
        taken.append(time.process_time() - begin)
    return 1000 * min(taken)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    head = (
        "checkpoint",
        *("visual tokens", "kept", *(f"{method}, CPU ms" for method in METHODS), "MB between actors"),
        *("tower, TFLOPs", "prefill", "100 decode steps", "all, pruned / whole"),
    )
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for row in rows:
        times = [f"{row.select_ms[method]:,.0f}" if row.select_ms else "-" for method in METHODS]
        whole, pruned = row.total
        cells = [
            *(row.name.split("/")[1], f"{row.visual:,}", f"{row.kept:,} ({row.retention:.3g})", *times),
            *(f"{row.bytes_between_actors / 1e6:.1f}", f"{row.tower:.2f}"),
            *(f"{before:.2f} -> {after:.2f}" for before, after in (row.prefill, row.decode)),
            f"{whole:.1f} -> {pruned:.1f} ({pruned / whole:.0%})",
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-times", action="store_true", help="measure no selection")
    times = not parser.parse_args().no_times
    rows = [row_of(released, times=times) for released in RELEASED]
    print(table(rows))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
