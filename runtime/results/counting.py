"""Reports to a caller how many bytes of a model are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tightfit.runtime.common.progress import Progress

Chunks = Iterable[memoryview | bytes]


class WriteProgress:
    """Yields chunks, and reports each to `progress` once it is written."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, chunks: Chunks) -> Iterator[memoryview | bytes]:
        for chunk in chunks:
            yield chunk
            self._done += len(chunk)
            if self._progress:
                self._progress("merging", self._done, self._total)
