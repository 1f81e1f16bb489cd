"""Makes profiles of traced steps: writes figures into their tensors, programs and device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightfit.profiles.schema import Channel, DeviceFigures, Floor, Profile, Program, Tensor, TracedStep
from tightfit.runtime.common.processor import cpu_name
from tightfit.runtime.engine.start.lean_torch import installed_version
from tightfit.runtime.engine.weights.layout import Header

CHOSEN_CODE_BYTES = 1 << 20
"""Allowance for the code of operators that only some runs have (dropout, DoRA, tables, batch norm, LSTM, losses of
pairs), which is mapped when they first run: the process that measures the floor does not run them. A run of a tiny
model with DoRA held 0.1 MiB more than its plan said without it.
"""
CHOSEN = tuple(f"tightfit.{name}" for name in ("dropout", "dora_", "table_", "batch_norm", "lstm", "preference"))
"""Prefixes of the operators that `CHOSEN_CODE_BYTES` is for."""


def unmeasured(traced: TracedStep, device: DeviceFigures, fingerprint: str) -> Profile:
    """A profile of a traced step on a device that is described, with all times 0."""
    return Profile(**dict(traced), device=device, fingerprint=fingerprint)


def measured(
    traced: TracedStep, figures: Mapping[str, Any], threads: int, fingerprint: str, store: Header | None
) -> Profile:
    """The profile of a traced step with the `figures` that `measure` returned. `store` has the model's weights, if it
    has any.
    """
    stored = (None, None) if store is None else (str(store.path), store.fingerprint)
    model = {"store": stored[0], "store_fingerprint": stored[1], "compared": figures["compared"]}
    if figures["other_evaluation"]:
        model["other_evaluation"] = figures["other_evaluation"]
    fields = dict(traced) | {
        "model": traced.model.model_copy(update=model),
        "tensors": [timed_tensor(tensor, figures) for tensor in traced.tensors],
        "programs": [timed_program(program, figures) for program in traced.programs],
    }
    return Profile(**fields, device=_device(figures, traced, threads), fingerprint=fingerprint)


UPDATED = ("update", "accumulate", "clipped", "perturb", "adafactor")
"""the kinds of work for a trainable that are timed"""


def timed_tensor(tensor: Tensor, measured: Mapping[str, Any]) -> Tensor:
    if tensor.name in measured["unpack"]:
        return tensor.model_copy(update={"unpack_seconds": measured["unpack"][tensor.name]})
    if tensor.name in measured["update"]:
        seconds = {f"{kind}_seconds": measured[kind][tensor.name] for kind in UPDATED}
        return tensor.model_copy(update=seconds)
    return tensor


def timed_program(program: Program, measured: Mapping[str, Any]) -> Program:
    figures, copied = measured["operators"][program.name], measured["copied"][program.name]
    operators = [
        op.model_copy(update={"seconds": seconds, "workspace_bytes": int(workspace), "copied": copies})
        for op, (seconds, workspace), copies in zip(program.operators, figures, copied, strict=True)
    ]
    return program.model_copy(update={"operators": operators})


def _device(measured: Mapping[str, Any], traced: TracedStep, threads: int) -> DeviceFigures:
    return DeviceFigures(
        name=cpu_name(),
        kind="cpu",
        threads=threads,
        busy_cores=measured["busy_cores"],
        quota_cores=measured["quota_cores"],
        torch_version=installed_version(),
        floor=_floor(measured["floor"], traced),
        read=Channel.model_validate(measured["read"]),
        write=Channel.model_validate(measured["write"]),
    )


def _floor(measured: Mapping[str, Any], traced: TracedStep) -> Floor:
    """The measured floor, with room for code that the process that measured it did not run."""
    floor = Floor.model_validate({name: measured[name] for name in Floor.model_fields if name in measured})
    targets = [operator.target for program in traced.programs for operator in program.operators]
    if not any(target.startswith(CHOSEN) for target in targets):
        return floor
    resident = {"resident_bytes": floor.resident_bytes + CHOSEN_CODE_BYTES}
    if floor.inference_resident_bytes is not None:
        resident["inference_resident_bytes"] = floor.inference_resident_bytes + CHOSEN_CODE_BYTES
    return floor.model_copy(update=resident)
