"""The adapter that a run starts from, if its caller gives one: found, and checked against the plan."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training import adapter

FLOAT32 = "F32"
"""as safetensors calls it: what trained tensors are computed and saved in"""


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

    Raises InputError for a plan that trains no adapter, a file that is missing, damaged or no safetensors file, for
    tensors of other names, shapes or types than the plan's, and for values that are no finite numbers.
    """
    if not plan.model.lora:
        raise InputError(
            f"adapter {directory}: the plan trains {plan.model.name} itself and no adapter of it; leave out the adapter,"
            " or profile with --lora-rank"
        )
    path = directory / adapter.WEIGHTS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give the folder of an adapter, such as a run's OUT/adapter"
        ) from error
    body = plan.model.config.get("adapter_body", adapter.BODY)
    wanted = {
        adapter.adapter_key(tensor.name, body): list(tensor.shape)
        for tensor in plan.tensors
        if tensor.kind == "trainable"
    }
    _check_tensors(path, content, wanted)
    return GivenAdapter(
        directory=directory, checksum=zlib.crc32(content), fingerprint=hashlib.sha256(content).hexdigest()
    )


def _check_tensors(path: Path, content: bytes, wanted: dict[str, list[int]]) -> None:
    """Raise InputError unless the safetensors file `content` has exactly the `wanted` tensors, in finite float32."""
    import numpy as np  # 10 MiB of the process that prepares a run, where no adapter is given

    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        found = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file; copy the adapter again") from error
    for name in wanted:
        if name not in found:
            raise InputError(
                f"{path}: no tensor {name}, which the plan trains; give an adapter of the plan's own model"
            )
    for name in found:
        if name not in wanted:
            raise InputError(
                f"{path}: holds {name}, which the plan does not train; give an adapter of the plan's own model"
            )
    for name, (dtype, shape, (begin, end)) in found.items():
        if shape != wanted[name] or dtype != FLOAT32:
            raise InputError(
                f"{path}: {name} is {dtype} {shape} and the plan trains {FLOAT32} {wanted[name]}; give an adapter of the same"
                " rank, saved in float32"
            )
        data = content[start + begin : start + end]
        if begin < 0 or len(data) != 4 * math.prod(shape):
            raise InputError(f"{path}: cut off or damaged in {name}; copy the adapter again")
        if not np.isfinite(np.frombuffer(data, "<f4")).all():
            raise InputError(f"{path}: {name} holds values that are no finite numbers; give the adapter of another run")
