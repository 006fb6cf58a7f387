"""Third stage, a GPU actor: kept visual tokens and prompts -> captions, by the transformers engine.

Fills `captions` of every image; drops `tokens` and `kept`. Holds the language model and the tokenizer, nothing of the
vision tower.
"""

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from otprune.models import Completion, load_decoder
from pipelines.encode import exit_if_cuda_is_broken, from_numpy, run_batched, torch_dtype
from pipelines.work import Work, clean


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
    ):
        self.decoder = load_decoder(Path(model_path), dtype=torch_dtype(dtype, device), device=device)
        self.conversation, self.batch_size, self.seed = conversation, batch_size, seed
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}

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
        visual = from_numpy(work.arrays["tokens"])
        prompts = {}
        for i, image in enumerate(work.images):
            try:
                prompts[i] = [self._prompt_ids(text, visual.shape[1]) for text in image.prompts]
            except ValueError as error:
                work.reject(i, "prompt", str(error))
        requests = [(i, j) for i in prompts for j in range(len(prompts[i]))]
        requests.sort(key=lambda r: len(prompts[r[0]][r[1]][1]))  # similar lengths together: less padding
        done: dict[tuple[int, int], Completion] = {}

        def run(indices: list[int]) -> None:
            batch = [requests[r] for r in indices]
            done.update(zip(batch, self._complete(work, batch, visual, prompts), strict=True))

        failed = run_batched(list(range(len(requests))), self.batch_size, run)
        for i in {requests[r][0] for r in failed}:
            error = next(e for r, e in failed.items() if requests[r][0] == i)
            work.reject(i, "generate", f"{type(error).__name__}: {error}")
        bad = {i for i in range(len(work.images)) if i not in prompts} | {requests[r][0] for r in failed}
        for i, image in enumerate(work.images):
            if i not in bad:
                image.captions = [as_caption(done[i, j], visual.shape[1]) for j in range(len(image.prompts))]
        work.arrays = {}
        work.drop(bad)

    def _prompt_ids(self, text: str, num_visual: int) -> tuple[list[int], list[int]]:
        before, after = self.decoder.encode_prompt(text, self.conversation)
        length, room = len(before) + num_visual + len(after), self.decoder.max_length - self.max_new_tokens
        if length > room:
            raise ValueError(
                f"prompt must leave room for {self.max_new_tokens} new tokens: at most {room}, got {length}"
            )
        return before, after

    def _complete(self, work: Work, batch: list[tuple[int, int]], visual: Tensor, prompts: dict) -> list[Completion]:
        name = f"{work.unit.name}:{batch[0]}:{self.seed}"
        return self.decoder.generate(
            [visual[i] for i, _ in batch],
            [prompts[i][j] for i, j in batch],
            max_new_tokens=self.max_new_tokens,
            seed=int(hashlib.sha256(name.encode()).hexdigest()[:15], 16),
            **self.sampling,
        )


def as_caption(completion: Completion, num_kept: int) -> dict[str, Any]:
    """The columns of one caption row that decoding knows."""
    return {
        "caption": completion.text,
        "num_kept_tokens": num_kept,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_generated_tokens": completion.num_generated_tokens,
        "finish_reason": completion.finish_reason,
    }
