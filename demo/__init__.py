"""The demo: a small LLaVA that was really trained, the synthetic world it knows, and a corpus to caption."""

from pathlib import Path

CORPUS = ".cache/demo_corpus"  # as the demo configurations name it


def ensure_corpus(path: str) -> None:
    """Generates the demo corpus if `path` is where the demo configurations expect it and nothing is there yet."""
    if path == CORPUS and not Path(path).exists():
        from demo.corpus import build_corpus  # draws and encodes images: only where that is needed

        build_corpus(Path(path))
