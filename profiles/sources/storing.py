"""Packs a model's weights into a store, in a process of its own where this one has not loaded PyTorch.

The worker (`tightfit.profiles.worker_process`) loads PyTorch's kernels alone, opens the same model again and packs it a
few MiB at a time; what it writes is the same to the bit.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tightfit.profiles.models.decoder_facts import DecoderFacts
from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.source import Source, block_rows
from tightfit.profiles.worker_process import run_worker, work
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import cache_directory, remove_orphans
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import child_environment, leave
from tightfit.runtime.engine.weights.layout import Entry, holds, store_path

PROCESS_BYTES = 84 << 20
"""What the worker holds before the first tensor, at most: PyTorch's kernels and the modules that open models."""
NUMPY_BYTES = 32 << 20
"""What NumPy and the gguf package add to it."""


def stored_weights(source: Source, directory: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """Path of the packed store of `source` in `directory`, written now unless an intact one is there already.

    Raises InputError for weights that do not fit the model's config, RunError if the disk is full or the worker fails;
    no partial file is ever left under the store's name.
    """
    if source.store is not None:
        return source.store
    path = store_path(directory, source.name, source.fingerprint)
    if holds(path, source.fingerprint):
        return path
    if "torch" in sys.modules:
        from tightfit.profiles.weights.store_file import build_store

        build_store(source, directory, progress)
    else:
        _have_packed(source, directory, progress)
    return path


def _have_packed(source: Source, directory: str | os.PathLike[str], progress: Progress | None) -> None:
    """Have a worker pack the weights."""
    request = {
        "source": source.path,
        "base": source.base,
        "embeddings": source.embeddings,
        "decoder": None if source.decoder is None else source.decoder.model_dump(mode="json"),
        "name": source.name,
        "fingerprint": source.fingerprint,
        "directory": os.fspath(directory),
    }

    def heard(message: dict[str, Any]) -> None:
        if progress:
            progress(message["stage"], message["done"], message["total"])

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        run_worker(
            command(__name__),
            request,
            child_environment(cores) | {"TIGHTFIT_CACHE": os.fspath(cache_directory())},
            doing="packing",
            predicted_bytes=storing_bytes(source),
            instead="make a bundle with the weights on a larger machine (`tightfit prepare --weights`)",
            on_message=heard,
        )
    finally:
        remove_orphans(store_path(directory, source.name, source.fingerprint))


def storing_bytes(source: Source) -> int:
    """Most bytes that the worker holds while it packs `source`, known before it starts."""
    block = max((_block_bytes(entry) for entry in source.entries.values()), default=0)
    return PROCESS_BYTES + (NUMPY_BYTES if source.needs_numpy else 0) + block


def _block_bytes(entry: Entry) -> int:
    """Bytes that converting a block of rows takes: what the file has of them, float32 values, and the packed form
    twice.
    """
    return block_rows(entry) * (entry.columns * (4 + 4) + 2 * entry.row_bytes)


def _pack(request: dict[str, Any], report: Progress) -> str:
    """The worker's part; returns the path of the store."""
    from tightfit.profiles.weights.store_file import build_store

    decoder = None if request["decoder"] is None else DecoderFacts.model_validate(request["decoder"])
    source = resolve(request["source"], base=request["base"], embeddings=request["embeddings"], decoder=decoder)
    if source.fingerprint != request["fingerprint"]:
        raise InputError(f"{request['source']}: was changed while it was being opened; start again")
    if source.needs_numpy:
        lean_torch.allow_numpy()
    source = replace(source, name=request["name"])
    return str(build_store(source, request["directory"], report))


def main() -> int:
    lean_torch.load()
    return work(_pack)


if __name__ == "__main__":
    leave(main)
