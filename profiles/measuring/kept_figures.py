"""Figures that belong to the machine and not to a model, kept in the cache from one profile to the next: an operator on
tensors of some sizes, a weight of some shape, the disk, an idle process are measured once.

There is a file for each machine as it is: its processor, kernel, PyTorch, threads and the code that measures are in the
file's name. Times are kept only where no other programs took the cores meanwhile, and are taken only while the machine
is as fast as it was then, by a reference computation that each profile times. Bytes depend on neither: two profiles
that are measured one after the other have the same floor, so that what the second needs less is its step's, and not how
a process happened to lie in memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from tightfit.profiles.measuring.cpu_load import crowded
from tightfit.runtime.common.errors import TightfitError
from tightfit.runtime.common.files import read_whole, write_whole

LONGEST_SECONDS = 14 * 24 * 3600.0
"""age from which a figure is measured anew"""
DIFFERENT = 0.15
"""share by which the reference may differ: a step is predicted within 5 % where nothing else runs, and the reference, a
tenth of a second long, spreads more
"""
OF_BYTES = ("floor ", "kernels ", "workspace ")
"""kinds of figures that are bytes, which do not depend on how fast the machine is"""
MOST_KEPT = 8192
"""figures; of more the oldest are left out"""
T = TypeVar("T")


class KeptFigures:
    """The kept figures of this machine, and those that are measured now."""

    def __init__(
        self, path: Path | None, *, turning_bytes: int = 0, anew: bool = False, now: Callable[[], float] = time.time
    ) -> None:
        """`path`: where they are kept; None: nowhere. `turning_bytes`: of the buffers with which times are measured; a
        time that was measured with smaller ones does not count. `anew`: take nothing that was measured before.
        """
        self.path, self.turning_bytes, self._now = path, turning_bytes, now
        self.reference: float | None = None
        """seconds of the reference computation when the first of the figures were measured"""
        self._figures: dict[str, list[Any]] = {}  # key -> [figure, when it was measured, turning_bytes]
        self._since = now() if anew else 0.0
        if path is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):  # none are kept yet, or the file is damaged
                kept = json.loads(read_whole(path))
                reference = kept["reference"]
                self.reference, self._figures = None if reference is None else float(reference), dict(kept["figures"])

    @classmethod
    def of_request(cls, request: Mapping[str, Any], *, turning_bytes: int = 0) -> Self:
        """Those that a request to measure may use."""
        path = request.get("kept")
        return cls(None if path is None else Path(path), turning_bytes=turning_bytes, anew=request.get("anew", False))

    def check(self, reference: float) -> None:
        """Forget all times if the reference computation takes another time than when they were measured."""
        if self.reference is None or abs(reference / self.reference - 1.0) > DIFFERENT:
            self.reference = reference
            self._figures = {name: kept for name, kept in self._figures.items() if name.startswith(OF_BYTES)}

    def known(self, kind: str, key: Any) -> Any:
        """The figure of this `kind` with this `key` (what JSON can hold); None: it is to be measured."""
        figure, measured_at, turning_bytes = self._figures.get(_name(kind, key), (None, 0.0, 0))
        fresh = measured_at >= self._since and 0 <= self._now() - measured_at < LONGEST_SECONDS
        return figure if fresh and turning_bytes >= self.turning_bytes else None

    def note(self, kind: str, key: Any, figure: T) -> T:
        """Remember a figure that was measured now; returns it."""
        self._figures[_name(kind, key)] = [figure, self._now(), self.turning_bytes]
        return figure

    def of(self, kind: str, key: Any, measure: Callable[[], T]) -> T:
        """The figure that is known, or else what `measure` returns."""
        known: T | None = self.known(kind, key)
        return self.note(kind, key, measure()) if known is None else known

    def save(self, busy_cores: float = 0.0, threads: int = 1) -> None:
        """Keep all figures, unless other programs took so many cores while they were measured that times are too long.
        A cache that cannot be written is no error.
        """
        if self.path is None or crowded(busy_cores, threads):
            return
        newest = dict(sorted(self._figures.items(), key=lambda item: item[1][1])[-MOST_KEPT:])
        with suppress(TightfitError, OSError):
            write_whole(self.path, json.dumps({"reference": self.reference, "figures": newest}))


def _name(kind: str, key: Any) -> str:
    return f"{kind} {hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}"
