"""Adds the adapters of a round up: federated averaging weighted by tokens, for adapters of one rank or of several.

**One rank.** Every tensor becomes the mean of the devices' tensors, weighted by the tokens that each was trained on,
computed in float64 in the order of the fleet's plan and rounded to float32 once. (A and B are averaged each by itself,
as federated averaging of LoRA does; the product of the means is not the mean of the products.)

**Several ranks.** The fleet's adapter has the largest rank R. Before a round it is brought into its singular form: B·A
= U·S·Vᵀ is written with A = c·Vᵀ and B = U·S/c, components by falling singular value. This changes nothing of B·A, and
the first r components are its best approximation of rank r, so a device of rank r gets just these. c is the length that
rows of A have when LoRA starts, and all rows of Vᵀ are orthonormal, also those whose singular value is zero: no
component loses its gradient. Since all devices start from the same components, their answers can be averaged component
by component: component j is the weighted mean over the devices whose rank is above j. (Filling up with zeros instead
would shrink the components that few devices train.) A component that nobody trained stays as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tightfit.planner.schema import Plan
from tightfit.runtime.common.errors import InputError
from tightfit.runtime.engine.training.adapter import BODY, adapter_key
from tightfit.runtime.federated.adapter_file import LORA_A, LORA_B, AdapterFile

Tensors: TypeAlias = "dict[str, NDArray[np.float32]]"
S = TypeVar("S", bound=np.generic)
START_LENGTH = 3**-0.5
"""length of a row of A when LoRA starts: uniform in ±1/sqrt(columns), whatever the number of columns"""


@dataclass(frozen=True, kw_only=True)
class DeviceContribution:
    """What one device adds to a round."""

    tensors: Tensors
    tokens: int


def averaged(parts: Sequence[DeviceContribution], current: Tensors) -> Tensors:
    """The mean of the parts, weighted by tokens; `current` is what they started from and has the fleet's rank.

    Parts are added up in the order given. Raises InputError where no part was trained on any token.
    """
    if not sum(part.tokens for part in parts):
        raise InputError("no device has trained on any token; give them data with labels")
    result: Tensors = {}
    for name, before in current.items():
        total = np.zeros(before.shape, np.float64)
        weights = np.zeros(rank_of(name, before), np.float64)
        for part in parts:
            values = part.tensors[name]
            own = rank_of(name, values)
            components(name, total)[:own] += part.tokens * components(name, values).astype(np.float64)
            weights[:own] += part.tokens
        trained = weights > 0
        mean = before.astype(np.float64)
        components(name, mean)[trained] = components(name, total)[trained] / weights[trained, np.newaxis]
        result[name] = mean.astype(np.float32)
    return result


def components(name: str, values: NDArray[S]) -> NDArray[S]:
    """A view of a factor with a row for each component."""
    return values if name.endswith(LORA_A) else values.T


def rank_of(name: str, values: NDArray[S]) -> int:
    return int(components(name, values).shape[0])


def singular_form(tensors: Tensors) -> Tensors:
    """The adapter with the same products B·A, its components orthogonal and by falling size."""
    result = dict(tensors)
    for name in tensors:
        if name.endswith(LORA_A):
            pair = name.removesuffix(LORA_A) + LORA_B
            result[name], result[pair] = _factored(tensors[name], tensors[pair])
    return result


def _factored(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if min(a.shape[1], b.shape[0]) < len(a):
        return a, b  # a layer smaller than the rank has fewer orthogonal components than that
    right, small_a = np.linalg.qr(a.astype(np.float64).T)
    left, small_b = np.linalg.qr(b.astype(np.float64))
    u, sizes, v = np.linalg.svd(small_b @ small_a.T)
    rows, columns = v @ right.T, left @ u * sizes
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, np.newaxis], 1)
    signs = np.where(largest < 0, -1.0, 1.0)  # a pair of vectors with both signs turned is as good: take one of them
    return (START_LENGTH * signs * rows).astype(np.float32), (columns * signs.T / START_LENGTH).astype(np.float32)


# --- what comes in, and what goes out ---------------------------------------------------------------------------------


def shapes_of(plan: Plan) -> dict[str, tuple[int, int]]:
    """The shapes of the adapter that a plan trains, by key."""
    body = plan.model.config.get("adapter_body", BODY)
    trained = [tensor for tensor in plan.tensors if tensor.kind == "trainable"]
    return {adapter_key(tensor.name, body): (tensor.shape[0], tensor.shape[1]) for tensor in trained}


def started(shapes: Mapping[str, tuple[int, int]], seed: int) -> Tensors:
    """A new adapter: A uniform in ±1/sqrt(columns), seeded for each tensor by its name, and B zero, as LoRA starts."""
    result: Tensors = {}
    for name, shape in shapes.items():
        result[name] = np.zeros(shape, np.float32)
        if name.endswith(LORA_A):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            bound = shape[1] ** -0.5
            draw = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
            result[name] = draw.uniform(-bound, bound, shape).astype(np.float32)
    return result


def opened(content: bytes, shapes: Mapping[str, tuple[int, int]], rank: int, place: str) -> Tensors:
    """The tensors of an adapter's file, which has to have the keys of `shapes` and this rank.

    Raises InputError, naming `place`, for a damaged file, other tensors, and values that are no finite numbers.
    """
    entries = AdapterFile.read(content, place).entries
    if set(entries) != set(shapes):
        raise InputError(f"{place}: holds other tensors than the fleet trains")
    for name, entry in entries.items():
        rows, columns = shapes[name]
        wanted = [rank, columns] if name.endswith(LORA_A) else [rows, rank]
        if entry["shape"] != wanted or entry["dtype"] != "F32":
            raise InputError(f"{place}: {name} is {entry['dtype']} {entry['shape']}, not F32 {wanted}")
    try:
        tensors: Tensors = load(content)
    except Exception as error:  # the library has exceptions of its own
        raise InputError(f"{place}: no adapter, or a damaged one ({error})") from error
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise InputError(f"{place}: {name} holds values that are no finite numbers")
    return {name: tensors[name] for name in shapes}


def closed(tensors: Tensors) -> bytes:
    """The file of an adapter."""
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    return save(contiguous, {"format": "pt"})
