"""The demo: a small trained LLaVA, the synthetic world that it was trained on, and a corpus to caption."""

from pathlib import Path

CORPUS = ".cache/demo_corpus"  # the name in the demo configurations


def ensure_corpus(path: str) -> None:
    """Generates the demo corpus if `path` is the demo configurations' corpus and does not exist yet."""
    if path == CORPUS and not Path(path).exists():
        from demo.corpus import (
            build_corpus,
        )  # a late import: it loads drawing libraries, which other corpora do not need

        build_corpus(Path(path))
