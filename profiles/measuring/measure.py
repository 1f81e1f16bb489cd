"""Measures operators, unpacking, updates, channels and the floor in a process like the one that will run the plan.

The timing itself is done by ``python -m tightfit.profiles.measuring.worker``, started with the runtime's own
environment, so that what is timed is the call that the runtime makes, under its allocator settings and thread count.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.profiles.measuring.cpu_quota import quota_cores, slowdown
from tightfit.profiles.measuring.memory import Measured, measuring_memory
from tightfit.profiles.schema import Layer, Program, Tensor
from tightfit.profiles.worker_process import run_worker
from tightfit.runtime.common.interpreter import command
from tightfit.runtime.common.progress import Progress
from tightfit.runtime.engine.weights.layout import Entry, find_extent

if TYPE_CHECKING:
    from tightfit.profiles.tracing.comparison import GradientComparison


def measure(
    programs: Iterable[Program],
    tensors: Iterable[Tensor],
    entries: Mapping[str, Entry],
    *,
    compute_dtype: str,
    accumulate: int = 1,
    threads: int,
    scratch: Path,
    environment: dict[str, str],
    layers: Iterable[Layer] = (),
    memory: int | None = None,
    kept: Path | None = None,
    anew: bool = False,
    progress: Progress | None = None,
    comparison: GradientComparison | None = None,
) -> dict[str, Any]:
    """Start the worker process and return what it measures, as a dict:

    - `operators`: {program: [[seconds, workspace bytes], ...]}
    - `copied`: {program: [whether an operator has to be run by its functional form, ...]}
    - `unpack`, `update`, `accumulate`, `clipped`, `perturb`, `adafactor`: {tensor: seconds}
    - `read`, `write`: fields of a `Channel`; `floor`: fields of a `Floor`
    - `busy_cores`: cores that other programs took meanwhile
    - `quota_cores`: cores that a CPU quota allows, by which all seconds of the cores are lengthened; None without one
    - `compared`: what the `comparison` concluded, or why it was not made; None without one
    - `other_evaluation`: why an evaluation is not what the module computes in eval mode; None if it is, or is unknown
    - `held_bytes`, `predicted_bytes`: most that the processes which measured have held at once, and what was predicted
      of it

    `layers` say how often a step runs each program: those that take more of it are measured for longer.

    `kept` is the file with what earlier profiles have measured on this machine
    (`tightfit.profiles.measuring.kept_figures`), of which nothing is taken if all is measured `anew`.

    Tensors of equal shape and format are measured once. `memory` are the bytes that the measuring processes may hold;
    None: what they are best with (`tightfit.profiles.measuring.memory`), about the tensors of the largest program,
    placed by their lifetimes, or 64 MiB, and PyTorch. Needs 64 MiB of disk in `scratch`, which must lie on the disk
    that will hold the weights. Raises InputError if `memory` is too little, RunError with the last line of the
    process's stderr if it fails, and whatever the comparison raises, before anything is timed.
    """
    programs, tensors = list(programs), list(tensors)
    scratch.mkdir(parents=True, exist_ok=True)
    weights: dict[tuple[Any, ...], list[str]] = {}
    for tensor in tensors:
        if tensor.kind == "weight" and tensor.packed_bytes:
            extent = find_extent(entries, tensor.name)
            key = (
                extent.entry.format,
                extent.entry.group,
                extent.stop - extent.start,
                extent.entry.columns,
                tensor.dtype,
            )
            weights.setdefault(key, []).append(tensor.name)
    updates: dict[int, list[str]] = {}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for tensor in tensors:
        if tensor.kind == "trainable":
            updates.setdefault(tensor.bytes // 4, []).append(tensor.name)
            shapes.setdefault(tuple(tensor.shape), []).append(tensor.name)
    counts = Counter(layer.program for layer in layers)
    compared = [None if comparison is None else comparison.why_not(scratch, memory)]
    described = Measured(
        programs=[p.model_dump() for p in programs],
        compute_dtype=compute_dtype,
        weights=list(weights),
        updates=list(updates),
        shapes=list(shapes),
        accumulate=accumulate,
        step_bytes=0 if comparison is None or compared[0] is not None else comparison.step_bytes,
    )
    room = measuring_memory(described, memory)
    request = {
        "programs": described.programs,
        "counts": [counts[p.name] or 1 for p in programs],
        "turning_bytes": room.turning_bytes,
        "floor_children": room.floor_children,
        "inference": [p.inference for p in programs],
        "weights": [list(key) for key in weights],
        "tables": [[list(e.shape), e.format, e.group] for e in entries.values() if len(e.shape) == 2],
        "updates": list(updates),
        "shapes": list(shapes),
        "compute_dtype": compute_dtype,
        "accumulate": accumulate,
        "scratch": str(scratch),
        "threads": threads,
        "kept": None if kept is None else str(kept),
        "anew": anew,
    }
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        if comparison is not None and compared[0] is None:
            request["step"] = comparison.request(Path(folder), progress)

        def computed() -> None:
            assert comparison is not None
            compared[0] = comparison.conclude(Path(folder))

        def heard(message: dict[str, Any]) -> None:
            if message["stage"] == "computed":
                computed()
            elif progress:
                progress(message["stage"], message["done"], message["total"])

        measured: dict[str, Any] = run_worker(
            command("tightfit.profiles.measuring.worker", str(threads)),
            request,
            environment,
            doing="measuring",
            predicted_bytes=room.predicted_bytes,
            instead="a layer must fit into memory while it is measured, try a smaller batch or sequence",
            on_message=heard,
        )
    measured["compared"] = compared[0]
    measured["other_evaluation"] = None if comparison is None else comparison.other_evaluation
    measured["predicted_bytes"] = room.predicted_bytes
    measured["quota_cores"] = quota_cores()
    _lengthen(measured, slowdown(threads, measured["quota_cores"]))
    measured["unpack"] = {
        name: seconds for seconds, names in zip(measured["unpack"], weights.values(), strict=True) for name in names
    }
    for kind in ("update", "accumulate", "clipped", "perturb", "adafactor"):
        named = shapes if kind == "adafactor" else updates
        measured[kind] = {
            name: seconds for seconds, names in zip(measured[kind], named.values(), strict=True) for name in names
        }
    return measured


def _lengthen(measured: dict[str, Any], factor: float) -> None:
    """Multiply all times that the worker measured on the cores by `factor`, and leave those of the disk as they are."""
    for figures in measured["operators"].values():
        for figure in figures:
            figure[0] *= factor
    for kind in ("unpack", "update", "accumulate", "clipped", "perturb", "adafactor"):
        measured[kind] = [seconds * factor for seconds in measured[kind]]
    for channel in ("read", "write"):
        for name in ("compute_seconds_per_byte", "compute_seconds_per_transfer"):
            measured[channel][name] = measured[channel].get(name, 0.0) * factor
