"""Merges an adapter into its base model: the whole model with its weights changed, in safetensors or GGUF, or the
adapter alone in the form of llama.cpp.

Tensor by tensor, a few MiB of rows at a time, whatever the size of the model; where PyTorch is not loaded, in a worker
(`tightfit.profiles.worker_process`) that loads its kernels alone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightfit.profiles.worker_process import run_worker, work
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import remove_orphans
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.start import lean_torch
from tightfit.runtime.engine.start.process import child_environment, leave
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.results.adapter_base import open_base, rounding_difference
from tightfit.runtime.results.place import adapter_folder, check_replaceable

FORMATS = ("safetensors", "gguf")
DTYPES = {"safetensors": ("float32", "bfloat16", "float16"), "gguf": ("float32", "bfloat16", "float16", "q8_0")}


def merge(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    format: str = "safetensors",  # noqa: A002  the word of the command line
    dtype: str | None = None,
    adapter_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the base model with the adapter in the folder `adapter` added to its weights; returns what was written.

    `format` is safetensors, for which `out` is the folder of a Hugging Face model, or gguf, for which it is a file. The
    base is `base`, or what the run's report or the adapter_config.json names; its values are those of its files,
    unpacked where they are quantised, and not as a run rounded them. `dtype` (float32, bfloat16, float16; in GGUF also
    q8_0) is that of all tensors in safetensors, in GGUF of those that the adapter changes; by default they keep the
    type that the base has, and what was quantised becomes what its config.json names, or q8_0 in GGUF. `adapter_only`
    writes the LoRA pairs alone in the form that llama.cpp loads beside a model.

    The result has `out`, `format`, `base`, `adapted` (number of tensors that were changed), `bytes`, `files`,
    `seconds`, `peak_bytes` (VmHWM of the process that merged), where a process was started for it `predicted_bytes`,
    and `note`: what differs from what training saw. Raises InputError for what does not fit together or cannot be
    written in this form, RunError where the disk is full; then nothing is left at `out`.
    """
    start = time.perf_counter()
    _check_options(format, dtype, adapter_only=adapter_only)
    folder, destination = adapter_folder(Path(adapter).absolute()), Path(out).absolute()
    check_replaceable(destination, folder=format == "safetensors", overwrite=overwrite)
    if (format == "gguf") != (destination.suffix == ".gguf"):
        advice = (
            "name it with -o NAME.gguf"
            if format == "gguf"
            else f"give {spelled('format', 'gguf')} as well, or name a folder with -o"
        )
        raise InputError(f"{out}: a GGUF model is one file; {advice}")
    base_model = open_base(folder, base)
    source = base_model.source
    if destination.resolve() in (folder.resolve(), Path(source.path).resolve()):
        raise InputError(f"{destination}: cannot replace what is read; name another place with -o")
    if "torch" not in sys.modules:
        options = {
            "adapter": str(folder),
            "out": str(destination),
            "base": base,
            "format": format,
            "dtype": dtype,
            "adapter_only": adapter_only,
            "overwrite": overwrite,
        }
        return _have_merged(options, progress) | {"seconds": time.perf_counter() - start}
    if format == "gguf" or source.needs_numpy:
        lean_torch.allow_numpy()
    from tightfit.runtime.results.adapter_changes import AdapterFolder

    adapter_tensors = AdapterFolder(folder, source.config.get("adapter_body", BODY))
    if format == "gguf" and adapter_tensors.settings.experts:
        raise InputError(
            f"{folder}: has pairs for experts, which are not written in GGUF; merge it without"
            f" {spelled('format', 'gguf')} and convert the result with llama.cpp's convert_hf_to_gguf.py"
        )
    with _one_thread():
        if format == "safetensors":
            from tightfit.runtime.results.merged_directory import write_safetensors

            written = write_safetensors(source, adapter_tensors, destination, dtype, progress)
        else:
            from tightfit.runtime.results import gguf_adapter, gguf_merge

            module = gguf_adapter if adapter_only else gguf_merge
            written = module.write_gguf(source, adapter_tensors, destination, dtype, progress)
    return {
        "out": str(destination),
        "format": format,
        "adapter": str(folder),
        "base": base_model.named,
        "adapted": len(adapter_tensors.weights) + len(adapter_tensors.tables),
        **written,
        "seconds": time.perf_counter() - start,
        "peak_bytes": memory().peak,
        "note": None if adapter_only else rounding_difference(base_model.rounding),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Blocks are small and the disk is the limit: where the cores are busy, sharing each operation out takes ten times
    as long.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


MERGING_BYTES = 160 << 20
"""what the worker holds at most: PyTorch's kernels, and rows of a tensor at a time; 104 MiB of SmolLM2-135M"""


def _check_options(form: str, dtype: str | None, *, adapter_only: bool) -> None:
    if form not in FORMATS:
        raise InputError(f"{spelled('format')} {form!r} is not known; choose one of {', '.join(FORMATS)}")
    if adapter_only and form != "gguf":
        raise InputError(
            f"{spelled('adapter_only')}: the folder of the adapter is in safetensors already; give"
            f" {spelled('format', 'gguf')} as well"
        )
    allowed = ("float32", "float16") if adapter_only else DTYPES[form]
    if dtype is not None and dtype not in allowed:
        raise InputError(
            f"{spelled('dtype')} {dtype!r} cannot be written in this form; choose one of {', '.join(allowed)}"
        )


def _have_merged(options: dict[str, Any], progress: Progress | None) -> dict[str, Any]:
    """Have a worker merge; arguments and result as those of `merge`."""

    def heard(message: dict[str, Any]) -> None:
        if progress:
            progress(message["stage"], message["done"], message["total"])

    try:
        merged: dict[str, Any] = run_worker(
            command(__name__),
            options,
            child_environment(1),
            doing="merging",
            predicted_bytes=MERGING_BYTES,
            instead="copy the run's folder and the base to a machine with more memory, and merge there",
            on_message=heard,
        )
    finally:
        remove_orphans(Path(options["out"]))
    return merged | {"predicted_bytes": MERGING_BYTES}


def main() -> int:
    lean_torch.load()
    return work(lambda options, report: merge(**options, progress=report))


if __name__ == "__main__":
    leave(main)
