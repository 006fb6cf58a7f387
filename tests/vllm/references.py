"""What transformers says to pruned pictures, and the same pictures as requests for vLLM.

The reference shares nothing with the plugin. It runs the whole sequence, with every visual token, at every step and
without a cache. A mask hides the dropped tokens, and positions are given: those that the whole sequence has with
M-RoPE, and those of the kept tokens alone, counted, without. Of Mistral's ends of rows it hides those that end no kept
token, and that of the last row with kept tokens, if the picture's end stands behind a later row.

Layers with linear attention see what a mask hides. For a model with such layers the dropped tokens are taken out, and
the others keep the positions of the whole sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from otprune.families.geometry import Span
from otprune.vllm.request import image_fields
from tests.vllm.tiny import BREAK, END, IMAGE, START

BEFORE, AFTER = [1, 20, 21, 22], [30, 31, 32, 33, 34]  # token ids of the text around the pictures
NEW = 24  # tokens of an answer
RATIOS = (1.0, 0.5, 0.15)
SIZES = ((6, 8), (10, 5), (10, 10), (7, 4))  # rows and columns of merged tokens (Qwen), or crops by number


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a model's tower makes of a picture of noise."""

    inputs: dict[str, Tensor]  # of the tower
    rows: Tensor  # [N, W], with DeepStack's levels side by side
    grid: tuple[int, int] | None  # rows and columns of tokens; None without M-RoPE
    columns: int = 0  # Mistral: tokens of a row, behind which an end stands; 0: rows have none
    labels: tuple[tuple[int, ...], ...] = ()  # ids in front of each crop's tokens, and behind the last one's

    @property
    def ids(self) -> list[int]:
        """What stands in the prompt for the whole picture."""
        if self.columns:
            rows = len(self.rows) // self.columns
            return [*([*[IMAGE] * self.columns, BREAK] * rows)[:-1], END]
        *labels, end = self.labels or ((), ())
        return [t for label in labels for t in (*label, *[IMAGE] * (len(self.rows) // len(labels)))] + list(end)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt with pruned pictures and transformers' answer."""

    ids: list[int]  # with one image token for each picture
    fields: dict[str, Tensor]
    tokens: list[int]  # [NEW]
    logprobs: Tensor  # [NEW, vocabulary]
    whole: bool = False  # nothing is pruned

    @property
    def prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.ids, "multi_modal_data": {"image": self.fields}}


@torch.no_grad()
def picture(model: Any, number: int) -> Picture:
    """Picture of noise `number` (0 .. 3), of a shape of its own where the family has shapes."""
    generator = torch.Generator().manual_seed(number)
    kind, rows, columns = model.config.model_type, *SIZES[number]
    grid, in_row, labels = None, 0, ()
    if kind == "llava":
        inputs = {"pixel_values": torch.randn(1, 3, 112, 112, generator=generator)}
    elif kind in ("llava_next", "llava_onevision"):
        height, width = [(112, 112), (56, 112), (112, 56), (100, 70)][number]
        tiles = 1 + (4 if number in (0, 3) else 2)
        pixels = torch.randn(1, tiles, 3, 56, 56, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    elif kind == "internvl":
        crops = (7, 13, 1, 5)[number]  # of 4 tokens each
        inputs = {"pixel_values": torch.randn(crops, 3, 56, 56, generator=generator)}
    elif kind == "mistral3":
        in_row, height, width = columns, 28 * rows, 28 * columns
        pixels = torch.randn(1, 3, height, width, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    elif kind in ("smolvlm", "idefics3"):
        crops = (7, 13, 1, 5)[number]  # of 4 tokens each
        inputs = {"pixel_values": torch.randn(1, crops, 3, 56, 56, generator=generator)}
        labels = (*((50, 51 + crop) for crop in range(crops)), (50,))
    else:
        grid, vision = (rows, columns), model.config.vision_config
        merge, channels = vision.spatial_merge_size, getattr(vision, "in_channels", 3)
        values = channels * vision.temporal_patch_size * vision.patch_size**2
        inputs = {
            "pixel_values": torch.randn(rows * columns * merge**2, values, generator=generator),
            "image_grid_thw": torch.tensor([[1, rows * merge, columns * merge]]),
        }
    out = model.model.get_image_features(**inputs, return_dict=True)
    features = out.pooler_output[0] if isinstance(out.pooler_output, tuple | list) else out.pooler_output
    levels = [level[0] for level in getattr(out, "deepstack_features", None) or ()]
    tokens = torch.cat([features.reshape(-1, features.shape[-1]), *levels], 1)
    return Picture(inputs=inputs, rows=tokens, grid=grid, columns=in_row, labels=labels)


@torch.no_grad()
def case(model: Any, pictures: Sequence[Picture], ratio: float) -> Case:
    """A prompt with these pictures, of which `ratio` of the tokens are kept at random, and its answer."""
    keeps = [keep_some(len(each.rows), ratio, seed=i) for i, each in enumerate(pictures)]
    whole, kept = whole_ids(pictures, model), []
    visible = torch.tensor(whole) != IMAGE
    where = (~visible).nonzero()[:, 0].split([len(each.rows) for each in pictures])
    for each, places, keep in zip(pictures, where, keeps, strict=True):
        visible[places[keep]] = True
        if each.columns:
            hide_ends(visible, places, each.columns)
        seen = visible[places[0] : places[0] + len(each.ids)].nonzero()[:, 0]
        kept.append(places[0] + seen)
    positions = whole_positions(model, pictures, whole)
    if positions is None:
        positions = torch.cumsum(visible, 0)[None] - 1  # of hidden tokens: whatever they are
    spans = [
        labelled_span(each, keep) if each.labels else span(positions[:, places], each, np.array(whole)[places.numpy()])
        for places, keep, each in zip(kept, keeps, pictures, strict=True)
    ]
    tokens, logprobs = answer(model, torch.tensor(whole), visible, positions, torch.cat([p.rows for p in pictures]))
    return Case(
        ids=prompt_ids(len(pictures), model),
        fields=image_fields(
            [each.rows[keep] for each, keep in zip(pictures, keeps, strict=True)], spans, axes=len(positions)
        ),
        tokens=tokens,
        logprobs=logprobs,
        whole=ratio == 1,
    )


def keep_some(num: int, ratio: float, seed: int) -> Tensor:
    return (
        torch.randperm(num, generator=torch.Generator().manual_seed(seed))[: max(1, round(ratio * num))].sort().values
    )


def hide_ends(visible: Tensor, places: Tensor, columns: int) -> None:
    """Hides the ends of rows that end no visible token: `visible` [L] of a prompt, `places` [N] of a picture's."""
    ends = [int(row[-1]) + 1 for row in places.split(columns)]
    left = [i for i, row in enumerate(places.split(columns)) if visible[row].any()]
    for i, end in enumerate(ends):
        visible[end] = i in left[:-1] or i == len(ends) - 1


def prompt_ids(num_pictures: int, model: Any) -> list[int]:
    kind = model.config.model_type
    one = [IMAGE] if "llava" in kind or kind == "mistral3" else [START, IMAGE, END]
    return BEFORE + ([*one, 40, 41] * num_pictures)[:-2] + AFTER


def whole_ids(pictures: Sequence[Picture], model: Any) -> list[int]:
    spans = iter(each.ids for each in pictures)
    return [t for i in prompt_ids(len(pictures), model) for t in (next(spans) if i == IMAGE else [i])]


def whole_positions(model: Any, pictures: Sequence[Picture], ids: list[int]) -> Tensor | None:
    """[3, L] by transformers' own rule; None without M-RoPE."""
    if pictures[0].grid is None:
        return None
    whole = torch.tensor([ids])
    grid = torch.cat([each.inputs["image_grid_thw"] for each in pictures])
    types = (whole == IMAGE).int()
    return model.model.get_rope_index(whole, mm_token_type_ids=types, image_grid_thw=grid)[0][:, 0]


def span(positions: Tensor, picture: Picture, ids: np.ndarray) -> Span:
    """The span of a picture of which these ids [L] are left, at these positions [axes, L] in the prompt."""
    num = positions.shape[1]
    start = positions[0, 0]  # a still picture has t = 0: its first axis stays where the span begins
    relative = (positions - start).numpy()
    return Span(ids, relative, num if picture.grid is None else max(picture.grid))


def labelled_span(picture: Picture, keep: Tensor) -> Span:
    """The span of a picture whose labels all stay: the whole one without the tokens that are not kept."""
    whole = np.array(picture.ids)
    stays = whole != IMAGE
    stays[np.flatnonzero(~stays)[keep.numpy()]] = True
    return Span(whole[stays], np.arange(stays.sum())[None], int(stays.sum()))


def answer(model: Any, ids: Tensor, visible: Tensor, positions: Tensor, rows: Tensor) -> tuple[list[int], Tensor]:
    """NEW greedy tokens, and log-probabilities [NEW, vocabulary], of the language model alone."""
    base, embed, axes = model.model, model.get_input_embeddings(), len(positions)
    language_model = base.text_model if hasattr(base, "text_model") else base.language_model
    image, width = (ids == IMAGE)[None], embed.weight.shape[1]
    main, *levels = rows.split(width, 1)
    embeds = embed(ids)[None].clone()
    embeds[image] = main
    if "linear_attention" in (getattr(model.config.text_config, "layer_types", None) or ()):
        embeds, image, positions = embeds[:, visible], image[:, visible], positions[:, visible]
        visible = visible[visible]
    tokens, logprobs = [], []
    for _ in range(NEW):
        length = embeds.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & visible | torch.eye(length, dtype=torch.bool)
        deepstack = {"visual_pos_masks": image, "deepstack_visual_embeds": levels} if levels else {}
        hidden = language_model(
            inputs_embeds=embeds,
            attention_mask=mask[None, None],
            position_ids=positions[:, None] if axes == 3 else positions,
            use_cache=False,
            **deepstack,
        ).last_hidden_state
        logprobs.append(model.lm_head(hidden[0, -1]).log_softmax(-1))
        tokens.append(int(logprobs[-1].argmax()))
        embeds = torch.cat([embeds, embed(torch.tensor([[tokens[-1]]]))], 1)
        image = torch.cat([image, torch.zeros(1, 1, dtype=torch.bool)], 1)
        visible = torch.cat([visible, torch.ones(1, dtype=torch.bool)])
        positions = torch.cat([positions, positions[:, -1:].max() + 1 + torch.zeros(axes, 1, dtype=torch.long)], 1)
    return tokens, torch.stack(logprobs)


def padded(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures as one batch of pixels, Mistral's with zeros at the right and below: the model knows their sizes."""
    if not pictures[0].columns:
        return list(pictures)
    height, width = torch.cat([each.inputs["image_sizes"] for each in pictures]).amax(dim=0).tolist()
    made = []
    for each in pictures:
        pixels = each.inputs["pixel_values"]
        pixels = torch.nn.functional.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))
        made.append(replace(each, inputs=each.inputs | {"pixel_values": pixels}))
    return made


@torch.no_grad()
def stock_answer(model: Any, pictures: Sequence[Picture]) -> list[int]:
    """transformers' own `generate` on the whole pictures."""
    ids = torch.tensor([whole_ids(pictures, model)])
    # Crops of labelled pictures stand in one row of the batch: [1, crops, 3, side, side].
    axis = 1 if pictures[0].labels else 0
    inputs = {name: torch.cat([each.inputs[name] for each in padded(pictures)], axis) for name in pictures[0].inputs}
    if pictures[0].grid is not None:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    done = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return done[0, ids.shape[1] :].tolist()
