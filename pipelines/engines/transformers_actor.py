"""Third stage, a GPU actor: kept visual tokens and prompts -> captions, by the transformers engine.

Sets `answers` of every image; drops `tokens` and `kept`. Holds the language model and the tokenizer, nothing of the
vision tower.
"""

from itertools import groupby
from statistics import fmean
from typing import Any

from otprune.budget import layer_rows, make_policy
from otprune.models import Checkpoint, Completion, load_decoder
from pipelines.config.keys import GenerateConfig, PruneConfig
from pipelines.engines.requests import Request, RequestMaker, as_answer, give_answers
from pipelines.stages.batches import Suspicion, run_batched
from pipelines.stages.gpu import Place, exit_if_cuda_is_broken, limit_memory
from pipelines.stages.seeds import sampling_seed
from pipelines.stages.token_arrays import unpack
from pipelines.stages.unit_batch import Answer, UnitBatch
from pipelines.text import clean


class Generator:
    """The actor. Its arguments are values that pickle, so that it runs without Ray as well."""

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        conversation: str,
        generate: GenerateConfig,
        prune: PruneConfig,
        settings: dict[str, Any],
        place: Place,
    ):
        """`prune` and its method's `settings`, resolved for the checkpoint, matter where it prunes inside the model."""
        limit_memory(place.device, place.gpu_share)
        self.decoder = load_decoder(checkpoint.path, dtype=place.torch_dtype, device=place.device)
        self.conversation, self.batch_size, self.seed = conversation, generate.batch_size, generate.seed
        self.max_new_tokens = generate.max_new_tokens
        self.sampling: dict[str, Any] = {"temperature": generate.temperature, "top_p": generate.top_p}
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
        maker = RequestMaker(self.decoder, self.conversation, self.max_new_tokens, self.decoder.max_length)
        one_picture = None if self.policy is None else self.method
        requests, bad = maker.of_unit(unit_batch, unpack(unit_batch), one_picture=one_picture)
        requests.sort(key=lambda r: (r.max_new_tokens, r.length))  # similar lengths together: less padding
        done: dict[tuple[int, int], Answer] = {}

        def run(indices: list[int]) -> None:
            batch = [requests[i] for i in indices]
            for request, completion in zip(batch, self._complete(unit_batch, batch), strict=True):
                num_kept = self._num_kept(request.num_visual)
                done[request.image, request.prompt] = as_answer(completion, num_kept)

        failed: dict[int, Exception] = {}
        for _, alike in groupby(range(len(requests)), key=lambda i: requests[i].max_new_tokens):
            failed |= run_batched(list(alike), self.batch_size, run)
        guilty = {requests[r].image: error for r, error in failed.items()}
        self.suspicion.note(len(done), guilty.values())
        for i, error in guilty.items():
            unit_batch.reject(i, "generate", f"{type(error).__name__}: {error}")
            bad.add(i)
        give_answers(unit_batch, done, bad)

    def _num_kept(self, num_visual: int) -> int:
        """Visual tokens that were decoded: of methods inside the model, the mean over its layers."""
        layers = self.decoder.model.config.num_hidden_layers
        rows = layer_rows(self.method, self.settings, num_visual, layers)
        return num_visual if rows is None else round(fmean(attended for attended, _ in rows))

    def _complete(self, unit_batch: UnitBatch, batch: list[Request]) -> list[Completion]:
        images = [unit_batch.images[request.image] for request in batch]
        return self.decoder.generate(
            [request.visual for request in batch],
            [request.ids for request in batch],
            max_new_tokens=batch[0].max_new_tokens,
            seeds=[sampling_seed(i.sha256, r.prompt, self.seed) for i, r in zip(images, batch, strict=True)],
            policy=self.policy,
            **self.sampling,
        )
