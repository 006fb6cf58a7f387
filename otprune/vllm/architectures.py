"""The architectures of vLLM that take spans, and the names of the classes that take them."""

SPAN_MODULE = "otprune.vllm.span"

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "smolvlm",
    "InternVLForConditionalGeneration": "interns1:InternS1ForConditionalGeneration",
    "Mistral3ForConditionalGeneration": "mistral3",
}
"""`architectures` of a checkpoint's config.json, and the module of vllm.model_executor.models with vLLM's own class.

The class has the architecture's name, or else the one behind the colon."""


def span_name(architecture: str) -> str:
    """The name under which vLLM knows the class that takes spans.

    Raises:
        ValueError: if there is none for this architecture.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"with pruning, vLLM must be given a model of {', '.join(sorted(ARCHITECTURES))}; got {architecture}"
        )
    return f"Span{architecture}"
