"""The service's own cache folder, where measurements and runs leave packed weights, measured profiles and configs sent
as JSON.

It lies in the data folder, so that all of it counts among what the service keeps; `tightfit` on the command line has
another one. What was left half-written by a process that was killed is removed when the service starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tightfit.planner.service.jobs.store import Row, cache_row
from tightfit.runtime.common.files import write_whole

STORES, CONFIGS, PROFILES = "stores", "configs", "profiles"
KEPT = (f"{STORES}/*.store", f"{CONFIGS}/*/config.json", f"{PROFILES}/*.json")
HALF_WRITTEN = (f"{STORES}/.*.partial", f"{CONFIGS}/*/.*.part", f"{PROFILES}/.*.part", "measure-*.store", ".measure-*")


class CacheFolder:
    """The files under one folder, each named by its path there, as in ``stores/qwen-0123.store``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()  # as the sources of models are named

    def rows(self, names: Iterable[str] | None = None) -> list[Row]:
        """Rows for `JobStore.add` of the files that exist, or of those among them that `names` lists."""
        names_wanted = None if names is None else set(names)
        sizes = {name: size for name, size in self._sizes() if names_wanted is None or name in names_wanted}
        return [cache_row(name, size) for name, size in sizes.items()]

    def _sizes(self) -> Iterator[tuple[str, int]]:
        for pattern in KEPT:
            for path in self.folder.glob(pattern):
                with suppress(FileNotFoundError):
                    yield str(path.relative_to(self.folder)), path.stat().st_size

    def keep_config(self, config: dict[str, Any]) -> Path:
        """Write a config.json that was sent, under its checksum: a run of a plan reads it again."""
        text = json.dumps(config, sort_keys=True)
        path = self.folder / CONFIGS / hashlib.sha256(text.encode()).hexdigest() / "config.json"
        return path if path.exists() else write_whole(path, text)

    def name(self, path: str | Path) -> str | None:
        """The name of a file in the cache; None for what lies elsewhere."""
        with suppress(ValueError):
            return str(Path(path).relative_to(self.folder))
        return None

    def remove(self, name: str) -> None:
        path = self.folder / name
        with suppress(OSError):
            path.unlink()
        if path.parent.parent.name == CONFIGS:
            with suppress(OSError):
                path.parent.rmdir()

    def sweep(self) -> int:
        """Remove half-written files; returns how many. No job may be running."""
        removed = 0
        for pattern in HALF_WRITTEN:
            for path in self.folder.glob(pattern):
                with suppress(OSError):
                    path.unlink()
                    removed += 1
        return removed
