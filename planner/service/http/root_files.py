"""Finds the models and data under the folders that are open to requests, so that nobody has to type a path.

Of a model its headers are read, by the code that opens models, and no weights. What `confined` would refuse, such as a
folder with a link that leads out, is not listed. How much is looked at is bounded: by files and folders, by what is
listed, and by seconds. Headers that were read are remembered, so that a second listing goes further.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tightfit.planner.service.jobs.paths import confined
from tightfit.planner.service.wire.errors import ServiceError
from tightfit.planner.service.wire.inputs import FileKind, FilesAnswer, FilesKind, FileUnderRoot
from tightfit.profiles.models.decoder_config import decoder_shape, handwritten
from tightfit.profiles.sources.gguf_metadata import read_header
from tightfit.profiles.sources.huggingface import QUANTIZATION, checkpoint_files
from tightfit.profiles.sources.quantised import method_of
from tightfit.profiles.weights.describe import decoder_tensors
from tightfit.profiles.weights.source import BUNDLE, read_config
from tightfit.profiles.weights.tensor_file import TensorFile
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.data.samples import LINES, data_files
from tightfit.runtime.data.tables import DATASET, kind_of

MOST_LOOKED_AT = 20_000
"""files and folders"""
MOST_LISTED = 500
MOST_SECONDS = 3.0
CONFIG = "config.json"
LARGEST_CONFIG = 1 << 18
"""bytes of a JSON file that may be a model's configuration"""
HUB_FOLDER = re.compile(r"models--(.+?)--(.+)")
"""a model's folder in the cache of the Hugging Face hub, which has its snapshots under checksums"""


class ModelHeader(NamedTuple):
    """What a model's headers say of it."""

    family: str | None = None
    parameters: int | None = None
    precision: str | None = None


class _Found(NamedTuple):
    """A model or data, before it is known whether a request may name it."""

    path: Path
    kind: FileKind
    files: Sequence[Path]
    read_header: Callable[[Path], ModelHeader] | None = None


def files_under(roots: Sequence[Path], kind: FilesKind) -> FilesAnswer:
    """What lies under the roots, the newest first."""
    ends = time.monotonic() + MOST_SECONDS
    listed: list[FileUnderRoot] = []
    cut = over = False
    for root in (root.resolve() for root in roots):
        if over:
            break
        for folder, names, whole in _folders(root):
            cut |= not whole
            for found in (_models if kind == "models" else _data)(folder, names, ends):
                if len(listed) == MOST_LISTED:
                    break
                path = os.path.relpath(found.path, root)
                if _allowed(path, found.path, roots):
                    listed.append(_described(found, path))
            over = len(listed) == MOST_LISTED or time.monotonic() > ends
            if over:
                cut = True
                break
    newest_first = sorted(listed, key=lambda file: (-file.modified, file.path))
    return FilesAnswer(roots=[root.resolve().name for root in roots], files=newest_first, cut=cut)


def _folders(root: Path) -> Iterator[tuple[Path, list[str], bool]]:
    """Each folder under a root with the names in it, those near the root first; and whether more was left to look at.

    Names that begin with a dot are left out, and so are folders that a link leads to a second time.
    """
    looked_at, seen, folders = 0, {root}, [root]
    for folder in folders:
        try:
            names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        except OSError:
            continue
        names = names[: MOST_LOOKED_AT - looked_at]
        looked_at += len(names)
        for name in names:
            path = folder / name
            if _is_folder(path) and (real := path.resolve()) not in seen:
                seen.add(real)
                folders.append(path)
        yield folder, names, looked_at < MOST_LOOKED_AT
        if looked_at >= MOST_LOOKED_AT:
            return


def _models(folder: Path, names: Sequence[str], ends: float) -> Iterable[_Found]:
    """The models in a folder, as far as they are found before the time `ends`."""
    if BUNDLE in names:
        yield _Found(folder, "bundle", [folder / name for name in names])
        return
    for name in names:
        if time.monotonic() > ends:
            return
        if name.endswith(".gguf"):
            yield _Found(folder / name, "gguf", [folder / name], _gguf_header)
        elif name.endswith(".json") and name != CONFIG:
            yield from _bare_config(folder / name)
    if CONFIG in names:
        try:
            weights = checkpoint_files(folder)
        except InputError:
            yield from _bare_config(folder / CONFIG)
        else:
            yield _Found(folder, "folder", [folder / CONFIG, *weights], _folder_header)


