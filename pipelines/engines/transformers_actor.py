"""The third stage with engine.name=transformers, a GPU actor: decodes captions from kept visual tokens and prompts.

The stage sets `answers` of every image and drops the arrays `tokens` and `kept`. The actor holds the language model and
the tokenizer, and nothing of the vision tower.
"""

import itertools
from statistics import fmean
from typing import Any

import torch

from otprune.budget import layer_rows, make_policy
from otprune.models import Checkpoint, Completion, load_decoder
from pipelines.config.keys import GenerateConfig, PromptConfig, PruneConfig
from pipelines.engines.repair import Ladder, better_of, failed_again
from pipelines.engines.requests import Request, RequestMaker, as_answer, give_answers
from pipelines.stages.batches import Suspicion, run_batched
from pipelines.stages.gpu import Place, exit_if_cuda_is_broken, limit_memory
from pipelines.stages.token_arrays import unpack
from pipelines.stages.unit_batch import Answer, UnitBatch
from pipelines.text import clean


class Generator:
    """The actor. All its arguments can be pickled; it also runs without Ray."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        prompt: PromptConfig,
        generate: GenerateConfig,
        prune: PruneConfig,
        settings: dict[str, Any],
        place: Place,
    ):
        """`settings` are the method's, resolved for the checkpoint. Only methods inside the model use them here."""
        limit_memory(place.device, place.gpu_share)
        self.decoder = load_decoder(checkpoint, dtype=place.torch_dtype, device=place.device)
        length = self.decoder.max_length
        self.requests = RequestMaker(self.decoder, prompt, checkpoint.geometry, generate.max_new_tokens, length)
        self.batch_size, self.ladder = generate.batch_size, Ladder.of(generate)
        self.method, self.settings = prune.method, settings
        self.suspicion = Suspicion()
        self.policy = make_policy(prune.method, settings)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        unit_batch = UnitBatch.from_row(row)
        if unit_batch.error is None:
            try:
                with unit_batch.timed("generate"):
                    self._generate(unit_batch)
            except Exception as error:
                exit_if_cuda_is_broken(error)
                unit_batch.error = f"generate: {type(error).__name__}: {clean(str(error))}"
        unit_batch.arrays = {}
        return unit_batch.to_row()

    def _generate(self, unit_batch: UnitBatch) -> None:
        one_picture = None if self.policy is None else self.method
        shown = self.requests.shown(unpack(unit_batch))
        requests, rejected = self.requests.of_unit(unit_batch, shown, one_picture=one_picture)
        # A batch of similar lengths needs little padding. `groupby` below needs equal limits next to each other.
        requests.sort(key=lambda r: (r.max_new_tokens, r.length))
        answers: dict[tuple[int, int], Answer] = {}
        failed_images = self._attempt(unit_batch, requests, answers, 0)
        self.suspicion.note(len(answers), failed_images.values())
        self._retry(unit_batch, requests, answers)
        for i, error in failed_images.items():
            unit_batch.reject(i, "generate", f"{type(error).__name__}: {error}")
            rejected.add(i)
        give_answers(unit_batch, answers, rejected)

    def _attempt(
        self, unit_batch: UnitBatch, requests: list[Request], answers: dict[tuple[int, int], Answer], attempt: int
    ) -> dict[int, Exception]:
        """Decodes the requests, puts the answers into `answers`, and returns the errors of images that fail."""

        def run(indices: list[int]) -> None:
            batch = [requests[i] for i in indices]
            for request, completion in zip(batch, self._complete(unit_batch, batch, attempt), strict=True):
                answer = as_answer(completion, self._num_kept(request.num_visual))
                answers[request.key] = better_of(answers[request.key], answer) if attempt else answer

        failed: dict[int, Exception] = {}
        # One call of `generate` has one limit of new tokens, so each limit gets batches of its own.
        for _, equal_limit in itertools.groupby(range(len(requests)), key=lambda i: requests[i].max_new_tokens):
            failed |= run_batched(list(equal_limit), self.batch_size, run)
        return {requests[i].image: error for i, error in failed.items()}

    def _retry(self, unit_batch: UnitBatch, requests: list[Request], answers: dict[tuple[int, int], Answer]) -> None:
        """Replaces faulty answers by better ones."""
        requests = [request for request in requests if request.key in answers]
        for attempt in itertools.count(1):
            requests = [request for request in requests if self.ladder.goes_on(answers[request.key])]
            if not requests:
                return
            self._attempt(unit_batch, requests, answers, attempt)
            for key in (request.key for request in requests):
                if answers[key].num_attempts == attempt:  # this attempt alone failed; the answer is a caption still
                    answers[key] = failed_again(answers[key])

    def _num_kept(self, num_visual: int) -> int:
        """Number of visual tokens that were decoded; for methods inside the model, the mean over its layers."""
        layers = self.decoder.model.config.num_hidden_layers
        rows = layer_rows(self.method, self.settings, num_visual, layers)
        return num_visual if rows is None else round(fmean(attended for attended, _ in rows))

    def _complete(self, unit_batch: UnitBatch, batch: list[Request], attempt: int) -> list[Completion]:
        """The completions of a batch of requests with equal `max_new_tokens`."""
        images = [unit_batch.images[request.image] for request in batch]
        return self.decoder.generate(
            [[(torch.as_tensor(picture.content), picture.span) for picture in r.pictures] for r in batch],
            [request.ids for request in batch],
            max_new_tokens=batch[0].max_new_tokens,
            seeds=[self.ladder.seed_of(i, r, attempt) for i, r in zip(images, batch, strict=True)],
            policy=self.policy,
            **self.ladder.sampling(attempt),
        )
