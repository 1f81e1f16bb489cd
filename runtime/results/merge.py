"""Merges an adapter into its base model: the whole model with its weights changed, in safetensors or GGUF, or the adapter
alone in the form of llama.cpp.

Tensor by tensor, a few MiB of rows at a time, whatever the size of the model.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tightfit.profiles.sources.lookup import resolve
from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import write_whole
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import read_json
from tightfit.runtime.engine.device.resident import memory
from tightfit.runtime.engine.training.adapter import BODY
from tightfit.runtime.engine.weights.safetensors_file import TensorItem, write
from tightfit.runtime.results.adapter_changes import AdapterFolder, named_base
from tightfit.runtime.results.counting import Progress, WriteProgress
from tightfit.runtime.results.place import adapter_folder, atomic_output, check_replaceable
from tightfit.runtime.results.safetensors_merge import MergedTensors, merged_config, shards

FORMATS = ("safetensors", "gguf")
DTYPES = {"safetensors": ("float32", "bfloat16", "float16"), "gguf": ("float32", "bfloat16", "float16", "q8_0")}
BEHIND = 256 << 20
"""bytes that may wait to be written: they lie in the page cache, which is no part of this process's memory"""
ROUNDED = "rounded from"
"""beginning of the notes on values that packing changes (`tightfit.profiles.weights.precision.rounding_note`)"""
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
LEFT = ("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json")
"""JSON files of a base that are not copied: a merge writes its own, or they describe codes or an adapter"""


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The base of an adapter, opened."""

    named: str
    source: Source
    rounding: str | None
    """How packing changed its values when the adapter was trained, as a sentence; None: no report says."""


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
    base is `base`, or what the run's report or the adapter_config.json names; its values are those of its files, unpacked
    where they are quantised, and not as a run rounded them. `dtype` (float32, bfloat16, float16; in GGUF also q8_0) is that
    of all tensors in safetensors, in GGUF of those that the adapter changes; by default they keep the type that the base
    has, and what was quantised becomes what its config.json names, or q8_0 in GGUF. `adapter_only` writes the LoRA pairs
    alone in the form that llama.cpp loads beside a model.

    The result has `out`, `format`, `base`, `adapted` (number of tensors that were changed), `bytes`, `files`, `seconds`,
    `peak_bytes` (VmHWM of this process) and `note`: what differs from what training saw. Raises InputError for what does
    not fit together or cannot be written in this form, RunError where the disk is full; then nothing is left at `out`.
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
    adapter_tensors = AdapterFolder(folder, source.config.get("adapter_body", BODY))
    with _one_thread():
        if format == "safetensors":
            written = _write_safetensors(source, adapter_tensors, destination, dtype, progress)
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
    """Blocks are small and the disk is the limit: where the cores are busy, sharing each operation out takes ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_options(form: str, dtype: str | None, *, adapter_only: bool) -> None:
    if form not in FORMATS:
        raise InputError(f"{spelled('format')} {form!r} is not known; choose one of {', '.join(FORMATS)}")
    if adapter_only and form != "gguf":
        raise InputError(
            f"{spelled('adapter_only')}: the folder of the adapter is in safetensors already; give {spelled('format', 'gguf')} as well"
        )
    allowed = ("float32", "float16") if adapter_only else DTYPES[form]
    if dtype is not None and dtype not in allowed:
        raise InputError(
            f"{spelled('dtype')} {dtype!r} cannot be written in this form; choose one of {', '.join(allowed)}"
        )


def open_base(folder: Path, requested: str | None) -> AdapterBase:
    """The base of the adapter in `folder`: `requested`, or what the report of its run or its adapter_config.json names.

    Raises InputError where none is named, or it is none that has weights of its own.
    """
    report_base = _base_in_report(folder)
    base_name = requested or report_base.get("source") or named_base(folder)
    if not base_name:
        raise InputError(f"{folder}: its adapter_config.json names no base model; give its {spelled('base')}")
    try:
        source = resolve(str(base_name))
    except InputError as error:
        if requested:
            raise
        raise InputError(
            f"the base of the adapter, {base_name}, cannot be opened: {error}; or name it with {spelled('base')}"
        ) from error
    if not source.has_weights:
        raise InputError(
            f"{base_name} is a bare config, whose weights are random: there is nothing to merge; give its {spelled('base')}"
        )
    if source.kind not in ("huggingface", "gguf"):
        raise InputError(
            f"{base_name} is a module of your own, which is trained in full: a run's OUT/model holds it whole"
        )
    rounding = report_base.get("rounding") or (None if ROUNDED in source.note else source.note)
    return AdapterBase(named=str(base_name), source=source, rounding=rounding)


def _base_in_report(folder: Path) -> dict[str, Any]:
    """What the report of the run that left the adapter in `folder` says of its base; {} if there is no report."""
    try:
        report = read_json(folder.parent / "report.json")
        base = report["base"] if Path(report["adapter"]).name == folder.name else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return base if isinstance(base, dict) else {}


def rounding_difference(rounding: str | None) -> str | None:
    """How the base that the adapter was added to differs from the one that training saw, in a sentence; None: not at all."""
    if rounding is not None and ROUNDED not in rounding:
        return None
    seen_in_training = (
        f"training saw the base {rounding}" if rounding else "where training saw the base rounded (4 bits by default)"
    )
    return (
        f"{seen_in_training}; the adapter was added to the values of the base's own files, from which those differ by the rounding: losses of"
        " the run are near those of this model, not equal"
    )


# --- safetensors ------------------------------------------------------------------------------------------------------


def _write_safetensors(
    source: Source, adapter: AdapterFolder, place: Path, dtype: str | None, progress: Progress | None
) -> dict[str, Any]:
    merged = MergedTensors(source, adapter, dtype)
    items = merged.items()
    groups = shards(items)
    total = sum(item.bytes for item in items)
    write_companions = _companion_files(source)
    counted = WriteProgress(total, progress)
    with atomic_output(place, total, folder=True) as folder:
        names = ["model.safetensors"]
        if len(groups) > 1:
            names = [f"model-{n + 1:05}-of-{len(groups):05}.safetensors" for n in range(len(groups))]
        file_of: dict[str, str] = {}
        for name, group in zip(names, groups):
            file_of |= {item.name: name for item in group}
            write(str(folder / name), partial(_counted, group, counted), {"format": "pt"}, BEHIND)
        if len(groups) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
        config = merged_config(source, untied=merged.untied, dtype=dtype)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_companions(folder)
        files = sorted(path.name for path in folder.iterdir())
    return {"bytes": total, "files": files}


def _counted(items: list[TensorItem], counted: WriteProgress) -> Iterator[TensorItem]:
    for item in items:
        yield replace(item, chunks=partial(_chunks, item, counted))


def _chunks(item: TensorItem, counted: WriteProgress) -> Iterator[memoryview | bytes]:
    return counted(item.chunks())


def _companion_files(source: Source) -> Callable[[Path], None]:
    """Writes what a Hugging Face directory has beside config and weights: tokenizer, chat templates, defaults for generation."""
    if source.kind == "gguf":
        from tightfit.runtime.results.directory_of_gguf import vocabulary_files

        return vocabulary_files(source)
    base = Path(source.path)

    def copied(path: Path) -> bool:
        has_suffix = path.suffix in COPIED or path.name.startswith("LICENSE")
        return has_suffix and path.is_file() and path.name not in LEFT and not path.name.endswith(".index.json")

    def copy(folder: Path) -> None:
        for path in sorted(base.iterdir()):
            if copied(path):
                shutil.copyfile(path, folder / path.name)
        templates = base / "additional_chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, folder / templates.name)

    return copy
