"""A store in memory that fails on command, as `memory://`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Refuses = Callable[[str, str], Exception | None]
"""(PUT, GET, LIST or DELETE; path) -> what the store raises, or None."""


class FailingStore(MemoryFileSystem):
    """Asks `refuses` before each call."""

    refuses: ClassVar[list[Refuses]] = []

    def _ask(self, verb: str, path: str) -> None:
        for refuses in self.refuses:
            if (error := refuses(verb, path)) is not None:
                raise error

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> Any:
        self._ask("PUT", path)
        return super().pipe_file(path, value, mode, **more)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> Any:
        self._ask("GET", path)
        return super().cat_file(path, start, end, **more)

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self._ask("LIST", path)
        return super().ls(path, detail, **more)

    def rm_file(self, path: str) -> None:
        self._ask("DELETE", path)
        super().rm_file(path)


@contextmanager
def failing_store(refuses: Refuses) -> Iterator[None]:
    """Makes `memory://` such a store for the block. What it holds stays until `empty_store`."""
    FailingStore.refuses.append(refuses)
    fsspec.register_implementation("memory", FailingStore, clobber=True)
    try:
        yield
    finally:
        FailingStore.refuses.remove(refuses)
        fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def empty_store() -> None:
    """Forgets everything under `memory://`."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
