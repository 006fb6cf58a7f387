"""The unpruned baseline: captions a corpus with stock `ray.data.llm` and vLLM.

    python -m benchmarks.stock_ray_llm --model FOLDER --input FILE.parquet [--engine '{"max_num_seqs": 32}']

Rows hold the prompt and the decoded image, which vLLM preprocesses and encodes. Ray's documentation passes images as
chat messages instead, but the stage for them (Ray 2.60) imports a module that vLLM 0.32 no longer has. Prints one JSON
line: images, seconds from the first answers to the last, images/s in this time, which excludes start-up, and seconds of
the whole run. Uses nothing of this package's dataflow.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import ray
from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from transformers import AutoTokenizer

PROMPT = "describe the image ."
OFF = (
    "prepare_multimodal_stage",
    "chat_template_stage",
    "tokenize_stage",
    "detokenize_stage",
)  # vLLM does this work itself


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True, help="Parquet with {bytes, path} structs in `image`")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of one batch; several are in flight")
    parser.add_argument("--engine", type=json.loads, default={}, help="keyword arguments of vLLM's engine, as JSON")
    arguments = parser.parse_args()
    print(json.dumps(measure(**vars(arguments))))


def measure(model: Path, input: Path, max_tokens: int, batch_size: int, engine: dict[str, Any]) -> dict[str, Any]:
    """Captions the corpus; returns images, seconds, images/s and tokens."""
    ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=8)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 4096  # so small that each answer is a block: its time is seen
    started = time.perf_counter()
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    config = vLLMEngineProcessorConfig(
        model_source=str(model),
        engine_kwargs={"limit_mm_per_prompt": {"image": 1}, **engine},
        batch_size=batch_size,
        concurrency=1,
        **{stage: {"enabled": False} for stage in OFF},
        log_engine_metrics=has_gpu,  # the exporter of metrics fails with the CPU build
        placement_group_config=None if has_gpu else {"bundle_per_worker": {"CPU": 1}},
    )
    prompt = chat_prompt(model)
    processor = build_processor(
        config,
        preprocess=lambda row: {
            "prompt": prompt,
            "multimodal_data": {"image": Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")},
            "sampling_params": {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True},
        },
        postprocess=lambda row: {
            "caption": row["generated_text"],
            "prompt_tokens": row["num_input_tokens"],
            "tokens": row["num_generated_tokens"],
        },
    )
    images = ray.data.read_parquet(str(input), columns=["image"], override_num_blocks=4)
    times: list[float] = []
    rows: list[dict[str, Any]] = []
    for row in processor(images).iter_rows():
        rows.append(row)
        times.append(time.perf_counter())
    first = next(
        (i for i, t in enumerate(times) if t > times[0] + 0.2), 0
    )  # answers of the first block arrive together
    return {
        "images": len(rows),
        "seconds": round(times[-1] - times[0], 2),
        "images_per_second": round((len(rows) - first) / max(1e-9, times[-1] - times[0]), 4),
        "wall_seconds": round(times[-1] - started, 2),
        "prompt_tokens": rows[0]["prompt_tokens"],
        "new_tokens": rows[0]["tokens"],
    }


def chat_prompt(model: Path) -> str:
    """The prompt in the checkpoint's chat format, with the placeholder for the image."""
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


if __name__ == "__main__":
    main()
