"""Checks the adapter that a caller gives a run to start from against the plan."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tightfit.planner.schema import Plan
from tightfit.profiles.models.lora import check_planned
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.common.files import open_regular
from tightfit.runtime.common.option_names import spelled
from tightfit.runtime.common.strict_json import from_json
from tightfit.runtime.engine.training import adapter
from tightfit.runtime.engine.weights.safetensors_file import header_in

FLOAT32 = "F32"
"""as safetensors calls it: what trained tensors are computed and saved in"""
FIRST = ".lora_A."
"""in the name of the first tensor of a pair"""
CHUNK = 1 << 20
"""bytes of a file in memory at a time: an embedding that is trained in full can be as large as a budget"""


@dataclass(frozen=True, kw_only=True)
class GivenAdapter:
    """An adapter whose tensors are those that a plan trains."""

    directory: Path
    checksum: int
    """crc32 of its file of tensors, so that the training process loads what was checked"""
    fingerprint: str
    """sha256 of that file"""


def given_adapter(plan: Plan, directory: Path) -> GivenAdapter:
    """The adapter in the folder `directory`, which has to hold what `plan` trains and nothing else.

    Raises InputError for a plan that trains no adapter, settings that tightfit does not have or the plan has otherwise,
    a file that is missing, damaged or no safetensors file, for tensors of other names, shapes or types than the plan's,
    and for values that are no finite numbers.
    """
    if not plan.model.lora:
        raise InputError(
            f"{spelled('adapter')} {directory}: the plan trains {plan.model.name} itself and no adapter of it; leave"
            f" out the adapter, or profile with {spelled('lora_rank')}"
        )
    check_planned(directory, plan.model.lora, layers_with_pairs(plan))
    path = directory / adapter.WEIGHTS
    checksum, digest = 0, hashlib.sha256()
    try:
        with open_regular(path) as file:
            for chunk in _chunks(file):
                checksum = zlib.crc32(chunk, checksum)
                digest.update(chunk)
            _check_tensors(path, file, saved_shapes(plan))
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give the folder of an adapter, such as a run's OUT/adapter"
        ) from error
    return GivenAdapter(directory=directory, checksum=checksum, fingerprint=digest.hexdigest())


def layers_with_pairs(plan: Plan) -> list[str]:
    """The layers of `plan` that have pairs, by PEFT's names."""
    body = plan.model.config.get("adapter_body", adapter.BODY)
    names = [tensor.name for tensor in plan.tensors if tensor.kind == "trainable" and FIRST in tensor.name]
    return [adapter.peft_name(name.partition(FIRST)[0], body) for name in names]


def saved_shapes(plan: Plan) -> dict[str, list[int]]:
    """The shape of every tensor in an adapter of `plan`, by its key. The slices of a module that is trained in full are
    saved as one tensor.
    """
    body = plan.model.config.get("adapter_body", adapter.BODY)
    shapes: dict[str, list[int]] = {}
    for tensor in plan.tensors:
        if tensor.kind != "trainable":
            continue
        key, shape = adapter.adapter_key(tensor.name, body), list(tensor.shape)
        if adapter.table_slice(tensor.name) and key in shapes:
            shape[0] += shapes[key][0]
        shapes[key] = shape
    return shapes


def _check_tensors(path: Path, file: BinaryIO, shapes: dict[str, list[int]]) -> None:
    """Raise InputError unless the safetensors file has exactly the tensors of `shapes`, in finite float32."""
    import numpy as np  # 10 MiB of the process that prepares a run, where no adapter is given

    end = file.seek(0, 2)
    file.seek(0)
    try:
        header = header_in(file.fileno())
        entries = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in from_json(header).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file; copy the adapter again") from error
    start = 8 + len(header)
    for name in shapes:
        if name not in entries:
            raise InputError(
                f"{path}: no tensor {name}, which the plan trains; give an adapter of the plan's own model"
            )
    for name in entries:
        if name not in shapes:
            raise InputError(
                f"{path}: holds {name}, which the plan does not train; give an adapter of the plan's own model"
            )
    for name, (dtype, shape, (begin, stop)) in entries.items():
        if shape != shapes[name] or dtype != FLOAT32:
            raise InputError(
                f"{path}: {name} is {dtype} {shape} and the plan trains {FLOAT32} {shapes[name]}; give an adapter of"
                " the same rank, saved in float32"
            )
        if begin < 0 or stop - begin != 4 * math.prod(shape) or start + stop > end:
            raise InputError(f"{path}: cut off or damaged in {name}; copy the adapter again")
        for chunk in _chunks(file, start + begin, stop - begin):
            if not np.isfinite(np.frombuffer(chunk, "<f4")).all():
                raise InputError(
                    f"{path}: {name} holds values that are no finite numbers; give the adapter of another run"
                )


def _chunks(file: BinaryIO, begin: int = 0, count: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, or `count` of them from `begin` on, at most `CHUNK` at a time."""
    file.seek(begin)
    while data := file.read(CHUNK if count is None else min(CHUNK, count)):
        count = None if count is None else count - len(data)
        yield data
