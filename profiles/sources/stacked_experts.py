"""The matrices of all experts of a layer, of which checkpoints hold those of each expert as tensors of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.weights.precision import PUBLISHED
from tightfit.profiles.weights.source import SourceTensor
from tightfit.profiles.weights.tensor_file import FileTensor
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.weights.layout import Entry

if TYPE_CHECKING:
    from torch import Tensor


def parts_there(name: str, parts: Sequence[str], experts: int, locations: Mapping[str, Any]) -> list[str]:
    """The names in `locations` of the tensors of single experts whose rows, one after the other, are those of the
    tensor `name`; `parts` has them with * for the number of an expert. None where a file holds it as it is, or none of
    them. Raises InputError where some of them are missing.
    """
    if name in locations or not parts:
        return []
    names = [part.replace("*", str(number)) for number in range(experts) for part in parts]
    missing = [name for name in names if name not in locations]
    if missing and len(missing) < len(names):
        raise InputError(
            f"no tensor {missing[0]!r} in the model's safetensors files ({len(missing)} of {len(names)} of its experts'"
            " matrices are missing); download the model again"
        )
    return [] if missing else names


def dtype_of_parts(path: Path, parts: Iterable[str], dtypes: Mapping[str, str]) -> str:
    """The one type of the experts' tensors. Raises InputError where they differ or are quantised."""
    found = {dtypes[part]: part for part in parts}
    for dtype, part in found.items():
        if dtype not in PUBLISHED or len(found) > 1:
            said = f"is {dtype}" if dtype not in PUBLISHED else f"is {dtype} and those of other experts are not"
            raise InputError(f"{path}: tensor {part!r} {said}; use the model's 16-bit weights")
    return next(iter(found))


def stacked_tensor(entry: Entry, parts: Sequence[str], load: Callable[[str], FileTensor]) -> SourceTensor:
    """A tensor of all experts, to be packed as `entry`, of the tensors `parts` of single ones."""
    stored = [load(part) for part in parts]
    origins = [f"{one.file.path}: tensor {one.name!r}" for one in stored]
    names = [one.name for one in stored]
    return SourceTensor(entry=entry, rows=_stacked_rows(stored, entry.shape), origins=origins, parts=names)


def _stacked_rows(stored: Sequence[FileTensor], shape: Sequence[int]) -> Callable[[int, int], Tensor]:
    """Reads rows of a matrix of this shape, in float32, in which the matrices `stored` stand below one another. Raises
    InputError for one of another shape.
    """
    height, width = shape[0] // len(stored), shape[1]
    for one in stored:
        if one.shape != (height, width):
            raise InputError(
                f"{one.file.path}: tensor {one.name!r} has shape {list(one.shape)} where {[height, width]} is due;"
                " config.json does not fit the weights"
            )

    def rows(start: int, stop: int) -> Tensor:
        import torch

        parts = (stored[number].rows(first, last) for number, first, last in spans(start, stop, height))
        return torch.cat([part.to(torch.float32) for part in parts])

    return rows


def spans(start: int, stop: int, height: int) -> Iterator[tuple[int, int, int]]:
    """(number of a matrix, first of its rows, end) for rows [start, stop) of matrices of so many rows that stand below
    one another.
    """
    while start < stop:
        number, first = divmod(start, height)
        last = min(height, first + stop - start)
        yield number, first, last
        start += last - first


def flattened_rows(stored: FileTensor, experts: int, shape: Sequence[int]) -> Callable[[int, int], Tensor]:
    """The same of one tensor in which they stand side by side, in three dimensions."""
    due = (experts, shape[0] // experts, shape[1])
    if stored.shape != due:
        raise InputError(
            f"{stored.file.path}: tensor {stored.name!r} has shape {list(stored.shape)} where {list(due)} is due;"
            " config.json does not fit the weights"
        )

    def rows(start: int, stop: int) -> Tensor:
        import torch

        return stored.matrix_rows(start, stop).to(torch.float32)

    return rows


def turned_rows(
    stored: FileTensor, experts: int, shape: Sequence[int], *, in_turn: bool
) -> Callable[[int, int], Tensor]:
    """The same of one tensor whose matrices have rows and columns the other way round; `in_turn`: whether the gate of
    each number stands beside its up.
    """
    height, width = shape[0] // experts, shape[1]
    if stored.shape != (experts, width, height):
        raise InputError(
            f"{stored.file.path}: tensor {stored.name!r} has shape {list(stored.shape)} where"
            f" {[experts, width, height]} is due; config.json does not fit the weights"
        )

    @functools.lru_cache(maxsize=1)
    def expert(number: int) -> Tensor:
        return stored.matrix_rows(number * width, (number + 1) * width).t()

    def rows(start: int, stop: int) -> Tensor:
        import torch

        taken = (
            expert(number)[_places(first, last, height, in_turn=in_turn)]
            for number, first, last in spans(start, stop, height)
        )
        return torch.cat([part.to(torch.float32) for part in taken])

    return rows


def mxfp4_parts(name: str, locations: Mapping[str, Any]) -> list[str]:
    """The names of the codes and scales of all experts in MXFP4, as transformers writes them; none where they are not
    in `locations`.
    """
    names = [f"{name}_blocks", f"{name}_scales"]
    return names if all(part in locations for part in names) else []


def mxfp4_rows(
    blocks: FileTensor, scales: FileTensor, experts: int, shape: Sequence[int], *, in_turn: bool
) -> Callable[[int, int], Tensor]:
    """Reads rows of the store's format mxfp4 from codes [experts, rows, groups, 16] and scales [experts, rows, groups];
    `in_turn` as above. Raises InputError for tensors of other shapes.
    """
    height, groups = shape[0] // experts, shape[1] // 32
    for stored, due in ((blocks, (experts, height, groups, 16)), (scales, (experts, height, groups))):
        if stored.shape != due or stored.dtype != "U8":
            raise InputError(
                f"{stored.file.path}: tensor {stored.name!r} is {stored.dtype} {list(stored.shape)} where U8"
                f" {list(due)} is due; config.json does not fit the weights"
            )

    def rows(start: int, stop: int) -> Tensor:
        import torch

        made = []
        for number, own_start, own_stop in spans(start, stop, height):
            wanted = _places(own_start, own_stop, height, in_turn=in_turn)
            first, last = int(wanted.min()), int(wanted.max()) + 1
            begin, end = number * height + first, number * height + last
            codes = blocks.matrix_rows(begin * groups, end * groups).view(-1, groups, 16)
            exponents = scales.matrix_rows(begin, end).view(-1, groups, 1)
            codes, exponents = codes[wanted - first], exponents[wanted - first]
            # Two elements that follow each other share a byte there; here elements j and j + 16 do.
            single = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2)
            made.append(torch.cat([exponents, single[:, :, :16] | single[:, :, 16:] << 4], dim=2).flatten(1))
        return torch.cat(made)

    return rows


def _places(first: int, last: int, height: int, *, in_turn: bool) -> Tensor:
    """Where rows [first, last) of an expert, of `height`, are among its rows in the file, int64."""
    import torch

    rows, half = torch.arange(first, last), height // 2
    return torch.where(rows < half, 2 * rows, 2 * (rows - half) + 1) if in_turn else rows
