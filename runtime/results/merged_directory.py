"""A merged model as a Hugging Face directory: its tensors, its config.json, and what its base has beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tightfit.profiles.weights.source import Source
from tightfit.runtime.common.files import WRITE_BEHIND_BYTES, write_whole
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.weights.safetensors_file import TensorItem, write
from tightfit.runtime.results.adapter_changes import AdapterFolder
from tightfit.runtime.results.counting import WriteProgress
from tightfit.runtime.results.place import atomic_output
from tightfit.runtime.results.safetensors_merge import MergedTensors, merged_config, shards

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
LEFT = ("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json")
"""JSON files of a base that are not copied: a merge writes its own, or they describe codes or an adapter"""


def write_safetensors(
    source: Source, adapter: AdapterFolder, place: Path, dtype: str | None, progress: Progress | None
) -> dict[str, Any]:
    """Write the merged model to the folder `place`; returns `bytes` and `files`."""
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
            write(str(folder / name), partial(_counted, group, counted), {"format": "pt"}, WRITE_BEHIND_BYTES)
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
    """Writes what a Hugging Face directory has beside config and weights: tokenizer, chat templates, defaults for
    generation.
    """
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
