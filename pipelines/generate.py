"""Third stage, a GPU actor: kept visual tokens and prompts -> captions, by the transformers engine.

Fills `captions` of every image; drops `tokens` and `kept`. Holds the language model and the tokenizer, nothing of the
vision tower.
"""

import hashlib
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from otprune.methods import get_method
from otprune.models import Completion, Prompt, load_decoder
from pipelines.encode import exit_if_cuda_is_broken, run_batched, torch_dtype
from pipelines.equal_flops import layer_rows, make_policy
from pipelines.tokens import unpack
from pipelines.work import Image, Work, clean


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of one image of the unit, ready to be decoded."""

    image: int
    prompt: int
    ids: Prompt
    visual: list[Tensor]  # [K, D] of each picture
    max_new_tokens: int

    @property
    def length(self) -> int:
        return sum(map(len, self.ids)) + self.num_visual

    @property
    def num_visual(self) -> int:
        return sum(map(len, self.visual))


class Generator:
    """The actor. Arguments are plain values, so that it runs without Ray as well."""

    def __init__(
        self,
        *,
        model_path: str,
        dtype: str,
        device: str,
        conversation: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        batch_size: int,
        method: str = "none",
        settings: dict[str, Any] | None = None,
    ):
        """`method` and its resolved `settings` matter where it prunes inside the model."""
        self.decoder = load_decoder(Path(model_path), dtype=torch_dtype(dtype, device), device=device)
        self.conversation, self.batch_size, self.seed = conversation, batch_size, seed
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
        self.method, self.settings = method, settings or {}
        self.policy = make_policy(method, self.settings) if get_method(method).kind == "in_llm" else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        work = Work.from_row(row)
        if work.error is None:
            try:
                with work.timed("generate"):
                    self._generate(work)
            except Exception as error:
                exit_if_cuda_is_broken(error)
                work.error = f"generate: {type(error).__name__}: {clean(str(error))}"
        work.arrays = {}
        return work.to_row()

    def _generate(self, work: Work) -> None:
        visual = unpack(work)
        requests: list[Request] = []
        bad: set[int] = set()
        for i, image in enumerate(work.images):
            try:
                requests += self._requests(i, image, visual[i])
            except ValueError as error:
                work.reject(i, "prompt", str(error))
                bad.add(i)
        requests.sort(key=lambda r: (r.max_new_tokens, r.length))  # similar lengths together: less padding
        done: dict[tuple[int, int], dict[str, Any]] = {}

        def run(indices: list[int]) -> None:
            batch = [requests[i] for i in indices]
            for request, completion in zip(batch, self._complete(work, batch), strict=True):
                num_kept = self._num_kept(request.num_visual)
                done[request.image, request.prompt] = as_caption(completion, num_kept)

        failed: dict[int, Exception] = {}
        for _, alike in groupby(range(len(requests)), key=lambda i: requests[i].max_new_tokens):
            failed |= run_batched(list(alike), self.batch_size, run)
        for i, error in {requests[r].image: error for r, error in failed.items()}.items():
            work.reject(i, "generate", f"{type(error).__name__}: {error}")
            bad.add(i)
        for i, image in enumerate(work.images):
            if i not in bad:
                image.captions = [done[i, j] for j in range(len(image.prompts))]
        work.arrays = {}
        work.drop(bad)

    def _num_kept(self, num_visual: int) -> int:
        """Visual tokens that were decoded: of methods inside the model, the mean over its layers."""
        layers = self.decoder.model.config.num_hidden_layers
        rows = layer_rows(self.method, self.settings, num_visual, layers)
        return num_visual if rows is None else round(fmean(attended for attended, _ in rows))

    def _requests(self, index: int, image: Image, visual: list[list[Tensor]]) -> list[Request]:
        """One for each prompt of the image, whose tokens are `visual`.

        A benchmark's limit of new tokens only guards against answers without end: where a prompt leaves less room, the
        question is asked with what there is.

        Raises:
            ValueError: if a prompt leaves no room for its answer, or holds several images that the method cannot take.
        """
        if self.policy is not None and image.num_pictures != 1:
            raise ValueError(f"{self.method} takes prompts with one image, got {image.num_pictures}")
        requests = []
        for j, text in enumerate(image.prompts):
            ids = self.decoder.encode_prompt(text, self.conversation, image.num_pictures)
            wanted = image.max_new_tokens[j] if image.max_new_tokens else self.max_new_tokens
            request = Request(index, j, ids, visual[j], wanted)
            needed = 1 if image.max_new_tokens else wanted
            room = self.decoder.max_length - request.length
            if room < needed:
                most = self.decoder.max_length - needed
                raise ValueError(
                    f"prompt must leave room for {needed} new tokens: at most {most}, got {request.length}"
                )
            requests.append(replace(request, max_new_tokens=min(wanted, room)))
        return requests

    def _complete(self, work: Work, batch: list[Request]) -> list[Completion]:
        images = [work.images[request.image] for request in batch]
        return self.decoder.generate(
            [request.visual for request in batch],
            [request.ids for request in batch],
            max_new_tokens=batch[0].max_new_tokens,
            seeds=[sampling_seed(i.sha256, r.prompt, self.seed) for i, r in zip(images, batch, strict=True)],
            policy=self.policy,
            **self.sampling,
        )


def sampling_seed(sha256: str, prompt: int, seed: int) -> int:
    """Seed of one answer: it depends on the image's bytes and the prompt's number, never on the unit or the batch."""
    return int(hashlib.sha256(f"{sha256}:{prompt}:{seed}".encode()).hexdigest()[:15], 16)


def as_caption(completion: Completion, num_kept: int) -> dict[str, Any]:
    """The columns of one caption row that decoding knows."""
    return {
        "caption": completion.text,
        "num_kept_tokens": num_kept,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_generated_tokens": completion.num_generated_tokens,
        "finish_reason": completion.finish_reason,
    }
