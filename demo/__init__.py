"""The demos: small trained models, the synthetic worlds that they were trained on, and corpora to caption."""

from pathlib import Path

CORPUS, GALLERY = ".cache/demo_corpus", ".cache/gallery_corpus"  # the names in the demo configurations


def ensure_corpus(path: str) -> None:
    """Generates a demo corpus if `path` is one of the demo configurations' corpora and does not exist yet."""
    if path not in (CORPUS, GALLERY) or Path(path).exists():
        return
    # Late imports: they load drawing libraries, which other corpora do not need.
    from demo.corpus import SHAPES, build_corpus
    from demo.gallery.corpus import GALLERY as WORLD

    build_corpus(Path(path), world=SHAPES if path == CORPUS else WORLD)
