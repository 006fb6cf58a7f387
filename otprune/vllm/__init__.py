"""Kept visual tokens in vLLM: a plugin for vLLM 0.32 and what its callers need.

vLLM's own classes compute a picture's place in the prompt from its size, and take equal numbers of visual tokens in one
step. Here the caller, who pruned, says what stands in the prompt for each picture: a span (`fields`). The plugin
registers a class `Span<Architecture>` for each architecture that it knows (`architectures`); vLLM finds it in each of
its processes by an entry point (`plugin`, `found`). Only `span` imports vLLM.
"""
