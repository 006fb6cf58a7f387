"""The entry point of the group `vllm.general_plugins`. vLLM calls it in each of its processes, before a model."""

from otprune.vllm.architectures import ARCHITECTURES, SPAN_MODULE, span_name


def register() -> None:
    """Tells vLLM about the classes that take spans. They are made when vLLM asks for one. May be called twice."""
    # pyright takes this very folder for vLLM, where vLLM is not installed
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    known = ModelRegistry.get_supported_archs()
    for architecture in ARCHITECTURES:
        name = span_name(architecture)
        if name not in known:
            ModelRegistry.register_model(name, f"{SPAN_MODULE}:{name}")
