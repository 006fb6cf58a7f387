"""Compares an evaluation with answering the same questions one at a time: are answers equal, and how long do both take?

    OMP_NUM_THREADS=1 python -m benchmarks.evaluate_batch1 [--limit 32] [--config conf/evaluate_demo.yaml] [key=value]

The job is `jobs/evaluate.py` on an embedded Ray: it encodes every image once, decodes prompts in batches and overlaps
the stages. The comparison works like the harness of the papers: for one question after the other, it decodes the image,
encodes, selects and generates, in one process without Ray, with the same encoder, selection and decoder. The last line
is JSON: questions a second of both, without the start of Ray and the loading of models; their ratio; and the number of
equal answers.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch

from otprune import num_kept, select_tokens
from otprune.models import llava_encoder, load_decoder
from pipelines.accuracy.config import EvaluateConfig
from pipelines.accuracy.evaluate import Evaluation, prepare_evaluation, run_evaluation
from pipelines.accuracy.read_questions import load_images
from pipelines.accuracy.scores import read_records
from pipelines.benchmarks import Benchmark, Row
from pipelines.config.load import REPOSITORY, load_config
from pipelines.run.stages import decode_settings
from pipelines.stages.gpu import torch_dtype
from pipelines.stages.seeds import image_seed

CONFIG = REPOSITORY / "conf" / "evaluate_demo.yaml"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=32, help="questions of each benchmark, in whole scoring groups")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("overrides", nargs="*", help="dotted.key=value")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        given = [f"limit={chosen.limit}", "mlflow.enabled=false", f"output.path={folder}/out", *chosen.overrides]
        config = load_config([f"--config={chosen.config}", *given], EvaluateConfig)
        evaluation = prepare_evaluation(config)
        outcome, results = run_evaluation(evaluation)
        if results is None:
            print(outcome.message, file=sys.stderr)
            return outcome.code
        answers = {
            (benchmark, record["question_id"]): record["prediction"]
            for benchmark, records in read_records(evaluation.job.output).items()
            for record in records
        }
    single, seconds = answer_one_by_one(evaluation)
    rate = len(single) / seconds
    job_rate = outcome.metrics["questions_per_second"]
    same = sum(answers[key] == text for key, text in single.items())
    print(f"{len(single)} questions, {same} answers the same; load of the machine {os.getloadavg()[0]:.1f}")
    print(f"job {job_rate:.1f} questions/s once started ({outcome.metrics['wall_seconds']:.0f} s in all)")
    print(f"batch 1 without Ray {rate:.1f} questions/s")
    numbers = {"questions": len(single), "same": same, "job_per_s": job_rate, "batch1_per_s": rate}
    print(json.dumps({name: round(value, 2) for name, value in {**numbers, "ratio": job_rate / rate}.items()}))
    return 0 if same == len(single) == len(answers) else 1


def answer_one_by_one(evaluation: Evaluation) -> tuple[dict[tuple[str, str], str], float]:
    """{(benchmark, question id): answer}, and the seconds for all of them without loading the models."""
    job, config = evaluation.job, evaluation.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch_dtype(config.model.dtype, device)
    encoder = llava_encoder.load(job.checkpoint, dtype=dtype, device=device)
    decoder = load_decoder(job.checkpoint, dtype=dtype, device=device)
    k = num_kept(config.prune.retention, encoder.num_tokens)
    decode, prune, answers = decode_settings(job), config.prune, {}
    started = time.perf_counter()
    for bench, question in wanted_questions(evaluation):
        pixels = torch.stack([torch.from_numpy(decode(data).pixels) for data in question["images"]])
        visual = encoder(pixels)
        if prune.method != "none":
            digest = hashlib.sha256(b"".join(question["images"])).hexdigest()
            seeds = torch.tensor([image_seed(digest, prune.seed + picture) for picture in range(len(visual))])
            keep = select_tokens(
                visual, k, method=prune.method, gamma=prune.gamma, gamma_scale=prune.gamma_scale, seed=seeds.to(device)
            )
            visual = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
        prompt = decoder.encode_prompt(bench.prompt(question), config.prompt.conversation, len(visual))
        limit = min(bench.max_new_tokens, config.generate.max_new_tokens)
        room = decoder.max_length - sum(map(len, prompt)) - visual.shape[0] * visual.shape[1]
        [completion] = decoder.generate([list(visual)], [prompt], max_new_tokens=min(limit, room))
        answers[bench.name, question["question_id"]] = completion.text
    return answers, time.perf_counter() - started


def wanted_questions(evaluation: Evaluation) -> Iterator[tuple[Benchmark, Row]]:
    """The questions of the evaluation, benchmark by benchmark and file by file."""
    asked = evaluation.asked
    for bench in evaluation.benchmarks:
        wanted = asked.wanted.get(bench.name)
        for source, file in asked.readers.items():
            if bench.name not in file.benchmarks:
                continue
            images = load_images(asked.store, bench.name, file.image_files) if bench.image_table else None
            with asked.store.fs.open(asked.store.join(source), "rb") as stream:
                table = pq.read_table(stream, columns=list(bench.columns))
            for question in bench.rows(table, file.first_row, images):
                if wanted is None or question["group_id"] in wanted:
                    yield bench, question


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
