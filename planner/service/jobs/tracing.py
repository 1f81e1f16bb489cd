"""The job that traces a model for a device which has too little memory for that: from a description, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tightfit.planner.service.jobs.orders import EventWriter, JobOrder
from tightfit.planner.service.jobs.store import Row, file_row
from tightfit.planner.service.wire.objects import ObjectStore
from tightfit.planner.service.wire.traces import parse_request
from tightfit.profiles.sources.prepared import prepared_json
from tightfit.profiles.steps.tracing_process import trace_requested


def trace(order: JobOrder, events: EventWriter) -> Row:
    """Trace what is wanted of the model that the order names; what is made of it is a `tightfit.profiles.sources.prepared.PreparedModel`."""
    request = parse_request(order.content(order.request["description"]))
    prepared = trace_requested(
        request, lambda stage, done, total: events.progress(stage=f"tracing, {stage}", done=done, total=total)
    )
    written = ObjectStore(Path(order.objects)).put(prepared_json(prepared).encode())
    summary: dict[str, Any] = {"model": request.source.name}
    if (step := prepared.step) is not None:
        summary |= {
            "batch": step.batch,
            "seq": step.seq,
            "layers": len(step.layers),
            "tensors": len(step.tensors),
        }
    file = file_row("prepared", written.digest, written, name=request.source.name, summary=summary)
    return {"result": {"trace": file["id"], "summary": summary}, "files": [file]}