def _bare_config(path: Path) -> Iterator[_Found]:
    """A model's configuration without weights; nothing for other JSON."""
    status = _status(path)
    if status is None or status.st_size > LARGEST_CONFIG:
        return
    try:
        read_config(path)
    except InputError:
        return
    yield _Found(path, "config", [path], _config_header)


def _data(folder: Path, names: Sequence[str], ends: float) -> Iterable[_Found]:
    """The data in a folder: their names tell them, which takes no time."""
    kinds = {name: kind for name in names if (kind := _data_kind(name)) is not None}
    dataset = DATASET in names
    if len(kinds) > 1 or dataset:
        try:
            yield _Found(folder, "folder", data_files(str(folder)))
        except InputError:  # several kinds, or several data sets
            pass
        else:
            if dataset:  # its files belong together
                return
    for name, kind in kinds.items():
        yield _Found(folder / name, kind, [folder / name])


def _data_kind(name: str) -> FileKind | None:
    if name.lower().endswith(LINES):
        return "jsonl"
    tables: dict[str | None, FileKind] = {"CSV": "csv", "Parquet": "parquet", "Arrow": "arrow"}
    return tables.get(kind_of(Path(name)))


def _allowed(path: str, found: Path, roots: Sequence[Path]) -> bool:
    """Whether `path` is what a request would get by that name: it lies inside, and no other root has the same name."""
    try:
        return confined(path, roots, "path") == str(found.resolve())
    except (ServiceError, OSError):
        return False


def _described(found: _Found, path: str) -> FileUnderRoot:
    sizes = [status for file in found.files if (status := _status(file)) is not None]
    modified = max((status.st_mtime for status in sizes), default=0.0)
    header = ModelHeader()
    if found.read_header is not None:
        changed = tuple((status.st_size, status.st_mtime_ns) for status in sizes)
        header = _remembered(found.read_header, found.path, changed)
    return FileUnderRoot(
        path=path,
        name=_name(found),
        kind=found.kind,
        bytes=sum(status.st_size for status in sizes),
        modified=modified,
        **header._asdict(),
    )


def _is_folder(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:  # removed meanwhile, or not to be looked at
        return None


def _name(found: _Found) -> str:
    """What a person calls it."""
    for part in reversed(found.path.parts):
        if (hub := HUB_FOLDER.fullmatch(part)) is not None:
            return f"{hub[1]}/{hub[2]}" + (f", {found.path.stem}" if found.kind == "gguf" else "")
    if found.kind == "gguf":
        return found.path.stem
    if found.path.name == CONFIG:
        return found.path.parent.name
    return found.path.name


@lru_cache(maxsize=2048)
def _remembered(read: Callable[[Path], ModelHeader], path: Path, changed: tuple[tuple[int, int], ...]) -> ModelHeader:
    """What a model's headers say; nothing of one that cannot be read. `changed` tells a file that was replaced from the
    one before.
    """
    try:
        return read(path)
    except (InputError, OSError):
        return ModelHeader()


def _gguf_header(path: Path) -> ModelHeader:
    header = read_header(path)
    weights: Counter[str] = Counter()
    for tensor in header.tensors:
        weights[tensor.kind] += math.prod(tensor.shape)
    return ModelHeader(_word(header.metadata.get("general.architecture")), weights.total(), _most(weights))


def _folder_header(path: Path) -> ModelHeader:
    config = read_config(path / CONFIG)
    method = method_of(path, config) if config.get(QUANTIZATION) else None
    if method is not None:
        return ModelHeader(_word(config.get("model_type")), _parameters_of(config), method)
    weights: Counter[str] = Counter()
    for file in checkpoint_files(path):
        for dtype, shape in TensorFile(file).tensors.values():
            weights[dtype] += math.prod(shape)
    return ModelHeader(_word(config.get("model_type")), weights.total(), _most(weights))


def _config_header(path: Path) -> ModelHeader:
    config = read_config(path)
    return ModelHeader(_word(config.get("model_type")), _parameters_of(config))


def _parameters_of(config: dict[str, object]) -> int | None:
    """Weights of a decoder of that configuration; None where transformers would have to build it to know."""
    return parameters(config) if handwritten(config) else None


def parameters(config: dict[str, object]) -> int:
    """Weights of a decoder that is written by hand. Raises InputError for a configuration that cannot be used."""
    return sum(math.prod(shape) for _, shape in decoder_tensors(decoder_shape(config)))


def _most(weights: Counter[str]) -> str | None:
    return weights.most_common(1)[0][0] if weights else None


def _word(value: object) -> str | None:
    return value[:80] if isinstance(value, str) else None
